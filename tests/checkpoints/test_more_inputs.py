"""Models that read a picture beside the latents: inpainting, instruct-pix2pix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import ldm
from ldm.checkpoints.convert import convert
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.config import SD_V1_INPAINTING, SD_V1_PIX2PIX, ModelConfig
from tests.checkpoints.test_open_clip import header_only
from tests.helpers import random_checkpoint, tiny_config, tiny_model


@pytest.mark.parametrize("config", [SD_V1_INPAINTING, SD_V1_PIX2PIX], ids=lambda c: c.name)
def test_official_files_are_recognised_and_nobody_draws_with_them(
    tmp_path: Path, config: ModelConfig
) -> None:
    path = header_only(tmp_path / "model.safetensors", config)
    assert recognise(open_archive(path)).config == config
    found = ldm.inspect(path)
    assert found.loads and found.family.startswith("Stable Diffusion v1, in")


@pytest.mark.parametrize("channels", [8, 9])
def test_they_are_loaded_saved_and_converted(tmp_path: Path, channels: int) -> None:
    tiny_model(tmp_path)
    unet = dataclasses.replace(tiny_config().unet, in_channels=channels)
    config = dataclasses.replace(tiny_config(), unet=unet)
    path = tmp_path / "model.safetensors"
    random_checkpoint(path, config)
    pipe = ldm.load(path, device="cpu")
    with pytest.raises(ValueError, match=f"tiny reads {channels} channels, a picture beside"):
        pipe("a red house", steps=1)
    convert(path, tmp_path / "folder")
    assert recognise(open_archive(tmp_path / "folder")).config.unet == unet
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    pipe.save(tmp_path / "saved.safetensors")
    saved = (tmp_path / "saved.safetensors").read_bytes()
    assert saved == path.read_bytes()
    again = ldm.load_unet(tmp_path / "again.safetensors")
    assert again.config == unet
