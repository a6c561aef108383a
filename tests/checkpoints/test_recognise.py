"""What a file holds, told by its keys and shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ldm.checkpoints.archive import Entry
from ldm.checkpoints.checkpoint import build_stage
from ldm.config import SD_V1
from ldm.checkpoints.keys import PREFIXES, computed_entries, key_map
from ldm.checkpoints.recognise import (
    ema_name,
    ignored_in,
    is_ignored,
    is_sd_v1,
    official_name,
    other_family,
    stages_in,
)
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


SPELLINGS = {
    "model.diffusion_model.out.2.bias": "model.diffusion_model.out.2.bias",
    "diffusion_model.out.2.bias": "model.diffusion_model.out.2.bias",
    "out.2.bias": "model.diffusion_model.out.2.bias",
    "time_embed.0.weight": "model.diffusion_model.time_embed.0.weight",
    "middle_block.1.norm.bias": "model.diffusion_model.middle_block.1.norm.bias",
    "decoder.mid.attn_1.q.weight": "first_stage_model.decoder.mid.attn_1.q.weight",
    "encoder.conv_in.weight": "first_stage_model.encoder.conv_in.weight",
    "post_quant_conv.bias": "first_stage_model.post_quant_conv.bias",
    "cond_stage_model.transformer.final_layer_norm.bias": TEXT + "final_layer_norm.bias",
    "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.bias": TEXT
    + "encoder.layers.0.mlp.fc1.bias",
    "text_model.final_layer_norm.bias": TEXT + "final_layer_norm.bias",
    "final_layer_norm.bias": TEXT + "final_layer_norm.bias",
    "encoder.layers.0.mlp.fc1.bias": TEXT + "encoder.layers.0.mlp.fc1.bias",
    "embeddings.position_ids": TEXT + "embeddings.position_ids",
    # not a weight's:
    "betas": "betas",
    "loss.discriminator.main.0.weight": "loss.discriminator.main.0.weight",
    "outer.weight": "outer.weight",
    "cond_stage_model.transformer.text_projection.weight": "cond_stage_model.transformer."
    "text_projection.weight",
}


@pytest.mark.parametrize("key, official", SPELLINGS.items())
def test_spellings_of_keys(key: str, official: str) -> None:
    assert official_name(key) == official


def test_official_keys_are_their_own_spelling_and_never_ignored() -> None:
    keys = [*official_keys(), *computed_entries()]
    assert len(keys) == 1143
    assert all(official_name(key) == key and not is_ignored(key) for key in keys)


def test_bare_keys_of_each_stage_come_back_to_it() -> None:
    for prefix in PREFIXES.values():
        keys = [key for key in official_keys() if key.startswith(prefix)]
        assert [official_name(key.removeprefix(prefix)) for key in keys] == keys


def test_ema_names_are_flat_and_no_two_are_equal() -> None:
    assert (
        ema_name("model.diffusion_model.input_blocks.0.0.weight")
        == "model_ema.diffusion_modelinput_blocks00weight"
    )
    unet = [key for key in official_keys() if key.startswith(UNET)]
    names = {ema_name(key) for key in unet}
    assert len(names) == len(unet) == 686
    assert all(name.count(".") == 1 and is_ignored(name) for name in names)


def test_ignored_names_are_whole_or_end_in_a_dot() -> None:
    assert is_ignored("loss.logvar") and is_ignored("logvar")
    assert not is_ignored("logvar_head.weight") and not is_ignored("losses")
    keys = ["loss.a", "loss.b", "model_ema.decay", "betas", UNET + "out.2.bias"]
    assert ignored_in(keys) == {"loss": 2, "model_ema": 1}


def test_stages_are_counted() -> None:
    assert stages_in(official_keys()) == {"unet": 686, "vae": 248, "text": 196}
    assert stages_in(["betas", VAE + "a", VAE + "b"]) == {"vae": 2}


FAMILIES = {
    "a ControlNet": entries(control_model__time_embed__0__weight=(1,), model__x=(1,)),
    "Stable Diffusion XL": entries(conditioner__embedders__0__weight=(1,)),
    "Stable Diffusion 3": entries(model__diffusion_model__joint_blocks__0__w=(1,)),
    "Flux": entries(double_blocks__0__img_attn__qkv__weight=(1,)),
    "Stable Diffusion 2": entries(cond_stage_model__model__ln_final__weight=(1024,)),
    "a part of a diffusers folder": entries(down_blocks__0__resnets__0__conv1__weight=(1,)),
    "a LoRA": entries(lora_unet_down_blocks_0_attentions_0__lora_down__weight=(4, 320)),
    "a textual inversion": entries(emb_params=(2, 768)),
    "an inpainting model": {UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)},
    "an instruct-pix2pix model": {UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)},
    "a depth-to-image model": {UNET + "input_blocks.0.0.weight": (320, 5, 3, 3)},
    "an upscaler": {UNET + "input_blocks.0.0.weight": (320, 7, 3, 3)},
    "Stable Diffusion 2 ": {UNET + "a.attn2.to_k.weight": (320, 1024)},
    "Stable Diffusion XL ": {UNET + "a.attn2.to_k.weight": (640, 2048)},
    "the refiner of Stable Diffusion XL": {UNET + "a.attn2.to_k.weight": (640, 1280)},
}


@pytest.mark.parametrize("name, found", FAMILIES.items())
def test_other_families_are_named(name: str, found) -> None:
    found = {k: entries(a=s)["a"] if isinstance(s, tuple) else s for k, s in found.items()}
    assert (other_family(found) or "").startswith(name)


def test_the_parts_of_a_diffusers_autoencoder_are_named() -> None:
    key = official_name("decoder.up_blocks.0.resnets.0.conv1.weight")
    assert "diffusers folder" in (other_family(entries(**{key: (1,)})) or "")


def test_our_own_models_are_of_no_other_family() -> None:
    for config in (SD_V1, tiny_config()):
        for stage in STAGES:
            with torch.device("meta"):
                model = build_stage(stage, config)
            state, names = model.state_dict(), key_map(model)
            found = {names[k]: entries(a=tuple(v.shape))["a"] for k, v in state.items()}
            assert other_family(found, config) is None
            assert is_sd_v1(found) == (config is SD_V1)


def test_a_config_of_ones_own_may_have_any_number() -> None:
    found = {
        UNET + "input_blocks.0.0.weight": entries(a=(32, 8, 3, 3))["a"],
        UNET + "a.attn2.to_k.weight": entries(a=(32, 1024))["a"],
    }
    assert "instruct-pix2pix" in (other_family(found) or "")
    wide = dataclasses.replace(SD_V1.unet, in_channels=8, context_dim=1024)
    assert other_family(found, dataclasses.replace(SD_V1, unet=wide)) is None


def test_an_addition_beside_a_model_is_no_other_family() -> None:
    found = entries(lora_unet_mid__weight=(1,)) | {UNET + "out.2.bias": entries(a=(4,))["a"]}
    assert other_family(found) is None  # loading names the key
