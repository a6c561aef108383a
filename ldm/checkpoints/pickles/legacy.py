"""Checkpoints as PyTorch wrote them before 1.6: pickles in a row, and the storages behind them."""

from __future__ import annotations

import struct

from ldm.checkpoints.entries import LEGACY_PICKLE, Archive, MappedFile
from ldm.checkpoints.pickles.instructions import Machine, cut_off
from ldm.checkpoints.pickles.limits import Purse
from ldm.checkpoints.pickles.tree import archive_of, naming
from ldm.checkpoints.pickles.values import key_text
from ldm.errors import UnreadableError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read_torch_legacy(file: MappedFile) -> Archive:
    """What is in a checkpoint as PyTorch wrote it before 1.6: five pickles in a row (a magic
    number, a version, the writer's type sizes, the content, the storages' keys), and then for each
    key the storage's count of elements, in 8 bytes, and the elements. Always little-endian.

    Raises:
        UnreadableError: this is no such file, or a damaged one.
        TruncatedError: its end is missing.
        UnsafePickleError: it makes its tensors by means that ldm does not know.
    """
    with naming(file):
        machine = Machine(file, 0, len(file), Purse())
        if machine.load() != MAGIC:
            raise UnreadableError("is a pickle, but none of PyTorch's: it has no magic number")
        if machine.load() != PROTOCOL:
            raise UnreadableError("is a pickle of PyTorch's in an unknown version")
        machine.load()
        content = machine.load()
        keys = machine.load()
        storages = machine.calls.storages
        if not isinstance(keys, list) or sorted(map(key_text, keys)) != sorted(storages):
            raise UnreadableError("lists other storages than its tensors need")
        at = machine.at
        expected = at + sum(8 + storage.nbytes for storage in storages.values())
        if expected > len(file):
            raise cut_off(f"expected {expected:,} bytes", file)
        starts = {}
        for key in map(key_text, keys):
            (count,) = struct.unpack_from("<q", file.bytes, at)
            if count != storages[key].numel:
                raise UnreadableError(
                    f"keeps {count} numbers in storage {key!r} for {storages[key].numel}"
                )
            starts[key] = at + 8
            at += 8 + storages[key].nbytes
        return archive_of(content, machine, LEGACY_PICKLE, starts, {})
