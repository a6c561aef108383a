"""Which model a file is, and its config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ldm
import ldm.checkpoints.saving
import ldm.checkpoints.spellings
import ldm.errors
from ldm.checkpoints.config_json import config_from_json, config_to_json
from ldm.checkpoints.loading import load_unet, load_vae
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.config import HORIZON, SD_V1, SD_V2, SD_V2_768
from ldm.errors import (
    ConfigError,
    FamilyError,
    KeysError,
    MissingPartsError,
)
from tests.checkpoints.helpers import VAE_KEY
from tests.helpers import (
    CONTAINERS,
    tiny_config,
    tiny_tensors,
    write_weights,
)


def test_config_travels_in_the_metadata(saved) -> None:
    path, _ = saved
    assert recognise(open_archive(path)).config == tiny_config()
    for config in (SD_V1, SD_V2, SD_V2_768, HORIZON):
        assert config_from_json(config_to_json(config), Path("a file")) == config


def test_file_without_a_config_is_taken_for_sd_v1_if_it_is_as_wide(tmp_path: Path) -> None:
    path = tmp_path / "model"
    unet = {"model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3)}
    assert recognise(open_archive(write_weights(path, unet))).config == SD_V1
    with pytest.raises(KeysError, match=r"holds 0 of the .* blocks that the unet of sd-v1 has"):
        load_unet(path)
    write_weights(path, tiny_tensors())
    with pytest.raises(
        ConfigError, match=r"not as wide as Stable Diffusion 1 or 2.*: pass its config"
    ):
        load_unet(path)
    assert load_unet(path, config=tiny_config()).config == tiny_config().unet


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CROSS = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "inpainting": lambda t: t | {FIRST: torch.ones(16, 9, 3, 3)},
    "instruct-pix2pix": lambda t: t | {FIRST: torch.ones(16, 8, 3, 3)},
    "Stable Diffusion XL": lambda t: t | {CROSS: torch.ones(32, 2048)},
    "ControlNet": lambda t: t | {"control_model.time_embed.0.weight": torch.ones(1)},
    "LoRA": lambda t: {"lora_unet_mid_block_attentions_0.lora_up.weight": torch.ones(2, 2)},
    "textual inversion": lambda t: {"string_to_param.*": torch.ones(1, 768)},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused_by_name(tmp_path: Path, name: str, container: str) -> None:
    path = write_weights(tmp_path / "other", OTHERS[name](tiny_tensors()), container)
    for load in (load_unet, ldm.load):
        with pytest.raises(FamilyError, match=f"is .*{name}.*; ldm loads Stable Diffusion 1 and 2"):
            load(path, config=tiny_config())


def test_no_stage_of_a_model(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "other", {"fc.weight": torch.ones(3, 3)})
    with pytest.raises(MissingPartsError, match="holds no stage of a model that ldm knows"):
        load_unet(path)


def test_two_spellings_of_one_key_are_not_guessed_between(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {VAE_KEY.removeprefix("first_stage_model."): torch.ones(1)}
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    with pytest.raises(KeysError, match=f"{VAE_KEY} under two names"):
        load_vae(path)
