"""A diffusers folder, written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints.diffusers.configs import (
    ACTIVATIONS,
    CLASSES,
    PIPELINES,
    PREDICTION_TYPES,
    VAE_BLOCKS,
    ConfigFile,
    model_config,
    unet_block_types,
)
from ldm.checkpoints.diffusers.names import PART_OF, diffusers_names
from ldm.checkpoints.folders import CONFIG, PARTS, SCHEDULER
from ldm.checkpoints.tokenizer_files import write_tokenizer
from ldm.config import ModelConfig, UNetConfig
from ldm.errors import FamilyError
from ldm.files import folder_written_whole, write_text, written_whole
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import BOS, EOS, Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

# What the config files that we write are written for.
DIFFUSERS_VERSION = "0.34.0"
FIRST = "!"  # token 0 of every vocabulary of this kind: the first of the bytes that are printable


def save_folder(
    path: str | Path,
    *,
    unet: UNet,
    vae: AutoencoderKL,
    text: CLIPTextEncoder,
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a whole model as a folder that `diffusers.StableDiffusionPipeline` reads.

    The parameters in their own dtype, or in `dtype`; the same model always gives the same bytes.
    The scheduler is diffusers' DDIM with the settings that make it our `ddim`. The folder appears
    whole or not at all.

    Raises:
        ValueError: there is something at `path` already, nothing can be written there, or the
            stages or the tokenizer are another model's.
        FamilyError: diffusers' config files cannot say this config.
    """
    path = Path(path)
    if (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) != (
        config.text.vocab_size,
        config.text.bos_token_id,
        config.text.eos_token_id,
    ):
        raise ValueError(f"the tokenizer is not the one of the model {config.name!r}")
    if (unet.config, vae.config, text.config) != (config.unet, config.vae, config.text):
        raise ValueError(f"the stages were not built from the config {config.name!r}")
    files = config_files(config)
    with folder_written_whole(path) as temporary:
        for name, fields in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_text(temporary / name, json.dumps(fields, indent=2, sort_keys=True) + "\n")
        write_tokenizer(tokenizer, temporary / "tokenizer")
        models: dict[str, nn.Module] = {"unet": unet, "vae": vae, "text": text}
        for stage, model in models.items():
            tensors = diffusers_tensors(model, dtype)
            # diffusers asks for this entry; a single one has no order that could change.
            part = PART_OF[stage]
            target = temporary / part / PARTS[part][0]
            with written_whole(target) as whole:
                save_file(tensors, whole, metadata={"format": "pt"})


def diffusers_tensors(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The parameters of a stage by diffusers' names, on the CPU; None keeps their dtype."""
    state = model.state_dict()
    tensors = {}
    for ours, theirs in diffusers_names(model).items():
        tensor = state[ours].to(device="cpu", dtype=dtype)
        if ".mid.attention.to_" in ours and tensor.ndim == 4:  # the autoencoder's, a matrix there
            tensor = tensor.flatten(1)  # (C, C)
        tensors[theirs] = tensor.contiguous()
    return tensors


def written_heads(unet: UNetConfig) -> int | list[int]:
    """What diffusers calls `attention_head_dim`: one number of heads, or one per level."""
    if not unet.head_width:
        return unet.num_heads
    return [unet.heads(unet.model_channels * mult) for mult in unet.channel_mult]


def config_files(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder: name -> fields.

    Raises:
        FamilyError: diffusers' config files cannot say this config.
    """
    unet, vae, text, schedule = config.unet, config.vae, config.text, config.schedule
    down_types, up_types = unet_block_types(unet)
    pad = FIRST if text.open_clip else EOS
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": PIPELINES.get(
                (unet.in_channels, unet.out_channels), "StableDiffusionPipeline"
            ),
            "_diffusers_version": DIFFUSERS_VERSION,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", CLASSES["unet"]],
            "vae": ["diffusers", CLASSES["vae"]],
        },
        "unet/config.json": {
            "_class_name": CLASSES["unet"],
            "_diffusers_version": DIFFUSERS_VERSION,
            "act_fn": "silu",
            "attention_head_dim": written_heads(unet),
            "block_out_channels": [unet.model_channels * mult for mult in unet.channel_mult],
            "cross_attention_dim": unet.context_dim,
            "down_block_types": down_types,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": unet.in_channels,
            "layers_per_block": unet.num_res_blocks,
            "norm_eps": 1e-5,
            "norm_num_groups": unet.norm_groups,
            "out_channels": unet.out_channels,
            "sample_size": config.image_size // vae.factor,
            "up_block_types": up_types,
            "use_linear_projection": unet.linear_projections,
        },
        "vae/config.json": {
            "_class_name": CLASSES["vae"],
            "_diffusers_version": DIFFUSERS_VERSION,
            "act_fn": "silu",
            "block_out_channels": [vae.model_channels * mult for mult in vae.channel_mult],
            "in_channels": vae.in_channels,
            "latent_channels": vae.latent_channels,
            "layers_per_block": vae.num_res_blocks,
            "norm_num_groups": vae.norm_groups,
            "out_channels": vae.in_channels,
            "sample_size": config.image_size,
            "scaling_factor": vae.scaling_factor,
        }
        | {name: [kind] * len(vae.channel_mult) for name, kind in VAE_BLOCKS.items()},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "hidden_act": ACTIVATIONS[text.open_clip],
            "hidden_size": text.hidden_size,
            "intermediate_size": text.mlp_size,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": text.max_length,
            "model_type": "clip_text_model",
            "num_attention_heads": text.num_heads,
            "num_hidden_layers": text.num_layers,
            "pad_token_id": text.pad_token_id,
            "projection_dim": text.hidden_size,
            "vocab_size": text.vocab_size,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": DIFFUSERS_VERSION,
            "beta_end": schedule.beta_end,
            "beta_schedule": "scaled_linear",
            "beta_start": schedule.beta_start,
            "clip_sample": False,
            "num_train_timesteps": schedule.num_train_timesteps,
            "prediction_type": PREDICTION_TYPES.get(config.prediction, config.prediction),
            "rescale_betas_zero_snr": schedule.zero_terminal_snr and schedule.betas is None,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "trailing" if schedule.ends_in_noise else "leading",
        }
        | ({} if schedule.betas is None else {"trained_betas": list(schedule.betas)}),
        "tokenizer/tokenizer_config.json": special
        | {"model_max_length": text.max_length, "tokenizer_class": "CLIPTokenizer"},
        "tokenizer/special_tokens_map.json": special,
    }
    # What was written is read back, so that no folder can say another model than it holds.
    names = {stage: f"{part}/{CONFIG}" for stage, part in PART_OF.items()} | {"schedule": SCHEDULER}
    again = model_config(config.name, {s: ConfigFile(Path(n), files[n]) for s, n in names.items()})
    # How a model is best drawn with has no place in them.
    if dataclasses.replace(again, name=config.name, defaults=config.defaults) != config:
        raise FamilyError(f"diffusers' config files cannot say the config {config.name!r}")
    return files
