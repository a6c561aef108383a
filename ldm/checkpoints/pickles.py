"""PyTorch checkpoints, read without running them.

A pickle is not data: it is a program for a small stack machine, and some of that machine's
instructions import any function of any module, and call it. `pickle.load` does what the program
says, and so a file of weights can do whatever its author liked.

Here is a machine of our own for the same programs. It imports nothing and calls nothing. A global
(a name to import) is only a pair of words to it; a call is looked up in one short list
(`Machine.call`) of what PyTorch uses to say "a tensor of this shape lies there", and what comes
out is that sentence, as data. A call of anything else leaves a `Dropped` where its result would be.

What a file can make us hold, and for how long it can make us work, is bounded too. A pickle of nine
bytes may claim a string of a gigabyte: every length is compared with the bytes that are left. A
pickle of a few thousand bytes may stand for a structure of billions: every step of the machine, and
of the walk through what it built, is paid from one `Purse`.

The tensors' bytes are not looked at. The walk only tells where they lie (`Entry`), once it is sure
that they lie inside of the file.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import TypeGuard

import torch

from ldm.checkpoints.archive import Entry, MappedFile, contiguous
from ldm.errors import CheckpointError, TruncatedError, UnreadableError, UnsafePickleError


@dataclass(frozen=True)
class TorchPickle:
    """What a PyTorch checkpoint holds.

    Attributes:
        entries: the tensors, in the order of the file. The checkpoint is a tree of dicts and lists,
            and a tensor's key is its way from the root, joined with dots
            (`optimizer_states.0.state.12.exp_avg`). A dict called `state_dict` at the root, or in
            one that is, adds nothing to the key: so weights have the same keys however often they
            were wrapped. The key of a tensor that was saved alone is "".
        stubs: the globals that were dropped, as "module.name", each once, in the order of the file.
    """

    entries: dict[str, Entry]
    stubs: tuple[str, ...]


# --- What a pickle is made of, as data -------------------------------------------------------


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


ENDLESS = Dropped("a very long string or number")
UNSET = Dropped("nothing")  # a number of the memo that nothing was stored under

STORAGES = {
    Global("torch", "DoubleStorage"): torch.float64,
    Global("torch", "FloatStorage"): torch.float32,
    Global("torch", "HalfStorage"): torch.float16,
    Global("torch", "BFloat16Storage"): torch.bfloat16,
    Global("torch", "LongStorage"): torch.int64,
    Global("torch", "IntStorage"): torch.int32,
    Global("torch", "ShortStorage"): torch.int16,
    Global("torch", "CharStorage"): torch.int8,
    Global("torch", "ByteStorage"): torch.uint8,
    Global("torch", "BoolStorage"): torch.bool,
    Global("torch", "ComplexFloatStorage"): torch.complex64,
    Global("torch", "ComplexDoubleStorage"): torch.complex128,
    Global("torch.storage", "UntypedStorage"): torch.uint8,
}
# Types that came after the last typed storage: an untyped one, and the type beside it.
DTYPES = {
    Global("torch", "float8_e4m3fn"): torch.float8_e4m3fn,
    Global("torch", "float8_e5m2"): torch.float8_e5m2,
    Global("torch", "float8_e4m3fnuz"): torch.float8_e4m3fnuz,
    Global("torch", "float8_e5m2fnuz"): torch.float8_e5m2fnuz,
    Global("torch", "uint16"): torch.uint16,
    Global("torch", "uint32"): torch.uint32,
    Global("torch", "uint64"): torch.uint64,
}
# Understood, and so no stubs. What is done with them is in `Machine.call`.
KNOWN = {
    *STORAGES,
    *DTYPES,
    Global("collections", "OrderedDict"),
    Global("collections", "defaultdict"),
    Global("torch", "Size"),
    Global("torch", "Tensor"),
    Global("torch._utils", "_rebuild_tensor"),
    Global("torch._utils", "_rebuild_tensor_v2"),
    Global("torch._utils", "_rebuild_tensor_v3"),
    Global("torch._utils", "_rebuild_parameter"),
    Global("torch._utils", "_rebuild_parameter_with_state"),
    Global("torch._tensor", "_rebuild_from_type_v2"),
}


# --- Limits ----------------------------------------------------------------------------------

# An official checkpoint with EMA weights and optimizer states takes 120,000 instructions, and with
# its 3,200 tensors a third of this. Nothing that one instruction makes is larger than it costs, so
# this is also a bound in bytes; and Python goes through it in about a second.
PURSE = 50_000_000
INSTRUCTION = 80  # an empty dict (64 bytes), and its place on the stack
TENSOR = 400  # a View, and later an Entry
CALL = 400  # for the time that it takes to compare it with those that we know
VISIT = 40  # nothing is kept of a leaf that is passed by; this is for the time

NAME = 500  # bytes of the longest string that can be a key, or a part of one
LINE = 200  # bytes of the longest module, or name, or number in decimals
INTEGER = 255  # bytes of the longest integer
DEPTH = 64  # of dicts in dicts; also of a tensor's dimensions
DIRECTORY = 1_000_000  # bytes of a zip archive's directory; that of the checkpoint above: 250,000


class Purse:
    """What a file may still cost us."""

    def __init__(self) -> None:
        self.left = PURSE

    def spend(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise UnreadableError("is more intricate than any checkpoint: reading it was given up")


# --- The machine -----------------------------------------------------------------------------

UINT1, UINT2, UINT4, UINT8 = Struct("<B"), Struct("<H"), Struct("<I"), Struct("<Q")
NUMBERS = {
    pickle.BININT1: UINT1,
    pickle.BININT2: UINT2,
    pickle.BININT: Struct("<i"),
    pickle.BINFLOAT: Struct(">d"),
}
# Python 2 wrote its strings as bytes, and torch's keys are ASCII: all strings are bytes here.
STRINGS = {
    pickle.BINUNICODE: UINT4,
    pickle.SHORT_BINUNICODE: UINT1,
    pickle.BINUNICODE8: UINT8,
    pickle.BINSTRING: UINT4,
    pickle.SHORT_BINSTRING: UINT1,
    pickle.BINBYTES: UINT4,
    pickle.SHORT_BINBYTES: UINT1,
    pickle.BINBYTES8: UINT8,
    pickle.BYTEARRAY8: UINT8,
}
INTEGERS = {pickle.LONG1: UINT1, pickle.LONG4: UINT4}
CONSTANTS = {
    pickle.NONE: None,
    pickle.NEWTRUE: True,
    pickle.NEWFALSE: False,
    pickle.EMPTY_TUPLE: (),
}
CONTAINERS: dict[bytes, type[list[object]] | type[Dict]] = {
    pickle.EMPTY_DICT: Dict,
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_SET: list,
}
PUTS = {pickle.BINPUT: UINT1, pickle.LONG_BINPUT: UINT4}
GETS = {pickle.BINGET: UINT1, pickle.LONG_BINGET: UINT4}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


class Machine:
    """Runs the pickles between two offsets of a file, one after another, on data alone.

    Attributes:
        at: where the next pickle begins.
        storages: key -> the storages that were named so far.
        stubs: the globals that were dropped so far; a dict, for its order.
        num_views: how many tensors were made so far, kept or dropped.
    """

    def __init__(self, file: MappedFile, at: int, end: int, purse: Purse) -> None:
        self.file, self.at, self.end, self.purse = file, at, end, purse
        self.storages: dict[str, Storage] = {}
        self.stubs: dict[str, None] = {}
        self.num_views = 0

    def load(self) -> object:
        """What the next pickle stands for.

        Raises:
            UnreadableError: it is damaged, or too intricate.
            TruncatedError: the file ends in it.
            UnsafePickleError: it makes a tensor by means that are not in `call`.
        """
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # a mark hides the stack below it
        self.memo: list[object] = []
        self.count = 0
        try:
            while (code := self.take(1)) != pickle.STOP:
                self.purse.spend(INSTRUCTION)
                self.count += 1
                self.step(code)
            return self.stack.pop()
        except IndexError:  # from an empty stack, or a memo without that number
            raise self.damaged() from None

    def damaged(self) -> UnreadableError:
        return UnreadableError(f"holds a pickle that is damaged before byte {self.at}")

    def take(self, length: int) -> bytes:
        """The next bytes."""
        self.skip(length)
        return self.file.bytes[self.at - length : self.at]

    def skip(self, length: int) -> None:
        if length > self.end - self.at:
            if self.end == len(self.file):
                raise cut_off("it ends inside of a pickle", self.file)
            raise UnreadableError("holds a pickle that breaks off")
        self.at += length

    def number(self, form: Struct) -> int:
        self.skip(form.size)
        (number,) = form.unpack_from(self.file.bytes, self.at - form.size)
        return number

    def line(self) -> str:
        """The next bytes up to a line's end, as text."""
        end = self.file.bytes.find(b"\n", self.at, min(self.at + LINE + 1, self.end))
        if end < 0:
            self.skip(LINE + 1)
            raise self.damaged()
        return self.take(end + 1 - self.at)[:-1].decode("ascii", "backslashreplace")

    def step(self, code: bytes) -> None:
        """One instruction: its code, and behind that in the file what it needs."""
        stack = self.stack
        if code in PUTS:
            self.remember(self.number(PUTS[code]))
        elif code in GETS:
            stack.append(self.recall(self.number(GETS[code])))
        elif code in NUMBERS:
            stack.append(self.number(NUMBERS[code]))
        elif code in STRINGS:
            stack.append(self.string(self.number(STRINGS[code])))
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code in CONTAINERS:
            stack.append(CONTAINERS[code]())
        elif code in TUPLES:
            first = len(stack) - TUPLES[code]
            if first < 0:
                raise IndexError
            stack[first:] = [tuple(stack[first:])]
        elif code in INTEGERS:
            stack.append(self.integer(self.number(INTEGERS[code])))
        else:
            self.compose(code)

    def compose(self, code: bytes) -> None:
        """The instructions that make something of what is on the stack, and some odd ones."""
        match code:
            case pickle.MARK:
                self.below.append(self.stack)
                self.stack = []
            case pickle.TUPLE:
                items = tuple(self.items())
                self.stack.append(items)
            case pickle.APPEND:
                item = self.stack.pop()
                self.extend([item])
            case pickle.APPENDS | pickle.ADDITEMS:
                self.extend(self.items())
            case pickle.SETITEM:
                value, key = self.stack.pop(), self.stack.pop()
                self.update([key, value])
            case pickle.SETITEMS:
                self.update(self.items())
            case pickle.FROZENSET:
                frozen = self.items()
                self.stack.append(frozen)
            case pickle.POP:
                self.stack.pop()
            case pickle.POP_MARK:
                self.items()
            case pickle.MEMOIZE:
                self.remember(len(self.memo))
            case pickle.PROTO:
                if (protocol := self.number(UINT1)) > pickle.HIGHEST_PROTOCOL:
                    raise UnreadableError(f"holds a pickle of protocol {protocol}: unknown")
            case pickle.FRAME:  # a hint how much to read at once
                self.number(UINT8)
            case pickle.INT:  # Python 2, where a number needs more than 32 bits
                self.stack.append(self.decimal(self.line()))
            case pickle.GLOBAL:
                self.stack.append(self.name(self.line(), self.line()))
            case pickle.STACK_GLOBAL:
                name, module = self.stack.pop(), self.stack.pop()
                if not isinstance(module, bytes) or not isinstance(name, bytes):
                    raise self.damaged()
                words = (word.decode("ascii", "backslashreplace") for word in (module, name))
                self.stack.append(self.name(*words))
            case pickle.REDUCE | pickle.NEWOBJ:
                args, function = self.stack.pop(), self.stack.pop()
                self.stack.append(self.call(function, args))
            case pickle.NEWOBJ_EX:
                _, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
                self.stack.append(self.call(function, args))
            case pickle.OBJ:  # an old class of Python 2
                function, *rest = self.items() or [None]
                self.stack.append(self.call(function, tuple(rest)))
            case pickle.INST:  # the same, in protocol 0
                function = self.name(self.line(), self.line())
                self.stack.append(self.call(function, tuple(self.items())))
            case pickle.BUILD:  # attributes, such as a state dict's `_metadata`
                state = self.stack.pop()
                self.check_dropped(self.stack[-1], state)
            case pickle.BINPERSID:
                self.stack.append(self.persistent(self.stack.pop()))
            case _:
                raise UnreadableError(f"holds a pickle with {code!r}, which PyTorch never writes")

    # What the instructions are made of.

    def items(self) -> list[object]:
        """All above the last mark, taken off the stack."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def extend(self, items: list[object]) -> None:
        """Into the list on top of the stack."""
        container = self.stack[-1]
        if isinstance(container, list) and not isinstance(container, Dict):
            container.extend(items)
        elif not isinstance(container, Dropped):
            raise self.damaged()

    def update(self, items: list[object]) -> None:
        """Into the dict on top of the stack: a key, its value, a key, its value ..."""
        container = self.stack[-1]
        if isinstance(container, Dict) and len(items) % 2 == 0:
            container.extend(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(container, Dropped):
            raise self.damaged()

    def remember(self, index: int) -> None:
        """Store the top of the stack. Picklers count up; a leap would only ask for memory."""
        if index > self.count:
            raise self.damaged()
        self.memo.extend([UNSET] * (index + 1 - len(self.memo)))
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> object:
        if self.memo[index] is UNSET:
            raise IndexError
        return self.memo[index]

    def string(self, length: int) -> object:
        if length > NAME:
            self.skip(length)
            return ENDLESS
        self.purse.spend(length)
        return self.take(length)

    def integer(self, length: int) -> object:
        if length > INTEGER:
            self.skip(length)
            return ENDLESS
        self.purse.spend(length)
        return int.from_bytes(self.take(length), "little", signed=True)

    def decimal(self, line: str) -> object:
        if line in ("00", "01"):
            return line == "01"
        if not line.removeprefix("-").isdecimal():
            raise self.damaged()
        return int(line)

    def name(self, module: str, name: str) -> Global:
        if not f"{module}{name}".isprintable():
            raise self.damaged()
        self.purse.spend(300 + 2 * len(module) + 2 * len(name))
        found = Global(module, name)
        if found not in KNOWN:
            self.stubs[str(found)] = None
        return found

    # What takes the place of running code.

    def persistent(self, saved: object) -> object:
        """What torch keeps outside of the pickle: storages."""
        if isinstance(saved, tuple) and len(saved) == 6 and saved[-1] is None:
            saved = saved[:-1]  # the legacy container's place for a part of a storage
        match saved:
            case (b"storage", Global() as kind, bytes() as key, _, numel):
                if kind not in STORAGES:
                    raise UnsafePickleError(f"keeps tensors in {kind}, which ldm does not know")
                if not is_size(numel):
                    raise UnreadableError(f"says that a storage has {brief(numel)} numbers")
                storage = Storage(key_text(key), STORAGES[kind], numel)
                if self.storages.setdefault(storage.key, storage) != storage:
                    raise UnreadableError(f"describes storage {storage.key!r} in two ways")
                self.purse.spend(TENSOR)
                return storage
            case (b"module", Global() as cls, _, _):  # a whole model: its class, and its source
                return cls
        raise UnsafePickleError(f"refers to something outside of its pickle: {brief(saved)}")

    def call(self, function: object, args: object) -> object:
        """What comes out where a pickle calls a function. All that is ever "called" is here."""
        self.purse.spend(CALL)
        if not isinstance(function, Global | Dropped) or not isinstance(args, tuple):
            raise self.damaged()
        match function, args:
            case Global("collections", "OrderedDict"), ():
                return Dict()
            case Global("collections", "OrderedDict"), (list() as pairs,):  # Python 2
                self.purse.spend(100 * len(pairs))
                return Dict(self.pair(pair) for pair in pairs)
            case Global("collections", "defaultdict"), (_,):
                return Dict()
            case Global("torch", "Size"), (tuple() as sizes,):
                return sizes
            case Global("torch._utils", "_rebuild_tensor"), (Storage() as of, offset, size, stride):
                return self.view(of, offset, size, stride, of.dtype)
            case (
                Global("torch._utils", "_rebuild_tensor_v2"),
                (Storage() as of, offset, size, stride, _, _),
            ):
                return self.view(of, offset, size, stride, of.dtype)
            case (
                Global("torch._utils", "_rebuild_tensor_v3"),
                (Storage() as of, offset, size, stride, _, _, Global() as dtype),
            ):
                if dtype not in DTYPES:
                    raise UnsafePickleError(f"holds tensors of {dtype}, which ldm does not read")
                return self.view(of, offset, size, stride, DTYPES[dtype])
            case Global("torch._utils", "_rebuild_parameter"), (View() as data, _, _):
                return data
            case Global("torch._utils", "_rebuild_parameter_with_state"), (View() as data, _, _, _):
                return data
            case (  # a tensor with attributes, or of a class that adds methods to the same bytes
                Global("torch._tensor", "_rebuild_from_type_v2"),
                (Global("torch._utils") as rebuild, Global(), inner, _),
            ):
                return self.call(rebuild, inner)
            case Global("torch._utils" | "torch._tensor", name), _ if name.startswith("_rebuild"):
                raise UnsafePickleError(f"makes a tensor by {function}, in a way ldm does not know")
        self.check_dropped(function, args)
        if isinstance(function, Dropped):
            return function
        self.stubs[str(function)] = None
        return Dropped(function)

    def pair(self, value: object) -> tuple[object, object]:
        match value:
            case [key, item]:
                return key, item
        raise self.damaged()

    def check_dropped(self, function: object, operands: object) -> None:
        """A call, or an object's state, may be left out; unless it is the only way to a tensor."""
        if isinstance(operands, list | tuple):
            self.purse.spend(8 * len(operands))
            if any(isinstance(operand, Storage) for operand in operands):
                raise UnsafePickleError(f"makes a tensor by {brief(function)}, which is not called")

    def view(
        self, storage: Storage, offset: object, shape: object, stride: object, dtype: torch.dtype
    ) -> View:
        """A tensor, once it is sure to lie inside of its storage, and to be no larger."""
        self.purse.spend(TENSOR)
        self.num_views += 1
        if (
            not is_size(offset)
            or not isinstance(shape, tuple)
            or not isinstance(stride, tuple)
            or not len(shape) == len(stride) <= DEPTH
            or not all(is_size(n) for n in (*shape, *stride))
        ):
            raise UnreadableError("describes a tensor by something other than sizes and strides")
        room = storage.nbytes // dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 in shape:  # no bytes; but even then torch wants to count them
            fits = math.prod(max(n, 1) for n in shape) < 2**56
        else:  # a stride of 0 could make terabytes out of one number
            fits = last < room and math.prod(shape) <= room
        if not fits:
            raise UnreadableError(
                f"describes a tensor of shape {list(shape)[:8]}, strides {list(stride)[:8]} and"
                f" offset {offset} in storage {storage.key!r}, which has {room} numbers"
            )
        return View(storage, offset, shape, stride, dtype)


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


