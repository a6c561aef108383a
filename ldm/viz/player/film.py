"""A run, filmed: its trace, and the pictures that its latents decode to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ldm.inputs import Inputs
from ldm.observe.traces import Trace, trace_run
from ldm.settings import Settings
from ldm.viz.runs import spaced

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

MOST_FRAMES = 100


@dataclass(frozen=True, eq=False)
class Film:
    """A run, and what it looks like.

    Attributes:
        run: the whole trace.
        frames: the steps that are shown, rising.
        x, x0: of each frame, the noisy latents and their clean estimate, decoded.
        picture: what the run ended in.
    """

    run: Trace
    frames: tuple[int, ...]
    x: tuple[Image.Image, ...]
    x0: tuple[Image.Image, ...]
    picture: Image.Image


def film(
    pipe: TextToImage,
    settings: Settings,
    inputs: Inputs = Inputs(),
    *,
    on_work: Callable[[], object] | None = None,
) -> Film:
    """Trace a run of one picture, and decode what it is shown by.

    Args:
        pipe, settings, inputs: as for `trace_run`.
        on_work: called after every step and every decoded picture, `work_of` times in all.
    """

    def done(*_: object) -> None:
        if on_work is not None:
            on_work()

    hook = pipe.unet.register_forward_hook(done)
    try:
        run = trace_run(pipe, settings, inputs)
    finally:
        hook.remove()
    frames = shown_frames(len(run))
    assert run.picture is not None  # a run that was just traced has its picture

    def decode(latents: Tensor) -> Image.Image:
        (image,) = pipe.decode(latents)
        done()
        return image

    return Film(
        run,
        frames,
        x=tuple(decode(run.x[i : i + 1]) for i in frames),
        x0=tuple(decode(run.x0[i : i + 1]) for i in frames),
        picture=Image.fromarray(run.picture.numpy()),
    )


def work_of(steps: int) -> int:
    """How often a film of so many steps says that it has done something."""
    return steps + 2 * len(shown_frames(steps))


def shown_frames(steps: int) -> tuple[int, ...]:
    """The steps that a page shows: all of them, or `MOST_FRAMES`, evenly spaced.

    A page of a thousand decoded steps would be slow to make and slow to open.
    """
    return tuple(spaced(steps, MOST_FRAMES))
