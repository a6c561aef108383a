"""From what a pickle stands for, a tree of dicts and lists, to tensors by their keys."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping

from ldm.checkpoints.entries import Archive, Entry, MappedFile, Record, contiguous
from ldm.checkpoints.pickles.instructions import Machine
from ldm.checkpoints.pickles.limits import DEPTH, NAME, VISIT, Purse
from ldm.checkpoints.pickles.values import ENDLESS, Dict, View, key_text
from ldm.errors import CheckpointError, UnreadableError, UnsafePickleError


def keyed_views(
    value: object, purse: Purse, path: tuple[object, ...] = (), depth: int = 0
) -> Iterator[tuple[str, View]]:
    """The tensors in a tree of dicts and lists, with their keys, in the tree's order."""
    if isinstance(value, View):
        key = ".".join(key_text(part) for part in path)
        if ENDLESS in path or len(key) > NAME:
            raise UnreadableError(f"has a tensor whose key is longer than {NAME} characters")
        purse.spend(100 + 4 * len(key))
        yield key, value
    elif isinstance(value, list | tuple):
        if depth > DEPTH:  # a list may hold itself
            raise UnreadableError(f"nests dicts and lists more than {DEPTH} deep")
        for part, item in value if isinstance(value, Dict) else enumerate(value):
            purse.spend(VISIT)
            wrapper = not path and part == b"state_dict" and isinstance(item, Dict)
            yield from keyed_views(item, purse, path if wrapper else (*path, part), depth + 1)


def archive_of(
    content: object,
    machine: Machine,
    container: str,
    starts: Mapping[str, int],
    records: Mapping[str, tuple[Record, ...]],
) -> Archive:
    """What came out of a machine, as an archive, given the place of every storage's first byte, and
    the records that each storage's tensors are read from, where those have checksums.

    A tensor's key is its way from the root, joined with dots (`optimizer_states.0.exp_avg`). A dict
    called `state_dict` at the root, or in one that is, adds nothing to the key: so weights have the
    same keys however often they were wrapped. A tensor that was saved alone has the key "".
    """
    calls = machine.calls
    entries: dict[str, Entry] = {}
    made: dict[int, Entry] = {}  # a tensor under two keys is one entry
    for key, view in keyed_views(content, machine.purse):
        if id(view) not in made:
            offset = starts[view.storage.key] + view.offset * view.dtype.itemsize
            stride = None if view.stride == contiguous(view.shape) else view.stride
            origin = records.get(view.storage.key, ())
            place = (machine.file, offset, view.dtype, view.shape, stride, origin)
            made[id(view)] = Entry(*place)
        if entries.setdefault(key, made[id(view)]) is not made[id(view)]:
            raise UnreadableError(f"holds two tensors under the key {key!r}")
    if calls.num_views and not entries:
        inside = ", ".join(itertools.islice(calls.stubs, 3))
        raise UnsafePickleError(f"holds its tensors inside of objects that need code: {inside}")
    return Archive(machine.file.path, container, entries, stubs=tuple(calls.stubs))


@contextlib.contextmanager
def naming(file: MappedFile) -> Iterator[None]:
    """Whatever is wrong is said of the file by its name; and no page of it stays in memory."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{file.path} {error}") from error.__cause__
    finally:
        file.release(0, len(file))
