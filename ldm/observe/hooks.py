"""Look at what passes through a model while it runs, or change it.

    with ldm.record(pipe.unet, "*.cross_attention.weights") as maps:
        pipe("a red house")
    maps["mid.transformer.cross_attention.weights"]      # one tensor per call of the UNet

Every part of a model has a name, its path in `module.named_modules()`, and what the part returns is
the value of that name: "mid.res1" of a UNet, "time_embedding", "decoder.up.3" of an autoencoder. Of
a part that returns several things, as some of the text encoder's do, it is the first tensor. A glob
names many at once; its `*` also matches dots. `record` keeps copies of the values, `edit` replaces
them. Both are forward hooks that are gone when the `with` ends, and belong to the thread that
entered it: what other threads draw meanwhile passes them by.

Attention has no part that returns its weights to someone who does not ask: the fast kernel never
writes them down. They exist only while a hook is on the part named `weights`.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

MAX_BYTES = 8 * 2**30
"""What the values that wildcards name may take in one recording, unless the caller says otherwise:
room for all cross-attention of Stable Diffusion v1, 132 MB a step at 64x64 latents, over 50 steps.
"""

SHARE = 64
"""One such value may take this part of it at most, since a run asks the UNet some fifty times."""


@contextlib.contextmanager
def record(
    module: nn.Module,
    *globs: str,
    reduce: Callable[[Tensor], Tensor] | None = None,
    max_bytes: int | None = MAX_BYTES,
) -> Iterator[dict[str, list[Tensor]]]:
    """Keep a copy of every value with these names, one per call: {name: [first, second, ...]}.

    A guided step calls the UNet once with a batch of two halves, without the prompt first: its
    attention weights are (2 B, heads, places, tokens). On a CPU `TextToImage` asks each image of
    a batch alone, so that B images make B calls a step, in their order.

    Memory is bounded. A value of more than `max_bytes / 64` is refused where a wildcard names it
    (the finest self-attention of Stable Diffusion v1 takes 1 GiB a layer and step), and so is
    going past `max_bytes` in all. A name that is given in full is asked for, and kept whatever it
    takes.

    Args:
        module: e.g. `pipe.unet`, `pipe.vae`, `pipe.text`. What is compiled runs as plain code
            meanwhile, in every thread: compiled code passes hooks by.
        globs: names of parts, with `*`, `?` and `[...]` as in file names.
        reduce: what to keep of a value, e.g. `lambda w: w.mean(dim=1)`, the mean over heads. It
            sees the value itself, and must not change it in place.
        max_bytes: 8 GiB by default; None is without a bound.

    Yields:
        The copies, detached, on the value's own device, as they come in.

    Raises:
        ValueError: a glob names nothing (near names are listed) or something without a tensor,
            or memory would go past its bound: the message says the bytes.
        RuntimeError: at the end, a name recorded nothing: nobody asked the model in this thread,
            or what ran was a captured CUDA graph, which passes hooks by.
    """
    parts = find_parts(module, globs)
    values: dict[str, list[Tensor]] = {name: [] for name in parts}
    bounded = set() if max_bytes is None else parts.keys() - set(globs)
    held = 0

    def before(name: str, size: int) -> None:
        if max_bytes is not None and name in bounded and size * SHARE > max_bytes:
            raise ValueError(
                f"{name} takes {size:,} bytes a call, more than a wildcard may "
                f"({max_bytes // SHARE:,}): record it by its full name, or raise max_bytes"
            )

    def keep(name: str, value: Tensor) -> None:
        nonlocal held
        before(name, value.nbytes)
        kept = value.detach() if reduce is None else reduce(value.detach())
        if not isinstance(kept, Tensor):
            raise ValueError(f"reduce must return a tensor, not {type(kept).__name__}")
        if name in bounded:
            held += kept.nbytes
            if max_bytes is not None and held > max_bytes:
                raise ValueError(
                    f"with {name} the recording would take {held:,} bytes, more than "
                    f"max_bytes={max_bytes:,}: reduce the values, name fewer, or raise max_bytes"
                )
        values[name].append(kept.detach().clone())

    with _hooked(parts, keep, before):
        yield values


@contextlib.contextmanager
def edit(
    module: nn.Module, *globs: str, by: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Replace values while the model runs: re-weight attention, ablate a block.

    Edits and recordings of the same name take turns in the order in which they were entered: a
    `record` inside of an `edit` sees the edited values.

        def blind(name, weights):                # (B, heads, places, tokens)
            return weights * keep                # keep: (tokens,), 0 at the words to ignore
        with ldm.edit(pipe.unet, "*.cross_attention.weights", by=blind):
            pipe("a red house")

    Args:
        module, globs: as in `record`; no bound on memory, since nothing is kept.
        by: called with each name and value; a tensor that it returns takes the value's place, of
            the same shape, dtype and device; None leaves it as it is. It must not change the value
            in place.

    Raises:
        ValueError: a glob names nothing, or something without a tensor, or what `by` returns
            does not fit.
        RuntimeError: as in `record`, no edit took place.
    """

    def replace(name: str, value: Tensor) -> Tensor | None:
        new = by(name, value)
        if new is not None and not isinstance(new, Tensor):
            raise ValueError(f"an edit must return a tensor or None, not {type(new).__name__}")
        if new is not None and _kind(new) != _kind(value):
            raise ValueError(f"the edit of {name} returned {_kind(new)}, not {_kind(value)}")
        return new

    with _hooked(find_parts(module, globs), replace):
        yield


