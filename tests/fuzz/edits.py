"""How bytes, and documents of JSON, are changed by hands that mean no good."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


# --- Bytes -----------------------------------------------------------------------------------

Edits = list[tuple[str, int, bytes]]  # what to do, where, and with what
PLACES = st.integers(0, 1 << 20)
# Small counts, signs, and the largest numbers of 1, 2, 4 and 8 bytes.
PIECES = st.binary(min_size=1, max_size=4) | st.sampled_from(
    [bytes(8), b"\xff", b"\xff" * 2, b"\xff" * 4, b"\xff" * 7 + b"\x7f", b"\xff" * 8, b"\x80"]
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "write", "insert", "drop", "splice"]), PLACES, PIECES
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, other: bytes, edits: Edits) -> bytes:
    """A file after some edits; a place is taken modulo the file's length."""
    for kind, place, piece in edits:
        at = place % (len(data) + 1)
        length = 1 + 8 * piece[0]
        match kind:
            case "cut":
                data = data[:at]
            case "flip":
                data = data[:at] + bytes(b ^ piece[0] for b in data[at : at + 1]) + data[at + 1 :]
            case "write":
                data = data[:at] + piece + data[at + len(piece) :]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "drop":
                data = data[:at] + data[at + length :]
            case "splice":
                start = place // 7 % len(other)
                data = data[:at] + other[start : start + length] + data[at:]
    return data


def pick(choices: Sequence[T], index: int) -> T:
    return choices[index % len(choices)]


# --- Documents -------------------------------------------------------------------------------
# A document that was in order, with some of its values replaced, gets further than random text.


class Raw(str):
    """A value, or a name, as it is to stand in a file of JSON: it need not be JSON at all."""


def to_json(value: object) -> str:
    """A document as text, `Raw` as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_json(k)}: {to_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value)


# What a terminal obeys, what no file name, no encoding and no line can hold, what reads backwards.
NAMES = (
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[31m",
    "two\nlines",
    "a\0b",
    "\u202egnp.exe",
    "\ud800",
    "家" * 3000,
    "x" * 100_000,
    "",
    " ",
    "../../etc/passwd",
    "__metadata__",
    "__class__",
    "{0.__init__}",
    "%s%n",
)
NUMBERS = (
    *("0", "-0.0", "-1", "1", "2", "3", "5", "7", "17", "1000", "1.5", "0.5", "1.0", "1e-4"),
    *("1e-320", "1e-45", "1e30", "1e38", "1e308", "1e400", "-1e400", "NaN", "Infinity"),
    *map(str, (10**5, 10**6, 10**7, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30)),
    *("9" * 400, "-" + "9" * 400, "9" * 5000, "0." + "0" * 400 + "1"),
)
OTHERS = (
    *("null", "true", "false", "[]", "{}", "[[]]", "[null]", '"1"', '[""]', "[0]", "[-1]", "[1.5]"),
    *(f"[{', '.join([one] * 20_000)}]" for one in ("1", "0", '"x"', "[]")),
    *(f"[{', '.join([one] * 17)}]" for one in ("1", "2", "1048576")),
    *(
        "[" * 100_000,
        *("[" * n + "]" * n for n in (900, 1900)),
        '{"a": ' * 900 + "1" + "}" * 900,
        '{"a": 1, "a": 2}',
    ),
)
FRAGMENTS = tuple(map(Raw, (*NUMBERS, *OTHERS, *map(json.dumps, NAMES))))

Changes = list[tuple[str, int, Raw, str]]  # what to do, where, with which value, and which name
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "set", "drop", "add", "copy", "many", "wrap", "twice"]),
        PLACES,
        st.sampled_from(FRAGMENTS),
        st.sampled_from(NAMES),
    ),
    min_size=1,
    max_size=3,
)
Place = tuple[Any, Any]  # a dict or a list, and a key or an index of it


def places(document: object) -> Iterator[Place]:
    """Every value in a document, those inside of it included, by where it stands."""
    if isinstance(document, dict):
        inside = list(document.items())
    elif isinstance(document, list):
        inside = list(enumerate(document))
    else:
        return
    for key, value in inside:
        yield document, key
        yield from places(value)


def changed(document: Any, changes: Changes) -> Any:
    """A copy of a document after some changes; a place is taken modulo their number."""
    whole = {"": copy.deepcopy(document)}  # the document itself is a value that can be changed
    for kind, place, fragment, name in changes:
        there = list(places(whole))
        holder, key = pick(there, place)
        match kind:
            case "drop":
                del holder[key]
            case "add" if isinstance(holder[key], dict):
                holder[key][name] = fragment
            case "add" if isinstance(holder[key], list):
                holder[key].append(fragment)
            case "copy":
                other, its = pick(there, place // 11)
                holder[key] = copy.deepcopy(other[its])
            case "many":
                few = isinstance(holder[key], dict | list)  # which may hold many already
                holder[key] = [holder[key]] * (3 if few else 200)
            case "wrap":
                holder[key] = [holder[key]]
            case "twice" if isinstance(holder, dict):
                holder[Raw(json.dumps(key))] = fragment  # the same name again
            case _:
                holder[key] = fragment
        if "" not in whole:
            whole[""] = Raw("")
    return whole[""]


def every_change(document: Any) -> Iterator[tuple[str, str]]:
    """Each of a document's values replaced by each hostile one, the very long apart, which take
    most of the time: what was changed, and the text."""
    whole = {"": document}
    here = Raw("\0")  # no text of JSON has it
    for holder, key in list(places(whole)):
        before, holder[key] = holder[key], here
        text = to_json(whole[""])
        holder[key] = before
        for fragment in (one for one in FRAGMENTS if len(one) <= 5000):
            yield f"{key} = {fragment[:80]}", text.replace(here, fragment)