# --- From a tree to keys ---------------------------------------------------------------------


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


def key_text(key: object) -> str:
    """A part of a tensor's key: one line that a terminal can show."""
    text = key.decode("utf-8", "backslashreplace") if isinstance(key, bytes) else brief(key)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def torch_pickle(content: object, machine: Machine, starts: Mapping[str, int]) -> TorchPickle:
    """What came out of a machine, with the place of every storage's first byte."""
    entries: dict[str, Entry] = {}
    made: dict[int, Entry] = {}  # a tensor under two keys is one entry
    for key, view in keyed_views(content, machine.purse):
        if id(view) not in made:
            offset = starts[view.storage.key] + view.offset * view.dtype.itemsize
            stride = None if view.stride == contiguous(view.shape) else view.stride
            made[id(view)] = Entry(machine.file, offset, view.dtype, view.shape, stride)
        if entries.setdefault(key, made[id(view)]) is not made[id(view)]:
            raise UnreadableError(f"holds two tensors under the key {key!r}")
    if machine.num_views and not entries:
        inside = ", ".join(itertools.islice(machine.stubs, 3))
        raise UnsafePickleError(f"holds its tensors inside of objects that need code: {inside}")
    return TorchPickle(entries, tuple(machine.stubs))


@contextlib.contextmanager
def naming(file: MappedFile) -> Iterator[None]:
    """Whatever is wrong is said of the file by its name; and no page of it stays in memory."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{file.path} {error}") from error.__cause__
    finally:
        file.release(0, len(file))


# --- Before PyTorch 1.6 ----------------------------------------------------------------------

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def read_torch_legacy(file: MappedFile) -> TorchPickle:
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
        if machine.load() != LEGACY_MAGIC:
            raise UnreadableError("is a pickle, but none of PyTorch's: it has no magic number")
        if machine.load() != LEGACY_PROTOCOL:
            raise UnreadableError("is a pickle of PyTorch's in an unknown version")
        machine.load()
        content = machine.load()
        keys = machine.load()
        storages = machine.storages
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
        return torch_pickle(content, machine, starts)


# --- PyTorch 1.6 and later -------------------------------------------------------------------

LOCAL_HEADER = Struct("<4s22xHH")  # its signature, and the lengths of its name and extra field
END = Struct("<4s18x")  # a signature, numbers, and then a comment
END_SIGNATURE, MAX_COMMENT = b"PK\x05\x06", 65535


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a zip archive: where its bytes are, which must be stored as they are."""

    start: int
    size: int


