"""What a key of a file means: a weight, or nothing that matters."""

from __future__ import annotations

import pytest
import torch

from ldm.checkpoints.entries import Entry
from ldm.checkpoints.keys import PREFIXES, computed_entries, key_map
from ldm.checkpoints.spellings import ema_name, ignored_in, is_ignored, official_name, stages_in
from ldm.checkpoints.stages import build_stage
from ldm.config import SD_V1
from tests.helpers import STAGES

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
    # left by wrappers:
    "module.model.diffusion_model.out.2.bias": "model.diffusion_model.out.2.bias",
    "model.diffusion_model._orig_mod.out.2.bias": "model.diffusion_model.out.2.bias",
    "_orig_mod.module.out.2.bias": "model.diffusion_model.out.2.bias",
    "out._checkpoint_wrapped_module.2.bias": "model.diffusion_model.out.2.bias",
    "_fsdp_wrapped_module.final_layer_norm.bias": TEXT + "final_layer_norm.bias",
    "module.betas": "betas",
    "model_ema.diffusion_model_orig_modout2bias": "model_ema.diffusion_modelout2bias",
    # not a weight's:
    "modules.weight": "modules.weight",
    "a_module.weight": "a_module.weight",
    "decoder.mid.attn_1.colour": "first_stage_model.decoder.mid.attn_1.colour",
    "betas": "betas",
    "loss.discriminator.main.0.weight": "loss.discriminator.main.0.weight",
    "outer.weight": "outer.weight",
    "cond_stage_model.transformer.text_projection.weight": "cond_stage_model.transformer."
    "text_projection.weight",
}


@pytest.mark.parametrize("key, official", SPELLINGS.items())
def test_spellings_of_keys(key: str, official: str) -> None:
    assert official_name(key) == official


ATTENTION = {
    "q": ("q", "to_q", "to_to_q", "query"),
    "k": ("k", "to_k", "to_to_k", "key"),
    "v": ("v", "to_v", "to_to_v", "value"),
    "proj_out": ("proj_out", "to_out.0", "to_to_out.0", "proj_attn"),
    "norm": ("norm", "group_norm"),
}


@pytest.mark.parametrize("official, spellings", ATTENTION.items())
def test_spellings_of_the_autoencoders_attention(official: str, spellings) -> None:
    for spelling in spellings:
        for side in ("encoder", "decoder"):
            for kind in ("weight", "bias"):
                key = f"{side}.mid.attn_1.{spelling}.{kind}"
                expected = f"{VAE}{side}.mid.attn_1.{official}.{kind}"
                assert official_name(key) == official_name(VAE + key) == expected


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
