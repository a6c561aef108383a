"""Text to image: four stages composed, nothing hidden.

    prompt ── text ── context ─┐
    noise ─────────────────── unet, once per step of the sampler ── latents ── vae ── picture

`pipe(prompt)` runs `pipe.denoise(prompt)` to its end and decodes what comes out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ldm.checkpoints.checkpoint import Origin, Plan, fill, joint_config, origin, save_checkpoint
from ldm.config import ModelConfig
from ldm.device import check_device, check_dtype
from ldm.speed.cpu import optimize, rest
from ldm.files import check_writable
from ldm.presets import MAX_SEED, OURS, PRESETS, check_preset
from ldm.samplers import Steps, ddim, ddpm, draw_noise, guide
from ldm.schedule import NoiseSchedule, pairs
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer, beside
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLERS = OURS.samplers
LARGE = 30_000_000
"""From how many parameters on a stage gains by `optimize`; smaller ones spend time on calls."""


class TextToImage:
    """A latent diffusion model (Rombach et al. 2022, arXiv:2112.10752), ready to draw.

    Attributes:
        unet, vae, text, schedule: the stages, each a plain object that works alone.
        config: the numbers they were built from.
        origin: which files the weights came from, or None where they came from none.
        low_memory: see `optimize`.
    """

    low_memory = False

    def __init__(
        self,
        unet: UNet,
        vae: AutoencoderKL,
        text: CLIPTextEncoder,
        schedule: NoiseSchedule,
        config: ModelConfig,
        origin: Origin | None = None,
    ) -> None:
        self.unet = unet
        self.vae = vae
        self.text = text
        self.schedule = schedule
        self.config = config
        self.origin = origin

    @classmethod
    def from_plans(
        cls,
        plans: Mapping[str, Plan],
        *,
        device: torch.device,
        dtype: torch.dtype,
        check: bool = True,
    ) -> Self:
        """Read the weights that a plan per stage has found (`ldm.checkpoints.checkpoint.plan_stages`).

        Raises:
            CheckpointError: the stages do not belong together, or a number is not finite.
        """
        config = joint_config({stage: plan.weights for stage, plan in plans.items()})
        parts: dict[str, Any] = {s: fill(plan, device, dtype, check) for s, plan in plans.items()}
        schedule = NoiseSchedule(config.schedule)
        return cls(**parts, schedule=schedule, config=config, origin=origin(plans))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are: float32, or half precision."""
        return self.unet.conv_in.weight.dtype

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move all stages; what is not given stays as it is. Returns the pipeline itself.

        Raises:
            ValueError: the device is not there, or the dtype is not a floating-point type.
        """
        device = self.device if device is None else check_device(device)
        dtype = self.dtype if dtype is None else check_dtype(dtype)
        for stage in (self.unet, self.vae, self.text):
            stage.to(device=device, dtype=dtype)
        return self

    def optimize(self, *, low_memory: bool = False) -> Self:
        """Draw the same pictures faster, from now on. Returns the pipeline itself.

        On a CPU, in float32 and without gradients, other kernels compute the same sums in another
        order (see `ldm.speed.cpu`): latents differ by some 1e-5 of their standard deviation, pictures
        by a grey level here and there. Weights, names and recordings stay what they are, and
        whatever cannot be faster is computed as before: on other devices everything, and stages
        as small as Horizon's. Memory that is freed stays with the process, to be used again.

        Args:
            low_memory: give back a stage's memory when its work is done: what was freed, and
                weights that are on a mapped file. The next picture reads those again, from the
                system's cache if there is room for that: about a second for Stable Diffusion v1.
        """
        self.low_memory = low_memory
        for stage in (self.unet, self.vae, self.text):
            if sum(weight.numel() for weight in stage.parameters()) >= LARGE:
                optimize(stage)
        return self

    def save(self, path: str | Path) -> None:
        """Write all weights as one safetensors file in the official layout, and the tokenizer's
        two files beside it. The file appears whole or not at all.

        Raises:
            ValueError: it cannot be written there, or another model's tokenizer is there already.
        """
        path, tokenizer = Path(path), self.text.require_tokenizer()
        check_writable(path)
        check_beside(path, tokenizer)
        save_checkpoint(path, unet=self.unet, vae=self.vae, text=self.text, config=self.config)
        if beside(path) is None:
            tokenizer.save(path.parent)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        sampler: str = "ddim",
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        like: str | None = None,
    ) -> list[Image]:
        """Draw pictures of a prompt, or `num_images` of each of several. See `denoise`.

        Returns:
            PIL images, those of the first prompt first.
        """
        run = self.denoise(
            prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            sampler=sampler,
            eta=eta,
            seed=seed,
            num_images=num_images,
            height=height,
            width=width,
            like=like,
        )
        for step in run:
            latents = step.x_prev
        return self.decode(latents)

    def denoise(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        sampler: str = "ddim",
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        like: str | None = None,
    ) -> Steps:
        """The same run as `pipe(...)`, one `Step` at a time: `pipe.decode(step.x0)` shows it.

        Args:
            prompt: what to draw; a list of prompts gives `num_images` of each.
            steps: how many times the UNet is asked, 1 to 1000.
            guidance_scale: how hard to follow the prompt; 1 is without guidance.
            negative_prompt: what to move away from; empty is the plain unconditional model.
            sampler: "ddim" or "ddpm".
            eta: for ddim, from 0 (the seed alone decides) to 1 (noise at every step).
            seed: image i draws its noise from a generator of its own, seeded `seed + i`; but see
                `like`.
            num_images: pictures per prompt.
            height, width: in pixels, multiples of the VAE's factor; by default as trained.
            like: whose picture of the seed to draw: None is ours; "compvis" and "diffusers" visit
                the timesteps of those code bases, and draw the noise of a batch as they do (see
                `ldm.presets`).

        Raises:
            ValueError: at the call, before any work, for any argument out of its range.
        """
        prompts = check_prompts(prompt, num_images)
        check_settings(
            self.config,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            eta=eta,
            seed=seed,
            num_images=len(prompts),
            height=height,
            width=width,
            like=like,
        )
        preset = PRESETS[like]
        timesteps = preset.timesteps(steps, self.config.schedule.num_train_timesteps)
        generators = preset.generators(seed, len(prompts))
        shape = latent_shape(self.config, height, width)
        dtype = self.dtype if preset.half_latents else torch.float32
        noise = torch.empty(len(prompts), *shape, device=self.device, dtype=dtype)  # (B, C, h, w)
        x = draw_noise(generators, noise)
        context = self.context(prompts)  # (B, L, D)
        uncond_context = self.context([negative_prompt]).expand_as(context)
        # Matrix products round differently with the size of the batch, and a sampler can amplify
        # that a hundredfold. On a CPU, where a batch gains least, each image is asked alone.
        images_per_call = 1 if self.device.type == "cpu" else None
        eps_fn = guide(
            self.unet, context, uncond_context, guidance_scale, images_per_call=images_per_call
        )

        if sampler == "ddim":
            grid = pairs(timesteps, end=0)
            return ddim(eps_fn, x, grid, self.schedule, eta=eta, generators=generators)
        grid = pairs(timesteps, end=-1)
        return ddpm(eps_fn, x, grid, self.schedule, generators=generators)

    @torch.no_grad()
    def context(self, prompts: Sequence[str]) -> Tensor:
        """The text states of prompts, (B, max_length, context_dim). An equal prompt is encoded
        once, and alone, so that an image does not depend on its neighbours in the batch."""
        states = {prompt: self.text([prompt]) for prompt in dict.fromkeys(prompts)}
        if self.low_memory:
            rest(self.text)
        return torch.cat([states[prompt] for prompt in prompts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image]:
        """Scaled latents (B, C, h, w), which stay as they are, to B PIL images.

        One at a time: a batch would take as many times the memory.
        """
        from PIL import Image

        if self.low_memory:
            rest(self.unet)
        images = []
        for z in latents.to(self.device, self.dtype).split(1):
            y = self.vae.decode(z / self.vae.config.scaling_factor).float()[0]  # (3, H, W)
            levels = ((y + 1) / 2).clamp(0, 1).mul(255).round().byte()
            images.append(Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()))
        if self.low_memory:
            rest(self.vae)
        return images

    @torch.no_grad()
    def encode(self, image: Image | Sequence[Image]) -> Tensor:
        """PIL images of one size to scaled latents (B, C, h, w), the posterior's modes.

        Raises:
            ValueError: a side is not a multiple of the VAE's factor.
        """
        import numpy as np

        images = image if isinstance(image, Sequence) else [image]
        for one in images:
            latent_shape(self.config, one.height, one.width)
        pixels = torch.from_numpy(np.stack([np.asarray(one.convert("RGB")) for one in images]))
        x = pixels.permute(0, 3, 1, 2).to(self.device, self.dtype) / 127.5 - 1  # (B, 3, H, W)
        return self.vae.encode(x).mode() * self.vae.config.scaling_factor


def latent_shape(
    config: ModelConfig, height: int | None, width: int | None
) -> tuple[int, int, int]:
    """The shape (C, h, w) of one picture's latents; None is the size the model was trained on.

    Raises:
        ValueError: a side is not a positive multiple of the VAE's factor.
    """
    factor = config.vae.factor
    height = config.image_size if height is None else height
    width = config.image_size if width is None else width
    for name, size in (("height", height), ("width", width)):
        check_whole(name, size)
        if size < factor or size % factor:
            raise ValueError(f"{name} must be a positive multiple of {factor}, not {size}")
    return config.vae.latent_channels, height // factor, width // factor


def check_settings(
    config: ModelConfig,
    *,
    negative_prompt: str,
    steps: int,
    guidance_scale: float,
    sampler: str,
    eta: float,
    seed: int,
    num_images: int,
    height: int | None,
    width: int | None,
    like: str | None = None,
) -> None:
    """A ValueError in one line for the first setting that is out of its range; `num_images` is the
    number of pictures in all."""
    if not isinstance(negative_prompt, str):
        raise ValueError(f"negative_prompt must be a string, not {negative_prompt!r}")
    for name, value in {"steps": steps, "seed": seed}.items():
        check_whole(name, value)
    for name, number in {"guidance_scale": guidance_scale, "eta": eta}.items():
        if not isinstance(number, (int, float)):
            raise ValueError(f"{name} must be a number, not {number!r}")
    total = config.schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, not {steps}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale}")
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: there are {', '.join(SAMPLERS)}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    if eta != 0.0 and sampler != "ddim":
        raise ValueError(f"eta is a setting of ddim: {sampler} has none")
    if not 0 <= seed <= MAX_SEED - num_images + 1:
        raise ValueError(f"the seed must be between 0 and {MAX_SEED}, not {seed}")
    latent_shape(config, height, width)
    check_preset(
        like,
        sampler=sampler,
        steps=steps,
        total=total,
        guidance_scale=guidance_scale,
        seed=seed,
    )


def check_prompts(prompt: str | Sequence[str], num_images: int) -> list[str]:
    """One prompt per image, or a ValueError in one line."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"a prompt must be a string or a list of strings, not {prompt!r}")
    if not prompts or not all(one.strip() for one in prompts):
        raise ValueError("the prompt is empty")
    check_whole("num_images", num_images)
    if num_images < 1:
        raise ValueError(f"num_images must be 1 or more, not {num_images}")
    return [one for one in prompts for _ in range(num_images)]


def check_beside(path: Path, tokenizer: Tokenizer) -> None:
    """A ValueError in one line if another model's tokenizer lies where a file of weights is to be
    written: this model would be loaded with it."""
    folder = beside(path)
    if folder is not None and Tokenizer.from_folder(folder) != tokenizer:
        raise ValueError(f"{folder} holds another model's tokenizer: save into another folder")


def check_whole(name: str, value: int) -> None:
    """A ValueError in one line unless the value is a whole number."""
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None
