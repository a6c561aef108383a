"""diffusers' own pipeline with random weights of ours, as the judge of `like="diffusers"`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import oracle_configs


def diffusers_schedulers() -> dict[str, Any]:
    """diffusers' schedulers with Stable Diffusion v1's settings."""
    diffusers = pytest.importorskip("diffusers")
    settings = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    return {
        "ddim": diffusers.DDIMScheduler(**settings, set_alpha_to_one=False),
        "ddpm": diffusers.DDPMScheduler(**settings),
    }


def oracle_pipeline(folder: Path) -> Any:
    """A StableDiffusionPipeline with the weights of a tiny model in `folder`, by diffusers' own
    conversion."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as convert
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests.helpers import tiny_config

    config, weights = tiny_config(), load_file(folder / "model.safetensors")
    unet_config = oracle_configs.unet(config.unet)
    unet = diffusers.UNet2DConditionModel(**unet_config)
    unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(weights), unet_config))
    vae_config = oracle_configs.vae(config.vae)
    vae = diffusers.AutoencoderKL(**vae_config)
    vae.load_state_dict(convert.convert_ldm_vae_checkpoint(dict(weights), vae_config))
    CLIPTextConfig(**oracle_configs.text(config.text)).save_pretrained(folder / "clip_config")
    text = convert.create_diffusers_clip_model_from_ldm(
        CLIPTextModel, dict(weights), config=str(folder / "clip_config"), local_files_only=True
    )
    if not hasattr(text, "text_model"):  # transformers 5; diffusers' clip_skip asks for it
        object.__setattr__(text, "text_model", text)  # not as a module: it would hold itself
    theirs = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(folder, model_max_length=config.text.max_length),
        unet=unet,
        scheduler=diffusers_schedulers()["ddim"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs
