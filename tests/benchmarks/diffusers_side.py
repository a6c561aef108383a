"""Stable Diffusion v1 as diffusers loads it: from a single file in the official layout, by
diffusers' own conversion, with the configs in a local folder (so that nothing asks the network)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    load_single_file_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.config import ModelConfig
from tests import oracle_configs

FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}


def load(
    stage: str,
    checkpoint: Path | dict[str, Tensor],
    configs: Path,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """One stage, from a file or from what `open_file` read of it; as float32 without a dtype."""
    where: dict[str, Any] = dict(
        config=str(configs), subfolder=FOLDERS[stage], torch_dtype=dtype, local_files_only=True
    )
    if stage == "text":
        tensors = checkpoint if isinstance(checkpoint, dict) else open_file(checkpoint)
        return create_diffusers_clip_model_from_ldm(CLIPTextModel, tensors, **where)
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[stage]
    source = checkpoint if isinstance(checkpoint, dict) else str(checkpoint)
    return kind.from_single_file(source, **where)


def open_file(path: Path) -> dict[str, Tensor]:
    """A checkpoint as diffusers' pipelines open it, once for all stages."""
    return load_single_file_checkpoint(str(path), local_files_only=True)


def write_configs(folder: Path, config: ModelConfig) -> Path:
    """A model's config as the folder of a diffusers pipeline has it, without weights."""
    factor = config.vae.factor
    models = {
        "unet": dict(
            _class_name="UNet2DConditionModel",
            sample_size=config.image_size // factor,
            **oracle_configs.unet(config.unet),
        ),
        "vae": dict(
            _class_name="AutoencoderKL",
            sample_size=config.image_size,
            scaling_factor=config.vae.scaling_factor,
            **oracle_configs.vae(config.vae),
        ),
    }
    for name, model in models.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(model), encoding="utf-8")
    CLIPTextConfig(**oracle_configs.text(config.text)).save_pretrained(folder / FOLDERS["text"])
    return folder
