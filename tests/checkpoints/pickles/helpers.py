"""Pickles of PyTorch's, written, read and refused."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.entries import Archive, MappedFile
from ldm.checkpoints.pickles.legacy import read_torch_legacy
from ldm.checkpoints.pickles.zipped import read_torch_zip
from ldm.errors import CheckpointError, UnreadableError
from tests.helpers import randn

READERS = {"zip": read_torch_zip, "legacy": read_torch_legacy}


def save(content: object, path: Path, container: str, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # legacy saving reads private parts of TypedStorage
        zipped = container == "zip"
        torch.save(content, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def read(path: Path, container: str) -> Archive:
    return READERS[container](MappedFile(path))


def read_bytes(data: bytes, container: str, tmp_path: Path) -> Archive:
    path = tmp_path / "weights"
    path.write_bytes(data)
    return read(path, container)


def bits(tensor: Tensor) -> Tensor:
    row_by_row = tensor.detach().clone(memory_format=torch.contiguous_format)
    return row_by_row.reshape(-1).view(torch.uint8)


def assert_same(pickled: Archive, expected: Mapping[str, Tensor]) -> None:
    """The same keys in the same order, and for each the same type, shape and bytes."""
    assert list(pickled.entries) == list(expected)
    for key, value in expected.items():
        mapped = pickled.entries[key].map()
        assert (mapped.dtype, mapped.shape) == (value.dtype, value.shape), key
        assert torch.equal(bits(mapped), bits(value)), key


def refusal(
    data: bytes, container: str, tmp_path: Path, error: type[CheckpointError] = UnreadableError
) -> str:
    """What the error says behind the file's name."""
    with pytest.raises(error) as raised:
        read_bytes(data, container, tmp_path)
    assert type(raised.value) is error
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'weights'} ") and message.isprintable()
    return message.removeprefix(f"{tmp_path / 'weights'} ")


def state_dict() -> OrderedDict[str, Tensor]:
    state = OrderedDict(a=randn(3, 4), b=randn(5, seed=1))
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state
