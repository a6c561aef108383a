"""Files of weights that were cut, flipped and spliced: an error in one line, and nothing else.

What is watched, and how many cases there are, is told in `tests.fuzz.watching`.
"""

from __future__ import annotations

import codecs
import itertools
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.checkpoints.opening import open_archive
from ldm.errors import CheckpointError
from tests.checkpoints.malicious import (
    MALICIOUS,
    call,
    group,
    inst,
    legacy_file,
    listed,
    name,
    number,
    obj,
    pickle_of,
    table,
    tensor,
    text,
    zip_file,
)
from tests.checkpoints.pickles.helpers import bits, save
from tests.fuzz.edits import EDITS, PIECES, PLACES, Edits, edited, pick
from tests.fuzz.watching import Watch, outcome
from tests.fuzz.watching import fuzzed as share
from tests.helpers import randn

fuzzed = share(percent=6)


class Bench:
    """Reads one file after another, and checks each reading.

    Attributes:
        safetensors_files, zip_files, legacy_files: what is to be changed; it can all be read, but
            for some malicious ones.
        programs: the pickles in some of them, by their instructions.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.marker = folder / "weights", folder / "marker"
        self.watch = Watch(self.path)
        evil = [table(evil=make(self.marker), w=tensor()) for make in MALICIOUS.values()]
        objects = {"i": inst("a", "b", number(1)), "o": obj(name("a", "b")), "j": inst("a", "b")}
        fragments = [table(w=tensor(), n=tensor()), table(**objects, w=tensor()), *evil]
        self.programs = [instructions(fragment) for fragment in fragments]
        self.safetensors_files = safetensors_files()
        self.zip_files = [
            *(save(content, self.path, "zip").read_bytes() for content in contents()),
            *map(zip_file, fragments),
        ]
        self.legacy_files = [
            *(save(content, self.path, "legacy").read_bytes() for content in contents()),
            *map(legacy_file, fragments),
        ]
        codecs.lookup("cp437")  # a zip needs it; Python imports a codec when it is first used

    def read_all(self) -> None:
        for entry in open_archive(self.path).entries.values():
            bits(entry.map()).sum()

    def read(self, data: bytes) -> bool:
        """Whether the file can be read, all of its tensors included."""
        self.path.write_bytes(data)
        message = outcome(self.watch, self.read_all, (CheckpointError,), len(data))
        assert not self.marker.exists()
        if message is not None:
            assert message.startswith(str(self.path))
        return message is None


def contents() -> list[object]:
    base = randn(3, 4)
    return [
        {"state_dict": {"w": base, "t": base.t(), "h": base[1:].half(), "s": torch.tensor(1.0)}},
        {"epoch": 1, "optimizer_states": [{"state": {0: {"step": 1, "avg": randn(2)}}}]},
        [randn(2).bfloat16(), torch.zeros(0, 3), torch.ones(2).to(torch.float8_e4m3fn)],
    ]


def safetensors_files() -> list[bytes]:
    tensors = {
        "w": randn(3, 4),
        "half": randn(5).half(),
        "none": torch.zeros(0),
        "i": torch.ones(2),
    }
    return [
        safetensors.torch.save(tensors),
        safetensors.torch.save(tensors, {"format": "pt", "config": '{"a": [1, 2]}'}),
        safetensors.torch.save({}),
    ]


def instructions(fragment: bytes) -> list[bytes]:
    """A fragment, cut where one instruction ends and the next begins."""
    program = pickle_of(fragment)
    starts = [at for _, _, at in pickletools.genops(program)]
    return [program[a:b] for a, b in itertools.pairwise(starts[1:])]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


def test_what_is_changed_below_is_readable_at_first(bench: Bench) -> None:
    """So that an error below comes from a change. Some malicious ones are refused as they are."""
    real = len(contents())
    assert all(map(bench.read, bench.safetensors_files))
    for files in (bench.zip_files, bench.legacy_files):
        assert all(map(bench.read, files[:real]))
        assert sum(map(bench.read, files[real:])) > len(MALICIOUS) // 2
    assert [zip_file(b"".join(program)) for program in bench.programs] == bench.zip_files[real:]


# --- Changed bytes ---------------------------------------------------------------------------


@fuzzed
@given(PLACES, PLACES, EDITS)
def test_a_changed_safetensors_file(bench: Bench, one: int, two: int, edits: Edits) -> None:
    files = bench.safetensors_files
    bench.read(edited(pick(files, one), pick(files, two), edits))


@fuzzed
@given(PLACES, PLACES, EDITS)
def test_a_changed_zip_file(bench: Bench, one: int, two: int, edits: Edits) -> None:
    files = bench.zip_files
    bench.read(edited(pick(files, one), pick(files, two), edits))


@fuzzed
@given(PLACES, PLACES, EDITS)
def test_a_changed_legacy_file(bench: Bench, one: int, two: int, edits: Edits) -> None:
    files = bench.legacy_files
    bench.read(edited(pick(files, one), pick(files, two), edits))


# --- Changes by whole instructions -----------------------------------------------------------
# A flipped byte mostly makes nonsense, which is soon found out. Instructions that are each in order
# get further.


REARRANGED = st.lists(
    st.tuples(
        st.sampled_from(["number", "drop", "repeat", "move", "splice", "change"]), PLACES, PIECES
    ),
    min_size=1,
    max_size=3,
)
BARE = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None]


def rearranged(program: list[bytes], other: list[bytes], edits: Edits) -> bytes:
    steps = list(program)
    for kind, place, piece in edits:
        at = place % len(steps)
        there = (place // 11 + piece[0]) % len(steps)
        match kind:
            case "number":  # sizes, strides, offsets and counts
                numbers = [n for n, step in enumerate(steps) if step.startswith(pickle.LONG1)]
                if numbers:
                    steps[pick(numbers, place)] = number(
                        int.from_bytes(piece, "little", signed=True)
                    )
            case "drop" if len(steps) > 1:
                del steps[at]
            case "repeat":
                steps.insert(there, steps[at])
            case "move":
                steps.insert(there, steps.pop(at))
            case "splice":
                start = place // 7 % len(other)
                steps[at:at] = other[start : start + 1 + piece[0] % 16]
            case "change":  # to one without an argument, of all that there are
                steps[at] = pick(BARE, place // 13)
    return b"".join(steps)


@pytest.mark.parametrize("container", [zip_file, legacy_file])
@fuzzed
@given(PLACES, PLACES, REARRANGED)
def test_a_rearranged_program(
    bench: Bench, container: Callable[[bytes], bytes], one: int, two: int, edits: Edits
) -> None:
    program, other = pick(bench.programs, one), pick(bench.programs, two)
    bench.read(container(rearranged(program, other, edits)))


# --- Programs that are in order ----------------------------------------------------------------
# What a pickler could have written is read: every tensor that is not inside of an object, under the
# key that is its way from the root, and nothing else.

Part = tuple[bytes, list[str]]  # a fragment, and the keys of the tensors in what it stands for


def in_row(parts: list[Part]) -> tuple[list[bytes], list[str]]:
    """Several fragments, and their keys behind their places in a row."""
    keys = [f"{n}.{key}".rstrip(".") for n, (_, found) in enumerate(parts) for key in found]
    return [fragment for fragment, _ in parts], keys


def row(make: Callable[[list[bytes]], bytes], parts: list[Part]) -> Part:
    fragments, keys = in_row(parts)
    return make(fragments), keys


def dropped(make: Callable[[list[bytes]], bytes], parts: list[Part]) -> Part:
    return make([fragment for fragment, _ in parts]), []


def pairs(fragments: list[bytes]) -> bytes:
    return b"".join(text(str(n)) + fragment for n, fragment in enumerate(fragments))


ROWS: list[Callable[[list[bytes]], bytes]] = [
    lambda fragments: listed(*fragments),
    lambda fragments: group(*fragments),
    lambda fragments: pickle.EMPTY_LIST + b"".join(f + pickle.APPEND for f in fragments),
    lambda fragments: pickle.EMPTY_SET + pickle.MARK + b"".join(fragments) + pickle.ADDITEMS,
    lambda fragments: pickle.MARK + b"".join(fragments) + pickle.FROZENSET,
    lambda fragments: pickle.EMPTY_DICT + pickle.MARK + pairs(fragments) + pickle.SETITEMS,
    lambda fragments: (
        pickle.EMPTY_DICT
        + b"".join(text(str(n)) + f + pickle.SETITEM for n, f in enumerate(fragments))
    ),
]
CLASS = name("argparse", "Namespace")
OBJECTS: list[Callable[[list[bytes]], bytes]] = [
    lambda fragments: inst("argparse", "Namespace", *fragments),
    lambda fragments: obj(CLASS, *fragments),
    lambda fragments: call(CLASS, *fragments),
    lambda fragments: CLASS + group(*fragments) + pickle.NEWOBJ,
    lambda fragments: CLASS + group(*fragments) + pickle.EMPTY_DICT + pickle.NEWOBJ_EX,
    lambda fragments: inst("argparse", "Namespace") + group(*fragments) + pickle.BUILD,
    lambda fragments: obj(CLASS) + pickle.MARK + b"".join(fragments) + pickle.APPENDS,
    lambda fragments: call(CLASS) + pickle.MARK + pairs(fragments) + pickle.SETITEMS,
    lambda fragments: pickle.MARK + b"".join(fragments) + pickle.POP_MARK + call(CLASS),
]
LEAVES: list[Part] = [(pickle.NONE, []), (number(7), []), (text("a"), []), (tensor(), [""])]
PARTS = st.recursive(
    st.sampled_from(LEAVES),
    lambda parts: (
        st.builds(row, st.sampled_from(ROWS), st.lists(parts, max_size=3))
        | st.builds(dropped, st.sampled_from(OBJECTS), st.lists(parts, max_size=3))
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("container", [zip_file, legacy_file])
@share(percent=1)
@given(st.lists(PARTS, max_size=4))
def test_all_tensors_of_a_program_are_read(
    bench: Bench, container: Callable[[bytes], bytes], parts: list[Part]
) -> None:
    fragments, keys = in_row([*parts, (tensor(), [""])])
    assert bench.read(container(listed(*fragments)))
    assert list(open_archive(bench.path).entries) == keys
