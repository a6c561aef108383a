"""The noise schedule: how much of the picture is left at timestep t, and which t to visit.

Noising has a closed form (DDPM eq. 4): from a clean x0 to timestep t in one stroke,

    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,    eps ~ N(0, 1).

The pure functions below turn that equation around: any two of x, x0, eps (and v) give the rest.
All of them broadcast `alpha_bar`: a float, or a tensor that broadcasts against the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.config import ScheduleConfig


def noised(x0: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """x_t from a clean x0 and the noise (DDPM eq. 4)."""
    return alpha_bar**0.5 * x0 + (1.0 - alpha_bar) ** 0.5 * eps


def x0_from_eps(x: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """The clean estimate, given the noise (DDPM eq. 4 solved for x0; DDIM eq. 9)."""
    return (x - (1.0 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5


def eps_from_x0(x: Tensor, x0: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """The noise, given the clean estimate (DDPM eq. 4 solved for eps)."""
    return (x - alpha_bar**0.5 * x0) / (1.0 - alpha_bar) ** 0.5


def v_from_eps(x0: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """The velocity v (Salimans & Ho 2022, arXiv:2202.00512, section 4)."""
    return alpha_bar**0.5 * eps - (1.0 - alpha_bar) ** 0.5 * x0


def x0_from_v(x: Tensor, v: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """The clean estimate, given the velocity (Salimans & Ho 2022, appendix D)."""
    return alpha_bar**0.5 * x - (1.0 - alpha_bar) ** 0.5 * v


def eps_from_v(x: Tensor, v: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """The noise, given the velocity: x and v are x0 and eps rotated by one angle."""
    return (1.0 - alpha_bar) ** 0.5 * x + alpha_bar**0.5 * v


def pair_from(
    prediction: str, output: Tensor, x: Tensor, alpha_bar: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(x0, eps), from what a model says of x: the one place where it matters what that is.

    Args:
        prediction: one of `ldm.config.PREDICTIONS`: "eps", the noise; "v"; "x0", the clean picture;
            or "flow", eps - x0, which is the velocity of a straight line between the two
            (Liu et al. 2022, arXiv:2209.03003), here on our own schedule.
    """
    if prediction == "eps":
        return x0_from_eps(x, output, alpha_bar), output
    if prediction == "v":
        return x0_from_v(x, output, alpha_bar), eps_from_v(x, output, alpha_bar)
    if prediction == "x0":
        return output, eps_from_x0(x, output, alpha_bar)
    a, b = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
    return (x - b * output) / (a + b), (x + a * output) / (a + b)  # x = a x0 + b eps


