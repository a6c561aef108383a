"""TAESD's decoder, against diffusers' own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import ldm
from ldm.checkpoints.tiny import is_tiny_decoder, load_tiny_decoder
from ldm.errors import (
    ConfigError,
    DivergedError,
    FamilyError,
    KeysError,
    NonFiniteError,
    ShapeError,
)
from ldm.vae import TinyDecoder
from tests.helpers import (
    CONTAINERS,
    randn,
    random_checkpoint,
    randomise,
    rng,
    tiny_config,
    tiny_model,
    write_weights,
)
from tests.parity import assert_parity


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Random weights under the official names."""
    return dict(randomise(TinyDecoder(), rng(3)).layers.state_dict())  # type: ignore[union-attr]


@pytest.mark.parametrize("container", CONTAINERS)
@torch.no_grad()
def test_it_decodes_as_diffusers_does(tensors, tmp_path: Path, container: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    path = write_weights(tmp_path / "taesd_decoder", tensors, container)
    assert is_tiny_decoder(path)
    ours, oracle = load_tiny_decoder(path), diffusers.AutoencoderTiny().decoder.eval()
    # diffusers does not count what it clamps.
    names = {key: f"layers.{int(key.split('.')[0]) - 1}.{key.split('.', 1)[1]}" for key in tensors}
    oracle.load_state_dict({names[key]: value for key, value in tensors.items()}, strict=True)
    z = randn(2, 4, 9, 7, seed=1)
    theirs = oracle(z).add(1).div(2).clamp(0, 1)
    reference = oracle.double()(z.double()).add(1).div(2).clamp(0, 1)
    mine = ours(z)
    assert mine.shape == (2, 3, 72, 56) and mine.min() >= 0 and mine.max() <= 1
    assert_parity(mine, theirs, reference, "picture")


def test_its_parameters_are_those_that_the_text_says() -> None:
    assert round(sum(p.numel() for p in TinyDecoder().parameters()) / 1e6, 1) == 1.2


def test_a_model_draws_by_it_and_keeps_its_own_autoencoder(tensors, tmp_path: Path) -> None:
    tiny_model(tmp_path)
    vae = dataclasses.replace(tiny_config().vae, channel_mult=(1, 1, 1, 1))
    config = dataclasses.replace(tiny_config(), vae=vae, image_size=64)
    random_checkpoint(tmp_path / "model.safetensors", config)
    path = write_weights(tmp_path / "taesd.pth", tensors)
    plain = ldm.load(tmp_path / "model.safetensors", device="cpu")
    pipe = ldm.load(tmp_path / "model.safetensors", vae=path, device="cpu")
    assert pipe.tiny is not None and plain.tiny is None
    z = randn(2, 4, 8, 8)
    rough, fine = pipe.decode(z), plain.decode(z)
    assert [image.size for image in rough] == [(64, 64)] * 2
    assert rough[0].tobytes() != fine[0].tobytes()
    assert pipe.decode(z[1:])[0].tobytes() == rough[1].tobytes()
    assert torch.equal(pipe.encode(fine[0]), plain.encode(fine[0]))
    (tmp_path / "saved").mkdir()
    pipe.save(tmp_path / "saved" / "model.safetensors")
    saved = (tmp_path / "saved" / "model.safetensors").read_bytes()
    assert saved == (tmp_path / "model.safetensors").read_bytes()
    assert next(pipe.to(dtype=torch.bfloat16).tiny.parameters()).dtype == torch.bfloat16
    assert len(pipe.decode(z)) == 2
    with pytest.raises(DivergedError, match="latents cannot be decoded: they hold NaN"):
        pipe.decode(torch.full((1, 4, 8, 8), torch.nan))


def test_latents_of_another_kind_are_a_line(tensors, tmp_path: Path) -> None:
    path = write_weights(tmp_path / "taesd.pth", tensors)
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="of 4 channels and 8 pixels, not of 4 channels and 2"):
        ldm.load(tiny_model(tmp_path / "model"), vae=path, device="cpu")


def test_what_does_not_fit_is_a_line(tensors, tmp_path: Path) -> None:
    key = "19.bias"
    cases = {
        KeysError: {k: v for k, v in tensors.items() if k != key},
        ShapeError: tensors | {key: torch.ones(4)},
        NonFiniteError: tensors | {key: torch.full((3,), torch.nan)},
    }
    for error, content in cases.items():
        with pytest.raises(error, match=key) as caught:
            load_tiny_decoder(write_weights(tmp_path / "file", content))
        assert "\n" not in str(caught.value)
    path = write_weights(tmp_path / "file", tensors)
    assert "TAESD, a tiny decoder" in ldm.inspect(path).family
    with pytest.raises(FamilyError, match="is TAESD, a tiny decoder"):
        ldm.load_vae(path)
