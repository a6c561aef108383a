"""The autoencoder against diffusers' AutoencoderKL."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.checkpoints.loading import load_vae
from ldm.vae import AutoencoderKL, Posterior
from tests import oracle_configs
from tests.helpers import randn, relative_error, small_config
from tests.parity import assert_parity, only_small, only_v1

diffusers = pytest.importorskip("diffusers")

# A square picture, and one whose latents are odd in height and width (9 x 13).
SIZES = [(64, 64), (72, 104)]


@pytest.fixture(scope="session")
def ours(checkpoint: Path) -> AutoencoderKL:
    return load_vae(checkpoint)


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> nn.Module:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = oracle_configs.vae(small_config().vae)
    model = diffusers.AutoencoderKL(**config)
    model.load_state_dict(convert_ldm_vae_checkpoint(load_file(checkpoint), config), strict=True)
    return model.eval()


def on(model: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(device, dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
@only_v1
def test_moments_agree_with_diffusers(
    ours: AutoencoderKL, oracle: nn.Module, size: tuple[int, int], device: str
) -> None:
    x = randn(2, 3, *size, seed=7).clamp(-1, 1)
    reference = on(oracle, "cpu", torch.float64).encode(x.double()).latent_dist
    theirs = on(oracle, device, torch.float32).encode(x.to(device)).latent_dist
    mine = on(ours, device, torch.float32).encode(x.to(device))
    assert mine.mean.shape == (2, 4, size[0] // 8, size[1] // 8)
    assert_parity(mine.mean, theirs.mean, reference.mean, "mean")
    assert_parity(mine.logvar, theirs.logvar, reference.logvar, "logvar")
    assert_parity(mine.mode(), theirs.mode(), reference.mode(), "mode")


def test_kl_agrees_with_diffusers(device: str) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    # From the same moments, and of many posteriors: each sum ends in a rounding of its own, so the
    # largest errors of a few sums would compare two draws of luck.
    moments = randn(256, 8, 8, 8, seed=9)
    reference = DiagonalGaussianDistribution(moments.double()).kl()
    theirs = DiagonalGaussianDistribution(moments.to(device)).kl()
    mine = Posterior(*moments.to(device).chunk(2, dim=1)).kl()
    assert mine.shape == (256,)
    assert_parity(mine, theirs, reference, "kl")


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
@only_v1
def test_decoder_agrees_with_diffusers(
    ours: AutoencoderKL, oracle: nn.Module, size: tuple[int, int], device: str
) -> None:
    z = randn(2, 4, size[0] // 8, size[1] // 8, seed=8)
    reference = on(oracle, "cpu", torch.float64).decode(z.double()).sample
    theirs = on(oracle, device, torch.float32).decode(z.to(device)).sample
    mine = on(ours, device, torch.float32).decode(z.to(device))
    assert mine.shape == (2, 3, *size)
    assert_parity(mine, theirs, reference, "picture")


@only_small
@pytest.mark.parametrize("norms", [("norm1", "norm2"), ("attention.norm",), ("norm_out",)], ids=str)
@torch.no_grad()
@only_v1
def test_parity_would_show_a_wrong_epsilon(
    ours: AutoencoderKL,
    oracle: nn.Module,
    norms: tuple[str, ...],
) -> None:
    """The tests above can see what they must: the UNet's epsilon, ten times the autoencoder's, at
    small activations, is far outside the bound of 1e-4."""
    wrong = copy.deepcopy(ours)
    for side in (wrong.encoder, wrong.decoder):
        changed = [m for name, m in side.named_modules() if name.endswith(norms)]
        assert changed
        for norm in changed:
            norm.eps *= 10
    x, z = randn(1, 3, 64, 64, seed=7), randn(1, 4, 8, 8, seed=8)
    exact = on(oracle, "cpu", torch.float64)
    assert relative_error(wrong.encode(x).mean, exact.encode(x.double()).latent_dist.mean) > 1e-3
    assert relative_error(wrong.decode(z), exact.decode(z.double()).sample) > 1e-3
