"""Whether latents are still latents: finite numbers of a sane size.

What is none is drawn as one flat colour, black as a rule, without a word. So the loop watches what
it makes. To look at a number on a GPU is to wait for the GPU: therefore nothing is looked at there
before the end, and what it takes to say then where it went wrong stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.errors import DivergedError

LARGEST = 1e6
"""Latents have a standard deviation of about 1. A number beyond this is an accident, and the layers
that normalise it would make one colour of the whole picture."""


def is_sound(x: Tensor) -> Tensor:
    """Whether all numbers are finite and none is beyond `LARGEST`: a bool, (), on x's device."""
    return (x.float().abs() <= LARGEST).all()  # NaN is not; half precision ends before LARGEST


def ailment(x: Tensor) -> str:
    """What is wrong with numbers that are not sound, for a message."""
    if x.isnan().any():
        return "NaN"
    return "infinity" if x.isinf().any() else f"numbers as large as {x.abs().max().item():.3g}"


class Watch:
    """Remembers the last step of a run that was given sound latents, without waiting for a GPU."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.index = torch.full((), -1, device=x.device)

    def see(self, index: int, x: Tensor) -> None:
        """Step `index` is given `x`."""
        sound = is_sound(x)
        self.x = torch.where(sound, x, self.x)
        self.index = self.index.masked_fill(sound, index)

    def check(self, x: Tensor, timesteps: Sequence[float]) -> None:
        """A DivergedError, if what came out is not sound, that names the step which made it.
        `timesteps` has the t of each step."""
        if is_sound(x):
            return
        index = int(self.index.item())
        if index < 0:
            raise DivergedError(f"x, from which the run starts, holds {ailment(self.x)}")
        t = timesteps[index]
        where = f"step {index + 1} of {len(timesteps)} (t = {t:.6g})"
        raise DivergedError(f"the latents hold {ailment(x)} after {where}", t=t, x=self.x)
