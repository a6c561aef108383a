"""The samplers, step by step, against diffusers' DDIMScheduler and DDPMScheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.samplers import Step, Steps, ddim, ddpm
from ldm.schedule import NoiseSchedule
from tests.helpers import randn, relative_error, rng

diffusers = pytest.importorskip("diffusers")

SCHEDULE = NoiseSchedule()
COUNTS = [1, 2, 10, 50, 999, 1000]
SHAPE = (1, 4, 8, 8)

# The reference is diffusers in fp64, its tables included. In fp32 it is itself up to 2.3e-5 off
# (DDPM at t = 2, where its 1 - alpha_bar cancels); ours, whose coefficients are Python floats, is
# not. A step is a handful of fp32 operations (6e-8 each) on latents of a standard deviation of
# about 1, with coefficients made of alpha_bar rounded to fp32: measured 3.5e-6 at most.
X_PREV_ATOL = 1e-5
# x0 divides by sqrt(alpha_bar), down to 0.068 at t = 999, and so magnifies the rounding by up to
# 15: measured 6.0e-6 of its standard deviation at most.
X0_RTOL = 1e-5


def make_scheduler(kind: str, steps: int, dtype: torch.dtype) -> Any:
    """diffusers' scheduler with Stable Diffusion v1's settings."""
    shared = dict(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        # With all 1000 steps an offset of 1 would lead out of diffusers' table.
        steps_offset=1 if steps < 1000 else 0,
        timestep_spacing="leading",
    )
    if kind == "ddim":
        scheduler = diffusers.DDIMScheduler(**shared, set_alpha_to_one=False)
    else:
        scheduler = diffusers.DDPMScheduler(**shared, variance_type="fixed_small")
    if dtype == torch.float64:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=dtype) ** 2
        scheduler.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if kind == "ddim":
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        else:
            scheduler.one = torch.tensor(1.0, dtype=dtype)
    scheduler.set_timesteps(steps)
    return scheduler


def eps_fn(x: Tensor, t: Tensor) -> Tensor:
    """The exact noise where data are N(0.3, 0.8^2), and a bend, so that nothing is linear."""
    alpha_bar = SCHEDULE.alpha_bar.to(x.device)[t].view(-1, 1, 1, 1)
    residual = x - 0.3 * alpha_bar.sqrt()
    exact = (1 - alpha_bar).sqrt() * residual / (0.64 * alpha_bar + 1 - alpha_bar)
    return exact + 0.05 * torch.sin(3 * x)


def our_steps(kind: str, steps: int, eta: float, device: str) -> Steps:
    x = randn(*SHAPE, seed=2).to(device)
    if kind == "ddpm":
        timesteps = SCHEDULE.ddpm_timesteps(steps)
        return ddpm(eps_fn, x, timesteps, SCHEDULE, generators=[rng(3)])
    timesteps = SCHEDULE.ddim_timesteps(steps)
    return ddim(eps_fn, x, timesteps, SCHEDULE, eta=eta, generators=[rng(3)])


def oracle_step(
    scheduler: Any, step: Step, noise: Tensor, eta: float, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The same step by diffusers, in the precision of its tables, with our noise."""
    dtype = scheduler.alphas_cumprod.dtype
    eps, x, noise = (a.cpu().to(dtype) for a in (step.eps, step.x, noise))
    if isinstance(scheduler, diffusers.DDIMScheduler):
        return scheduler.step(eps, step.t, x, eta=eta, variance_noise=noise)
    draw = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(draw, lambda *args, **kwargs: noise)
    return scheduler.step(eps, step.t, x)


@pytest.mark.parametrize(
    "kind, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 1.0)], ids=["ddim-0", "ddim-1", "ddpm"]
)
@pytest.mark.parametrize("steps", COUNTS)
def test_each_step_agrees_with_diffusers(
    kind: str, eta: float, steps: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = make_scheduler(kind, steps, torch.float64)
    theirs = make_scheduler(kind, steps, torch.float32)
    noises = rng(3)  # the same stream as our sampler's own

    worst = {"ours": 0.0, "theirs": 0.0}
    timesteps = exact.timesteps.tolist()
    assert len(timesteps) == steps
    for step, t in zip(our_steps(kind, steps, eta, device), timesteps, strict=True):
        assert step.t == t
        noise = torch.randn(SHAPE, generator=noises)

        reference = oracle_step(exact, step, noise, eta, monkeypatch)
        oracle = oracle_step(theirs, step, noise, eta, monkeypatch)

        x_prev = reference.prev_sample
        assert x_prev.dtype == torch.float64
        error = float((step.x_prev.cpu().double() - x_prev).abs().max())
        assert error <= X_PREV_ATOL, f"x_prev at t = {t}: {error:.3g}"
        x0_error = relative_error(step.x0, reference.pred_original_sample)
        assert x0_error <= X0_RTOL, f"x0 at t = {t}: {x0_error:.3g} of the std"

        worst["ours"] = max(worst["ours"], error)
        oracle_error = float((oracle.prev_sample.double() - x_prev).abs().max())
        worst["theirs"] = max(worst["theirs"], oracle_error)
    # Over a run, never more than twice as far from the exact steps as diffusers in fp32.
    assert worst["ours"] <= 2 * worst["theirs"], worst
    print(kind, eta, steps, worst)


def test_diffusers_alpha_bar_is_ours_up_to_its_rounding() -> None:
    """The tables themselves: in fp32, a thousand factors are each rounded by 6e-8 or less."""
    theirs = make_scheduler("ddim", 50, torch.float32).alphas_cumprod
    torch.testing.assert_close(theirs, SCHEDULE.alpha_bar, rtol=1000 * 6e-8, atol=0)
