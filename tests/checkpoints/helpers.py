"""Files of weights of a tiny model, changed."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.checkpoints.loading import load_text_encoder, load_unet, load_vae

UNET_KEY = "model.diffusion_model.middle_block.0.in_layers.2.weight"
VAE_KEY = "first_stage_model.decoder.mid.attn_1.q.weight"
TEXT_KEY = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"
LOADERS = {"unet": load_unet, "vae": load_vae, "text": load_text_encoder}


def rewrite(path: Path, change) -> None:
    """Change the tensors of a file, keep its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
