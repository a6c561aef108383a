"""A from-scratch, educational latent diffusion library.

    import ldm
    pipe = ldm.load()                              # Horizon, which ships with the package
    pipe("green grass at night")[0].save("night.png")

Importing this costs little more than importing torch: transformers, PIL and matplotlib are
imported where they are used.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ldm.checkpoint import (
    CheckpointError,
    KeysError,
    UnreadableError,
    find_file,
    find_tokenizer,
    load_config,
    load_stages,
    load_text_encoder,
    load_unet,
    load_vae,
)
from ldm.config import HORIZON, SD_V1, ModelConfig
from ldm.device import check_device, check_dtype, default_device, default_dtype
from ldm.pipeline import TextToImage
from ldm.samplers import Step
from ldm.schedule import NoiseSchedule
from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

try:
    __version__ = version("ldm-from-scratch")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "HORIZON",
    "SD_V1",
    "AutoencoderKL",
    "CLIPTextEncoder",
    "CheckpointError",
    "KeysError",
    "ModelConfig",
    "NoiseSchedule",
    "Step",
    "TextToImage",
    "UNet",
    "UnreadableError",
    "load",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "shipped_weights",
]


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
) -> TextToImage:
    """A whole model, ready to draw.

    Args:
        path: a safetensors file in the official SD v1 layout, or a folder with
            `model.safetensors`; None is Horizon, our own small model.
        device: "cuda", "mps" or "cpu"; None picks the fastest there is.
        dtype: None is float16 on a GPU, float32 on a CPU.
        config: for a file whose metadata has none and that is not Stable Diffusion v1.

    Raises:
        FileNotFoundError: nothing is at `path`, or no tokenizer is beside it.
        CheckpointError: the file cannot be read, or does not fit; one line says why.
        ValueError: the device is not there, or the dtype is not a floating-point type.
    """
    device = default_device() if device is None else check_device(device)
    dtype = default_dtype(device) if dtype is None else check_dtype(dtype)
    path = find_file(shipped_weights() if path is None else path)
    if find_tokenizer(path) is None:
        raise FileNotFoundError(
            f"no tokenizer for {path}: put CLIP's vocab.json and merges.txt into {path.parent}"
        )
    config = config or load_config(path)
    unet, vae, text = load_stages(path, device=device, dtype=dtype, config=config)
    return TextToImage(unet, vae, text, NoiseSchedule(config.schedule), config)  # type: ignore[arg-type]


def shipped_weights() -> Path:
    """The file of Horizon's weights: the repository's own when run from a checkout (or an editable
    install of one), else the copy that was installed with the package."""
    package = Path(__file__).parent
    is_checkout = (package.parent / "pyproject.toml").is_file()
    root = package.parent if is_checkout else package
    return root / "weights" / "horizon" / "model.safetensors"
