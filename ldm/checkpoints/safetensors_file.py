"""Safetensors: a header that says where each tensor lies, and the tensors' bytes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ldm.checkpoints.entries import SAFETENSORS, Archive, Entry, MappedFile
from ldm.errors import TruncatedError, UnreadableError, some

T = TypeVar("T")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA = "__metadata__"
MAX_HEADER = 100_000_000
"""Bytes of a header, as the format itself has it."""
MOST_ENTRIES = 250_000
"""Tensors and words of metadata. The largest official file, with a second set of weights and an
optimizer's states, has some 4,000."""
LONGEST_ENTRY = 4096
"""Letters of JSON that say of one tensor what and where it is."""


def read_safetensors(file: MappedFile) -> Archive:
    """A safetensors file: 8 bytes with the length of a header, the header (JSON: for every tensor
    its type, shape and place), and the tensors' bytes.

    Raises:
        UnreadableError: it is no such file, or a damaged one.
        TruncatedError: its end is missing.
    """
    path = file.path
    data = 8 + int.from_bytes(file.bytes[:8], "little")  # where the tensors' bytes begin
    if data > len(file):
        raise TruncatedError(
            f"{path} is cut off: its header alone takes {data:,} bytes, found {len(file):,}; "
            "fetch it again"
        )
    if data - 8 > MAX_HEADER:
        raise UnreadableError(
            f"{path} has a header of {data - 8:,} bytes: safetensors allows {MAX_HEADER:,}"
        )
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    strange: set[str] = set()
    places: list[tuple[int, int]] = []
    end = data
    try:
        for key, value in Header(str(file.bytes[8:data], "utf-8")).items():
            if key == METADATA:
                metadata = value
                continue
            (start, stop), shape = value["data_offsets"], tuple(value["shape"])
            if not all(type(n) is int and 0 <= n < 2**63 for n in (start, stop, *shape)):
                raise ValueError(f"{key!r:.80} is measured in other things than whole numbers")
            end = max(end, data + stop)
            if (dtype := DTYPES.get(value["dtype"])) is None:
                strange.add(str(value["dtype"]))
                continue
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{key!r:.80} has {stop - start:,} bytes, and another shape")
            entries[key] = Entry(file, data + start, dtype, shape)
            places.append((start, stop))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UnreadableError(f"{path} has a broken safetensors header: {error}") from error
    if end > len(file):
        raise TruncatedError(
            f"{path} is cut off: expected {end:,} bytes, found {len(file):,}; fetch it again"
        )
    if strange:
        raise UnreadableError(f"{path} holds types that ldm does not read: {some(sorted(strange))}")
    at = 0  # every byte belongs to one tensor: each begins where another has ended
    for start, stop in sorted(places):
        at = stop if start == at else -1
    if data + at != len(file):
        raise UnreadableError(
            f"{path} has a broken safetensors header: its tensors overlap, or leave bytes between"
        )
    return Archive(path, SAFETENSORS, entries, metadata)


class Header:
    """The JSON of a header, read from left to right, one entry at a time.

    Python's objects take twenty times the bytes of the JSON that they are read from: a hundred
    megabytes of brackets would become gigabytes of lists. So no more is decoded at once than one
    string, or what is said of one tensor; and of those there is a most.

    Every method raises a ValueError where the text is not what it must be.
    """

    def __init__(self, text: str) -> None:
        self.text, self.at, self.left = text, 0, MOST_ENTRIES

    def items(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What each tensor is called, and what is said of it; the metadata as if it were one."""
        yield from self.members(lambda key: self.words() if key == METADATA else self.tensor())
        if self.at < len(self.text):
            raise ValueError(f"more follows its end, at letter {self.at:,}")

    def words(self) -> dict[str, str]:
        """The metadata: an object of strings."""
        return dict(self.members(lambda _: self.string()))

    def members(self, value: Callable[[str], T]) -> Iterator[tuple[str, T]]:
        """The members of an object in order; `value` reads what stands after a name."""
        seen: set[str] = set()
        self.take("{")
        while not self.is_next("}"):
            if seen:
                self.take(",")
            name = self.string()
            self.take(":")
            if name in seen:
                raise ValueError(f"two entries are called {name!r:.80}")
            seen.add(name)
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"it has more than {MOST_ENTRIES:,} entries")
            yield name, value(name)
        self.take("}")

    def string(self) -> str:
        if not self.is_next('"'):
            raise self.wrong("a string")
        text, stop = DECODER.raw_decode(self.text, self.at)
        self.skip(stop)
        return str(text)

    def tensor(self) -> dict[str, Any]:
        """What is said of one tensor: an object without any in it."""
        stop = self.text.find("}", self.at, self.at + LONGEST_ENTRY) + 1
        if not self.is_next("{") or not stop:
            raise self.wrong("an object that is a tensor's")
        found: dict[str, Any]
        found, _ = DECODER.raw_decode(self.text[self.at : stop])  # ends with it, or is none
        self.skip(stop)
        return found

    def is_next(self, sign: str) -> bool:
        return self.text.startswith(sign, self.at)

    def take(self, sign: str) -> None:
        if not self.is_next(sign):
            raise self.wrong(repr(sign))
        self.skip(self.at + 1)

    def skip(self, stop: int) -> None:
        """Go on from there, behind whatever blanks follow."""
        blanks = BLANKS.match(self.text, stop)
        self.at = stop if blanks is None else blanks.end()

    def wrong(self, wanted: str) -> ValueError:
        return ValueError(f"there is no {wanted} at letter {self.at:,}")


DECODER = json.JSONDecoder()
BLANKS = re.compile(r"[ \t\n\r]*")
