"""Whose picture a seed is: our own rule, and those of two other code bases.

With the same weights, prompt and seed, two programs draw two pictures. The mathematics is the same;
what differs is which timesteps they visit and how they turn the seed into noise. A `Preset` is just
that, as a value. docs/other-code.md lists these differences and those that no seed can show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from ldm.samplers import SAMPLERS, Generators
from ldm.samplers.grids import RHO, Levels, grid_of
from ldm.schedule import NoiseLevel, NoiseSchedule, even_timesteps, sigma_of

MAX_SEED = 2**63 - 1


class Walk(NamedTuple):
    """The noise levels of a run.

    Attributes:
        start: to where a picture that the run starts from is noised. As a rule that is where the
            first step begins.
        grid: its steps.
    """

    start: NoiseLevel
    grid: Levels


@dataclass(frozen=True)
class Preset:
    """What decides a picture besides weights, prompts and settings.

    Attributes:
        grid: grid(sampler, steps, schedule, spacing), the noise levels that a run walks: when the
            UNet is asked. A ValueError in one line where that code base fails.
        begun: begun(sampler, grid, steps, strength), the part of a grid that is walked from a
            picture on. A ValueError in one line where no step is left, or that code base fails.
        noise_device: where noise is drawn; other devices draw other numbers from the same seed.
        one_generator: whether one generator draws the noise of a whole batch, so that an image
            depends on the size of its batch, or each image has its own, seeded `seed + i`.
        samples_latents: whether a picture to start from is encoded as a sample of the VAE's
            posterior, which the generator draws first; else it is the posterior's mode.
        half_latents: whether latents and their noise have the model's dtype, half precision
            included, or are always float32.
        skips_negative: whether `clip_skip` is of the negative prompt too.
        samplers: which of ours the code base has too, exactly.
        max_seed: the largest seed it takes.
        min_guidance_scale: below it, guidance means something else there.
    """

    grid: Callable[[str, int, NoiseSchedule, str | None], Levels]
    begun: Callable[[str, Levels, int, float], Walk]
    noise_device: str
    one_generator: bool
    samples_latents: bool = False
    half_latents: bool = False
    skips_negative: bool = True
    samplers: tuple[str, ...] = tuple(SAMPLERS)
    max_seed: int = MAX_SEED
    min_guidance_scale: float = -math.inf

    def generators(self, seed: int, num_images: int) -> Generators:
        """Fresh generators, which draw all noise of a run: the starting noise, then each step's.

        One that is seeded on a device gives the numbers that the device's global generator gives
        after `torch.manual_seed(seed)`.
        """
        if self.one_generator:
            return torch.Generator(self.noise_device).manual_seed(seed)
        seeds = range(seed, seed + num_images)
        return [torch.Generator(self.noise_device).manual_seed(one) for one in seeds]


def our_grid(sampler: str, steps: int, schedule: NoiseSchedule, spacing: str | None) -> Levels:
    """`Sampler.grid`."""
    return SAMPLERS[sampler].grid(steps, schedule, spacing)


def our_begun(sampler: str, grid: Levels, steps: int, strength: float) -> Walk:
    """The last steps of a grid, a share of them; the first of these begins at the noised picture
    (diffusers' `StableDiffusionImg2ImgPipeline.get_timesteps`).

    Raises:
        ValueError: there is not one.
    """
    left = min(int(steps * strength), len(grid))
    if left < 1:
        raise ValueError(
            f"strength={strength} of {steps} steps leaves none: {1 / steps:.3g} is one"
        )
    return Walk(grid[-left][0], grid[-left:])


# --- diffusers -------------------------------------------------------------------------------

KARRAS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
"""Whose schedulers have `use_karras_sigmas`."""


def diffusers_grid(
    sampler: str, steps: int, schedule: NoiseSchedule, spacing: str | None
) -> Levels:
    """The grid of diffusers' scheduler with Stable Diffusion v1's settings (`timestep_spacing`
    "leading", `steps_offset` 1), and with `use_karras_sigmas` where the spacing is "karras".

    Raises:
        ValueError: there is no such grid there, or none of so many steps.
    """
    if spacing not in (None, "leading", "karras"):
        raise ValueError(
            f"like='diffusers' draws as Stable Diffusion v1 is set up there, with the spacings "
            f"leading and karras, not {spacing}"
        )
    if spacing == "karras" and sampler not in KARRAS:
        raise ValueError(f"like='diffusers' has no spacing 'karras' for {sampler}")
    if sampler == "lcm":  # its grid is the one it was distilled at, there too
        return our_grid(sampler, steps, schedule, None)
    if sampler == "plms" and steps == 1:
        raise ValueError(
            "like='diffusers' takes plms' only step without its second call: that is ddim"
        )
    total, end = schedule.config.num_train_timesteps, SAMPLERS[sampler].end
    multistep = sampler in ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
    timesteps = diffusers_timesteps(steps, total, multistep=multistep)
    if spacing != "karras":
        return grid_of(timesteps, schedule, end=end)
    # Between the sigmas of the grid, but for multistep methods between those of the whole table;
    # and these ask at the timestep next to a sigma, the others at the point itself.
    ends = (total - 1, 0) if multistep else (timesteps[0], timesteps[-1])
    most, least = (sigma_of(schedule.alpha_bar_at(t)) ** (1 / RHO) for t in ends)
    most_left, least_left = schedule.alpha_bar[0].item(), schedule.alpha_bar[-1].item()
    levels = []
    for k in range(steps):
        sigma = (most + k / max(steps - 1, 1) * (least - most)) ** RHO
        # The first and the last are points of the table, but for rounding.
        alpha_bar = min(max(1 / (1 + sigma**2), least_left), most_left)
        t = schedule.timestep_at(alpha_bar)
        levels.append(NoiseLevel(round(t) if multistep else t, alpha_bar))
    return list(pairwise([*levels, schedule.level(end)]))


def diffusers_timesteps(steps: int, total: int, *, multistep: bool = False) -> list[int]:
    """The timesteps of diffusers' schedulers with Stable Diffusion v1's settings: ours, but that
    all steps lead out of its table. DPMSolverMultistep and UniPC leave out the last, which is the
    first of the table, of one step more: 4 are 801, 601, 401, 201.

    Raises:
        ValueError: `steps` is not within 1 and total - 1, or total - 2 for those two.
    """
    most = total - 2 if multistep else total - 1
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, not {steps}")
    if steps > most:
        raise ValueError(
            f"diffusers fails with {steps} steps: its first timestep would be {total}, "
            f"which is none; take {most} at most"
        )
    return even_timesteps(steps + 1, total)[:-1] if multistep else even_timesteps(steps, total)


def diffusers_begun(sampler: str, grid: Levels, steps: int, strength: float) -> Walk:
    """The same, but for a scheduler that counts one of its timesteps twice.

    Raises:
        ValueError: there is no step, or it is that scheduler.
    """
    if sampler == "plms":
        raise ValueError(
            "like='diffusers' has no plms from a picture: its PNDMScheduler asks twice at the "
            "first of all timesteps, and loses count where that is left out"
        )
    return our_begun(sampler, grid, steps, strength)


# --- CompVis ---------------------------------------------------------------------------------


def compvis_grid(sampler: str, steps: int, schedule: NoiseSchedule, spacing: str | None) -> Levels:
    """The grid of CompVis' samplers.

    Raises:
        ValueError: there is no such grid there, or none of so many steps.
    """
    if spacing is not None:
        raise ValueError(f"like='compvis' has one spacing of its own, not {spacing!r}")
    timesteps = compvis_timesteps(steps, schedule.config.num_train_timesteps)
    grid = grid_of(timesteps, schedule, end=SAMPLERS[sampler].end)
    if sampler == "plms" and len(grid) == 1:  # its second call is not at the end but at t itself
        here, there = grid[0]
        return [(here, NoiseLevel(here.t, there.alpha_bar))]
    return grid


def compvis_begun(sampler: str, grid: Levels, steps: int, strength: float) -> Walk:
    """scripts/img2img.py: the picture is noised to the timestep of index strength * S, counted from
    the cleanest, and the first step asks at the one below.

    Raises:
        ValueError: there is no step, or no such timestep (at a strength of 1), or no such sampler.
    """
    if sampler == "plms":
        raise ValueError("like='compvis' has no plms from a picture: scripts/img2img.py has ddim")
    left = int(steps * strength)
    if left < 1:
        return our_begun(sampler, grid, steps, strength)
    if left >= len(grid):
        raise ValueError(
            f"CompVis' code fails with strength={strength}: it noises to the timestep after the "
            f"last of {len(grid)}; less than 1 works"
        )
    return Walk(grid[-left - 1][0], grid[-left:])


def compvis_timesteps(steps: int, total: int) -> list[int]:
    """The grid of CompVis' `make_ddim_timesteps`: `range(0, total, total // steps)`, each plus 1.

    It has more timesteps than were asked for where these do not divide `total` (8 for 7), and where
    the last would be `total` itself, their sampler stops with an IndexError.

    Raises:
        ValueError: `steps` is not within 1 and `total`, or is such a number.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, not {steps}")
    if not fits_compvis(steps, total):
        fitting = (s for s in range(1, total) if fits_compvis(s, total))
        nearest = min(fitting, key=lambda s: abs(s - steps))
        raise ValueError(
            f"CompVis' code fails with {steps} steps: its first timestep would be {total}, "
            f"which is none; the nearest number that works is {nearest}"
        )
    return [t + 1 for t in reversed(range(0, total, total // steps))]


def fits_compvis(steps: int, total: int) -> bool:
    """Whether `range(0, total, total // steps)` stops short of total - 1."""
    return (total - 1) % (total // steps) != 0


# --- The presets -----------------------------------------------------------------------------

OURS = Preset(our_grid, our_begun, noise_device="cpu", one_generator=False)

# StableDiffusionPipeline, or StableDiffusionImg2ImgPipeline, with
# generator=torch.Generator("cpu").manual_seed(seed). Its guidance is off at a scale of 1, as ours
# is, and below 1 too, where ours is not.
DIFFUSERS = Preset(
    diffusers_grid,
    diffusers_begun,
    noise_device="cpu",
    one_generator=True,
    samples_latents=True,
    half_latents=True,
    skips_negative=False,
    min_guidance_scale=1.0,
)

# scripts/txt2img.py with its DDIMSampler, or with --plms its PLMSSampler, or scripts/img2img.py:
# the first batch of a run. The last samples the VAE's posterior, by numbers that depend on what was
# drawn while the model was built; here it is the mode. Lightning's `seed_everything` takes seeds of
# 32 bits.
COMPVIS = Preset(
    compvis_grid,
    compvis_begun,
    noise_device="cuda",
    one_generator=True,
    samplers=("ddim", "plms"),
    max_seed=2**32 - 1,
)

PRESETS: dict[str | None, Preset] = {None: OURS, "compvis": COMPVIS, "diffusers": DIFFUSERS}


def check_preset(
    like: str | None,
    *,
    sampler: str,
    steps: int,
    spacing: str | None,
    schedule: NoiseSchedule,
    guidance_scale: float,
    seed: int,
) -> None:
    """A ValueError in one line for a name that is no preset, or what its code base cannot do here.

    The settings themselves are within our own ranges.
    """
    if not isinstance(like, str | None) or like not in PRESETS:
        names = ", ".join(name for name in PRESETS if name is not None)
        raise ValueError(
            f"unknown like={like!r:.80}: there are {names}, and None for our own pictures"
        )
    preset = PRESETS[like]
    if sampler not in preset.samplers:
        there = ", ".join(preset.samplers)
        raise ValueError(f"like={like!r} has no sampler {sampler!r}: there is {there}")
    if guidance_scale < preset.min_guidance_scale:
        raise ValueError(
            f"like={like!r} means no guidance by any guidance_scale below "
            f"{preset.min_guidance_scale:g}: pass {preset.min_guidance_scale:g} for that, "
            f"not {guidance_scale}"
        )
    if seed > preset.max_seed:
        raise ValueError(f"like={like!r} takes seeds up to {preset.max_seed}, not {seed}")
    preset.grid(sampler, steps, schedule, spacing)


def check_noise_device(like: str | None) -> None:
    """A ValueError in one line where the noise of a preset cannot be drawn on this machine."""
    if PRESETS[like].noise_device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"like={like!r} draws its noise on a CUDA device, and there is none on this machine: "
            "pass the noise itself (noise=)"
        )
