"""Headers of safetensors: read, and refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.safetensors_file import MAX_HEADER
from ldm.errors import (
    UnreadableError,
)
from tests.helpers import randn

TENSORS = {
    "a": randn(3, 5),
    "b": randn(7, seed=1).half(),
    "c": torch.arange(6).view(2, 3),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
}


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