def output_from(prediction: str, x0: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """What a perfect model would say, given both: the target of training, `pair_from` inverted."""
    if prediction == "eps":
        return eps
    if prediction == "v":
        return v_from_eps(x0, eps, alpha_bar)
    return x0 if prediction == "x0" else eps - x0


def as_eps_fn(
    model: Callable[[Tensor, Tensor], Tensor], prediction: str, schedule: NoiseSchedule
) -> Callable[[Tensor, Tensor], Tensor]:
    """A model of any prediction as one of the noise, for whoever compares or measures it.

    Samplers need the pair (x0, eps) and make it themselves: in pure noise eps says nothing of x0.

    Args:
        model: model(x, t), x (B, ...) and t (B,), real timesteps within the table.
        prediction: what it says, one of `ldm.config.PREDICTIONS`.
    """

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        levels = [schedule.alpha_bar_at(value) for value in t.tolist()]
        alpha_bar = torch.tensor(levels, dtype=x.dtype, device=x.device)
        output = model(x, t)
        return pair_from(prediction, output, x, alpha_bar.view(-1, *[1] * (x.ndim - 1)))[1]

    return eps_fn


class NoiseLevel(NamedTuple):
    """How noisy latents are.

    Attributes:
        t: what the model is told, from 0 to the last timestep of the table; -1 is the clean
            picture. A whole number is an int.
        alpha_bar: the picture's share of the variance, which all equations compute with. As a rule
            it is that of t, `schedule.level(t)`; where other code rounds t alone, it is not.
    """

    t: float
    alpha_bar: float


class NoiseSchedule:
    """Betas, their cumulative products, and the grids of timesteps that samplers walk.

    Attributes:
        betas: (T,) float32 on the CPU, the noise added at each training step.
        alpha_bar: (T,) float32 on the CPU, the share of the signal's variance left after it,
            the cumulative product of 1 - beta; falls from nearly 1 to nearly 0.
    """

    def __init__(self, config: ScheduleConfig = ScheduleConfig()) -> None:
        """Both tables are computed in float64 and cast once, as the reference code does."""
        self.config = config
        betas, alpha_bar = exact_tables(config)
        self.betas = betas.float()
        self.alpha_bar = alpha_bar.float()

    def alpha_bar_at(self, t: float) -> float:
        """alpha_bar of one timestep; t = -1 stands for the clean picture, where it is 1.

        Between two timesteps the logarithm of sigma = sqrt((1 - alpha_bar) / alpha_bar) is a
        straight line in t, so that a sigma between two of the table is one t (`timestep_at`), as in
        k-diffusion. Beside the clean picture, and beside pure noise, that logarithm is infinite:
        there the angle is a straight line, of which alpha_bar is the squared cosine (Salimans & Ho
        2022, appendix D).

        Raises:
            IndexError: t is below -1 or past the table.
        """
        last = len(self.alpha_bar) - 1
        if not -1 <= t <= last:
            raise IndexError(f"timestep {t} is out of range: 0 to {last}, -1 is the clean picture")
        below = math.floor(t)
        if below == t:
            return 1.0 if t == -1 else self.alpha_bar[below].item()
        low, high = self.alpha_bar_at(below), self.alpha_bar_at(below + 1)
        to, back = scale_between(low, high)
        return back(to(low) + (t - below) * (to(high) - to(low)))

    def timestep_at(self, alpha_bar: float) -> float:
        """The t between 0 and the last timestep of which `alpha_bar_at` gives this alpha_bar.

        Raises:
            ValueError: the table does not reach it.
        """
        most, least = self.alpha_bar[0].item(), self.alpha_bar[-1].item()
        if not least <= alpha_bar <= most:
            raise ValueError(f"alpha_bar must be between {least:.6g} and {most:.6g}: {alpha_bar}")
        above = int((self.alpha_bar.double() > alpha_bar).sum())  # the first timestep not above it
        if self.alpha_bar[above].item() == alpha_bar:
            return float(above)
        low, high = self.alpha_bar_at(above - 1), self.alpha_bar_at(above)
        to, _ = scale_between(low, high)
        return above - 1 + (to(alpha_bar) - to(low)) / (to(high) - to(low))

    def level(self, t: float) -> NoiseLevel:
        """The noise level of a timestep, or of a t between two; -1 is the clean picture."""
        return NoiseLevel(int(t) if float(t).is_integer() else float(t), self.alpha_bar_at(t))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise a batch to its timesteps: x0 and noise (B, ...), t int64 (B,) -> (B, ...).

        Raises:
            ValueError: a shape does not fit, or a timestep is not one of the table. Timesteps that
                are on a GPU cannot be looked at without waiting: there, one outside the table gives
                NaN.
        """
        if noise.shape != x0.shape:
            raise ValueError(f"noise must be {tuple(x0.shape)} as x0 is, not {tuple(noise.shape)}")
        if not isinstance(t, Tensor) or t.shape != x0.shape[:1] or t.dtype != torch.int64:
            kind = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"t must be int64 ({len(x0)},), a timestep for each, not {kind}")
        last = len(self.alpha_bar) - 1
        inside = (t >= 0) & (t <= last)
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and not inside.all():
            raise ValueError(f"t must be between 0 and {last}, not {t[~inside][0].item()}")
        # Not in half precision: the first alpha_bar would round to 1, and its noise vanish.
        dtype = torch.promote_types(x0.dtype, torch.float32)
        # A negative index would count from the table's end.
        alpha_bar = self.alpha_bar.to(t.device)[t.clamp(0, last)].where(inside, torch.nan)
        alpha_bar = alpha_bar.to(x0.device, dtype).view(-1, *[1] * (x0.ndim - 1))
        return noised(x0, noise, alpha_bar).to(x0.dtype)

    def check_timestep(self, t: float) -> None:
        """A ValueError unless t is a real number from 0 to the last timestep of the table."""
        last = len(self.alpha_bar) - 1
        if not 0 <= t <= last:
            raise ValueError(f"timesteps must be between 0 and {last}, not {t}")

    def timesteps(self, steps: int) -> list[int]:
        """The grid of `usual_timesteps` in this schedule; where that ends in pure noise, it must
        begin there, and is that of `trailing_timesteps` (Lin et al. 2023, 3.3)."""
        total = self.config.num_train_timesteps
        grid = trailing_timesteps if self.config.ends_in_noise else usual_timesteps
        return grid(steps, total)

    def ddim_timesteps(self, steps: int) -> list[tuple[int, int]]:
        """The pairs (t, t_prev) that DDIM walks; the last one ends at timestep 0, as SD v1 does,
        not at the clean picture."""
        return pairs(self.timesteps(steps), end=0)

    def ddpm_timesteps(self, steps: int) -> list[tuple[int, int]]:
        """The pairs (t, t_prev) that DDPM walks; the last one ends at the clean picture, -1."""
        return pairs(self.timesteps(steps), end=-1)


def exact_tables(config: ScheduleConfig) -> tuple[Tensor, Tensor]:
    """betas and alpha_bar, (T,) float64 each: the square roots of the betas are evenly spaced,
    unless the config has a table of its own."""
    if config.betas is not None:
        betas = torch.tensor(config.betas, dtype=torch.float64)
    else:
        start, end = config.beta_start**0.5, config.beta_end**0.5
        betas = torch.linspace(start, end, config.num_train_timesteps, dtype=torch.float64) ** 2
        if config.zero_terminal_snr:
            betas = ending_in_noise(betas)
    return betas, torch.cumprod(1.0 - betas, dim=0)


def ending_in_noise(betas: Tensor) -> Tensor:
    """Such betas that nothing is left of the picture at the last timestep, as samplers suppose who
    begin there with pure noise (Lin et al. 2023, arXiv:2305.08891, algorithm 1): sqrt(alpha_bar)
    is moved to end at 0 and stretched to begin where it began. (T,) float64, of 2 or more."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root.square()
    return 1.0 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])


