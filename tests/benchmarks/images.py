"""A whole picture, from token ids to pixels, by the pipelines that people use.

Both start from the same noise and take the same steps, so that their pictures can be compared. The
prompts are token ids: a random model has no words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.harness import Benchmark, Setting
from tests.benchmarks.models import token_ids
from tests.helpers import rng

GUIDANCE = 7.5


def our_pipeline(setting: Setting, low_memory: bool) -> Any:
    from ldm.checkpoints.loading import load_stages
    from ldm.pipeline import TextToImage
    from ldm.schedule import NoiseSchedule

    where = dict(device=setting.device, dtype=setting.dtype, config=setting.config)
    stages = load_stages(setting.weights, check=False, **where)
    pipe = TextToImage(*stages, NoiseSchedule(setting.config.schedule), setting.config)
    without, prompt = token_ids(setting.config).split(1)
    even = torch.ones(prompt.shape)  # no word weighs more than another
    pipe.text.read = lambda text, *_: (prompt if text else without, even)
    return pipe.optimize(low_memory=low_memory)


def our_picture(
    setting: Setting, *, steps: int, size: int, load: bool, low_memory: bool = False
) -> Callable[[], Tensor]:
    import transformers.models.clip.modeling_clip  # noqa: F401 (loading would import it)

    loaded = None if load else our_pipeline(setting, low_memory)

    def draw() -> Tensor:
        pipe = loaded or our_pipeline(setting, low_memory)
        settings = dict(steps=steps, guidance_scale=GUIDANCE, seed=0, height=size, width=size)
        (image,) = pipe("a prompt", **settings)
        return torch.from_numpy(np.array(image))

    return draw


def their_pipeline(setting: Setting) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from tests.benchmarks import diffusers_side

    tensors = diffusers_side.open_file(setting.weights)
    unet, vae, text = (
        diffusers_side.load(stage, tensors, setting.configs, setting.dtype)
        for stage in ("unet", "vae", "text")
    )
    scheduler = DDIMScheduler(
        beta_start=setting.config.schedule.beta_start,
        beta_end=setting.config.schedule.beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(setting.device)


def their_picture(setting: Setting, *, steps: int, size: int, load: bool) -> Callable[[], Tensor]:
    config = setting.config
    side = size // config.vae.factor
    noise = torch.randn(1, config.vae.latent_channels, side, side, generator=rng(0))
    loaded = None if load else their_pipeline(setting)

    @torch.no_grad()
    def draw() -> Tensor:
        pipe = loaded or their_pipeline(setting)
        ids = token_ids(config).to(setting.device)
        without, prompt = pipe.text_encoder(input_ids=ids).last_hidden_state.split(1)
        (image,) = pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=without,
            latents=noise.to(setting.device, setting.dtype),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            height=size,
            width=size,
        ).images
        return torch.from_numpy(np.array(image))

    return draw


def image(*, steps: int, size: int, low_memory: bool) -> tuple[Benchmark, ...]:
    """From the file to the picture, each time anew: so all memory counts."""
    shape = dict(steps=steps, size=size, load=True)
    ours = partial(our_picture, low_memory=low_memory, **shape)
    theirs = partial(their_picture, **shape)
    name = f"load, and draw {size}x{size} pixels in {steps} steps"
    return (Benchmark(f"{name}, low_memory" if low_memory else name, ours, theirs, fresh=True),)


def horizon(*, steps: int, size: int) -> tuple[Benchmark, ...]:
    """From the prompt to the picture, again and again."""
    shape = dict(steps=steps, size=size, load=False)
    ours, theirs = partial(our_picture, **shape), partial(their_picture, **shape)
    return (Benchmark(f"Horizon's picture, {steps} steps", ours, theirs),)
