"""Which noise levels a run visits: four ways to space them, the same for every sampler.

    leading     k * (T // S) + 1, k from S - 1 down to 0: Stable Diffusion v1's, below the top
    trailing    the same distances, counted from the top: S = 4 is 999, 749, 499, 249
    linspace    from the top down to timestep 0, both included
    karras      the same, but dense where there is little noise: the seventh roots of sigma are
                evenly spaced (Karras et al. 2022, arXiv:2206.00364, eq. 5)

The first three are those of Lin et al. (2023, arXiv:2305.08891, table 2). Where a run ends is the
sampler's own: in the clean picture, a step below the last of these, or at timestep 0, as Stable
Diffusion v1's DDIM does. With linspace and karras that is the last of these itself, so that such
runs have one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ldm.schedule import (
    NoiseLevel,
    NoiseSchedule,
    even_timesteps,
    sigma_of,
    trailing_timesteps,
)

SPACINGS = ("leading", "linspace", "trailing", "karras")
RHO = 7.0  # Karras et al. 2022, appendix D.1

Levels = list[tuple[NoiseLevel, NoiseLevel]]
"""A grid: from where to where each step goes."""


def spaced(spacing: str, steps: int, schedule: NoiseSchedule, *, end: int) -> Sequence[float]:
    """The t of each of `steps` steps, noisiest first; real numbers for linspace and karras.

    Args:
        spacing: one of `SPACINGS`.
        steps: at least 1, at most as many as there are timesteps.
        end: 0 or -1, see `grid_of`.

    Raises:
        ValueError: in one line, for steps or a spacing that cannot be.
    """
    total = schedule.config.num_train_timesteps
    if spacing in ("leading", "trailing"):
        return (even_timesteps if spacing == "leading" else trailing_timesteps)(steps, total)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, not {steps}")
    last = max(steps if end == 0 else steps - 1, 1)  # how many distances there are
    if spacing == "linspace":
        return [(total - 1) * (last - k) / last for k in range(steps)]
    inner = karras_sigmas(schedule, last)[1:-1]
    timesteps = (schedule.timestep_at(1 / (1 + sigma**2)) for sigma in inner)
    return [total - 1, *timesteps, 0][:steps]


def karras_sigmas(schedule: NoiseSchedule, distances: int) -> list[float]:
    """Sigmas from that of the last timestep down to that of the first (Karras et al. 2022, eq. 5).

    Raises:
        ValueError: the last timestep is pure noise, whose sigma is infinite.
    """
    if schedule.alpha_bar[-1].item() == 0.0:
        raise ValueError(
            "spacing='karras' needs a finite sigma to begin with, and this schedule ends in pure "
            "noise: take 'trailing'"
        )
    most, least = (sigma_of(schedule.alpha_bar[i].item()) ** (1 / RHO) for i in (-1, 0))
    return [(most + k / distances * (least - most)) ** RHO for k in range(distances + 1)]


def grid_of(
    timesteps: Sequence[float], schedule: NoiseSchedule, *, end: int, rounds: bool = False
) -> Levels:
    """The pairs of noise levels that a run walks.

    Args:
        timesteps: of each step, noisiest first.
        end: where the last one ends: 0, at the first timestep of the table, or -1, the clean
            picture.
        rounds: whether every t is rounded to a timestep of the table.
    """
    walked = [round(t) for t in timesteps] if rounds else timesteps
    return list(pairwise(schedule.level(t) for t in (*walked, end)))
