"""What a pickle is made of, as data: names, storages and tensors, dicts and lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle wants to import. Nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of `numel` numbers, which the file keeps under a key."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class View:
    """A tensor: a way to look at a storage. Offset and strides are in elements of its dtype."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Dict(list[tuple[object, object]]):
    """A dict, as its pairs: a key that is never hashed can neither collide nor overflow a stack."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Dropped:
    """Stands for what is of no use to us: the result of an unknown call, an endless string."""

    what: Global | str

    def __str__(self) -> str:
        return str(self.what)


class Malformed(Exception):
    """What no pickler writes; whoever runs the pickle knows where it was."""


ENDLESS = Dropped("a very long string or number")
UNSET = Dropped("nothing")  # a number of the memo that nothing was stored under


def is_size(value: object) -> TypeGuard[int]:
    """Whether a value can count elements: no bool, and small enough for a computer."""
    return type(value) is int and 0 <= value < 2**56


def brief(value: object) -> str:
    """A value of a pickle, for a message of one line."""
    if isinstance(value, Global | Dropped):
        return str(value)
    if isinstance(value, bytes | int | float):
        return repr(value)[:60]
    return f"a {type(value).__name__.lower()}"


def key_text(key: object) -> str:
    """A part of a tensor's key: one line that a terminal can show."""
    text = key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else brief(key)
    return text if text.isprintable() else text.encode("unicode_escape").decode()
