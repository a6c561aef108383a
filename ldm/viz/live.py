"""Watch a picture form, in the notebook cell that makes it.

    for step in viz.live(pipe.denoise("a red house"), pipe.decode):
        pass

The steps pass through unchanged, so the loop may look at each of them, send new latents back, or
stop. One output of the cell is replaced at every step; there are no widgets.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ldm.samplers import Step, Steps
from ldm.viz.grids import strip
from ldm.viz.latents import Draw, false_colours
from ldm.viz.runs import LATENTS

if TYPE_CHECKING:
    from PIL.Image import Image


def live(
    steps: Steps,
    draw: Draw | None = None,
    *,
    show: str = "x0",
    every: int = 1,
    size: int | None = 256,
) -> Steps:
    """Pass steps on, and show each as it comes: in Jupyter a picture, elsewhere a line on a
    terminal, and nothing where the output is no terminal.

    Args:
        steps: `pipe.denoise(...)`. What is sent to this generator is sent on to them, and when it
            is closed, so are they.
        draw: how to show latents: `pipe.decode`, which for a large model takes about as long as a
            step; a `viz.LatentRGB`, at once; None shows false colours.
        show: which latents: x, x0, eps, eps_cond or eps_uncond.
        every: show every n-th step, the first and the last besides.
        size: of the pictures, as in `viz.grid`.

    Raises:
        ValueError: at the call, for `show` or `every` out of their range; at the first step, where
            the run is without guidance and has no such latents.
    """
    if show not in LATENTS:
        raise ValueError(f"a step has no {show!r}: it has {', '.join(LATENTS)}")
    if every < 1:
        raise ValueError(f"every must be 1 or more, not {every}")

    def picture(step: Step) -> Image:
        latents = getattr(step, show)
        if latents is None:
            raise ValueError(f"there is no {show}: the run is without guidance")
        drawn = (draw or false_colours(latents.shape[1]))(latents)
        return strip(drawn, title=f"step {step.index + 1}, t = {step.t:.5g}", size=size)

    screen = _cell(picture) if in_jupyter() else _terminal()
    return _passed_on(steps, every, screen)


def in_jupyter() -> bool:
    """Whether this runs in a notebook's kernel, which can replace what it has shown."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


Screen = contextlib.AbstractContextManager[Callable[[Step], None]]


def _passed_on(steps: Steps, every: int, screen: Screen) -> Steps:
    """The steps, each shown before it is passed on; what the caller sends goes back to them."""
    with contextlib.closing(steps), screen as see:
        step, sent, last_seen = None, None, -1
        while True:
            try:
                step = steps.send(sent)
            except StopIteration:
                break
            if step.index % every == 0:
                see(step)
                last_seen = step.index
            sent = yield step
        if step is not None and step.index != last_seen:
            see(step)


@contextlib.contextmanager
def _cell(picture: Callable[[Step], Image]) -> Iterator[Callable[[Step], None]]:
    """One output of the notebook cell that runs, replaced by each step's picture."""
    from IPython.display import DisplayHandle

    handle: Any = DisplayHandle()  # IPython gives its methods no types
    shown = False

    def see(step: Step) -> None:
        nonlocal shown
        (handle.update if shown else handle.display)(picture(step))
        shown = True

    yield see


@contextlib.contextmanager
def _terminal() -> Iterator[Callable[[Step], None]]:
    """One line on the terminal, replaced by each step's."""
    shown = False

    def see(step: Step) -> None:
        nonlocal shown
        if sys.stderr.isatty():
            sys.stderr.write(f"\rstep {step.index + 1}, t = {step.t:<6.5g}")
            sys.stderr.flush()
            shown = True

    try:
        yield see
    finally:
        if shown:
            sys.stderr.write("\n")
