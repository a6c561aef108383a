"""From a picture, and with a mask: against diffusers, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm.pipeline import TextToImage
from ldm.samplers import ddim, inpaint_rule, sample
from ldm.samplers.rules import ddim_rule
from ldm.schedule import NoiseLevel, NoiseSchedule
from tests.helpers import randn, relative_error, rng, tiny_model
from tests.oracle_pipeline import diffusers_schedulers, oracle_pipeline

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EACH_STEP = 1e-5  # of the standard deviation: handed their x, one call of the network and one rule
CHAIN = 1e-3
PROMPTS = ["a red house", "the blue sea by day"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> TextToImage:
    return ldm.load(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    parts = oracle_pipeline(folder).components
    parts["unet"].register_to_config(sample_size=64)  # which the constructor looks at
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def their_run(theirs: Any, sampler: str, **asked: Any) -> tuple[list[float], list[Tensor]]:
    """Their timesteps; the noised picture, and the latents after every step."""
    timesteps: list[float] = []
    latents: list[Tensor] = []

    def keep(pipeline: Any, index: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        timesteps.append(float(t))
        latents.append(values["latents"])
        return {}

    theirs.scheduler = diffusers_schedulers()[sampler]
    prepare = theirs.prepare_latents
    theirs.prepare_latents = lambda *args: latents.append(prepare(*args)) or latents[0]
    try:
        theirs(**asked, output_type="latent", callback_on_step_end=keep)
    finally:
        theirs.prepare_latents = prepare
    return timesteps, latents


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize(
    ("steps", "strength"), [(10, 0.75), (10, 1.0), (10, 0.1), (50, 0.29), (7, 0.5)]
)
def test_each_step_from_a_picture_is_diffusers(
    pipe: TextToImage, theirs: Any, sampler: str, steps: int, strength: float
) -> None:
    """Its noise too, and the sample of the posterior that is drawn before it."""
    timesteps, latents = their_run(
        theirs,
        sampler,
        prompt=PROMPTS,
        image=[picture(0), picture(1)],
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=rng(5),
    )
    asked: dict[str, Any] = dict(
        image=[picture(0), picture(1)], strength=strength, steps=steps, guidance_scale=2.0, seed=5
    )
    run = pipe.denoise(PROMPTS, sampler=sampler, like="diffusers", **asked)
    step = next(run)
    assert relative_error(step.x, latents[0]) <= EACH_STEP
    errors, found = [], []
    for x_prev in latents[1:]:
        found.append(float(step.t))
        errors.append(relative_error(step.x_prev, x_prev))
        step = run.send(x_prev) if len(found) < len(timesteps) else step
    print(f"largest error of a step {max(errors):.2g}")
    assert found == timesteps
    assert max(errors) <= EACH_STEP

    *_, last = pipe.denoise(PROMPTS, sampler=sampler, like="diffusers", **asked)
    assert relative_error(last.x_prev, latents[-1]) <= CHAIN


def other_schedulers() -> dict[str, Any]:
    """diffusers' schedulers of solvers, with Stable Diffusion v1's settings."""
    shared = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    leading = shared | {"timestep_spacing": "leading"}
    return {
        "euler": diffusers.EulerDiscreteScheduler(**leading),
        "heun": diffusers.HeunDiscreteScheduler(**leading),
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(
            **leading, algorithm_type="dpmsolver++", final_sigmas_type="zero"
        ),
        "unipc": diffusers.UniPCMultistepScheduler(**leading, final_sigmas_type="zero"),
    }


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize(("steps", "strength"), [(10, 0.75), (10, 1.0), (10, 0.1)])
def test_what_solvers_make_of_a_picture_is_diffusers(
    pipe: TextToImage, theirs: Any, sampler: str, steps: int, strength: float
) -> None:
    """Their latents have other units, but where they are clean."""
    theirs.scheduler = other_schedulers()[sampler]
    reference = theirs(
        prompt="a red house",
        image=picture(),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=rng(5),
        output_type="latent",
    ).images
    asked: dict[str, Any] = dict(image=picture(), strength=strength, steps=steps, seed=5)
    *_, last = pipe.denoise(
        "a red house", sampler=sampler, guidance_scale=2.0, like="diffusers", **asked
    )
    error = relative_error(last.x_prev, reference)
    print(f"{sampler}, {steps} steps, strength {strength}: {error:.2g}")
    assert error <= CHAIN


def test_ours_differ_from_diffusers_in_the_noise_and_the_posteriors_sample_alone(
    pipe: TextToImage, theirs: Any
) -> None:
    """With the sample's noise at 0 and the run's own handed in, theirs is our own picture too."""
    noise = randn(1, 4, 8, 8, seed=3)
    clean = pipe.encode(picture())
    asked: dict[str, Any] = dict(image=picture(), strength=0.6, steps=10, guidance_scale=2.0)
    *_, ours = pipe.denoise("a red house", noise=[noise], **asked)
    scheduler = diffusers_schedulers()["ddim"]
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[10 - 6 :]
    x = scheduler.add_noise(clean, noise, timesteps[:1])
    eps_fn = pipe.eps_fn(*ldm.inputs.asked(pipe.config, "a red house", asked))
    for t in timesteps.tolist():
        prediction: Any = eps_fn(x, torch.tensor([t]))
        x = scheduler.step(prediction.eps, t, x).prev_sample
    assert relative_error(ours.x_prev, x) <= CHAIN


# --- With a mask -------------------------------------------------------------------------------

SCHEDULE = NoiseSchedule()


def eps_fn(x: Tensor, t: Tensor) -> Tensor:
    """The exact noise where data are N(0.3, 0.8^2), and a bend, so that nothing is linear."""
    alpha_bar = SCHEDULE.alpha_bar[t].view(-1, 1, 1, 1)
    residual = x - 0.3 * alpha_bar.sqrt()
    exact = (1 - alpha_bar).sqrt() * residual / (0.64 * alpha_bar + 1 - alpha_bar)
    return exact + 0.05 * torch.sin(3 * x)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_each_step_with_a_mask_is_diffusers(steps: int) -> None:
    """The arithmetic of `StableDiffusionInpaintPipeline` for models of four channels, with its own
    scheduler: after each step the kept part is noised to the next timestep, after the last it is
    the picture."""
    scheduler = diffusers_schedulers()["ddim"]
    scheduler.set_timesteps(steps)
    clean, noise = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    mask = (randn(1, 1, 8, 8, seed=3) > 0).float()
    grid = SCHEDULE.ddim_timesteps(steps)
    end = SCHEDULE.level(grid[-1][1])
    rule = inpaint_rule(lambda known: ddim_rule(known, 0.0), clean, noise, mask, end)
    timesteps = scheduler.timesteps
    x = scheduler.add_noise(clean, noise, timesteps[:1])
    run = sample(rule, eps_fn, x, grid, SCHEDULE)
    step = next(run)
    for i, t in enumerate(timesteps.tolist()):
        x = scheduler.step(eps_fn(x, torch.tensor([t, t])), t, x).prev_sample
        kept = clean
        if i < len(timesteps) - 1:
            kept = scheduler.add_noise(clean, noise, timesteps[i + 1 : i + 2])
        x = (1 - mask) * kept + mask * x
        assert relative_error(step.x_prev, x) <= EACH_STEP
        if i < len(timesteps) - 1:
            step = run.send(x)


def test_a_mask_that_redraws_all_is_the_rule_itself() -> None:
    clean, noise, x = (randn(1, 4, 8, 8, seed=k) for k in range(3))
    grid = SCHEDULE.ddim_timesteps(5)
    rule = inpaint_rule(
        lambda known: ddim_rule(known, 0.0), clean, noise, torch.ones(1, 1, 8, 8), NoiseLevel(0, 1)
    )
    *_, masked = sample(rule, eps_fn, x, grid, SCHEDULE)
    *_, plain = ddim(eps_fn, x, grid, SCHEDULE)
    assert torch.equal(masked.x_prev, plain.x_prev)
