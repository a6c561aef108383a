"""What the suites of configs and of folders share: a small model, and what is done with one."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.inspection import inspect
from ldm.checkpoints.loading import plan_stages
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.checkpoints.stages import STAGES
from ldm.config import ModelConfig, ScheduleConfig
from ldm.errors import CheckpointError
from ldm.pipeline import TextToImage
from ldm.schedule import NoiseSchedule
from tests.fuzz.watching import Watch, assert_lines, outcome
from tests.helpers import tiny_config, tiny_tokenizer

# What is done with a file. To build the stages, as looking into it does, takes ten times as long as
# to read what it says; to load them, and to draw, ten times as long again. What a model says of
# itself is read beside a few tensors: all of them would be most of the work.
WAYS = ("recognise",) * 12 + ("inspect",) * 3 + ("load",)


def micro_config() -> ModelConfig:
    """Nothing but what the shortest run needs: one level, with attention; one layer for text."""
    config = tiny_config()
    return dataclasses.replace(
        config,
        name="micro",
        unet=dataclasses.replace(config.unet, channel_mult=(1,), attention_levels=(0,)),
        vae=dataclasses.replace(config.vae, channel_mult=(1,)),
        text=dataclasses.replace(config.text, num_layers=1),
    )


def load(path: Path) -> TextToImage:
    """A whole model, with the tokenizer that is its own."""
    plans = plan_stages(dict.fromkeys(STAGES, recognise(open_archive(path))))
    cpu = torch.device("cpu")
    return TextToImage.from_plans(plans, tiny_tokenizer(), device=cpu, dtype=torch.float32)


def draw(pipe: TextToImage) -> None:
    """A model that was loaded is one that draws."""
    side = pipe.config.vae.factor * 8
    (step,) = pipe.denoise(
        "a red house", sampler="ddim", steps=1, guidance_scale=2.0, height=side, width=side
    )
    assert step.x_prev.isfinite().all()
    assert pipe.decode(step.x_prev)[0].size == (side, side)


def warm_up(path: Path) -> None:
    """Python imports, and the library opens files of its own, when they are first needed."""
    inspect(path)
    draw(load(path))


def check(watch: Watch, path: Path, way: str, size: int) -> str | None:
    """Read what a file or a folder says, or look into it, or load it and draw: the message, where
    it was refused."""
    found: list[Any] = []
    read = {"recognise": lambda: recognise(open_archive(path)), "inspect": lambda: inspect(path)}
    message = outcome(
        watch,
        lambda: found.append(read.get(way, lambda: load(path))()),
        # Of the ValueErrors that are no CheckpointErrors, loading documents the tokenizer's.
        (CheckpointError, ValueError) if way == "load" else (CheckpointError,),
        size,
        traced=way == "recognise",
    )
    if message is not None:
        assert str(path) in message or message.startswith("the tokenizer"), message
    elif way == "load":
        draw(found[0])
    else:
        assert_lines(str(found[0]))
        assert way == "inspect" or is_sane(found[0].config)
    return message


def is_sane(config: ModelConfig) -> bool:
    """What the code that builds, draws and prints takes for granted."""
    unet, vae, text = config.unet, config.vae, config.text
    widths = [unet.model_channels * m for m in unet.channel_mult]
    vae_widths = [vae.model_channels * m for m in vae.channel_mult]
    return (
        config.name.isprintable()
        and 0 < config.image_size <= 2**16
        and falls(config.schedule)
        and 1 <= len(widths) <= 16
        and 1 <= len(vae_widths) <= 16
        and all(w > 0 == w % (unet.head_width or unet.num_heads) for w in widths)
        and all(w % unet.norm_groups == 0 for w in widths)
        and all(w > 0 and w % vae.norm_groups == 0 for w in vae_widths)
        and all(0 <= level < len(widths) for level in unet.attention_levels)
        and text.hidden_size % text.num_heads == 0
        and 0 <= text.bos_token_id < text.vocab_size
        and 0 <= text.eos_token_id < text.vocab_size
        and 1e-6 < vae.scaling_factor < 1e6
        and math.isfinite(config.defaults.guidance_scale)
        and config.defaults.steps >= 1
    )


@functools.cache
def falls(schedule: ScheduleConfig) -> bool:
    """Whether each step leaves less of a picture, and all but the last something of it."""
    noise = NoiseSchedule(schedule)
    betas, left = noise.betas, noise.alpha_bar
    return bool((betas > 0).all() and (betas <= 1).all() and (left[:-1] > 0).all() and left[0] < 1)
