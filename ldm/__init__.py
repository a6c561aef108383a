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

from ldm.checkpoints.checkpoint import (
    Ema,
    load_text_encoder,
    load_unet,
    load_vae,
    open_model,
    plan_stages,
)
from ldm.config import HORIZON, SD_V1, ModelConfig
from ldm.device import check_device, check_dtype, default_device, default_dtype
from ldm.checkpoints.download import require_tokenizer
from ldm.errors import CheckpointError
from ldm.checkpoints.inspection import Inspection, inspect
from ldm.observe.hooks import edit, record
from ldm.pipeline import TextToImage
from ldm.samplers import Step
from ldm.schedule import NoiseSchedule
from ldm.text import CLIPTextEncoder
from ldm.observe.traces import Trace, trace
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
    "Inspection",
    "ModelConfig",
    "NoiseSchedule",
    "Step",
    "TextToImage",
    "Trace",
    "UNet",
    "edit",
    "inspect",
    "load",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "record",
    "shipped_weights",
    "trace",
]


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    ema: Ema = "auto",
    vae: str | Path | None = None,
    text: str | Path | None = None,
    check: bool = True,
) -> TextToImage:
    """A whole model, ready to draw.

    Args:
        path: a file in the official Stable Diffusion v1 layout (safetensors, or torch's pickles:
            nothing in them is executed), a diffusers folder, or a folder that holds one file of
            weights; None is Horizon, our own small model.
        device: "cuda", "mps" or "cpu"; None picks the fastest there is.
        dtype: None is float16 on a GPU, float32 on a CPU.
        config: for weights that bring none and are not Stable Diffusion v1.
        ema: True takes the running mean of the UNet's weights, False the weights themselves,
            "auto" the mean where the file has all of it; `pipe.origin.ema` says which it was.
        vae, text: other files or folders, from which these stages come.
        check: look at every number of the weights now (`ldm.checkpoints.checkpoint.load_stages`).

    Raises:
        FileNotFoundError: nothing is at `path`; or no tokenizer is beside the text encoder, in the
            Hub's cache or to be fetched, and one line says how to get it.
        CheckpointError: the file cannot be read, or does not fit; see `ldm.errors`.
        ValueError: an argument is out of its range, or the tokenizer found is another model's.
    """
    device = default_device() if device is None else check_device(device)
    dtype = default_dtype(device) if dtype is None else check_dtype(dtype)
    sources = open_model(shipped_weights() if path is None else path, config, vae=vae, text=text)
    plans = plan_stages(sources, ema, require_tokenizer)
    return TextToImage.from_plans(plans, device=device, dtype=dtype, check=check)


def shipped_weights() -> Path:
    """The file of Horizon's weights: the repository's own when run from a checkout (or an editable
    install of one), else the copy that was installed with the package."""
    package = Path(__file__).parent
    is_checkout = (package.parent / "pyproject.toml").is_file()
    root = package.parent if is_checkout else package
    return root / "weights" / "horizon" / "model.safetensors"