def read_torch_zip(file: MappedFile) -> TorchPickle:
    """What is in a checkpoint as PyTorch writes it since 1.6: a zip archive with, in one folder,
    the content as a pickle (`data.pkl`), each storage's bytes (`data/<key>`), and notes.

    Raises:
        UnreadableError: this is no such file, or a damaged one.
        TruncatedError: its end is missing.
        UnsafePickleError: it makes its tensors by means that ldm does not know.
    """
    with naming(file):
        directory, end = zip_directory(file)
        folder = torch_folder([info.orig_filename for info in directory])
        records = zip_records(file, directory, end)
        order = records.get(f"{folder}/byteorder")
        if order is not None and file.bytes[order.start : order.start + order.size] != b"little":
            raise UnreadableError("is not little-endian: its record byteorder says so")
        program = records[f"{folder}/data.pkl"]
        machine = Machine(file, program.start, program.start + program.size, Purse())
        content = machine.load()
        starts = {}
        for key, storage in machine.storages.items():
            record = records.get(f"{folder}/data/{key}")
            if record is None:
                raise UnreadableError(f"has no record data/{key}, which holds a tensor")
            if record.size < storage.nbytes:
                raise UnreadableError(
                    f"has {record.size} bytes in data/{key}, whose tensors need {storage.nbytes}"
                )
            starts[key] = record.start
        return torch_pickle(content, machine, starts)


