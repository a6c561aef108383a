"""The stack machine that pickles are programs for: its instructions, and nothing but them.

Whatever an instruction asks of the world outside is answered by `Calls`.
"""

from __future__ import annotations

import pickle
from struct import Struct

from ldm.checkpoints.entries import MappedFile
from ldm.checkpoints.pickles.calls import Calls
from ldm.checkpoints.pickles.limits import INSTRUCTION, INTEGER, LINE, NAME, Purse
from ldm.checkpoints.pickles.values import ENDLESS, UNSET, Dict, Dropped, Malformed
from ldm.errors import TruncatedError, UnreadableError

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
        calls: what answers the instructions that would import, fetch or call something.
    """

    def __init__(self, file: MappedFile, at: int, end: int, purse: Purse) -> None:
        self.file, self.at, self.end, self.purse = file, at, end, purse
        self.calls = Calls(purse)

    def load(self) -> object:
        """What the next pickle stands for.

        Raises:
            UnreadableError: it is damaged, or too intricate.
            TruncatedError: the file ends in it.
            UnsafePickleError: it makes a tensor by means that are not among the `calls`.
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
        except (IndexError, Malformed):  # an empty stack, or a memo without that number, is one too
            damaged = f"holds a pickle that is damaged before byte {self.at}"
            raise UnreadableError(damaged) from None

    # What lies in the file behind an instruction.

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
            raise Malformed
        return self.take(end + 1 - self.at)[:-1].decode("ascii", "backslashreplace")

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
            raise Malformed
        return int(line)

    # The instructions.

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
                self.push(tuple(self.items()))
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
                self.push(self.items())
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
                self.push(self.decimal(self.line()))
            case pickle.GLOBAL:
                self.push(self.calls.name(self.line(), self.line()))
            case pickle.STACK_GLOBAL:
                name, module = self.stack.pop(), self.stack.pop()
                if not isinstance(module, bytes) or not isinstance(name, bytes):
                    raise Malformed
                words = (word.decode("ascii", "backslashreplace") for word in (module, name))
                self.push(self.calls.name(*words))
            case pickle.REDUCE | pickle.NEWOBJ:
                args, function = self.stack.pop(), self.stack.pop()
                self.push(self.calls.call(function, args))
            case pickle.NEWOBJ_EX:
                _, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
                self.push(self.calls.call(function, args))
            case pickle.OBJ:  # an old class of Python 2
                function, *rest = self.items() or [None]
                self.push(self.calls.call(function, tuple(rest)))
            case pickle.INST:  # the same, in protocol 0
                function = self.calls.name(self.line(), self.line())
                self.push(self.calls.call(function, tuple(self.items())))
            case pickle.BUILD:  # attributes, such as a state dict's `_metadata`
                state = self.stack.pop()
                self.calls.check_dropped(self.stack[-1], state)
            case pickle.BINPERSID:
                self.push(self.calls.persistent(self.stack.pop()))
            case _:
                raise UnreadableError(f"holds a pickle with {code!r}, which PyTorch never writes")

    # What the instructions are made of.

    def push(self, value: object) -> None:
        """On top of the stack; of the one that is there once the value is made: `items` puts
        another in its place."""
        self.stack.append(value)

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
            raise Malformed

    def update(self, items: list[object]) -> None:
        """Into the dict on top of the stack: a key, its value, a key, its value ..."""
        container = self.stack[-1]
        if isinstance(container, Dict) and len(items) % 2 == 0:
            container.extend(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(container, Dropped):
            raise Malformed

    def remember(self, index: int) -> None:
        """Store the top of the stack. Picklers count up; a leap would only ask for memory."""
        if index > self.count:
            raise Malformed
        self.memo.extend([UNSET] * (index + 1 - len(self.memo)))
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> object:
        if self.memo[index] is UNSET:
            raise IndexError
        return self.memo[index]


def cut_off(what: str, file: MappedFile) -> TruncatedError:
    """The error for a file that ends too early: what is missing, and how many bytes there are."""
    return TruncatedError(f"is cut off: {what}, found {len(file):,} bytes; fetch it again")
