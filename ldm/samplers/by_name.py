"""Samplers by their names: what a run that asks for one needs to know of it.

    sampler = SAMPLERS["dpmpp_2m"]
    for step in sample(sampler.rule, eps_fn, x, sampler.grid(20, schedule), schedule): ...

Rules with `options` are called with those settings too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ldm.samplers.grids import Levels, grid_of, spaced
from ldm.samplers.multistep import dpmpp_2m_rule, dpmpp_2m_sde_rule, plms_rule, unipc_rule
from ldm.samplers.rules import ddim_rule, ddpm_rule
from ldm.samplers.solvers import euler_ancestral_rule, euler_rule, heun_rule, lcm_rule
from ldm.schedule import NoiseSchedule, trailing_timesteps

LCM_TIMESTEPS = 50
"""How many timesteps an LCM was distilled at (Luo et al. 2023, section 4.3: every 20th of 1000)."""


def usual(steps: int, schedule: NoiseSchedule) -> Sequence[int]:
    """The schedule's own grid: Stable Diffusion v1's, where that begins in the noise."""
    return schedule.timesteps(steps)


def from_the_top(steps: int, schedule: NoiseSchedule) -> Sequence[int]:
    """Evenly, from the last timestep on."""
    return trailing_timesteps(steps, schedule.config.num_train_timesteps)


def distilled(steps: int, schedule: NoiseSchedule) -> Sequence[int]:
    """Some of the timesteps that an LCM knows, evenly from the last on: 999, 759, 499, 259.

    Raises:
        ValueError: there are not so many.
    """
    total = schedule.config.num_train_timesteps
    most = min(LCM_TIMESTEPS, total)
    if not 1 <= steps <= most:
        raise ValueError(f"lcm was distilled at {most} timesteps: steps must be 1 to {most}")
    known = [total // most * k - 1 for k in range(most, 0, -1)]
    return [known[k * most // steps] for k in range(steps)]


@dataclass(frozen=True)
class Sampler:
    """What a run that asks for a sampler by its name needs to know of it.

    Attributes:
        rule: takes the step; called with the settings that `options` names.
        end: where its grid ends: at timestep 0, as Stable Diffusion v1's DDIM does, or at -1, the
            clean picture.
        rounds: whether it visits timesteps of the table alone, or points between them too.
        timesteps: of its own grid, where no spacing is asked for.
        options: the settings of a run that are this sampler's own, by their names.
        always_draws: whether it adds fresh noise at its steps, whatever the options.
        steps, guidance_scale: its own defaults, where the model's would make no sense.
    """

    rule: Callable[..., Tensor]
    end: int = -1
    rounds: bool = False
    timesteps: Callable[[int, NoiseSchedule], Sequence[int]] = from_the_top
    options: tuple[str, ...] = ()
    always_draws: bool = False
    steps: int | None = None
    guidance_scale: float | None = None

    def grid(self, steps: int, schedule: NoiseSchedule, spacing: str | None = None) -> Levels:
        """The pairs of noise levels that so many steps walk; see `ldm.samplers.grids`.

        Raises:
            ValueError: in one line, for steps or a spacing that cannot be.
        """
        if spacing is None:
            timesteps: Sequence[float] = self.timesteps(steps, schedule)
        else:
            timesteps = spaced(spacing, steps, schedule, end=self.end)
        return grid_of(timesteps, schedule, end=self.end, rounds=self.rounds)


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(ddim_rule, end=0, rounds=True, timesteps=usual, options=("eta",)),
    "ddpm": Sampler(ddpm_rule, rounds=True, timesteps=usual, always_draws=True),
    "plms": Sampler(plms_rule, end=0, rounds=True),
    "euler": Sampler(euler_rule),
    "euler_ancestral": Sampler(euler_ancestral_rule, always_draws=True),
    "heun": Sampler(heun_rule),
    "dpmpp_2m": Sampler(dpmpp_2m_rule),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde_rule, always_draws=True),
    "unipc": Sampler(unipc_rule),
    "lcm": Sampler(
        lcm_rule,
        rounds=True,
        timesteps=distilled,
        always_draws=True,
        steps=4,
        guidance_scale=1.0,
    ),
}
