"""The other samplers, step by step and as whole runs, against diffusers' schedulers.

No model is needed: the noise prediction is a smooth function of (x, t). diffusers' own noise levels
are handed to our rules; its Euler and Heun work with x / sqrt(alpha_bar), which is turned into x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.presets import DIFFUSERS
from ldm.samplers import SAMPLERS, sample
from ldm.samplers.grids import Levels
from ldm.schedule import NoiseLevel, NoiseSchedule
from tests.helpers import randn, relative_error, rng

diffusers = pytest.importorskip("diffusers")

# It gives NumPy 2 tensors in a way that torch does not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULE = NoiseSchedule()
SHAPE = (1, 4, 8, 8)
COUNTS = [1, 2, 4, 10, 20, 50]
SETTINGS = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    timestep_spacing="leading",
)
SCHEDULERS = {
    "plms": ("PNDMScheduler", dict(skip_prk_steps=True, set_alpha_to_one=False)),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++")),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    "unipc": ("UniPCMultistepScheduler", dict(solver_order=2, solver_type="bh2")),
    "lcm": ("LCMScheduler", {}),
}
IN_SIGMA = ("euler", "euler_ancestral", "heun")
KARRAS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")

# Theirs computes in float32, ours here in float64. A step is a few roundings (6e-8) of x0, which is
# up to 15 times as large as x, and of coefficients: measured 8.9e-6 at most, where one step goes
# from pure noise to the clean picture, and 2e-6 with 10 steps or more. Runs: 9e-6.
STEP, RUN = 1e-5, 1e-3  # of the standard deviation


def eps_fn(x: Tensor, t: Tensor) -> Tensor:
    """The exact noise where data are N(0.3, 0.8^2), and a bend, so that nothing is linear."""
    alpha_bar = SCHEDULE.alpha_bar_at(float(t[0]))
    exact = (1 - alpha_bar) ** 0.5 * (x - 0.3 * alpha_bar**0.5) / (0.64 * alpha_bar + 1 - alpha_bar)
    return exact + 0.05 * torch.sin(3 * x)


@dataclass(frozen=True)
class TheirRun:
    """diffusers' noise levels, its x at each of them in our units, and at how many t it asked."""

    levels: Levels
    x: list[Tensor]
    asked: list[float]


def make_scheduler(name: str, steps: int, karras: bool) -> Any:
    kind, settings = SCHEDULERS[name]
    extra = {"use_karras_sigmas": True} if karras else {}
    scheduler = getattr(diffusers, kind)(**SETTINGS, **settings, **extra)
    scheduler.set_timesteps(steps)
    return scheduler


def their_levels(name: str, scheduler: Any, steps: int) -> Levels:
    """From where to where each step goes."""
    t, clean = scheduler.timesteps.tolist(), NoiseLevel(-1, 1.0)
    if name == "plms":  # the second t comes twice: it is that of the first step's second call
        t = [t[0], *t[2:]]
    if name == "heun":
        t = [t[0], *t[1::2]]
    assert len(t) == steps
    if name in ("plms", "lcm"):
        levels = [NoiseLevel(one, scheduler.alphas_cumprod[one].item()) for one in t]
        end = NoiseLevel(0, scheduler.alphas_cumprod[0].item()) if name == "plms" else clean
    else:
        sigmas = scheduler.sigmas.tolist()
        assert sigmas[-1] == 0
        sigmas = [sigmas[0], *sigmas[1:-1:2]] if name == "heun" else sigmas[:-1]
        levels = [NoiseLevel(a, 1 / (1 + s**2)) for a, s in zip(t, sigmas, strict=True)]
        end = clean
    return list(zip(levels, [*levels[1:], end], strict=True))


def their_run(name: str, steps: int, karras: bool) -> TheirRun:
    scheduler = make_scheduler(name, steps, karras)
    levels = their_levels(name, scheduler, steps)
    x, generator = randn(*SHAPE, seed=2), rng(3)
    found, asked = [x.double()], []
    if name in IN_SIGMA:
        x = x * scheduler.init_noise_sigma
    draws = {"generator": generator} if SAMPLERS[name].always_draws else {}
    # The first of two calls, which ends no step.
    guesses = {"plms": range(1), "heun": range(0, 2 * steps - 2, 2)}.get(name, ())
    for call, t in enumerate(scheduler.timesteps):
        asked.append(t.item())
        eps = eps_fn(scheduler.scale_model_input(x, t), t[None])
        x = scheduler.step(eps, t, x, **draws).prev_sample
        if call not in guesses:
            alpha_bar = levels[len(found) - 1][1].alpha_bar
            found.append(x.double() * (alpha_bar**0.5 if name in IN_SIGMA else 1))
    assert len(found) == steps + 1
    return TheirRun(levels, found, asked)


CASES = [
    pytest.param(name, karras, id=name + "-karras" * karras)
    for name in SCHEDULERS
    for karras in ([False, True] if name in KARRAS else [False])
]


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("name, karras", CASES)
def test_steps_and_runs_agree_with_diffusers(name: str, karras: bool, steps: int) -> None:
    if name == "plms" and steps == 1:
        pytest.skip("PNDMScheduler has no second call there: it is DDIM")
    theirs = their_run(name, steps, karras)
    rule = SAMPLERS[name].rule
    asked: list[float] = []

    def heard(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        return eps_fn(x, t)

    run = sample(rule, heard, theirs.x[0], theirs.levels, SCHEDULE, generators=[rng(3)])
    worst, step = 0.0, next(run)
    for index, (x, x_prev) in enumerate(zip(theirs.x, theirs.x[1:], strict=False)):
        assert torch.equal(step.x, x)
        worst = max(worst, relative_error(step.x_prev, x_prev))
        if index + 1 < steps:
            step = run.send(x_prev)
    assert worst <= STEP
    assert asked == theirs.asked

    *_, last = sample(rule, eps_fn, theirs.x[0], theirs.levels, SCHEDULE, generators=[rng(3)])
    whole = relative_error(last.x_prev, theirs.x[-1])
    assert whole <= RUN
    print(f"{name} {'karras ' * karras}{steps}: a step {worst:.2g}, the run {whole:.2g}")


@pytest.mark.parametrize("name, karras", CASES)
def test_like_diffusers_has_diffusers_noise_levels(name: str, karras: bool) -> None:
    counts = range(1, 51) if name == "lcm" else [*range(2, 70), 99, 333, 334, 500, 501, 998]
    for steps in counts:
        theirs = their_levels(name, make_scheduler(name, steps, karras), steps)
        ours = DIFFUSERS.grid(name, steps, SCHEDULE, "karras" if karras else None)
        assert len(ours) == steps
        for pair, their_pair in zip(ours, theirs, strict=True):
            for level, their_level in zip(pair, their_pair, strict=True):
                # Theirs is in float32, and so is the table that both are made of.
                assert level.t == pytest.approx(their_level.t, abs=2e-3)
                assert level.alpha_bar == pytest.approx(their_level.alpha_bar, rel=2e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_where_diffusers_leaves_its_table_it_is_refused(name: str) -> None:
    most = {"lcm": 50, "dpmpp_2m": 998, "dpmpp_2m_sde": 998, "unipc": 998}.get(name, 999)
    assert len(DIFFUSERS.grid(name, most, SCHEDULE, None)) == most
    if name != "lcm":
        assert make_scheduler(name, most + 1, False).timesteps.max() == 1000
    with pytest.raises(ValueError, match=rf"take {most} at most|steps must be 1 to {most}"):
        DIFFUSERS.grid(name, most + 1, SCHEDULE, None)
