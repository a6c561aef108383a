"""The three stages of a model by their names: built, with memory or without."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm.config import ModelConfig
from ldm.errors import ConfigError
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

STAGES = ("unet", "vae", "text")


def build_stage(stage: str, config: ModelConfig, tokenizer: Tokenizer | None = None) -> nn.Module:
    """A stage by its name, freshly initialised (or, under `torch.device("meta")`, empty)."""
    if stage == "unet":
        return UNet(config.unet)
    if stage == "vae":
        return AutoencoderKL(config.vae)
    return CLIPTextEncoder(config.text, tokenizer)


def empty_stage(stage: str, config: ModelConfig, path: Path) -> nn.Module:
    """A stage without memory or random numbers: the file at `path` has the values.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        with torch.device("meta"), Unfilled():
            return build_stage(stage, config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"no {stage} can be built for {path}: {reason}") from error


class Unfilled(TorchFunctionMode):
    """Layers draw their initial weights when they are built: on the meta device too, where nothing
    is drawn and the calls alone take a fifth of a stage's time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return (kwargs or {})["tensor"]  # as it is
        return func(*args, **(kwargs or {}))


def too_small(tensors: Sized, stage: str, config: ModelConfig) -> bool:
    """Whether a file holds fewer tensors than a stage has. A damaged config may ask for millions
    of blocks, so this is asked before any is built; each has 8 tensors or more."""
    part = config.vae if stage == "vae" else config.unet
    if stage == "text":
        blocks = config.text.num_layers
    else:
        blocks = len(part.channel_mult) * part.num_res_blocks
    return 8 * blocks > len(tensors)
