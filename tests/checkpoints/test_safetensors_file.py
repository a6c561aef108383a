"""Headers of safetensors: read, and refused in one line."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ldm.checkpoints import safetensors_file
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.safetensors_file import MAX_HEADER, MOST_ENTRIES
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
    "no metadata": {"__metadata__": None, "a": tensor()},
    "a hole at the end": {"a": tensor(shape=(4, 5), offsets=(0, 80))},
    "a type that is none": {"a": tensor(dtype=["F32"])},
    "a shape of text": {"a": tensor(dtype="U8", shape="x" * 100)},
    "two of one name": b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2),
    "two objects": json.dumps({"a": tensor()}).encode() + b"{}",
    "a comma at the end": json.dumps({"a": tensor()}).encode()[:-1] + b",}",
    "no comma": json.dumps({"a": tensor()}).encode()[:-1] + b'"b":{}}',
    "an entry that is a list": {"a": [tensor()]},
    "a name that is a number": b"{3:%s}" % json.dumps(tensor()).encode(),
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_the_library_would_refuse_it_too(tmp_path: Path, header: object) -> None:
    """But for what is only strange: the format forbids names that are there twice."""
    path = with_header(tmp_path / "file", header)
    if header not in (BROKEN["two of one name"], BROKEN["no metadata"]):
        with pytest.raises(SafetensorError):
            load_file(path)


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


# What would become gigabytes of Python's objects.
BURSTING = {
    "lists": b'{"a":[' + b"[]," * 1_000_000 + b"[]]}",
    "objects": b'{"a":' + b'{"a":' * 1_000_000 + b"}" * 1_000_000 + b"}",
    "lists in lists": b'{"a":{"dtype":' + b"[" * 1900 + b"]" * 1900 + b"}}",
    "a long shape": b'{"a":{"dtype":"F32","shape":[' + b"1," * 1_000_000 + b"1]}}",
}


@pytest.mark.parametrize("header", BURSTING.values(), ids=BURSTING)
def test_header_that_would_take_gigabytes_of_objects_is_refused(tmp_path: Path, header) -> None:
    path = with_header(tmp_path / "file", header)
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableError, match="has a broken safetensors header"):
            open_archive(path)
        assert tracemalloc.get_traced_memory()[1] < 64e6 + 8 * len(header)
    finally:
        tracemalloc.stop()


def test_header_may_be_as_long_as_the_format_allows_and_no_longer(tmp_path: Path) -> None:
    notes = "x" * 3_000_000
    header = json.dumps({"__metadata__": {"notes": notes}, "a": tensor()}).encode() + b" " * 1000
    archive = open_archive(with_header(tmp_path / "file", header))
    assert archive.metadata == {"notes": notes} and list(archive.entries) == ["a"]
    with (tmp_path / "file").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1) + b"{")
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(UnreadableError, match="100,000,001 bytes: safetensors allows 100,000,000"):
        open_archive(tmp_path / "file")


@pytest.mark.parametrize(
    "more", [{"b": tensor(shape=(0,), offsets=(0, 0))}, {"__metadata__": {"x": ""}}]
)
def test_entries_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more) -> None:
    monkeypatch.setattr(safetensors_file, "MOST_ENTRIES", 3)
    none = tensor(shape=(0,), offsets=(0, 0))
    header = {"__metadata__": {"y": "z"}, "a": none}
    assert list(open_archive(with_header(tmp_path / "file", header, b"")).entries) == ["a"]
    for key, value in more.items():
        header[key] = value | (header.get(key, {}) if key == "__metadata__" else {})
    path = with_header(tmp_path / "file", header, b"")
    with pytest.raises(UnreadableError, match="more than 3 entries"):
        open_archive(path)


def test_metadata_of_a_model_passes_the_bound() -> None:
    # The largest official file: 686 + 248 + 196 weights, as many means, two optimizer states each.
    keys = [f"model.diffusion_model.input_blocks.11.1.transformer_blocks.{n}" for n in range(4000)]
    header = save({key: torch.zeros(0) for key in keys})
    assert len(header) < MAX_HEADER / 2 and len(keys) < MOST_ENTRIES / 2
