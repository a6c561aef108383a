"""The loop that all samplers share: ask for the noise, let a rule take the step, yield all of it.

    x ── eps_fn ── eps ── x0 ── rule ── x_prev ── the next step's x

Samplers differ in the rule alone: how to get from what a step knows to `x_prev`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.samplers.noise import Generators, draw_noise
from ldm.schedule import NoiseSchedule, x0_from_eps


class Prediction(NamedTuple):
    """What a guided model says: the noise to use, and the two predictions it was made of."""

    eps: Tensor
    eps_cond: Tensor
    eps_uncond: Tensor


EpsFn = Callable[[Tensor, Tensor], Tensor | Prediction]
"""eps_fn(x, t): x (B, C, H, W) and t int64 (B,) -> the noise in x."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler. No later step changes these tensors; all are (B, C, H, W).

    Attributes:
        index: 0 for the first step.
        t: the timestep of `x`; t_prev: that of `x_prev` (-1 is the clean picture).
        x: the noisy latents before the step; x_prev: after it.
        eps: the predicted noise in `x`; x0: the clean picture that it implies.
        eps_cond, eps_uncond: with and without the prompt, where guidance made `eps`, else None.
    """

    index: int
    t: int
    t_prev: int
    x: Tensor
    eps: Tensor
    eps_cond: Tensor | None
    eps_uncond: Tensor | None
    x0: Tensor
    x_prev: Tensor


Steps = Generator[Step, Tensor | None, None]


@dataclass(frozen=True)
class Known:
    """What a rule may use to take its step.

    Attributes:
        x, eps, x0: as in `Step`, (B, C, H, W).
        t, t_prev: as in `Step`; alpha_bar, alpha_bar_prev: how much of the picture is left there.
        ask: ask(x, t) -> eps, (B, C, H, W): the model once more, at another point of this step, for
            methods of a higher order.
        draw: draw() -> standard normal noise, (B, C, H, W); new numbers at every call.
        memory: what earlier steps of the run kept under names of their own, for methods that look
            back. It is empty at the first step, and stays when a caller sends an `x` of their own.
    """

    x: Tensor
    eps: Tensor
    x0: Tensor
    t: int
    t_prev: int
    alpha_bar: float
    alpha_bar_prev: float
    ask: Callable[[Tensor, int], Tensor]
    draw: Callable[[], Tensor]
    memory: dict[str, Any]


Rule = Callable[[Known], Tensor]
"""A sampler's own part: from what a step knows to `x_prev`, (B, C, H, W), a new tensor."""


def sample(
    rule: Rule,
    eps_fn: EpsFn,
    x: Tensor,
    timesteps: Sequence[tuple[int, int]],
    schedule: NoiseSchedule,
    *,
    generators: Generators | None = None,
) -> Steps:
    """Walk the grid by a rule: one `Step` for each of its intervals.

    Args:
        rule: takes the step; for a sampler of your own, any function of `Known`.
        eps_fn: predicts the noise; asked once per step, and again only where the rule does.
        x: starting noise, (B, C, H, W); never changed.
        timesteps: pairs (t, t_prev), e.g. `schedule.ddim_timesteps(50)`.
        schedule: gives alpha_bar.
        generators: for rules that draw noise, see `draw_noise`.

    Raises:
        ValueError: at the first step whose rule draws noise without generators.
    """

    # Around the generator, not in it: at a yield inside of `with no_grad()` the caller's gradients
    # would be off too.
    @torch.no_grad()
    def steps(x: Tensor) -> Steps:
        memory: dict[str, Any] = {}
        for index, (t, t_prev) in enumerate(timesteps):
            eps, eps_cond, eps_uncond = unpack(eps_fn(x, each(t, x)))
            alpha_bar, alpha_bar_prev = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t_prev)
            known = Known(
                x=x,
                eps=eps,
                x0=x0_from_eps(x, eps, alpha_bar),
                t=t,
                t_prev=t_prev,
                alpha_bar=alpha_bar,
                alpha_bar_prev=alpha_bar_prev,
                ask=lambda x, t: unpack(eps_fn(x, each(t, x)))[0],
                draw=functools.partial(draw_noise, generators, x),
                memory=memory,
            )
            x_prev = rule(known)
            sent = yield Step(index, t, t_prev, x, eps, eps_cond, eps_uncond, known.x0, x_prev)
            x = x_prev if sent is None else sent

    return steps(x)


def each(t: int, x: Tensor) -> Tensor:
    """A timestep for each image of x: (B,) int64, on its device."""
    return torch.full((len(x),), t, device=x.device)


def unpack(prediction: Tensor | Prediction) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(eps, eps_cond, eps_uncond); the last two are None where there was no guidance."""
    return prediction if isinstance(prediction, Prediction) else (prediction, None, None)
