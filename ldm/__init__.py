"""A from-scratch, educational latent diffusion library.

    import ldm
    pipe = ldm.load()                              # Horizon, which ships with the package
    pipe("green grass at night")[0].save("night.png")

This is the front door: every name below is fetched from its room when it is first asked for
(PEP 562), so that importing the package costs nothing, and asking for a model costs little more
than importing torch. transformers, PIL and matplotlib are imported where they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.checkpoints.inspection import Inspection, inspect
    from ldm.checkpoints.loading import load_text_encoder, load_unet, load_vae
    from ldm.checkpoints.shipped import shipped_weights
    from ldm.config import (
        HORIZON,
        SD_V1,
        SD_V1_INPAINTING,
        SD_V1_PIX2PIX,
        SD_V2,
        SD_V2_768,
        ModelConfig,
    )
    from ldm.errors import CheckpointError
    from ldm.inputs import Inputs
    from ldm.observe.hooks import edit, record
    from ldm.observe.traces import Trace, trace
    from ldm.pipeline import TextToImage, load
    from ldm.samplers import Step
    from ldm.schedule import NoiseSchedule
    from ldm.settings import Settings
    from ldm.text import CLIPTextEncoder
    from ldm.unet import UNet
    from ldm.vae import AutoencoderKL

    __version__: str

# Each public name, and the file that defines it.
HOME = {
    "HORIZON": "config",
    "SD_V1": "config",
    "SD_V1_INPAINTING": "config",
    "SD_V1_PIX2PIX": "config",
    "SD_V2": "config",
    "SD_V2_768": "config",
    "AutoencoderKL": "vae",
    "CLIPTextEncoder": "text",
    "CheckpointError": "errors",
    "Inputs": "inputs",
    "Inspection": "checkpoints.inspection",
    "ModelConfig": "config",
    "NoiseSchedule": "schedule",
    "Settings": "settings",
    "Step": "samplers",
    "TextToImage": "pipeline",
    "Trace": "observe.traces",
    "UNet": "unet",
    "edit": "observe.hooks",
    "inspect": "checkpoints.inspection",
    "load": "pipeline",
    "load_text_encoder": "checkpoints.loading",
    "load_unet": "checkpoints.loading",
    "load_vae": "checkpoints.loading",
    "record": "observe.hooks",
    "shipped_weights": "checkpoints.shipped",
    "trace": "observe.traces",
}
# What stands on the top shelf, and the rooms: `ldm.samplers.ddim`, after `import ldm` alone.
SHELF = (
    *(
        "adapters",
        "attention",
        "config",
        "inputs",
        "layers",
        "pipeline",
        "presets",
        "prompts",
        "recipe",
        "samplers",
        "schedule",
    ),
    *("settings", "starting", "text", "tokenizer", "unet", "vae"),
    *("device", "errors", "files", "pictures", "version"),
    *("checkpoints", "evaluate", "export", "observe", "speed", "train", "viz", "worlds"),
)

__all__ = [
    "HORIZON",
    "SD_V1",
    "SD_V1_INPAINTING",
    "SD_V1_PIX2PIX",
    "SD_V2",
    "SD_V2_768",
    "AutoencoderKL",
    "CLIPTextEncoder",
    "CheckpointError",
    "Inputs",
    "Inspection",
    "ModelConfig",
    "NoiseSchedule",
    "Settings",
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


def __getattr__(name: str) -> Any:
    """A public name on first use; it is kept, so that this is asked once."""
    if name in HOME:
        value = getattr(importlib.import_module(f"ldm.{HOME[name]}"), name)
        if HOME[name] == "observe.traces":
            _show_traces_as_cards()
    elif name in SHELF:
        value = importlib.import_module(f"ldm.{name}")
    elif name == "__version__":
        from ldm.version import ldm_version

        value = ldm_version()
    else:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    globals()[name] = value
    return value


def _show_traces_as_cards() -> None:
    """In Jupyter a trace shows its card; `ldm.viz` is imported when one is shown."""
    from ldm.observe.traces import show_as

    def card(trace: Trace) -> str:
        from ldm.viz.card import trace_html

        return trace_html(trace)

    show_as(card)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *SHELF, "__version__"})
