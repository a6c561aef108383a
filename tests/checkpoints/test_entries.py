"""Tensors on disk: mapped, and read piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.entries import Entry, MappedFile, contiguous
from ldm.checkpoints.opening import open_archive
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