def even_timesteps(steps: int, total: int) -> list[int]:
    """`steps` evenly spaced timesteps, noisiest first: k * (total // steps) + 1, k from steps - 1
    down to 0. All of them would end outside the table: there it is total - 1 down to 0.

    Raises:
        ValueError: `steps` is not within 1 and `total`.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, not {steps}")
    offset = 0 if steps == total else 1
    return [k * (total // steps) + offset for k in reversed(range(steps))]


def trailing_timesteps(steps: int, total: int) -> list[int]:
    """`steps` evenly spaced timesteps, the first of them the last of the table: (steps - k) *
    total / steps - 1, rounded (Lin et al. 2023, arXiv:2305.08891, table 2, "trailing").

    Raises:
        ValueError: `steps` is not within 1 and `total`.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, not {steps}")
    return [round(total * k / steps) - 1 for k in reversed(range(1, steps + 1))]


def usual_timesteps(steps: int, total: int) -> list[int]:
    """The grid of DDIM and DDPM: the official one, `even_timesteps`, wherever it begins in the
    noise, in the last tenth of the table (at 900 of 1000), and `trailing_timesteps` elsewhere.

    Where `steps` do not divide the table, the official grid may end far below the top: 501 steps
    begin at timestep 501, and what they are given, pure noise, is not what the model knows there.
    Of up to 10 steps the official grid is kept: people know it, with 4 steps, as 751, 501, 251, 1.

    Raises:
        ValueError: `steps` is not within 1 and `total`.
    """
    official = even_timesteps(steps, total)
    if steps <= 10 or 10 * official[0] >= 9 * total:
        return official
    return trailing_timesteps(steps, total)


def sigma_of(alpha_bar: float) -> float:
    """The noise's standard deviation beside the picture's, sqrt((1 - alpha_bar) / alpha_bar)
    (Karras et al. 2022); infinite where there is no picture."""
    return ((1.0 - alpha_bar) / alpha_bar) ** 0.5 if alpha_bar > 0.0 else math.inf


def scale_between(low: float, high: float) -> tuple[Callable[[float], float], ...]:
    """On which scale alpha_bar is a straight line in t between two timesteps of these alpha_bars,
    and the way back: see `NoiseSchedule.alpha_bar_at`."""
    if low < 1.0 and high > 0.0:
        return (
            lambda alpha_bar: math.log(sigma_of(alpha_bar)),
            lambda log_sigma: 1.0 / (1.0 + math.exp(2.0 * log_sigma)),
        )
    return (lambda alpha_bar: math.acos(alpha_bar**0.5)), (lambda angle: math.cos(angle) ** 2)


def pairs(timesteps: list[int], end: int) -> list[tuple[int, int]]:
    """[981, 961, ..., 1] -> [(981, 961), ..., (1, end)]."""
    return list(zip(timesteps, [*timesteps[1:], end], strict=True))
