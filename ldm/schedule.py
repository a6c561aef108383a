"""The noise schedule: how much of the picture is left at timestep t, and which t to visit.

Noising has a closed form (DDPM eq. 4): from a clean x0 to timestep t in one stroke,

    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,    eps ~ N(0, 1).

The pure functions below turn that equation around: any two of x, x0, eps (and v) give the rest.
All of them broadcast `alpha_bar`: a float, or a tensor that broadcasts against the latents.
"""

from __future__ import annotations

import math

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

        Between two timesteps the angle phi is interpolated, of which alpha_bar is the squared
        cosine (Salimans & Ho 2022, appendix D): it is finite at either end, where the signal's or
        the noise's logarithm is not.

        Raises:
            IndexError: t is below -1 or past the table.
        """
        last = len(self.alpha_bar) - 1
        if not -1 <= t <= last:
            raise IndexError(f"timestep {t} is out of range: 0 to {last}, -1 is the clean picture")
        below = math.floor(t)
        if below == t:
            return 1.0 if t == -1 else self.alpha_bar[below].item()
        low, high = (math.acos(self.alpha_bar_at(n) ** 0.5) for n in (below, below + 1))
        return math.cos(low + (t - below) * (high - low)) ** 2

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
        low, high = (math.acos(self.alpha_bar_at(n) ** 0.5) for n in (above - 1, above))
        return above - 1 + (math.acos(alpha_bar**0.5) - low) / (high - low)

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
        """The grid of `even_timesteps` in this schedule."""
        return even_timesteps(steps, self.config.num_train_timesteps)

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
    return betas, torch.cumprod(1.0 - betas, dim=0)


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


def pairs(timesteps: list[int], end: int) -> list[tuple[int, int]]:
    """[981, 961, ..., 1] -> [(981, 961), ..., (1, end)]."""
    return list(zip(timesteps, [*timesteps[1:], end], strict=True))
