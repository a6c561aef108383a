"""A whole model as one file in the official layout, with its tokenizer beside it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.config_json import config_to_json
from ldm.checkpoints.keys import POSITION_IDS, key_map, schedule_entries
from ldm.checkpoints.open_clip import joined
from ldm.checkpoints.tokenizer_files import check_beside, tokenizer_beside, tokenizer_written
from ldm.config import ModelConfig
from ldm.files import check_writable, written_whole
from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL


def save_model(
    path: str | Path, *, unet: UNet, vae: AutoencoderKL, text: CLIPTextEncoder, config: ModelConfig
) -> None:
    """Write a whole model as `save_checkpoint` does, and its tokenizer's two files beside it.

    Raises:
        ValueError: it has no tokenizer, it cannot be written there, or another model's tokenizer is
            there already.
    """
    path, tokenizer = Path(path), text.require_tokenizer()
    check_writable(path)
    check_beside(path, tokenizer)
    has_one = tokenizer_beside(path) is not None
    with contextlib.nullcontext() if has_one else tokenizer_written(tokenizer, path.parent):
        save_checkpoint(path, unet=unet, vae=vae, text=text, config=config)


def save_checkpoint(
    path: str | Path,
    *,
    unet: UNet,
    vae: AutoencoderKL,
    text: CLIPTextEncoder,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a whole model as one safetensors file in the official layout.

    The parameters in their own dtype, or in `dtype`; beside them `position_ids` (but where the text
    encoder is OpenCLIP's, which has its own names) and the schedule's tables, as official files
    have them. The config travels in the metadata, as one entry of sorted
    JSON, so that the same model always gives the same bytes. The file appears whole or not at all.
    """
    tensors: dict[str, Tensor] = {}
    for model in (unet, vae, text):
        weights = model.state_dict()
        for ours, theirs in key_map(model).items():
            tensors[theirs] = weights[ours].to(device="cpu", dtype=dtype).contiguous()
    if config.text.open_clip:
        tensors = joined(tensors)
    else:
        tensors[POSITION_IDS] = torch.arange(config.text.max_length)[None]  # (1, L)
    tensors |= schedule_entries(config.schedule)
    with written_whole(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"ldm": config_to_json(config)})