def find_parts(module: nn.Module, globs: Sequence[str]) -> dict[str, nn.Module]:
    """The parts that globs name, in the module's order: {name: part}.

    Only parts that are called have a value: lists of parts, such as "down.1" of a UNet, have none.

    Raises:
        ValueError: no globs, or one that names nothing.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"observe a module, such as pipe.unet, not a {type(module).__name__}")
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise ValueError("say what to observe, each a string: a name or a glob such as '*.res'")
    # A compiled part wraps the plain one, and adds a level to the names.
    names = {
        ".".join(piece for piece in path.split(".") if piece != "_orig_mod"): part
        for path, part in module.named_modules()
        if type(part).forward is not nn.Module.forward
    }
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = ", ".join(near_names(glob, names))
            raise ValueError(f"no value is named {glob!r}; near names: {near}")
    return {
        name: part for name, part in names.items() if any(fnmatchcase(name, glob) for glob in globs)
    }


def near_names(glob: str, names: Iterable[str], count: int = 5) -> list[str]:
    """What someone who wrote `glob` may have meant: parts below it, names spelled alike, or, if
    there are none, the first parts that there are."""
    names = list(names)
    if below := [name for name in names if name.startswith(glob + ".")]:
        return below[:count]
    pieces = [name.split(".") for name in names]
    ends = {"*." + ".".join(path[i:]) for path in pieces for i in range(1, len(path))}
    alike = difflib.get_close_matches(glob, [*names, *sorted(ends)], n=count, cutoff=0.5)
    return alike or list(dict.fromkeys(path[0] for path in pieces if path[0]))[:count]


@contextlib.contextmanager
def _hooked(
    parts: Mapping[str, nn.Module],
    after: Callable[[str, Tensor], Tensor | None],
    before: Callable[[str, int], None] | None = None,
) -> Iterator[None]:
    """Call `after(name, value)` with every value, and with what it returns go on, if anything;
    `before(name, bytes)` comes first, where a part can tell the size of its value before it makes
    it. Every part must be heard of before the end. All of it in this thread alone."""
    heard: set[str] = set()

    def value_hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(part: nn.Module, inputs: Any, output: Any) -> Any:
            value = first_tensor(output)
            if value is None:
                kind = type(output).__name__
                raise ValueError(f"{name or 'the module'} returns a {kind}, and no tensor")
            if is_captured(value):
                raise RuntimeError(
                    f"{name or 'the module'} is being captured, and replays pass hooks by: "
                    "compile, or capture, before you record"
                )
            heard.add(name)
            new = after(name, value)
            return None if new is None else with_tensor(output, value, new)

        return hook

    def size_hook(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(part: nn.Module, inputs: Any) -> None:
            if before is not None:
                before(name, part.output_bytes(*inputs))  # type: ignore[operator]

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(eagerly())
        for name, part in parts.items():
            if hasattr(part, "output_bytes"):
                stack.callback(part.register_forward_pre_hook(OfThisThread(size_hook(name))).remove)
            stack.callback(part.register_forward_hook(OfThisThread(value_hook(name))).remove)
        yield
    # Not in a finally: an exception from inside the `with` says more than this one.
    if silent := [name for name in parts if name not in heard]:
        named = ", ".join(name or "the module" for name in silent[:3])
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        raise RuntimeError(
            f"nothing passed through {named}{more}: never called in this thread, or what ran was "
            "a captured graph, which passes hooks by"
        )


class OfThisThread:
    """A hook of the thread that makes it: what another draws with the same model passes it by.

    It says whose it is, so that the other's layers need not do for its sake what they would do for
    a watched one (`ldm.layers.is_watched`): the other's picture stays the same to the last bit.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook
        self.thread = threading.get_ident()

    def __call__(self, *arguments: Any) -> Any:
        """What the hook says; in another thread, nothing."""
        # What compiles knows no threads, and is refused in each: it would keep the hook for good.
        if torch.compiler.is_dynamo_compiling() or threading.get_ident() == self.thread:
            return self.hook(*arguments)
        return None


def first_tensor(output: Any) -> Tensor | None:
    """What is looked at of what a part returns: itself, or the first tensor of a tuple, a list or
    a mapping (transformers' outputs are such); None if there is none."""
    match output:
        case Tensor():
            return output
        case Mapping():
            values = list(output.values())
        case tuple() | list():
            values = list(output)
        case _:
            return None
    return next((value for value in values if isinstance(value, Tensor)), None)


def with_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """What a part returns, of the same kind, with `new` in the place of the tensor `old`."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        for name, value in output.items():
            if value is old:
                changed[name] = new
        return changed
    values = [new if value is old else value for value in output]
    is_named = hasattr(output, "_fields")  # a named tuple takes its values one by one
    return type(output)(*values) if is_named else type(output)(values)


def is_captured(value: Tensor) -> bool:
    """Whether the value is being made for torch.compile or a CUDA graph to repeat, not for now."""
    return torch.compiler.is_dynamo_compiling() or (
        value.is_cuda and torch.cuda.is_current_stream_capturing()
    )


_observers = 0
_stance = contextlib.ExitStack()
_turn = threading.Lock()


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """torch.compile makes code that passes later hooks by: run the plain code behind it instead,
    until the last observer has left (they may leave in any order). It is one for all threads."""
    global _observers
    with _turn:
        # Nothing can have been compiled before this is imported, and importing it takes seconds.
        if "torch._dynamo" in sys.modules:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _observers += 1
    try:
        yield
    finally:
        with _turn:
            _observers -= 1
            if _observers == 0:
                _stance.close()


def _kind(value: Tensor) -> str:
    """Shape, type and device, for a message."""
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
