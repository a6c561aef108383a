"""How much a pickle may cost us, in memory and in time: all that it asks for is paid."""

from __future__ import annotations

from ldm.errors import UnreadableError

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
