"""What can be wrong with weights on disk. Every message is one line that says what, and where."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """Weights that cannot be loaded; the base of all below."""


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


def some(names: Sequence[str], count: int = 8) -> str:
    """The first few of many names, on one line, and how many more there are."""
    shown = [name[:200] if name.isprintable() else repr(name)[:200] for name in names[:count]]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(shown) + more
