"""TAESD's file: the weights of the tiny decoder."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.checkpoints.families import TAESD
from ldm.checkpoints.opening import open_archive
from ldm.config import ModelConfig
from ldm.errors import ConfigError, KeysError, NonFiniteError, ShapeError, some
from ldm.vae import TinyDecoder


def is_tiny_decoder(path: str | Path) -> bool:
    """Whether a file holds TAESD's decoder, under the official names.

    Raises:
        FileNotFoundError, CheckpointError: as `open_archive`.
    """
    return TAESD in open_archive(path).entries


def load_tiny_decoder(path: str | Path) -> TinyDecoder:
    """The decoder in `taesd_decoder.safetensors`, or in the `.pth` of the same name, in float32 on
    the CPU, without gradients.

    Raises:
        FileNotFoundError, CheckpointError: as `open_archive`; or the file does not fit.
    """
    archive = open_archive(path)
    model = TinyDecoder()
    state = model.layers.state_dict()
    problems = {
        "missing": sorted(state.keys() - archive.entries.keys()),
        "unexpected": sorted(archive.entries.keys() - state.keys()),
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {some(keys)}" for what, keys in problems.items() if keys)
        raise KeysError(f"{archive.path} does not fit TAESD's decoder; {told}")
    for key, weight in state.items():
        entry = archive.entries[key]
        if entry.shape != tuple(weight.shape) or not entry.dtype.is_floating_point:
            found = f"{list(entry.shape)} of {str(entry.dtype).removeprefix('torch.')}"
            raise ShapeError(f"{archive.path} does not fit TAESD's decoder; {key} is {found}")
        state[key] = entry.map().to(torch.float32, copy=True)
        if not state[key].isfinite().all():
            raise NonFiniteError(f"{archive.path}: {key} holds NaN or infinity")
    model.layers.load_state_dict(state)
    return model.eval().requires_grad_(False)


def check_tiny(tiny: TinyDecoder, config: ModelConfig) -> None:
    """A ConfigError unless a tiny decoder reads the latents of this model: as many channels, each
    of 8 pixels along a side. That they mean the same, nothing tells."""
    ours = (config.vae.latent_channels, config.vae.factor)
    if ours != (tiny.latent_channels, TinyDecoder.FACTOR):
        told = f"{ours[0]} channels and {ours[1]} pixels"
        raise ConfigError(f"TAESD decodes latents of 4 channels and 8 pixels, not of {told}")
