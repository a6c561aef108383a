"""The three stages of a model by their names: built, with memory or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm.config import ModelConfig
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

STAGES = ("unet", "vae", "text")


def build_stage(stage: str, config: ModelConfig, tokenizer: Tokenizer | None = None) -> nn.Module:
    """A stage by its name, freshly initialised (or, under `torch.device("meta")`, empty)."""
    if stage == "unet":
        return UNet(config.unet, config.schedule.num_train_timesteps)
    if stage == "vae":
        return AutoencoderKL(config.vae)
    return CLIPTextEncoder(config.text, tokenizer)


def empty_stage(stage: str, config: ModelConfig) -> nn.Module:
    """A stage without memory or random numbers, for values from a file."""
    with torch.device("meta"), Unfilled():
        return build_stage(stage, config)


class Unfilled(TorchFunctionMode):
    """Layers draw their initial weights when they are built: on the meta device too, where nothing
    is drawn and the calls alone take a fifth of a stage's time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return (kwargs or {})["tensor"]  # as it is
        return func(*args, **(kwargs or {}))
