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
    unet, vae, text = config.unet, config.vae, config.text
    levels = range(len(unet.channel_mult))
    down = [f"{'CrossAttn' * (i in unet.attention_levels)}DownBlock2D" for i in levels]
    models = {
        "unet": dict(
            _class_name="UNet2DConditionModel",
            sample_size=config.image_size // vae.factor,
            in_channels=unet.in_channels,
            out_channels=unet.out_channels,
            block_out_channels=[unet.model_channels * m for m in unet.channel_mult],
            down_block_types=down,
            up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
            layers_per_block=unet.num_res_blocks,
            cross_attention_dim=unet.context_dim,
            attention_head_dim=unet.num_heads,  # diffusers' name for the number of heads, in SD v1
            norm_num_groups=unet.norm_groups,
        ),
        "vae": dict(
            _class_name="AutoencoderKL",
            sample_size=config.image_size,
            in_channels=vae.in_channels,
            out_channels=vae.in_channels,
            latent_channels=vae.latent_channels,
            block_out_channels=[vae.model_channels * m for m in vae.channel_mult],
            down_block_types=["DownEncoderBlock2D"] * len(vae.channel_mult),
            up_block_types=["UpDecoderBlock2D"] * len(vae.channel_mult),
            layers_per_block=vae.num_res_blocks,
            norm_num_groups=vae.norm_groups,
            scaling_factor=vae.scaling_factor,
        ),
    }
    for name, model in models.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(model), encoding="utf-8")
    CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.mlp_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        max_position_embeddings=text.max_length,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    ).save_pretrained(folder / FOLDERS["text"])
    return folder