def zip_directory(file: MappedFile) -> tuple[list[zipfile.ZipInfo], int]:
    """The records that an archive lists at its end, and where the list begins."""
    latest = max(0, len(file) - END.size)
    if file.bytes.rfind(END_SIGNATURE, max(0, latest - MAX_COMMENT), latest + 4) < 0:
        raise cut_off("the list of records at its end is missing", file)
    try:
        with zipfile.ZipFile(Window(file)) as archive:
            return archive.infolist(), archive.start_dir
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise UnreadableError(f"is a damaged zip archive: {error}") from error


class Window:
    """A mapped file as `zipfile` wants it: it seeks, and reads no more than a sane directory."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.at = file, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self.at, len(self.file))[whence]
        if at < 0:
            raise OSError("it refers to bytes before its beginning")
        self.at = at
        return at

    def tell(self) -> int:
        return self.at

    def read(self, length: int = -1) -> bytes:
        start = self.at
        self.at = len(self.file) if length < 0 else min(start + length, len(self.file))
        if self.at - start > DIRECTORY:
            raise UnreadableError(f"is a zip archive that lists more than {DIRECTORY} bytes")
        return self.file.bytes[start : self.at]


def torch_folder(names: Sequence[str]) -> str:
    """The one folder of a checkpoint's archive; torch names it after the file."""
    folders = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(folders) != 1:
        found = f"{len(folders)} files named data.pkl"
        raise UnreadableError(f"is a zip archive, but none of PyTorch's: it has {found}")
    if f"{folders[0]}/constants.pkl" in names:
        raise UnreadableError("is a TorchScript program: ldm reads weights alone (a `state_dict`)")
    return folders[0]


