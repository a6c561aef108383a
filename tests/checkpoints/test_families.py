"""Other kinds of models, told by their keys and shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm.checkpoints.entries import Entry
from ldm.checkpoints.families import known_config, other_family
from ldm.checkpoints.keys import PREFIXES, key_map
from ldm.checkpoints.spellings import official_name
from ldm.checkpoints.stages import build_stage
from ldm.config import OFFICIAL, SD_V1
from tests.helpers import STAGES, tiny_config

UNET, VAE, TEXT = PREFIXES.values()


def entries(**shapes: tuple[int, ...]) -> dict[str, Entry]:
    """Entries of no file; in the names, two underscores are a dot."""
    return {
        key.replace("__", "."): Entry(None, 0, torch.float32, shape)  # type: ignore[arg-type]
        for key, shape in shapes.items()
    }


def official_keys(config=SD_V1) -> list[str]:
    keys: list[str] = []
    for stage in STAGES:
        with torch.device("meta"):
            keys += key_map(build_stage(stage, config)).values()
    return keys


FAMILIES = {
    "a ControlNet": entries(control_model__time_embed__0__weight=(1,), model__x=(1,)),
    "Stable Diffusion XL": entries(conditioner__embedders__0__weight=(1,)),
    "Stable Diffusion 3": entries(model__diffusion_model__joint_blocks__0__w=(1,)),
    "Flux": entries(double_blocks__0__img_attn__qkv__weight=(1,)),
    "Stable Diffusion 2.1 unCLIP": entries(noise_augmentor__betas=(1000,)),
    "a depth-to-image model ": entries(depth_model__model__bias=(1,)),
    "an upscaler ": entries(low_scale_model__betas=(350,)),
    "a latent consistency model": entries(
        model__diffusion_model__time_embed__cond_proj__weight=(320, 256)
    ),
    "a latent consistency model ": entries(
        time_embedding__cond_proj__weight=(320, 256), down_blocks__0__w=(1,)
    ),
    "a control-LoRA": {
        "lora_controlnet": (0,),
        official_name("input_blocks.1.0.in_layers.2.up"): (320, 64),
    },
    "a ControlNet ": entries(controlnet_mid_block__bias=(1,), down_blocks__0__w=(1,)),
    "a ControlNet  ": entries(zero_convs__0__0__weight=(320, 320, 1, 1)),
    "a ControlNet-LLLite": {"lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight": (64, 320)},
    "a motion module": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": (320,)},
    "a motion module ": {"temporal_transformer.proj_in.weight": (320, 320)},
    "an IP-Adapter": {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (1,)},
    "an IP-Adapter ": {"ip_adapter.0.to_q_lora.down.weight": (128, 320)},
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": (320, 320, 3, 3)},
    "a T2I-Adapter ": {"body.0.block1.weight": (320, 320, 3, 3), "conv_in.bias": (320,)},
    "an OFT": {"oft_unet_down_blocks_0_attentions_0_proj_in.oft_blocks": (4, 80, 80)},
    "an OFT ": {"lora_unet_mid_block.oft_diag": (4, 80, 80)},
    "a LoHa": {"lora_unet_mid_block.hada_w1_a": (4, 80)},
    "a LoKr": {"lora_unet_mid_block.lokr_w1": (4, 80)},
    "a textual inversion ": {"<cat-toy>": (768,)},
    "a textual inversion  ": {"clip_l": (2, 768), "clip_g": (2, 1280)},
    "a part of a diffusers folder": entries(down_blocks__0__resnets__0__conv1__weight=(1,)),
    "a LoRA": entries(lora_unet_down_blocks_0_attentions_0__lora_down__weight=(4, 320)),
    "a textual inversion": entries(emb_params=(2, 768)),
    "an inpainting model": {UNET + "input_blocks.0.0.weight": (64, 9, 3, 3)},
    "an instruct-pix2pix model": {UNET + "input_blocks.0.0.weight": (64, 8, 3, 3)},
    "a depth-to-image model": {UNET + "input_blocks.0.0.weight": (320, 5, 3, 3)},
    "an upscaler": {UNET + "input_blocks.0.0.weight": (320, 7, 3, 3)},
    "Stable Diffusion XL ": {UNET + "a.attn2.to_k.weight": (640, 2048)},
    "the refiner of Stable Diffusion XL": {UNET + "a.attn2.to_k.weight": (640, 1280)},
}


@pytest.mark.parametrize("name, found", FAMILIES.items())
def test_other_families_are_named(name: str, found) -> None:
    found = {k: entries(a=s)["a"] if isinstance(s, tuple) else s for k, s in found.items()}
    assert (other_family(found) or "").startswith(name.strip())


def test_additions_are_said_to_be_that() -> None:
    for key in ("body.0.block1.weight", "ip_adapter.1.to_k_ip.weight", "<word>"):
        found = other_family({key: entries(a=(768,))["a"]}) or ""
        assert ", an addition to a model" in found


def test_a_few_tensors_of_another_width_are_no_textual_inversion() -> None:
    for shape in ((700,), (), (1, 1, 768)):
        assert other_family({"a": entries(a=shape)["a"]}) is None
    assert other_family(entries(**{f"a{n}": (768,) for n in range(9)})) is None


def test_the_parts_of_a_diffusers_autoencoder_are_named() -> None:
    key = official_name("decoder.up_blocks.0.resnets.0.conv1.weight")
    assert "diffusers folder" in (other_family(entries(**{key: (1,)})) or "")


def test_our_own_models_are_of_no_other_family() -> None:
    for config in (*OFFICIAL, tiny_config()):
        for stage in STAGES:
            with torch.device("meta"):
                model = build_stage(stage, config)
            state, names = model.state_dict(), key_map(model)
            found = {names[k]: entries(a=tuple(v.shape))["a"] for k, v in state.items()}
            assert other_family(found, config) is None
            if (
                config in OFFICIAL
            ):  # the autoencoders are the same, and what is predicted is not told
                told = {"unet": config.unet, "vae": SD_V1.vae, "text": config.text}[stage]
                assert getattr(known_config(found), stage) == told
            else:
                assert known_config(found) is None


def test_a_config_of_ones_own_may_have_any_number() -> None:
    found = {
        UNET + "input_blocks.0.0.weight": entries(a=(32, 8, 3, 3))["a"],
        UNET + "a.attn2.to_k.weight": entries(a=(32, 1280))["a"],
    }
    assert "instruct-pix2pix" in (other_family(found) or "")
    wide = dataclasses.replace(SD_V1.unet, in_channels=8, context_dim=1280)
    assert other_family(found, dataclasses.replace(SD_V1, unet=wide)) is None


def test_an_addition_beside_a_model_is_no_other_family() -> None:
    found = entries(lora_unet_mid__weight=(1,)) | {UNET + "out.2.bias": entries(a=(4,))["a"]}
    assert other_family(found) is None  # loading names the key
