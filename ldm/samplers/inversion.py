"""Inversion: DDIM backwards, from a picture to the noise that it could have come from.

for step in invert(eps_fn, x0, rising(schedule.ddim_timesteps(50)), schedule): ...
ddim(eps_fn, step.x_prev, schedule.ddim_timesteps(50), schedule)     # about x0 again
"""

from __future__ import annotations

from torch import Tensor

from ldm.samplers.loop import EpsFn, Grid, Moment, Steps, check_grid, sample
from ldm.samplers.solvers import euler_rule
from ldm.schedule import NoiseSchedule


def rising(timesteps: Grid) -> list[tuple[Moment, Moment]]:
    """A falling grid, walked the other way: of [(2, 1), (1, 0)] it is [(0, 1), (1, 2)]."""
    return [(t_prev, t) for t, t_prev in reversed(timesteps)]


def invert(
    eps_fn: EpsFn,
    x: Tensor,
    timesteps: Grid,
    schedule: NoiseSchedule,
    *,
    prediction: str = "eps",
) -> Steps:
    """DDIM's equation on a rising grid (Song et al. 2020, arXiv:2010.02502, section 4.3): the
    probability flow, followed from the picture to the noise. It draws nothing.

    A step down asks the model where it begins, at its noisier end; a step up has to ask at its
    cleaner end, since it does not know the other yet. So the way back does not quite lead to where
    one came from: the error falls with the number of steps, as 1 / steps. Where a schedule ends in
    pure noise, nothing of the picture is left in it to come back to.

    Args:
        eps_fn: predicts the noise. Guidance bends the flow: without it the round trip is closest.
        x: the picture's latents, (B, C, H, W), taken to be as noisy as the grid begins; never
            changed.
        timesteps: pairs (t, t_next), t_next >= t >= 0, e.g. `rising(schedule.ddim_timesteps(50))`.
        schedule: gives alpha_bar.
        prediction: what `eps_fn` predicts, see `sample`.

    Returns:
        The steps of `sample`: in each, `t_prev` is where it ends, the noisier of the two, and
        `x_prev` the latents there.

    Raises:
        ValueError: at the call, for timesteps that fall, are no pairs or are outside the table; and
            see `sample`.
        DivergedError: see `sample`.
    """
    grid = check_grid(timesteps, schedule)
    for here, there in grid:
        if there.alpha_bar > here.alpha_bar:
            raise ValueError(
                f"timesteps must be rising, from picture to noise, not ({here.t}, {there.t})"
            )
    return sample(euler_rule, eps_fn, x, grid, schedule, prediction=prediction)
