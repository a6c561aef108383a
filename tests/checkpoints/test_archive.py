"""Files of tensors: recognised by content, mapped, and read piece by piece."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ldm.checkpoints.archive import MAX_HEADER, Entry, MappedFile, contiguous, open_archive
from ldm.errors import (
    EmptyFileError,
    PointerError,
    TruncatedError,
    UnreadableError,
    WebPageError,
)
from tests.helpers import CONTAINERS, randn, write_weights

TENSORS = {
    "a": randn(3, 5),
    "b": randn(7, seed=1).half(),
    "c": torch.arange(6).view(2, 3),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
}


def resident(path: Path) -> int:
    """How many bytes of a file are in this process's memory now."""
    sizes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            sizes += int(line.split()[1]) * 1024
    return sizes


# --- Entries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_tensors(tmp_path: Path, container: str) -> None:
    archive = open_archive(write_weights(tmp_path / "file", TENSORS, container))
    assert archive.container == container and archive.entries.keys() == TENSORS.keys()
    for key, expected in TENSORS.items():
        entry = archive.entries[key]
        assert (entry.dtype, entry.shape) == (expected.dtype, tuple(expected.shape))
        assert torch.equal(entry.map(), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.uint16, torch.bool])
def test_types_that_numpy_lacks_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_weights(tmp_path / "file", {"a": torch.ones(3, 2).to(dtype)})
    found = open_archive(path).entries["a"].map()
    assert found.dtype == dtype and found.double().tolist() == [[1, 1]] * 3


def test_writing_to_a_mapped_tensor_changes_no_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file", TENSORS)
    before = path.read_bytes()
    open_archive(path).entries["a"].map().fill_(7)
    assert path.read_bytes() == before


def test_a_file_that_is_replaced_keeps_what_was_opened(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file", TENSORS)
    entry = open_archive(path).entries["a"]
    other = write_weights(tmp_path / "other", {"a": torch.zeros(3, 5)})
    other.replace(path)
    assert torch.equal(entry.map(), TENSORS["a"])


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.T,
        lambda t: t[1:, ::3],
        lambda t: t[0],
        lambda t: t[:1].expand(3, 100),
        lambda t: t[:0],
    ],
    ids=["whole", "transposed", "strided", "row", "repeated", "empty"],
)
@pytest.mark.parametrize("skew", [0, 1])
def test_pieces_are_the_numbers_in_order(tmp_path: Path, view, skew: int) -> None:
    whole = randn(40, 100)
    path = tmp_path / "file"
    path.write_bytes(bytes(skew) + whole.numpy().tobytes())  # one byte off: nothing is aligned
    part: Tensor = view(whole)
    stride = None if part.is_contiguous() else part.stride()
    offset = skew + part.storage_offset() * 4
    entry = Entry(MappedFile(path), offset, torch.float32, tuple(part.shape), stride)
    pieces = [piece.clone() for piece in entry.pieces(7)]
    assert all(len(piece) == 7 for piece in pieces[:-1]) and len(pieces[-1]) <= 7
    assert torch.equal(torch.cat(pieces), part.flatten())
    assert torch.equal(entry.map(), part)
    assert offset + entry.span <= path.stat().st_size


def test_strides_of_rows() -> None:
    for shape in ((), (3,), (2, 3, 4), (2, 0, 4), (1, 1)):
        assert contiguous(shape) == torch.empty(shape).stride()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="measures with Linux's /proc")
@pytest.mark.parametrize("stride", [None, (1, 4096)], ids=["rows", "transposed"])
def test_what_was_read_goes_back(tmp_path: Path, stride) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(64 << 20))
    entry = Entry(MappedFile(path), 0, torch.float32, (4096, 4096), stride)
    most = 0
    for piece in entry.pieces(1 << 20):
        assert piece.sum() == 0
        most = max(most, resident(path))
    assert resident(path) == 0
    if stride is None:  # a piece of 4 MB, and what the system reads around it
        assert (4 << 20) <= most <= (8 << 20)


# --- What a file is --------------------------------------------------------------------------

