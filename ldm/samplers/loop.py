"""The loop that all samplers share: ask for the noise, let a rule take the step, yield all of it.

    x ── eps_fn ── eps ── x0 ── rule ── x_prev ── the next step's x

Samplers differ in the rule alone: how to get from what a step knows to `x_prev`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.samplers.noise import Generators, draw_noise
from ldm.samplers.soundness import Watch
from ldm.schedule import NoiseSchedule, x0_from_eps


class Prediction(NamedTuple):
    """What a guided model says: the noise to use, and the two predictions it was made of."""

    eps: Tensor
    eps_cond: Tensor
    eps_uncond: Tensor


EpsFn = Callable[[Tensor, Tensor], Tensor | Prediction]
"""eps_fn(x, t): x (B, C, H, W) and t (B,) -> the noise in x, of x's shape. t is int64, or float32
where a rule asks between the timesteps of the table."""


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
            methods of a higher order; t may lie between two timesteps of the table.
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
    ask: Callable[[Tensor, float], Tensor]
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
        timesteps: pairs (t, t_prev), e.g. `schedule.ddim_timesteps(50)`; they may rise, if the rule
            can.
        schedule: gives alpha_bar.
        generators: for rules that draw noise, see `draw_noise`.

    Raises:
        ValueError: at the call, for timesteps that are no pairs or outside the table; at the step
            where `eps_fn` returns another shape than x's, or a rule draws noise without generators.
        DivergedError: latents became NaN, infinite, or larger than `soundness.LARGEST`. On a CPU
            instead of the step that made them, elsewhere (so that no step waits for the device)
            after the last one; it names the step.
    """
    grid = check_grid(timesteps, schedule)

    def ask(x: Tensor, t: float) -> Tensor:
        schedule.check_timestep(t)
        return predict(eps_fn, x, t)[0]

    # Around the generator, not in it: at a yield inside of `with no_grad()` the caller's gradients
    # would be off too.
    @torch.no_grad()
    def steps(x: Tensor) -> Steps:
        memory: dict[str, Any] = {}
        watch = Watch(x)
        for index, (t, t_prev) in enumerate(grid):
            watch.see(index, x)
            eps, eps_cond, eps_uncond = predict(eps_fn, x, t)
            alpha_bar, alpha_bar_prev = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t_prev)
            known = Known(
                x=x,
                eps=eps,
                x0=x0_from_eps(x, eps, alpha_bar),
                t=t,
                t_prev=t_prev,
                alpha_bar=alpha_bar,
                alpha_bar_prev=alpha_bar_prev,
                ask=ask,
                draw=functools.partial(draw_noise, generators, x),
                memory=memory,
            )
            x_prev = rule(known)
            if x_prev.device.type == "cpu":
                watch.check(x_prev, grid)
            sent = yield Step(index, t, t_prev, x, eps, eps_cond, eps_uncond, known.x0, x_prev)
            x = x_prev if sent is None else sent
        watch.check(x, grid)

    return steps(x)


def check_grid(
    timesteps: Sequence[tuple[int, int]], schedule: NoiseSchedule
) -> list[tuple[int, int]]:
    """Pairs (t, t_prev) of Python's own integers, or a ValueError: they are no pairs, or not within
    the table, where t_prev = -1 stands for the clean picture."""
    grid = []
    for pair in timesteps:
        try:
            t, t_prev = map(operator.index, pair)
        except (TypeError, ValueError):
            raise ValueError(
                "timesteps must be pairs of integers (t, t_prev), as schedule.ddim_timesteps(50) "
                f"gives, not {pair!r:.80}"
            ) from None
        schedule.check_timestep(t)
        if t_prev != -1:
            schedule.check_timestep(t_prev)
        grid.append((t, t_prev))
    return grid


def predict(eps_fn: EpsFn, x: Tensor, t: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(eps, eps_cond, eps_uncond) at one timestep for all images of x; the last two are None where
    there was no guidance.

    Raises:
        ValueError: what `eps_fn` returns has not the shape of x. It may not broadcast: then images
            would share a prediction.
    """
    answer = eps_fn(x, torch.full((len(x),), t, device=x.device))
    prediction = answer if isinstance(answer, Prediction) else (answer, None, None)
    for eps in prediction:
        if eps is not None and eps.shape != x.shape:
            raise ValueError(f"eps_fn returned {tuple(eps.shape)} for x of {tuple(x.shape)}")
    return prediction
