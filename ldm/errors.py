"""What can be wrong with weights on disk or with what they draw, and how anything is told: one
printable line.

Names in a file are the words of whoever made it. On a terminal an escape sequence is a command, a
line break forges a line of ours, and a name of three megabytes buries what matters. So whatever
came out of a file passes `printable` on its way to people: every `CheckpointError` does that by
itself, and the command does it with all that it prints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class CheckpointError(ValueError):
    """Weights that cannot be loaded; the base of all below. Its message is one printable line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class UnreadableError(CheckpointError):
    """Not a file of weights in any format that ldm reads, or a damaged one."""


class EmptyFileError(UnreadableError):
    """No bytes at all."""


class TruncatedError(UnreadableError):
    """The beginning of a file of weights: the rest is missing. Says expected and found bytes."""


class PointerError(UnreadableError):
    """A git-lfs pointer: the few lines that stand for a file that was never fetched."""


class WebPageError(UnreadableError):
    """A web page (a login form, say) that was saved in the place of a file of weights."""


class UnsafePickleError(UnreadableError):
    """A pickle that needs something other than tensors and plain containers; names the global."""


class MissingPartsError(CheckpointError):
    """A folder, or a file, that holds some stages of a model and not the others."""


class FamilyError(CheckpointError):
    """Weights of another kind of model than Stable Diffusion v1; says which."""


class KeysError(CheckpointError):
    """Keys are missing or unexpected."""


class ShapeError(KeysError):
    """A tensor has another shape than the model's."""


class DtypeError(KeysError):
    """A weight is not stored as floating-point numbers: the model was quantised."""


class ConfigError(CheckpointError):
    """No model can be built: the config is missing, impossible, or that of another model."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity."""


class HalfOverflowError(NonFiniteError):
    """A finite value that is too large for the precision that was asked for."""


class DivergedError(ValueError):
    """What was to become a picture is none: NaN, infinity, or numbers of an absurd size.

    Attributes:
        t, x: the timestep and the latents, still sound, of the step of a sampler that made it; None
            where no step did.
    """

    def __init__(self, message: str, *, t: float | None = None, x: Tensor | None = None) -> None:
        super().__init__(message)
        self.t = t
        self.x = x


# --- How it is told --------------------------------------------------------------------------

LINE, NAME = 1000, 200  # the longest line, and the longest name in one, in characters


def printable(text: object, limit: int = LINE) -> str:
    """Any text as one line that a terminal only shows: what has no shape of its own (controls, line
    breaks, marks that turn the writing direction, halves of a character) is spelled out, as \\x1b,
    and of more than `limit` characters the middle is left out."""
    shown = (
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in shortened(str(text), limit)
    )
    return shortened("".join(shown), limit)


def shortened(text: str, limit: int) -> str:
    """The beginning and the end of a text, where there is more than `limit` characters of it."""
    if len(text) <= limit:
        return text
    gap = " ... "
    end = (limit - len(gap)) // 2
    return text[: limit - len(gap) - end] + gap + text[len(text) - end :]


def some(names: Sequence[str], count: int = 8) -> str:
    """The first few of many names, on one line, and how many more there are."""
    shown = [printable(name, NAME) for name in names[:count]]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return shortened(", ".join(shown), LINE // 2) + more


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """What to add to the line that says that there is no such name: the one or two nearest of
    those that there are, or nothing where none is near."""
    by_lower = {one.lower(): one for one in names}
    near = difflib.get_close_matches(name[:NAME].lower(), by_lower, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(sorted(by_lower[one] for one in near))}?" if near else ""
