"""The loop that all samplers share: ask for the noise, let a rule take the step, yield all of it.

    x ── eps_fn ── eps, x0 ── rule ── x_prev ── the next step's x

Samplers differ in the rule alone: how to get from what a step knows to `x_prev`.
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.config import PREDICTIONS
from ldm.samplers.noise import Generators, draw_noise
from ldm.samplers.soundness import Watch
from ldm.schedule import NoiseLevel, NoiseSchedule, pair_from


class Prediction(NamedTuple):
    """What a guided model says: the noise to use, and the two predictions it was made of."""

    eps: Tensor
    eps_cond: Tensor
    eps_uncond: Tensor


EpsFn = Callable[[Tensor, Tensor], Tensor | Prediction]
"""eps_fn(x, t): x (B, C, H, W) and t (B,) -> the noise in x, of x's shape; or what else `sample` is
told that the model predicts. t is int64, or float32 between two timesteps of the table."""

Moment = float | NoiseLevel
"""A timestep, or a point between two, or -1 for the clean picture: at the schedule's own noise
level, or at one that is given with it."""

Grid = Sequence[tuple[Moment, Moment]]
"""From where to where each step goes: [(981, 961), (961, 941), ...]."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler. No later step changes these tensors; all are (B, C, H, W).

    Attributes:
        index: 0 for the first step.
        t: the timestep of `x`; t_prev: that of `x_prev` (-1 is the clean picture). Between two
            timesteps of the table they are floats, else ints.
        alpha_bar, alpha_bar_prev: how much of the picture is left in `x` and in `x_prev`.
        x: the noisy latents before the step; x_prev: after it.
        eps: the predicted noise in `x`; x0: the clean picture that it implies.
        eps_cond, eps_uncond: with and without the prompt, where guidance made `eps`, else None.
    """

    index: int
    t: float
    t_prev: float
    alpha_bar: float
    alpha_bar_prev: float
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
        t, t_prev, alpha_bar, alpha_bar_prev: as in `Step`.
        ask: ask(x, t) -> eps, (B, C, H, W): the model once more, at another point of this step, for
            methods of a higher order; t may lie between two timesteps of the table, or be a
            `NoiseLevel`, such as `there`.
        draw: draw() -> standard normal noise, (B, C, H, W); new numbers at every call.
        memory: what earlier steps of the run kept under names of their own, for methods that look
            back. It is empty at the first step, and stays when a caller sends an `x` of their own.
    """

    x: Tensor
    eps: Tensor
    x0: Tensor
    t: float
    t_prev: float
    alpha_bar: float
    alpha_bar_prev: float
    ask: Callable[[Tensor, Moment], Tensor]
    draw: Callable[[], Tensor]
    memory: dict[str, Any]

    @property
    def there(self) -> NoiseLevel:
        """Where the step ends."""
        return NoiseLevel(self.t_prev, self.alpha_bar_prev)


Rule = Callable[[Known], Tensor]
"""A sampler's own part: from what a step knows to `x_prev`, (B, C, H, W), a new tensor."""


