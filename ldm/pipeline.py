"""Text to image: four stages composed, nothing hidden.

    prompt ── text ── context ─┐
    noise ─────────────────── unet, once per step of the sampler ── latents ── vae ── picture

`pipe(prompt)` runs `pipe.denoise(prompt)` to its end and decodes what comes out. Both make their
arguments two values, `Settings`, of numbers and names, and `Inputs`, of pictures and tensors, of
which `pipe.run` makes the steps. `load` makes the pipeline.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import torch
from torch import Tensor

from ldm.checkpoints.filling import fill
from ldm.checkpoints.loading import Origin, joint_config, open_model, origin, plan_stages
from ldm.checkpoints.planning import Ema, Plan
from ldm.checkpoints.saving import save_model
from ldm.checkpoints.shipped import shipped_weights
from ldm.config import ModelConfig
from ldm.device import check_device, check_dtype, default_device, default_dtype
from ldm.inputs import Inputs, Keywords, Pictures, asked, told
from ldm.observe.nonfinite import decoded, decoded_roughly, explained
from ldm.pictures import Picture, stack, to_images, to_tensor
from ldm.presets import PRESETS
from ldm.prompts import MOST_CHUNKS, Reading
from ldm.samplers import (
    EpsFn,
    Generators,
    Step,
    Steps,
    draw_noise,
    guide,
    invert,
    on_interval,
    rising,
    sample,
)
from ldm.samplers.guidance import Scale
from ldm.schedule import NoiseSchedule
from ldm.settings import Settings, bytes_held, check_bytes, latent_shape
from ldm.speed.waiting import told_when_slow
from ldm.speed.workplace import Workplace
from ldm.starting import begin
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, Posterior, TinyDecoder

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.adapters import Lora


class TextToImage:
    """A latent diffusion model (Rombach et al. 2022, arXiv:2112.10752), ready to draw.

    Attributes:
        unet, vae, text, schedule: the stages, each a plain object that works alone.
        config: the numbers they were built from.
        origin: which files the weights came from, or None where they came from none.
        workplace: where and how they compute, which `optimize` arranges.
        loras: those that were loaded with `load_lora`, in that order.
        tiny: a tiny decoder that `decode` uses in place of the autoencoder's, or None.
    """

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
        self.workplace = Workplace()
        self.loras: tuple[Lora, ...] = ()
        self.tiny: TinyDecoder | None = None

    @classmethod
    def from_plans(
        cls,
        plans: Mapping[str, Plan],
        tokenizer: Tokenizer | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        check: bool = True,
    ) -> Self:
        """Read the weights that a plan per stage has found; the tokenizer is the text encoder's,
        which without one encodes token ids only.

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
        """Where the stages compute: where their weights are, or come to when they are needed."""
        return self.workplace.visited or self.unet.conv_in.weight.device

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
        visited = device if self.workplace.low_memory and device.type == "cuda" else None
        self.workplace = dataclasses.replace(self.workplace, visited=visited)
        for stage in (self.unet, self.vae, self.text):
            stage.to(device="cpu" if visited else device, dtype=dtype)
        if self.tiny is not None:
            self.tiny.to(device=device, dtype=dtype)
        return self

    def optimize(self, *, low_memory: bool = False) -> Self:
        """Draw the same pictures faster, from now on. Returns the pipeline itself.

        On a CPU, in float32 and without gradients, other kernels compute the same sums in another
        order (see `ldm.speed.cpu`): latents differ by some 1e-5 of their standard deviation,
        pictures by a grey level here and there. Weights, names and recordings stay what they are,
        and whatever cannot be faster is computed as before: stages as small as Horizon's, and on
        other devices everything. Memory that is freed stays with the process, to be used again.

        On a CUDA device the UNet's call is captured as a graph, and large stages are compiled,
        which takes minutes at the first picture of each size (see `ldm.speed.gpu`, which no GPU has
        run yet); float32 may then use TensorFloat-32, as without `optimize` it never does.

        Args:
            low_memory: give back a stage's memory when its work is done. On a CPU: what was freed,
                and weights that are on a mapped file. The next picture reads those again, from the
                system's cache if there is room for that: about a second for Stable Diffusion v1. On
                a CUDA device: each stage's weights wait in the CPU's memory until it works, one
                stage at a time, and nothing is captured or compiled.
        """
        self.workplace = Workplace.arranged(
            self.unet, self.vae, self.text, self.device, low_memory=low_memory
        )
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
        from ldm.adapters import Lora

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
        from ldm.checkpoints.embedding import read_embedding

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

    def __call__(self, prompt: str | Sequence[str], **keywords: Unpack[Keywords]) -> list[Image]:
        """Draw pictures of a prompt, or `num_images` of each of several. The keywords are those of
        `denoise`.

        Returns:
            PIL images, those of the first prompt first.
        """
        return self.draw(*asked(self.config, prompt, keywords))

    def denoise(self, prompt: str | Sequence[str], **keywords: Unpack[Keywords]) -> Steps:
        """The same run as `pipe(...)`, one `Step` at a time: `pipe.decode(step.x0)` shows it.

        Args:
            prompt: what to draw; a list of prompts gives `num_images` of each.
            steps: how many intervals the sampler's grid has, 1 to 1000; None, here and below, is
                the model's own default, `pipe.config.defaults` (Stable Diffusion v1: 50).
            guidance_scale: how hard to follow the prompt; 1 is without guidance.
            negative_prompt: what to move away from; empty is the plain unconditional model. A list
                of prompts may have as many of them.
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
            image: a picture to start from, or one for each that is drawn: it is encoded, noised,
                and denoised from there. Of the run's size; see `fit`.
            strength: how much of the grid is walked from it, above 0, where the picture stays as it
                is, to 1, where it is drawn anew; 0.75, with a mask 1, if it is not given.
            mask: what of the image is redrawn, white, and what is kept, black. A latent is redrawn
                if any of its pixels is white.
            fit: "crop" takes the middle of an image or mask of another size, and resizes it; None
                refuses it.
            paste_back: take the pixels that the mask keeps from the image, not from the decoder.
            latents: x at the first timestep, as noisy as that is, (B, C, h, w), instead of the
                starting noise: what `invert` ended in, say.
            noise: instead of the seeds': a list of tensors (B, C, h, w), the starting noise first,
                unless there are latents, then each step's; or a function noise(k, shape) that
                gives the k-th of them.
            timesteps: the pairs (t, t_prev) to walk, as `schedule.ddim_timesteps(50)` gives them,
                instead of `steps` and `spacing`.
            context, uncond_context: text states (B, M, D), or (1, M, D) for all pictures, instead
                of the prompt's and the negative prompt's; the prompt is then but a name.
            variation_seed, variation_strength: go from the seed's starting noise some of the way, 0
                to 1, towards another's: image i towards that of `variation_seed + i`.
            guidance_rescale: from 0 to 1, how far guided predictions get back the contrast that the
                prompt's own have; 0.7 is usual where a schedule ends in pure noise.
            guidance_interval: (low, high), the timesteps from and to which there is guidance; the
                other steps cost half. None is everywhere.
            weighting: whether brackets in the prompts weigh words, `"a (red:1.3) house"`, as in
                AUTOMATIC1111's program (`ldm.prompts`).
            clip_skip: how many of the text encoder's last layers are left out, 0 to all but one.
                What that program calls "Clip skip 2" is 1.
            long_prompts: whether tokens that do not fit are read in further chunks, instead of left
                out (`CLIPTextEncoder.read`). All pictures of a run must then have as many chunks.
            callback: callback(step, count) is told of every step, of so many; if it returns False
                the run ends there, and `pipe(...)` draws the clean estimate of that step.

        Raises:
            FileNotFoundError: a picture is not at its path.
            ValueError: at the call, before any work, for any argument out of its range, or that
                does not go with the others.
        """
        return self.run(*asked(self.config, prompt, keywords))

    def draw(self, settings: Settings, inputs: Inputs = Inputs()) -> list[Image]:
        """The pictures of a run, in the order of its prompts."""
        for step in self.run(settings, inputs):
            last = step
        return self.pictures(self.ended(last, settings, inputs), settings, inputs)

    def ended(self, last: Step, settings: Settings, inputs: Inputs) -> Tensor:
        """The latents that a run has come to, by its last step: of one that was stopped before its
        end the clean estimate."""
        whole = last.index + 1 == len(inputs.walk(settings, self.schedule).grid)
        return last.x_prev if whole else last.x0

    def pictures(self, latents: Tensor, settings: Settings, inputs: Inputs) -> list[Image]:
        """What a run ended in, decoded, and what its mask keeps pasted back if it is to be."""
        images = self.decode(latents)
        return inputs.pasted(images, settings) if settings.paste_back else images

    def run(self, settings: Settings, inputs: Inputs = Inputs()) -> Steps:
        """A run, one `Step` at a time: noise from the seeds, context from the prompts, and the
        sampler, which asks the guided UNet at every step of its grid.

        Raises:
            ValueError: at the call, for settings that this model cannot follow, or inputs that do
                not go with them.
            DivergedError: NaN, infinity or absurdly large numbers came up; one line says at which
                step, and in which part of the model they begin (see `ldm.samplers.loop.sample`).
        """
        settings.check(self.config)
        inputs.check(settings, self.config)
        self.chunks(settings, inputs)  # or an error, before a picture is encoded
        preset, walk = PRESETS[settings.like], inputs.walk(settings, self.schedule)
        source = inputs.source(settings)
        shape = latent_shape(self.config, settings.height, settings.width)
        dtype = self.dtype if preset.half_latents else torch.float32
        like = torch.empty(settings.num_images, *shape, device=self.device, dtype=dtype)
        # Where noise is handed in, all of it is for the latents.
        drawn_from = source if preset.samples_latents and inputs.noise is None else None
        encode = functools.partial(self.clean, settings, inputs, drawn_from)
        x, rule = begin(settings, inputs, walk, source, like, encode)
        eps_fn = self.eps_fn(settings, inputs)
        prediction = self.config.prediction
        steps = sample(
            rule, eps_fn, x, walk.grid, self.schedule, generators=source, prediction=prediction
        )
        steps = self.watched(steps, eps_fn, settings)
        return steps if inputs.callback is None else told(steps, inputs.callback, len(walk.grid))

    def invert(
        self,
        image: Pictures,
        prompt: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        fit: str | None = None,
        spacing: str | None = None,
    ) -> Steps:
        """From a picture back to the noise that DDIM would make it of, one `Step` at a time (see
        `ldm.samplers.inversion`). `pipe(prompt, latents=step.x_prev, sampler="ddim", ...)` with the
        last of them, the same steps and guidance leads about there again.

        Args:
            image: the picture, or one for each of several prompts.
            prompt: what is on it.
            guidance_scale: 1 is without guidance, and closest.
            steps, negative_prompt, height, width, fit, spacing: as in `denoise`.

        Raises:
            FileNotFoundError, ValueError, DivergedError: as for a run from a picture.
        """
        settings, inputs = asked(
            self.config,
            prompt,
            Keywords(
                image=image,
                strength=1.0,
                sampler="ddim",
                steps=steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                height=height,
                width=width,
                fit=fit,
                spacing=spacing,
            ),
        )
        x = self.clean(settings, inputs).float().expand(settings.num_images, -1, -1, -1)
        eps_fn, grid = self.eps_fn(settings, inputs), rising(settings.grid(self.schedule))
        prediction = self.config.prediction
        backwards = invert(eps_fn, x, grid, self.schedule, prediction=prediction)
        return self.watched(backwards, eps_fn, settings)

    # --- The parts of a run ------------------------------------------------------------------

    def clean(
        self, settings: Settings, inputs: Inputs, drawn_from: Generators | None = None
    ) -> Tensor:
        """The scaled latents of the pictures that a run starts from, (1 or B, C, h, w): the
        posterior's mode, or where there are generators a sample of it."""
        posterior = self.posterior(inputs.levels(settings))
        if drawn_from is None:
            return posterior.mode() * self.config.vae.scaling_factor
        z = posterior.drawn(draw_noise(drawn_from, posterior.mean))
        return z * self.config.vae.scaling_factor

    def eps_fn(self, settings: Settings, inputs: Inputs = Inputs()) -> EpsFn:
        """The UNet as a run asks it: with the contexts of its prompts, or those that are given, and
        guided."""
        count = settings.num_images
        context, uncond_context = inputs.context, inputs.uncond_context
        chunks = self.chunks(settings, inputs)
        if context is None:
            context = self.context(settings.prompts, settings.reading, chunks)  # (B, L, D)
        if uncond_context is None:
            negative, reading = settings.negative_prompts, settings.negative_reading
            uncond_context = self.context(negative, reading, chunks)  # (B, L, D)
        # Matrix products round differently with the size of the batch, and a sampler can amplify
        # that a hundredfold. On a CPU, where a batch gains least, each image is asked alone.
        images_per_call = 1 if self.device.type == "cpu" else None
        scale: Scale = settings.guidance_scale
        if settings.guidance_interval is not None:
            scale = on_interval(settings.guidance_scale, *settings.guidance_interval)
        guided = guide(
            functools.partial(self.workplace.ask, self.unet),
            context.to(self.device, self.dtype).expand(count, -1, -1),
            uncond_context.to(self.device, self.dtype).expand(count, -1, -1),
            scale,
            rescale=settings.guidance_rescale,
            images_per_call=images_per_call,
        )
        return told_when_slow(guided) if self.device.type == "cpu" else guided

    def watched(self, steps: Steps, eps_fn: EpsFn, settings: Settings) -> Steps:
        """The steps of a run; where they diverge, the error says in which part of the model."""
        return explained(
            steps,
            text=self.text,
            encode=lambda: self.context(
                [*settings.prompts, *settings.negative_prompts], settings.reading
            ),
            unet=self.unet,
            eps_fn=eps_fn,
            guidance_scale=settings.guidance_scale,
        )

    # --- Words and pictures ------------------------------------------------------------------

    def chunks(self, settings: Settings, inputs: Inputs = Inputs()) -> int:
        """How many chunks of tokens the contexts of a run have, those of the prompts and of the
        negative prompts alike: 1 but for `long_prompts`.

        Raises:
            ValueError: in one line, if they are too many, or some pictures need more than others: a
                chunk more changes a picture, which would then not be that of its prompt alone.
        """
        if not settings.long_prompts or inputs.context is not None:
            return 1
        pairs = dict.fromkeys(zip(settings.prompts, settings.negative_prompts, strict=True))
        reading = settings.reading
        counts = {max(self.text.chunks(prompt, reading) for prompt in pair) for pair in pairs}
        if max(counts) > MOST_CHUNKS:
            raise ValueError(
                f"long_prompts: a prompt takes {max(counts)} chunks, more than {MOST_CHUNKS}"
            )
        if len(counts) > 1:
            raise ValueError(
                "long_prompts: the pictures of a run must need as many chunks, and these need "
                f"{', '.join(map(str, sorted(counts)))}: draw them apart"
            )
        size = (settings.num_images, settings.height, settings.width)
        check_bytes("long_prompts", bytes_held(self.config, *size, *counts))
        return counts.pop()

    @torch.no_grad()
    def context(
        self, prompts: Sequence[str], reading: Reading = Reading(), chunks: int | None = None
    ) -> Tensor:
        """The text states of prompts, (B, max_length, context_dim). An equal prompt is encoded
        once, and alone, so that an image does not depend on its neighbours in the batch.

        Args:
            reading: how they are read; with `long_prompts` the context has as many times
                `max_length` places as it has chunks.
            chunks: how many these are; None is as many as the longest prompt needs.
        """
        if chunks is None:
            chunks = max(self.text.chunks(prompt, reading) for prompt in prompts)
        with self.workplace.at_work(self.text):
            states = {
                prompt: self.text([prompt], reading, chunks=chunks)
                for prompt in dict.fromkeys(prompts)
            }
        self.workplace.rest(self.text)
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
        self.workplace.rest(self.unet)
        images: list[Image] = []
        tiny = self.tiny
        with self.workplace.at_work(self.vae if tiny is None else tiny):
            ys = decoded(self.vae, latents) if tiny is None else decoded_roughly(tiny, latents)
            for y in ys:  # (1, 3, H, W)
                images += to_images(y)
        self.workplace.rest(self.vae)
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
        return self.posterior(levels).mode() * self.config.vae.scaling_factor

    @torch.no_grad()
    def posterior(self, levels: Tensor) -> Posterior:
        """The Gaussian over the latents of pictures, unscaled. Each is encoded alone, so that it
        does not depend on its neighbours in the batch.

        Args:
            levels: grey levels 0 to 255, (B, H, W, 3), sides multiples of the VAE's factor.
        """
        pixels = to_tensor(levels.to(self.device, self.dtype))  # (B, 3, H, W)
        with self.workplace.at_work(self.vae):
            each = [self.vae.encode(x) for x in pixels.split(1)]
        self.workplace.rest(self.vae)
        return Posterior(torch.cat([p.mean for p in each]), torch.cat([p.logvar for p in each]))


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    ema: Ema = "auto",
    vae: str | Path | None = None,
    text: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | Literal[False] | None = None,
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
        tokenizer: one, or a folder with a vocabulary's files; None looks for it where the text
            encoder's weights are and may fetch it, False does without: `pipe.text.encode` takes
            token ids, and prompts are an error.
        prediction: what the UNet predicts, where that is not what the file says, or says by
            nothing: "eps", the noise, "v", the velocity, "x0" or "flow" (`ldm.schedule.pair_from`).
        check: look at every number of the weights now (`ldm.checkpoints.filling.fill`).

    Raises:
        FileNotFoundError: nothing is at `path`; or no tokenizer is beside the text encoder, in the
            Hub's cache or to be fetched, and one line says how to get it.
        CheckpointError: the file cannot be read, or does not fit; see `ldm.errors`.
        ValueError: an argument is out of its range, or the tokenizer found is another model's.
    """
    from ldm.checkpoints.download import chosen_tokenizer
    from ldm.checkpoints.tiny import check_tiny, is_tiny_decoder, load_tiny_decoder

    device = default_device() if device is None else check_device(device)
    dtype = default_dtype(device) if dtype is None else check_dtype(dtype)
    path = shipped_weights() if path is None else path
    tiny = load_tiny_decoder(vae) if vae is not None and is_tiny_decoder(vae) else None
    vae = vae if tiny is None else None
    sources = open_model(path, config, vae=vae, text=text, prediction=prediction)
    plans = plan_stages(sources, ema)
    known = chosen_tokenizer(tokenizer, plans["text"].path, plans["text"].config.text)
    pipe = TextToImage.from_plans(plans, known, device=device, dtype=dtype, check=check)
    if tiny is not None:
        check_tiny(tiny, pipe.config)
        pipe.tiny = tiny.to(device, dtype)
    return pipe
