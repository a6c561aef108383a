"""DDIM and DDPM: their rules, and as functions that check what they are given.

A rule is what a sampler does with what a step knows (`Known` -> `x_prev`), its paper's equation in
a few lines. The others' are in `ldm.samplers.solvers` and `ldm.samplers.multistep`; any of them is
used alone by `sample(rule, eps_fn, x, timesteps, schedule)`.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ldm.samplers.grids import Levels
from ldm.samplers.loop import EpsFn, Grid, Known, Steps, check_grid, sample
from ldm.samplers.noise import Generators, check_generators
from ldm.schedule import NoiseSchedule


def ddim_rule(known: Known, eta: float) -> Tensor:
    """DDIM (Song et al. 2020, arXiv:2010.02502): back to x0, and from there along eps."""
    alpha_bar, alpha_bar_prev = known.alpha_bar, known.alpha_bar_prev
    # DDIM eq. 16: the noise's share; the direction to x_t takes what is left of it.
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * max(variance, 0.0) ** 0.5
    direction = max(1 - alpha_bar_prev - sigma**2, 0.0) ** 0.5 * known.eps
    x_prev = alpha_bar_prev**0.5 * known.x0 + direction  # DDIM eq. 12
    return x_prev + sigma * known.draw() if eta > 0.0 else x_prev


def ddpm_rule(known: Known) -> Tensor:
    """DDPM (Ho et al. 2020, arXiv:2006.11239): a sample of q(x_prev | x, x0), at the end its mean.

    Steps may skip timesteps: alpha is then the ratio of the two alpha_bars.
    """
    alpha_bar, alpha_bar_prev = known.alpha_bar, known.alpha_bar_prev
    alpha = alpha_bar / alpha_bar_prev
    # DDPM eq. 7: the mean of q(x_prev | x, x0), and its variance beta-tilde.
    x0_share = alpha_bar_prev**0.5 * (1 - alpha) / (1 - alpha_bar)
    x_share = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)
    mean = x0_share * known.x0 + x_share * known.x
    return mean if alpha_bar_prev == 1.0 else mean + variance**0.5 * known.draw()


def falling(timesteps: Grid, schedule: NoiseSchedule) -> Levels:
    """The grid of a sampler that goes from noise to a picture, or a ValueError."""
    grid = check_grid(timesteps, schedule)
    for here, there in grid:
        if there.alpha_bar < here.alpha_bar:
            raise ValueError(
                f"timesteps must be falling, from noise to picture, not ({here.t}, {there.t})"
            )
    return grid


# --- As functions ----------------------------------------------------------------------------


def ddim(
    eps_fn: EpsFn,
    x: Tensor,
    timesteps: Grid,
    schedule: NoiseSchedule,
    *,
    eta: float = 0.0,
    generators: Generators | None = None,
    prediction: str = "eps",
) -> Steps:
    """DDIM (Song et al. 2020, arXiv:2010.02502, eq. 12).

    Args:
        eps_fn: predicts the noise.
        x: starting noise, (B, C, H, W); never changed.
        timesteps: pairs (t, t_prev), t_prev <= t, e.g. `schedule.ddim_timesteps(50)`.
        schedule: gives alpha_bar.
        eta: 0 is deterministic, 1 adds as much noise per step as DDPM does.
        generators: for the noise of eta > 0, see `draw_noise`.
        prediction: what `eps_fn` predicts, see `sample`.

    Raises:
        ValueError: at the call, for an eta outside [0, 1], noise without its generators, or
            timesteps that rise or are no pairs; and see `sample`.
        DivergedError: see `sample`.
    """
    grid = falling(timesteps, schedule)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    if eta > 0.0:
        check_generators(generators, x)
    rule = functools.partial(ddim_rule, eta=eta)
    return sample(rule, eps_fn, x, grid, schedule, generators=generators, prediction=prediction)


def ddpm(
    eps_fn: EpsFn,
    x: Tensor,
    timesteps: Grid,
    schedule: NoiseSchedule,
    *,
    generators: Generators | None = None,
    prediction: str = "eps",
) -> Steps:
    """DDPM's ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2). The variance is
    the posterior's ("fixed small", beta-tilde of eq. 7), and x0 is not clipped.

    Args:
        eps_fn: predicts the noise.
        x: starting noise, (B, C, H, W); never changed.
        timesteps: pairs (t, t_prev), t_prev <= t, e.g. `schedule.ddpm_timesteps(1000)`.
        schedule: gives alpha_bar.
        generators: for the noise of every step but the last, see `draw_noise`.
        prediction: what `eps_fn` predicts, see `sample`.

    Raises:
        ValueError: at the call, when the generators are missing or not one per image, or timesteps
            rise or are no pairs; and see `sample`.
        DivergedError: see `sample`.
    """
    grid = falling(timesteps, schedule)
    check_generators(generators, x)
    return sample(
        ddpm_rule, eps_fn, x, grid, schedule, generators=generators, prediction=prediction
    )
