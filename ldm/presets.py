"""Whose picture a seed is: our own rule, and those of two other code bases.

With the same weights, prompt and seed, two programs draw two pictures. The mathematics is the same;
what differs is which timesteps they visit and how they turn the seed into noise. A `Preset` is just
that, as a value. docs/other-code.md lists these differences and those that no seed can show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldm.samplers import SAMPLERS, Generators
from ldm.schedule import even_timesteps

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Preset:
    """What decides a picture besides weights, prompts and settings.

    Attributes:
        timesteps: timesteps(steps, total), noisiest first: when the UNet is asked. A ValueError in
            one line where that code base fails.
        noise_device: where noise is drawn; other devices draw other numbers from the same seed.
        one_generator: whether one generator draws the noise of a whole batch, so that an image
            depends on the size of its batch, or each image has its own, seeded `seed + i`.
        half_latents: whether latents and their noise have the model's dtype, half precision
            included, or are always float32.
        samplers: which of ours the code base has too, exactly.
        max_seed: the largest seed it takes.
        min_guidance_scale: below it, guidance means something else there.
    """

    timesteps: Callable[[int, int], list[int]]
    noise_device: str
    one_generator: bool
    half_latents: bool = False
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


def diffusers_timesteps(steps: int, total: int) -> list[int]:
    """The grid of diffusers' DDIMScheduler and DDPMScheduler with Stable Diffusion v1's settings
    ("leading", steps_offset=1): ours, but that all steps lead out of its table.

    Raises:
        ValueError: `steps` is not within 1 and total - 1.
    """
    if steps == total:
        raise ValueError(
            f"diffusers fails with all {total} steps: its first timestep would be {total}, "
            f"which is none; take {total - 1} at most"
        )
    return even_timesteps(steps, total)


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


OURS = Preset(even_timesteps, noise_device="cpu", one_generator=False)

# StableDiffusionPipeline with generator=torch.Generator("cpu").manual_seed(seed). Its guidance is
# off at a scale of 1, as ours is, and below 1 too, where ours is not.
DIFFUSERS = Preset(
    diffusers_timesteps,
    noise_device="cpu",
    one_generator=True,
    half_latents=True,
    samplers=("ddim", "ddpm"),
    min_guidance_scale=1.0,
)

# scripts/txt2img.py with its DDIMSampler, the first batch of a run. Lightning's `seed_everything`
# takes seeds of 32 bits.
COMPVIS = Preset(
    compvis_timesteps,
    noise_device="cuda",
    one_generator=True,
    samplers=("ddim",),
    max_seed=2**32 - 1,
)

PRESETS: dict[str | None, Preset] = {None: OURS, "compvis": COMPVIS, "diffusers": DIFFUSERS}


def check_preset(
    like: str | None, *, sampler: str, steps: int, total: int, guidance_scale: float, seed: int
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
    preset.timesteps(steps, total)
    if preset.noise_device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"like={like!r} draws its noise on a CUDA device, and there is none on this machine"
        )
