"""Pictures as other code draws them: the same timesteps, noise and final latents for a seed.

The judge of `like="diffusers"` is its own `StableDiffusionPipeline`, that of `like="compvis"` the
formulas of its public code (`make_ddim_timesteps`, `make_ddim_sampling_parameters`,
`DDIMSampler.p_sample_ddim`), written anew below in NumPy's terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ldm
from ldm.pipeline import TextToImage
from ldm.presets import (
    COMPVIS,
    DIFFUSERS,
    OURS,
    PRESETS,
    compvis_timesteps,
    diffusers_timesteps,
)
from ldm.samplers import ddim, ddpm, draw_noise
from ldm.schedule import NoiseSchedule
from tests.helpers import randn, relative_error, rng, tiny_model
from tests.oracle_pipeline import diffusers_schedulers, oracle_pipeline

# Both sides in fp32 with the same weights and noise. Their sums are in another order, 6e-8 each,
# and a run of a random network with guidance magnifies that; any other difference is of order 1.
SAME_LATENTS = 1e-4  # of the standard deviation

PROMPT = "a red house"
PROMPTS = [PROMPT, "the blue sea by day"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> TextToImage:
    return ldm.load(folder, device="cpu", dtype=torch.float32)


# --- like="diffusers" ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return oracle_pipeline(folder)


def diffusers_run(
    theirs: Any, prompt: str | list[str], *, seed: int, sampler: str = "ddim", **settings: Any
) -> tuple[list[int], list[Tensor]]:
    """What their pipeline does: its timesteps; the starting noise and the latents of every step."""
    timesteps: list[int] = []
    latents: list[Tensor] = []

    def keep(pipeline: Any, index: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        timesteps.append(int(t))
        latents.append(values["latents"])
        return {}

    theirs.scheduler = diffusers_schedulers()[sampler]
    prepare = theirs.prepare_latents
    theirs.prepare_latents = lambda *args: latents.append(prepare(*args)) or latents[0]
    try:
        theirs(
            prompt,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            callback_on_step_end=keep,
            **settings,
        )
    finally:
        theirs.prepare_latents = prepare
    return timesteps, latents


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_images": 3, "eta": 0.5},
        {"prompt": PROMPTS, "num_images": 2, "eta": 0.5, "negative_prompt": "the sky"},
        {"prompt": PROMPTS, "steps": 7, "guidance_scale": 1.0, "height": 24, "width": 40},
        {"prompt": PROMPTS, "num_images": 2, "sampler": "ddpm"},
    ],
    ids=["one", "batch-eta", "prompts-eta", "sizes-unguided", "prompts-ddpm"],
)
def test_diffusers_noise_timesteps_and_latents(
    pipe: TextToImage, theirs: Any, settings: dict[str, Any]
) -> None:
    settings = {"prompt": PROMPT, "steps": 10, "seed": 5, "height": 16, "width": 16} | settings
    steps = list(pipe.denoise(**settings, like="diffusers"))
    renamed = {"steps": "num_inference_steps", "num_images": "num_images_per_prompt"}
    asked = {renamed.get(name, name): value for name, value in settings.items()}
    if "negative_prompt" in asked:  # one per prompt, there
        asked["negative_prompt"] = [asked["negative_prompt"]] * len(asked["prompt"])
    timesteps, latents = diffusers_run(theirs, **asked)
    assert [step.t for step in steps] == timesteps
    assert torch.equal(steps[0].x, latents[0])
    errors = [relative_error(step.x_prev, x) for step, x in zip(steps, latents[1:], strict=True)]
    print(f"largest error of a step {max(errors):.2g}, of the last {errors[-1]:.2g}")
    assert max(errors) <= SAME_LATENTS


def test_diffusers_leaves_layers_out_for_the_prompt_alone(pipe: TextToImage, theirs: Any) -> None:
    """Ours and A1111's for the negative prompt as well."""
    size, words = {"height": 16, "width": 16}, {"negative_prompt": "the sky"}
    run = {"steps": 3, "seed": 5, "clip_skip": 1, **size, **words}
    steps = list(pipe.denoise(PROMPT, **run, like="diffusers"))
    asked = {"num_inference_steps": 3, "clip_skip": 1, **size, **words}
    _, latents = diffusers_run(theirs, PROMPT, seed=5, **asked)
    errors = [relative_error(step.x_prev, x) for step, x in zip(steps, latents[1:], strict=True)]
    assert max(errors) <= SAME_LATENTS
    ours = list(pipe.denoise(PROMPT, **run))
    assert relative_error(ours[-1].x_prev, latents[-1]) > 1e-2


def test_diffusers_picture_to_one_grey_level(pipe: TextToImage, theirs: Any) -> None:
    theirs.scheduler = diffusers_schedulers()["ddim"]
    generator = torch.Generator("cpu").manual_seed(8)
    reference = theirs(
        PROMPT, num_inference_steps=5, height=16, width=16, generator=generator
    ).images[0]
    (picture,) = pipe(PROMPT, steps=5, seed=8, like="diffusers")
    levels = np.asarray(picture, dtype=int), np.asarray(reference, dtype=int)
    assert levels[0].std() > 10
    assert np.abs(levels[0] - levels[1]).max() <= 1


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_diffusers_grid_for_every_number_of_steps(kind: str) -> None:
    scheduler = diffusers_schedulers()[kind]
    for steps in range(1, 1000):
        scheduler.set_timesteps(steps)
        assert diffusers_timesteps(steps, 1000) == scheduler.timesteps.tolist()
    scheduler.set_timesteps(1000)
    with pytest.raises(IndexError):
        scheduler.step(torch.zeros(1, 4, 2, 2), scheduler.timesteps[0], torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"diffusers fails with 1000 steps.*999 at most"):
        diffusers_timesteps(1000, 1000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_diffusers_latents_and_noise_have_the_models_dtype(
    folder: Path, kind: str, dtype: torch.dtype
) -> None:
    """As there, a step's result is rounded to half precision, and so is its noise."""
    pipe = ldm.load(folder, device="cpu", dtype=dtype)
    noisy = {"eta": 0.5} if kind == "ddim" else {}
    settings = {"steps": 6, "num_images": 2, "sampler": kind, "seed": 3} | noisy
    run = pipe.denoise(PROMPT, **settings, like="diffusers")
    scheduler, generator = diffusers_schedulers()[kind], rng(3)
    scheduler.set_timesteps(6)
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    noise = randn_tensor((2, 4, 8, 8), generator=generator, dtype=dtype)
    for step in run:
        assert step.index > 0 or (step.x.dtype == dtype and torch.equal(step.x, noise))
        assert step.eps.dtype == step.x_prev.dtype == dtype
        reference = scheduler.step(step.eps, step.t, step.x, generator=generator, **noisy)
        # The same operations in half precision, but for their coefficients: on a CPU, torch rounds
        # these to it too where they come first in a product. So the last bit of the largest term
        # may differ. Measured: half of that.
        ulp = torch.finfo(dtype).eps * reference.pred_original_sample.abs().max()
        assert (step.x_prev - reference.prev_sample).abs().max() <= ulp


def test_diffusers_takes_a_small_guidance_scale_for_none(pipe: TextToImage, theirs: Any) -> None:
    """Why it is refused: there, 0.5 draws the picture of 1, here it is half of the way."""
    run = {"seed": 2, "num_inference_steps": 3, "height": 16, "width": 16}
    _, half = diffusers_run(theirs, PROMPT, guidance_scale=0.5, **run)
    _, one = diffusers_run(theirs, PROMPT, guidance_scale=1.0, **run)
    assert torch.equal(half[-1], one[-1])
    with pytest.raises(ValueError, match=r"no guidance by any guidance_scale below 1: pass 1"):
        pipe.denoise(PROMPT, guidance_scale=0.5, like="diffusers")


# --- like="compvis" --------------------------------------------------------------------------


def script_timesteps(steps: int) -> np.ndarray:
    """CompVis' `make_ddim_timesteps`, "uniform"; ascending."""
    return np.asarray(list(range(0, 1000, 1000 // steps))) + 1


def script_tables(steps: int, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CompVis' tables for its timesteps: alphas, alphas_prev, sigmas."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = np.cumprod(1 - betas).astype(np.float32).astype(np.float64)
    timesteps = script_timesteps(steps)
    alphas = alphas_cumprod[timesteps]
    alphas_prev = np.asarray([alphas_cumprod[0], *alphas_cumprod[timesteps[:-1]]])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    return alphas, alphas_prev, sigmas


def script_run(
    pipe: TextToImage, prompts: list[str], device: str, *, steps: int, scale: float, eta: float
) -> Iterator[tuple[int, Tensor]]:
    """What scripts/txt2img.py does after `seed_everything`: the noise, then each step's latents,
    with our UNet and text encoder. Draws from the global generator of the device."""
    x = torch.randn((len(prompts), 4, 8, 8), device=device)
    yield 1000, x
    uncond, cond = pipe.context([""] * len(prompts)), pipe.context(prompts)
    tables = script_tables(steps, eta)
    for t, alpha, alpha_prev, sigma in zip(
        *(a[::-1].tolist() for a in (script_timesteps(steps), *tables)), strict=True
    ):
        times = torch.full((2 * len(prompts),), t, device=device)
        with torch.no_grad():
            both = pipe.unet(torch.cat([x, x]), times, torch.cat([uncond, cond]))
        e_uncond, e_cond = both.chunk(2)
        e = e_uncond + scale * (e_cond - e_uncond)
        pred_x0 = (x - np.sqrt(1 - alpha) * e) / np.sqrt(alpha)
        direction = np.sqrt(1 - alpha_prev - sigma**2) * e
        noise = sigma * torch.randn(x.shape, device=device)  # drawn even where sigma is 0
        x = np.sqrt(alpha_prev) * pred_x0 + direction + noise
        yield t, x


cuda = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


@pytest.fixture(params=["cpu", cuda])
def noise_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The preset as it is, on CUDA; and with CUDA's generator replaced by the CPU's, which shows
    all but the numbers themselves on a machine without."""
    device: str = request.param
    preset = dataclasses.replace(COMPVIS, noise_device=device)
    monkeypatch.setitem(PRESETS, "compvis", preset)
    return device


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 7, 10, 12])
@pytest.mark.parametrize(
    ("prompt", "num_images"), [(PROMPT, 1), (PROMPT, 3), (PROMPTS, 1)], ids=["1", "3", "prompts"]
)
def test_compvis_noise_timesteps_and_latents(
    folder: Path,
    noise_device: str,
    prompt: str | list[str],
    num_images: int,
    steps: int,
    eta: float,
) -> None:
    pipe = ldm.load(folder, device=noise_device, dtype=torch.float32)
    prompts = [PROMPT] * num_images if isinstance(prompt, str) else prompt
    run = pipe.denoise(prompt, num_images=num_images, steps=steps, eta=eta, seed=42, like="compvis")
    ours = list(run)
    devices = [torch.cuda.current_device()] if noise_device == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(42)  # seed_everything; model building draws from the CPU's alone
        (_, noise), *reference = script_run(
            pipe, prompts, noise_device, steps=steps, scale=7.5, eta=eta
        )
    assert len(ours) == {7: 8, 12: 13}.get(steps, steps)
    assert [step.t for step in ours] == [t for t, _ in reference]
    assert torch.equal(ours[0].x, noise)
    for step, (_, x) in zip(ours, reference, strict=True):
        assert relative_error(step.x_prev, x) <= SAME_LATENTS


def test_compvis_grid_for_every_number_of_steps() -> None:
    """And it is refused exactly where their lookup of alpha_bar is an IndexError."""
    refused = []
    for steps in range(1, 1001):
        try:
            script_tables(steps, 0.0)
        except IndexError:
            refused.append(steps)
            with pytest.raises(ValueError, match="CompVis' code fails with") as error:
                compvis_timesteps(steps, 1000)
            assert "\n" not in str(error.value)
        else:
            assert compvis_timesteps(steps, 1000) == script_timesteps(steps)[::-1].tolist()
    assert refused == [
        *(3, 9, 27, 36, 37),
        *range(101, 112),
        *range(251, 334),
        *range(501, 1001),
    ]


@pytest.mark.parametrize(
    ("steps", "nearest"), [(3, 2), (27, 26), (105, 100), (110, 112), (300, 334), (1000, 500)]
)
def test_compvis_refusal_names_the_nearest_number_that_works(steps: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"the nearest number that works is {nearest}$"):
        compvis_timesteps(steps, 1000)
    assert compvis_timesteps(nearest, 1000)


def test_grids_are_ours_where_the_steps_divide_1000() -> None:
    schedule = NoiseSchedule()
    for steps in (s for s in range(1, 501) if 1000 % s == 0):
        ours = OURS.grid("ddim", steps, schedule, None)
        assert [(here.t, there.t) for here, there in ours] == schedule.ddim_timesteps(steps)
        assert ours == COMPVIS.grid("ddim", steps, schedule, None)
        assert ours == DIFFUSERS.grid("ddim", steps, schedule, None)


@pytest.mark.parametrize("like", PRESETS, ids=str)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_grids_refuse_a_number_of_steps_that_no_table_has(like: str | None, steps: int) -> None:
    preset = PRESETS[like]
    for sampler in set(preset.samplers) - {"lcm"}:  # that has a table of its own
        with pytest.raises(ValueError, match=f"between 1 and 1000, not {steps}"):
            preset.grid(sampler, steps, NoiseSchedule(), None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compvis_noise_is_the_cuda_devices_and_not_the_cpus(folder: Path) -> None:
    """Also where the model computes on the CPU, or in half precision."""
    with torch.random.fork_rng([torch.cuda.current_device()]):
        torch.manual_seed(42)
        noise = torch.randn((3, 4, 8, 8), device="cuda").cpu()
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        pipe = ldm.load(folder, device=device, dtype=dtype)
        step = next(pipe.denoise(PROMPT, num_images=3, seed=42, like="compvis"))
        assert step.x.dtype == torch.float32
        assert torch.equal(step.x.cpu(), noise)
    assert not torch.equal(noise, torch.randn((3, 4, 8, 8), generator=rng(42)))


# --- What all presets share ------------------------------------------------------------------


def test_only_diffusers_latents_are_halved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "compvis", dataclasses.replace(COMPVIS, noise_device="cpu"))
    pipe = ldm.load(folder, device="cpu", dtype=torch.bfloat16)
    dtypes = {like: next(pipe.denoise(PROMPT, steps=2, like=like)).x.dtype for like in PRESETS}
    assert dtypes == {None: torch.float32, "compvis": torch.float32, "diffusers": torch.bfloat16}


@pytest.mark.parametrize("like", ["compvis", "diffusers"])
def test_no_global_generator_is_seeded_or_used(
    pipe: TextToImage, like: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "compvis", dataclasses.replace(COMPVIS, noise_device="cpu"))
    before = torch.get_rng_state()
    pipe(PROMPT, steps=2, eta=0.5, like=like)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_generator_draws_the_batch_at_once_and_each_step_anew(device: str) -> None:
    x = randn(2, 4, 4, 4).to(device)
    generator, same = rng(6), rng(6)
    assert torch.equal(draw_noise(generator, x).cpu(), torch.randn(x.shape, generator=same))
    schedule = NoiseSchedule()

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x

    grid = schedule.ddim_timesteps(3)
    assert len(list(ddim(eps_fn, x, grid, schedule, eta=1.0, generators=generator))) == 3
    grid = schedule.ddpm_timesteps(3)
    assert len(list(ddpm(eps_fn, x, grid, schedule, generators=generator))) == 3
    for _ in range(3 + 2):  # DDPM's last step draws none
        torch.randn(x.shape, generator=same)
    assert torch.equal(generator.get_state(), same.get_state())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"like": "comfy"}, "unknown like='comfy': there are compvis, diffusers"),
        ({"like": ""}, "unknown like=''"),
        ({"like": ["compvis"]}, "unknown like="),
        ({"like": True}, "unknown like=True"),
        ({"like": "diffusers", "steps": 1000}, "999 at most"),
        ({"like": "diffusers", "steps": 1000, "sampler": "ddpm"}, "999 at most"),
        ({"like": "diffusers", "guidance_scale": 0.0}, "no guidance by any guidance_scale below 1"),
        ({"like": "compvis", "steps": 3}, "the nearest number that works is 2"),
        ({"like": "compvis", "sampler": "ddpm"}, "has no sampler 'ddpm': there is ddim"),
        ({"like": "compvis", "seed": 2**32}, "takes seeds up to 4294967295, not 4294967296"),
        ({"like": "compvis"}, "draws its noise on a CUDA device, and there is none"),
    ],
)
def test_what_a_preset_cannot_do_is_refused_at_the_call_in_one_line(
    folder: Path, settings: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ldm.load(folder, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pipe, "context", lambda _: pytest.fail("work started"))
    for draw in (pipe, pipe.denoise):
        with pytest.raises(ValueError, match=match) as error:
            draw(PROMPT, **settings)
        assert "\n" not in str(error.value)


def test_largest_settings_that_a_preset_takes(
    pipe: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "compvis", dataclasses.replace(COMPVIS, noise_device="cpu"))
    assert next(pipe.denoise(PROMPT, seed=2**32 - 1, steps=500, like="compvis")).t == 999
    assert next(pipe.denoise(PROMPT, guidance_scale=0.5, steps=2, like="compvis")).t == 501
    assert next(pipe.denoise(PROMPT, guidance_scale=1.0, steps=999, like="diffusers")).t == 999
    assert next(pipe.denoise(PROMPT, seed=2**63 - 1, steps=1, like="diffusers")).t == 1


def test_presets_are_these() -> None:
    assert PRESETS == {None: OURS, "compvis": COMPVIS, "diffusers": DIFFUSERS}
    assert COMPVIS.noise_device == "cuda"  # what the tests above replace