def sample(
    rule: Rule,
    eps_fn: EpsFn,
    x: Tensor,
    timesteps: Grid,
    schedule: NoiseSchedule,
    *,
    generators: Generators | None = None,
    prediction: str = "eps",
) -> Steps:
    """Walk the grid by a rule: one `Step` for each of its intervals.

    Args:
        rule: takes the step; for a sampler of your own, any function of `Known`.
        eps_fn: predicts the noise; asked once per step, and again only where the rule does.
        x: starting noise, (B, C, H, W); never changed.
        timesteps: pairs (t, t_prev), e.g. `schedule.ddim_timesteps(50)`, of timesteps or of
            `NoiseLevel`s; they may rise, if the rule can.
        schedule: gives alpha_bar.
        generators: for rules that draw noise, see `draw_noise`.
        prediction: what `eps_fn` predicts, one of `ldm.config.PREDICTIONS`. Whatever it is, rules
            and steps see the pair (x0, eps).

    Raises:
        ValueError: at the call, for timesteps that are no pairs or outside the table, or that
            begin in pure noise, of which a prediction of the noise says nothing; at the step
            where `eps_fn` returns another shape than x's, or a rule draws noise without generators.
        DivergedError: latents became NaN, infinite, or larger than `soundness.LARGEST`. On a CPU
            instead of the step that made them, elsewhere (so that no step waits for the device)
            after the last one; it names the step.
    """
    grid = check_grid(timesteps, schedule)
    times = [here.t for here, _ in grid]

    if prediction not in PREDICTIONS:
        there = ", ".join(PREDICTIONS)
        raise ValueError(f"unknown prediction {prediction!r:.80}: there are {there}")
    if prediction == "eps" and any(here.alpha_bar == 0.0 for here, _ in grid):
        raise ValueError(
            "timesteps begin in pure noise, where alpha_bar is 0: which picture it hides, no "
            "prediction of the noise can say"
        )

    def ask(x: Tensor, t: Moment) -> Tensor:
        here = level_of(t, schedule)
        return pair_from(prediction, predict(eps_fn, x, here.t)[0], x, here.alpha_bar)[1]

    # Around the generator, not in it: at a yield inside of `with no_grad()` the caller's gradients
    # would be off too.
    @torch.no_grad()
    def steps(x: Tensor) -> Steps:
        memory: dict[str, Any] = {}
        watch = Watch(x)
        for index, (here, there) in enumerate(grid):
            watch.see(index, x)
            output, *parts = predict(eps_fn, x, here.t)
            x0, eps = pair_from(prediction, output, x, here.alpha_bar)
            eps_cond, eps_uncond = (
                None if part is None else pair_from(prediction, part, x, here.alpha_bar)[1]
                for part in parts
            )
            known = Known(
                x=x,
                eps=eps,
                x0=x0,
                t=here.t,
                t_prev=there.t,
                alpha_bar=here.alpha_bar,
                alpha_bar_prev=there.alpha_bar,
                ask=ask,
                draw=functools.partial(draw_noise, generators, x),
                memory=memory,
            )
            x_prev = rule(known)
            if x_prev.device.type == "cpu":
                watch.check(x_prev, times)
            sent = yield Step(
                index=index,
                t=here.t,
                t_prev=there.t,
                alpha_bar=here.alpha_bar,
                alpha_bar_prev=there.alpha_bar,
                x=x,
                eps=eps,
                eps_cond=eps_cond,
                eps_uncond=eps_uncond,
                x0=x0,
                x_prev=x_prev,
            )
            x = x_prev if sent is None else sent
        watch.check(x, times)

    return steps(x)


def check_grid(timesteps: Grid, schedule: NoiseSchedule) -> list[tuple[NoiseLevel, NoiseLevel]]:
    """The noise levels of pairs (t, t_prev), or a ValueError: they are no pairs, or not within the
    table, where t_prev = -1 stands for the clean picture."""
    grid = []
    for pair in timesteps:
        try:
            if isinstance(pair, NoiseLevel):  # a pair too, but of other things
                raise TypeError
            t, t_prev = pair
            t, t_prev = number_of(t), number_of(t_prev)
        except (TypeError, ValueError):
            raise ValueError(
                "timesteps must be pairs (t, t_prev) of numbers, as schedule.ddim_timesteps(50) "
                f"gives, not {pair!r:.80}"
            ) from None
        grid.append((level_of(t, schedule), level_of(t_prev, schedule, clean=True)))
    return grid


def number_of(t: Any) -> Moment:
    """A timestep of any type, NumPy's too, as Python's own; a TypeError if it is none."""
    if isinstance(t, NoiseLevel):
        return t
    return float(t) if isinstance(t, numbers.Real) else operator.index(t)


def level_of(t: Moment, schedule: NoiseSchedule, *, clean: bool = False) -> NoiseLevel:
    """The noise level at t, or a ValueError: it is outside the table. The `clean` picture is one
    where a step ends, not where the model is asked."""
    if not isinstance(t, NoiseLevel):
        if not (clean and t == -1):
            schedule.check_timestep(t)
        return schedule.level(t)
    if clean and t.alpha_bar == 1.0:
        return t
    schedule.check_timestep(t.t)
    if not 0.0 <= t.alpha_bar < 1.0:
        raise ValueError(f"alpha_bar of a timestep must be in [0, 1), not {t.alpha_bar}")
    return t


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
