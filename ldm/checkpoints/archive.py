"""Files of tensors, whatever their container: what is in them, without reading it.

A tensor on disk is a run of bytes, a type, a shape and strides. So an `Entry` is all that a
container has to tell, and loading maps the file and copies one entry after another: a file of eight
gigabytes of which half is wanted costs the half.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.errors import EmptyFileError, PointerError, TruncatedError, UnreadableError, WebPageError

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


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not read yet.

    Attributes:
        file, offset: its bytes begin there, little-endian.
        dtype, shape: as stored.
        stride: in elements, as torch has it; None is contiguous.
    """

    file: MappedFile = field(repr=False)
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

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
            self.file.release(self.offset, self.offset + self.span)


@dataclass(frozen=True)
class Archive:
    """What a file (or a folder) of weights holds.

    Attributes:
        container: "safetensors", "torch zip pickle", "torch legacy pickle" or "diffusers folder".
        entries: key -> tensor.
        metadata: what a safetensors file says of itself.
        stubs: the globals that a pickle named and that were not called, in order, each once.
    """

    path: Path
    container: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    stubs: tuple[str, ...] = ()


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor that lies row after row."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides))[: len(shape)]


# -------------------------------------------------------------------------------- by content


ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how a zip archive and a pickle (protocol 2 and up) begin


def open_archive(path: str | Path) -> Archive:
    """What is in a file of weights: safetensors, or a pickle of torch's, old or new. The content
    tells which; a name may say anything.

    Raises:
        FileNotFoundError: nothing is there.
        UnreadableError: it is none of these, or damaged; one line says how.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size == 0:
        raise EmptyFileError(f"{path} is empty: fetch it again")
    file = MappedFile(path)
    start = file.bytes[:512]
    # A header shorter than a terabyte: its length ends in zeros, which no text does.
    if start[5:9] == b"\0\0\0{":
        return read_safetensors(file)
    if start.startswith((ZIP, PICKLE)):
        from ldm.checkpoints.pickles import read_torch_legacy, read_torch_zip

        zipped = start.startswith(ZIP)
        pickled = read_torch_zip(file) if zipped else read_torch_legacy(file)
        container = "torch zip pickle" if zipped else "torch legacy pickle"
        return Archive(path, container, pickled.entries, stubs=pickled.stubs)
    if start.startswith(b"version https://git-lfs"):
        raise PointerError(f"{path} is a git-lfs pointer: fetch the file with `git lfs pull`")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(MARKUP):
        raise WebPageError(f"{path} is a web page, not weights: log in there, and fetch it again")
    raise UnreadableError(f"{path} is not a file of weights: neither safetensors nor torch's")


MARKUP = (b"<!doctype", b"<html", b"<head", b"<!--", b"<?xml")
SAFETENSORS_DTYPES = {
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
# Python's objects take twenty times the bytes of the JSON that they are read from. The header of an
# official file, with a second set of weights and the optimizer's states, has 250,000.
MAX_HEADER = 2_000_000


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
    if data > MAX_HEADER:
        raise UnreadableError(
            f"{path} has a header of {data} bytes; that of a model has {MAX_HEADER} at most"
        )
    try:
        header = json.loads(file.bytes[8:data])
        metadata = header.pop("__metadata__", {})
        end = data + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UnreadableError(f"{path} has a broken safetensors header: {error}") from error
    if end > len(file):
        raise TruncatedError(
            f"{path} is cut off: expected {end:,} bytes, found {len(file):,}; fetch it again"
        )
    try:
        with safe_open(path, framework="pt"):  # the library's own checks of every number
            pass
    except (SafetensorError, OSError) as error:
        raise UnreadableError(f"{path} has a broken safetensors header: {error}") from error
    if strange := {tensor["dtype"] for tensor in header.values()} - SAFETENSORS_DTYPES.keys():
        raise UnreadableError(f"{path} holds types that ldm does not read: {sorted(strange)}")
    entries = {
        key: Entry(
            file,
            data + tensor["data_offsets"][0],
            SAFETENSORS_DTYPES[tensor["dtype"]],
            tuple(tensor["shape"]),
        )
        for key, tensor in header.items()
    }
    return Archive(path, "safetensors", entries, metadata)
