"""Files of tensors, whatever their container: what is in them, without reading it.

A tensor on disk is a run of bytes, a type, a shape and strides. So an `Entry` is all that a
container has to tell, and loading maps the file and copies one entry after another: a file of eight
gigabytes of which half is wanted costs the half.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Looking at one page maps its neighbours too: on Linux up to a huge page of 2 MB.
NEIGHBOURS = max(mmap.PAGESIZE, 1 << 21)


class MappedFile:
    """The bytes of a file, mapped into memory: a page is read when it is first looked at.

    The mapping is private: writing to a tensor on it changes no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return len(self.bytes)

    def release(self, start: int, stop: int) -> None:
        """Give back the memory of all that was read to look at the bytes from `start` to `stop`.
        They stay on disk: a page that is looked at again is read again."""
        start = start // NEIGHBOURS * NEIGHBOURS
        stop = min(-(-stop // NEIGHBOURS) * NEIGHBOURS, len(self))
        if hasattr(mmap, "MADV_DONTNEED") and start < stop:
            self.bytes.madvise(mmap.MADV_DONTNEED, start, stop - start)


PIECE = 1 << 22  # bytes that are looked at before their memory is given back


@dataclass(frozen=True, slots=True)
class Record:
    """A run of bytes that a zip archive keeps under a name, with their checksum.

    Attributes:
        crc: CRC-32 of the bytes; 0 where none was taken, as torch can be told to.
    """

    file: MappedFile = field(repr=False)
    name: str
    start: int
    size: int
    crc: int

    def is_intact(self) -> bool:
        """Whether the bytes are those that were written, as far as the checksum tells. It reads
        them all, a gigabyte in a second."""
        crc, stop = 0, self.start + self.size
        for start in range(self.start, stop, PIECE):
            crc = zlib.crc32(self.file.bytes[start : min(start + PIECE, stop)], crc)
            self.file.release(start, min(start + PIECE, stop))
        return self.crc in (0, crc)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file, not read yet.

    Attributes:
        file, offset: its bytes begin there, little-endian.
        dtype, shape: as stored.
        stride: in elements, as torch has it; None is contiguous.
        records: what all of this was read from, where that has checksums.
    """

    file: MappedFile = field(repr=False)
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    records: tuple[Record, ...] = field(default=(), repr=False)

    @property
    def span(self) -> int:
        """How many bytes of the file the tensor reaches over."""
        if 0 in self.shape:
            return 0
        strides = contiguous(self.shape) if self.stride is None else self.stride
        last = sum((n - 1) * step for n, step in zip(self.shape, strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def map(self) -> Tensor:
        """The tensor, on the mapped file itself: nothing is read yet."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        count = self.span // self.dtype.itemsize
        flat = torch.frombuffer(self.file.bytes, dtype=self.dtype, count=count, offset=self.offset)
        return flat.as_strided(self.shape, self.stride or contiguous(self.shape))

    def release(self) -> None:
        """Give back the memory that looking at the tensor took: it stays on the file."""
        self.file.release(self.offset, self.offset + self.span)

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Its numbers in order, at most `size` at a time. Behind each piece the memory that it took
        is given back; so copy what is to last."""
        flat = self.map().reshape(-1)  # strides that skip numbers make this a copy
        start = self.offset
        for piece in flat.split(size):
            yield piece
            if self.stride is None:
                self.file.release(start, start := start + piece.nbytes)
        if self.stride is not None:
            self.release()


# The containers that there are.
SAFETENSORS, ZIP_PICKLE, LEGACY_PICKLE = "safetensors", "torch zip pickle", "torch legacy pickle"
DIFFUSERS_FOLDER = "diffusers folder"


@dataclass(frozen=True, repr=False)
class Archive:
    """What a file (or a folder) of weights holds.

    Attributes:
        container: one of the four above.
        entries: key -> tensor; in a folder the key begins with its part (`unet/conv_in.weight`).
        metadata: what a safetensors file says of itself.
        stubs: the globals that a pickle named and that were not called, in order, each once.
        documents: the JSON files of a folder, read: name -> fields.
        parts: of a folder: part -> the file that its tensors are in, or the index of several. The
            name of a part that was opened alone is empty.
    """

    path: Path
    container: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    stubs: tuple[str, ...] = ()
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: what there is of each kind."""
        size = sum(entry.span for entry in self.entries.values())
        facts = [self.container, f"{len(self.entries)} tensors of {size:,} bytes"]
        facts += [f"{part}: {file}" for part, file in self.parts.items() if part]
        facts += [f"{len(self.stubs)} stubs"] if self.stubs else []
        return f"Archive({self.path}: {', '.join(facts)})"


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor that lies row after row."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides))[: len(shape)]