WRONG = {
    "empty": (b"", EmptyFileError, "is empty"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n",
        PointerError,
        "git-lfs pointer: fetch the file with `git lfs pull`",
    ),
    "web page": (b"<!DOCTYPE html><html>Sign in</html>", WebPageError, "is a web page"),
    "web page with a mark": (b"\xef\xbb\xbf\r\n  <HTML lang=en>", WebPageError, "is a web page"),
    "XML": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', WebPageError, "is a web page"),
    "text": (b"weights {not here}", UnreadableError, "neither safetensors nor torch's"),
    "JSON": (b'{"error": "not found"}', UnreadableError, "neither safetensors nor torch's"),
    "zeros": (bytes(1000), UnreadableError, "neither safetensors nor torch's"),
    "GGUF": (b"GGUF\x03" + bytes(100), UnreadableError, "neither safetensors nor torch's"),
    "one byte": (b"\x00", UnreadableError, "neither safetensors nor torch's"),
}


@pytest.mark.parametrize("content, error, told", WRONG.values(), ids=WRONG)
def test_what_is_no_file_of_weights_is_said(tmp_path: Path, content, error, told) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=told) as caught:
        open_archive(path)
    assert type(caught.value) is error and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_archive(tmp_path / "none")


@pytest.mark.parametrize("container", CONTAINERS)
def test_cut_file_says_that_it_is_cut(tmp_path: Path, container: str) -> None:
    path = write_weights(tmp_path / "file", TENSORS | {"big": torch.zeros(1000)}, container)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(TruncatedError, match=f"is cut off: .*found {length:,}"):
            open_archive(path)


def test_cut_safetensors_says_expected_and_found_bytes(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file", TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(
        TruncatedError,
        match=rf"expected {len(whole)} bytes, found {len(whole) - 10}; fetch it again",
    ):
        open_archive(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:60])
    with pytest.raises(TruncatedError, match=f"its header alone takes {header} bytes, found 60;"):
        open_archive(path)


# --- Headers of safetensors ------------------------------------------------------------------


def with_header(path: Path, header: object, data: bytes = bytes(100)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype="F32", shape=(5, 5), offsets=(0, 100)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "no JSON": b'{"a": ',
    "no UTF-8": b'{"\xff": 1}',
    "no object of objects": {"a": 3},
    "no offsets": {"a": {"dtype": "F32", "shape": [5, 5]}},
    "offsets of text": {"a": tensor(offsets=("0", "100"))},
    "one offset": {"a": tensor(offsets=(100,))},
    "backward offsets": {"a": tensor(offsets=(100, 0))},
    "negative offsets": {"a": tensor(offsets=(-100, 0))},
    "fractions": {"a": tensor(offsets=(0, 99.5))},
    "another size": {"a": tensor(shape=(5, 6))},
    "a negative shape": {"a": tensor(shape=(-5, -5))},
    "a shape that overflows": {"a": tensor(shape=(2**33, 2**33))},
    "overlapping": {"a": tensor(), "b": tensor()},
    "a hole": {"a": tensor(shape=(4, 5), offsets=(20, 100))},
    "metadata of numbers": {"__metadata__": {"ldm": 3}, "a": tensor()},
    "metadata of text": {"__metadata__": "ldm", "a": tensor()},
    "an unknown type": {"a": tensor(dtype="Q4")},
    "deeply nested": b'{"a":' + b"[" * 100_000,
    "an endless number": b'{"a":' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_broken_header_is_one_line(tmp_path: Path, header: object) -> None:
    path = with_header(tmp_path / "file", header)
    with pytest.raises(UnreadableError, match=str(path)) as caught:
        open_archive(path)
    assert "\n" not in str(caught.value)


def test_whole_header_is_read(tmp_path: Path) -> None:
    path = with_header(tmp_path / "file", {"a": tensor(), "__metadata__": {"x": "y"}})
    archive = open_archive(path)
    assert torch.equal(archive.entries["a"].map(), load_file(path)["a"])
    assert archive.metadata == {"x": "y"}


def test_header_that_would_take_gigabytes_of_objects_is_refused(tmp_path: Path) -> None:
    lists = b'{"a":[' + b"[]," * (MAX_HEADER // 3) + b"[]]}"
    path = with_header(tmp_path / "file", lists)
    with pytest.raises(UnreadableError, match=f"has a header of {len(lists) + 8} bytes"):
        open_archive(path)


def test_metadata_of_a_model_passes_the_bound() -> None:
    # The largest official file: 686 + 248 + 196 weights, as many means, two optimizer states each.
    keys = [f"model.diffusion_model.input_blocks.11.1.transformer_blocks.{n}" for n in range(4000)]
    header = save({key: torch.zeros(0) for key in keys})
    assert len(header) < MAX_HEADER / 2
