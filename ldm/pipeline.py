"""Text to image: four stages composed, nothing hidden.

    prompt ── text ── context ─┐
    noise ─────────────────── unet, once per step of the sampler ── latents ── vae ── picture

`pipe(prompt)` runs `pipe.denoise(prompt)` to its end and decodes what comes out. Both make their
arguments one value, `Settings`, of which `pipe.run` makes the steps. `load` makes the pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from ldm.adapters import Lora
from ldm.checkpoints.download import require_tokenizer
from ldm.checkpoints.embedding import read_embedding
from ldm.checkpoints.filling import fill
from ldm.checkpoints.loading import Origin, joint_config, open_model, origin, plan_stages
from ldm.checkpoints.planning import Ema, Plan
from ldm.checkpoints.saving import save_model
from ldm.checkpoints.shipped import shipped_weights
from ldm.checkpoints.tiny import check_tiny, is_tiny_decoder, load_tiny_decoder
from ldm.config import ModelConfig
from ldm.device import check_device, check_dtype, default_device, default_dtype
from ldm.observe.nonfinite import decoded, decoded_roughly, explained
from ldm.pictures import Picture, stack, to_images, to_tensor
from ldm.presets import PRESETS
from ldm.samplers import SAMPLERS, Steps, draw_noise, guide, sample
from ldm.schedule import NoiseSchedule
from ldm.settings import Settings, latent_shape
from ldm.speed.cpu import optimize, rest
from ldm.speed.waiting import told_when_slow
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, TinyDecoder

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE = 30_000_000
"""From how many parameters on a stage gains by `optimize`; smaller ones spend time on calls."""


class TextToImage:
    """A latent diffusion model (Rombach et al. 2022, arXiv:2112.10752), ready to draw.

    Attributes:
        unet, vae, text, schedule: the stages, each a plain object that works alone.
        config: the numbers they were built from.
        origin: which files the weights came from, or None where they came from none.
        loras: those that were loaded with `load_lora`, in that order.
        tiny: a tiny decoder that `decode` uses in place of the autoencoder's, or None.
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
        self.loras: tuple[Lora, ...] = ()
        self.tiny: TinyDecoder | None = None

    @classmethod
    def from_plans(
        cls,
        plans: Mapping[str, Plan],
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        dtype: torch.dtype,
        check: bool = True,
    ) -> Self:
        """Read the weights that a plan per stage has found; the tokenizer is the text encoder's.

        Raises:
            CheckpointError: the stages do not belong together, or a number is not finite.
            ValueError: the tokenizer is another model's.
        """
        config = joint_config({stage: plan.weights for stage, plan in plans.items()})
        parts: dict[str, Any] = {
            stage: fill(plan, device, dtype, check, tokenizer) for stage, plan in plans.items()
        }
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
        for stage in filter(None, (self.unet, self.vae, self.text, self.tiny)):
            stage.to(device=device, dtype=dtype)
        return self

    def optimize(self, *, low_memory: bool = False) -> Self:
        """Draw the same pictures faster, from now on. Returns the pipeline itself.

        On a CPU, in float32 and without gradients, other kernels compute the same sums in another
        order (see `ldm.speed.cpu`): latents differ by some 1e-5 of their standard deviation,
        pictures by a grey level here and there. Weights, names and recordings stay what they are,
        and whatever cannot be faster is computed as before: on other devices everything, and stages
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

    def load_lora(self, path: str | Path, scale: float = 1.0) -> Lora:
        """Add a LoRA: the weights stay what they are, and what it changes is computed beside them.

        Args:
            path: a file as kohya's trainers, diffusers or PEFT write it (`ldm.checkpoints.lora`).
            scale: how strongly it counts.

        Returns:
            A handle: `lora.scale = 0.5`, and `lora.remove()`, after which pictures are as before,
            bit for bit.

        Raises:
            FileNotFoundError: nothing is there.
            CheckpointError: it cannot be read, or is no LoRA of this model; one line says why.
            ValueError: the scale is none.
        """
        lora = Lora(path, {"unet": self.unet, "text": self.text}, scale)
        self.loras = (*(one for one in self.loras if one.is_on), lora)
        return lora

    def fuse_lora(self) -> Self:
        """Write all loaded LoRAs into the weights, each by its scale. This cannot be undone, and
        `save` then saves them. Returns the pipeline itself."""
        for lora in self.loras:
            lora.fuse()
        self.loras = ()
        return self

    def load_embedding(self, path: str | Path, word: str | None = None) -> str:
        """Teach the text encoder a word (textual inversion), for this pipeline: `save` leaves it
        out.

        Args:
            path: a file as A1111's program or diffusers write it (`ldm.checkpoints.embedding`).
            word: what it is called in prompts; None is the word of the file.

        Returns:
            The word.

        Raises:
            FileNotFoundError: nothing is there.
            CheckpointError: it cannot be read, or is no word of this model; one line says why.
            ValueError: the vocabulary has the word already, or no prompt can have it.
        """
        found, vectors = read_embedding(path, self.text.config.hidden_size)
        self.text.add_word(word or found, vectors)
        return word or found

    def save(self, path: str | Path) -> None:
        """Write all weights as one safetensors file in the official layout, and the tokenizer's
        two files beside it. The file appears whole or not at all. LoRAs are not in it, unless
        `fuse_lora` has merged them.

        Raises:
            ValueError: it cannot be written there, or another model's tokenizer is there already.
        """
        save_model(path, unet=self.unet, vae=self.vae, text=self.text, config=self.config)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        like: str | None = None,
        spacing: str | None = None,
    ) -> list[Image]:
        """Draw pictures of a prompt, or `num_images` of each of several. See `denoise`.

        Returns:
            PIL images, those of the first prompt first.
        """
        settings = Settings.of(
            self.config,
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
            spacing=spacing,
        )
        return self.draw(settings)

    def denoise(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        like: str | None = None,
        spacing: str | None = None,
    ) -> Steps:
        """The same run as `pipe(...)`, one `Step` at a time: `pipe.decode(step.x0)` shows it.

        Args:
            prompt: what to draw; a list of prompts gives `num_images` of each.
            steps: how many intervals the sampler's grid has, 1 to 1000; None, here and below, is
                the model's own default, `pipe.config.defaults` (Stable Diffusion v1: 50).
            guidance_scale: how hard to follow the prompt; 1 is without guidance.
            negative_prompt: what to move away from; empty is the plain unconditional model.
            sampler: one of `ldm.samplers.SAMPLERS`: "ddim", "ddpm", "plms", "euler",
                "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", or "lcm", which
                needs a model made for it.
            eta: for ddim, from 0 (the seed alone decides) to 1 (noise at every step).
            seed: image i draws its noise from a generator of its own, seeded `seed + i`; but see
                `like`.
            num_images: pictures per prompt.
            height, width: in pixels, multiples of the VAE's factor; by default as trained.
            like: whose picture of the seed to draw: None is ours; "compvis" and "diffusers" visit
                the timesteps of those code bases, and draw the noise of a batch as they do (see
                `ldm.presets`).
            spacing: which noise levels the steps visit: "leading", "linspace", "trailing" or
                "karras" (see `ldm.samplers.grids`); None is the sampler's own way.

        Raises:
            ValueError: at the call, before any work, for any argument out of its range.
        """
        settings = Settings.of(
            self.config,
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
            spacing=spacing,
        )
        return self.run(settings)

    def draw(self, settings: Settings) -> list[Image]:
        """The pictures of a run, in the order of its prompts."""
        for step in self.run(settings):
            latents = step.x_prev
        return self.decode(latents)

    def run(self, settings: Settings) -> Steps:
        """A run, one `Step` at a time: noise from the seeds, context from the prompts, and the
        sampler, which asks the guided UNet at every step of its grid.

        Raises:
            ValueError: at the call, for settings that this model cannot follow.
            DivergedError: NaN, infinity or absurdly large numbers came up; one line says at which
                step, and in which part of the model they begin (see `ldm.samplers.loop.sample`).
        """
        settings.check(self.config)
        preset, sampler = PRESETS[settings.like], SAMPLERS[settings.sampler]
        count, dtype = settings.num_images, self.dtype if preset.half_latents else torch.float32
        generators = preset.generators(settings.seed, count)
        shape = latent_shape(self.config, settings.height, settings.width)
        latents = torch.empty(count, *shape, device=self.device, dtype=dtype)  # (B, C, h, w)
        x = draw_noise(generators, like=latents)
        context = self.context(settings.prompts)  # (B, L, D)
        uncond_context = self.context([settings.negative_prompt]).expand_as(context)
        # Matrix products round differently with the size of the batch, and a sampler can amplify
        # that a hundredfold. On a CPU, where a batch gains least, each image is asked alone.
        images_per_call = 1 if self.device.type == "cpu" else None
        eps_fn = guide(
            self.unet,
            context,
            uncond_context,
            settings.guidance_scale,
            images_per_call=images_per_call,
        )
        if self.device.type == "cpu":
            eps_fn = told_when_slow(eps_fn)
        options = {name: getattr(settings, name) for name in sampler.options}
        rule = functools.partial(sampler.rule, **options)
        grid = settings.grid(self.schedule)
        prediction = self.config.prediction
        steps = sample(
            rule, eps_fn, x, grid, self.schedule, generators=generators, prediction=prediction
        )
        return explained(
            steps,
            text=self.text,
            encode=lambda: self.context([*settings.prompts, settings.negative_prompt]),
            unet=self.unet,
            eps_fn=eps_fn,
            guidance_scale=settings.guidance_scale,
        )

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

        One at a time: a batch would take as many times the memory. Where a decoder overflows in
        float16 the picture is decoded once more in float32, with a warning.

        Raises:
            ValueError: latents are not (B, C, h, w).
            DivergedError: they hold NaN, infinity or absurdly large numbers, or the picture does.
        """
        channels = self.vae.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents must be (B, {channels}, h, w), not {tuple(latents.shape)}")
        if self.low_memory:
            rest(self.unet)
        images: list[Image] = []
        tiny = self.tiny
        ys = decoded(self.vae, latents) if tiny is None else decoded_roughly(tiny, latents)
        for y in ys:  # (1, 3, H, W)
            images += to_images(y)
        if self.low_memory:
            rest(self.vae)
        return images

    @torch.no_grad()
    def encode(self, picture: Picture | Sequence[Picture]) -> Tensor:
        """Pictures of one size to scaled latents (B, C, h, w), the posterior's modes.

        Args:
            picture: a PIL image, an array (H, W, 3) of uint8 or a path, or a list of them: what a
                person sees of each is encoded (see `ldm.pictures.to_rgb`).

        Raises:
            FileNotFoundError: nothing is at a path.
            ValueError: a picture cannot be read, they are not of one size, or a side is not a
                multiple of the VAE's factor.
        """
        if isinstance(picture, str) or not isinstance(picture, Sequence):
            picture = [picture]
        levels = stack(picture)  # (B, H, W, 3)
        latent_shape(self.config, levels.shape[1], levels.shape[2])
        x = to_tensor(levels.to(self.device, self.dtype))  # (B, 3, H, W)
        return self.vae.encode(x).mode() * self.vae.config.scaling_factor


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    ema: Ema = "auto",
    vae: str | Path | None = None,
    text: str | Path | None = None,
    prediction: str | None = None,
    check: bool = True,
) -> TextToImage:
    """A whole model, ready to draw.

    Args:
        path: a file in the official Stable Diffusion v1 layout (safetensors, or torch's pickles:
            nothing in them is executed), a diffusers folder, or a folder that holds one file of
            weights; None is Horizon, our own small model.
        device: "cuda", "mps" or "cpu"; None picks the fastest there is.
        dtype: None is float16 on a GPU, float32 on a CPU.
        config: for weights that bring none and are not Stable Diffusion v1.
        ema: True takes the running mean of the UNet's weights, False the weights themselves,
            "auto" the mean where the file has all of it; `pipe.origin.ema` says which it was.
        vae, text: other files or folders, from which these stages come. Where `vae` is TAESD's
            decoder, `pipe.decode` uses that, roughly and at once; all else is the model's own.
        prediction: what the UNet predicts, where that is not what the file says, or says by
            nothing: "eps", the noise, "v", the velocity, "x0" or "flow" (`ldm.schedule.pair_from`).
        check: look at every number of the weights now (`ldm.checkpoints.filling.fill`).

    Raises:
        FileNotFoundError: nothing is at `path`; or no tokenizer is beside the text encoder, in the
            Hub's cache or to be fetched, and one line says how to get it.
        CheckpointError: the file cannot be read, or does not fit; see `ldm.errors`.
        ValueError: an argument is out of its range, or the tokenizer found is another model's.
    """
    device = default_device() if device is None else check_device(device)
    dtype = default_dtype(device) if dtype is None else check_dtype(dtype)
    path = shipped_weights() if path is None else path
    tiny = load_tiny_decoder(vae) if vae is not None and is_tiny_decoder(vae) else None
    vae = vae if tiny is None else None
    sources = open_model(path, config, vae=vae, text=text, prediction=prediction)
    plans = plan_stages(sources, ema)
    tokenizer = require_tokenizer(plans["text"].path, plans["text"].config.text.vocab_size)
    pipe = TextToImage.from_plans(plans, tokenizer, device=device, dtype=dtype, check=check)
    if tiny is not None:
        check_tiny(tiny, pipe.config)
        pipe.tiny = tiny.to(device, dtype)
    return pipe