def zip_records(
    file: MappedFile, directory: Sequence[zipfile.ZipInfo], end: int
) -> dict[str, Record]:
    """Where the records' bytes are, once it is sure that no two share any.

    The directory tells where a record's local header is. Behind that are the name once more, a
    padding of any length (torch aligns its storages by it), and the bytes.
    """
    records: dict[str, Record] = {}
    free = 0  # all before it is taken
    for info in sorted(directory, key=lambda info: info.header_offset):
        name = info.orig_filename
        said = f"is a damaged zip archive: its record {name[:60]!r}"
        if info.flag_bits & 1:
            raise UnreadableError(f"is an encrypted zip archive (its record {name[:60]!r})")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnreadableError(
                f"has its record {name[:60]!r} compressed: tensors must be stored uncompressed, as"
                " torch.save writes them"
            )
        if info.compress_size != info.file_size:
            raise UnreadableError(f"{said} has two sizes")
        at = info.header_offset
        if at < free or at + LOCAL_HEADER.size > end:
            raise UnreadableError(f"{said} begins inside of another, or outside of the file")
        signature, name_length, padding = LOCAL_HEADER.unpack_from(file.bytes, at)
        start = at + LOCAL_HEADER.size + name_length + padding
        free = start + info.file_size
        if signature != b"PK\x03\x04" or free > end:
            raise UnreadableError(f"{said} lies outside of the file, or has no header")
        if name in records:
            raise UnreadableError(f"{said} is there twice")
        records[name] = Record(start, info.file_size)
    return records


def cut_off(what: str, file: MappedFile) -> TruncatedError:
    return TruncatedError(f"is cut off: {what}, found {len(file):,} bytes; fetch it again")
