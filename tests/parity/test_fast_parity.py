"""The fast layers of `pipe.optimize()` against diffusers and transformers, by the plain ones' rule:
to compute faster may not cost exactness."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoints.loading import load_text_encoder, load_unet, load_vae
from ldm.config import ModelConfig
from ldm.speed.cpu import has_onednn, optimize
from tests.helpers import randn, small_config, text_in_fp64
from tests.parity import assert_parity, only_v1

pytest.importorskip("diffusers")
pytestmark = pytest.mark.skipif(not has_onednn(), reason="this PyTorch is without oneDNN")

# Odd at every level; square, with enough places for attention in blocks; wide, with more of them.
LATENTS = [(9, 13), (24, 24), (16, 40)]


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig) -> Path:
    from tests.benchmarks.diffusers_side import write_configs

    return write_configs(tmp_path_factory.mktemp("fast") / "configs", config)


def oracle(stage: str, checkpoint: Path, configs: Path) -> nn.Module:
    from tests.benchmarks import diffusers_side

    return diffusers_side.load(stage, checkpoint, configs).eval()


@pytest.mark.parametrize("size", LATENTS, ids=str)
@torch.no_grad()
def test_the_fast_unet_agrees_with_diffusers(
    checkpoint: Path, configs: Path, size: tuple[int, int]
) -> None:
    x, t = randn(2, 4, *size, seed=5), torch.tensor([999, 1])
    context = randn(2, 77, small_config().unet.context_dim, seed=6)
    ours, theirs = load_unet(checkpoint), oracle("unet", checkpoint, configs)
    optimize(ours)
    mine, oracles = ours(x, t, context), theirs(x, t, context).sample
    reference = theirs.double()(x.double(), t, context.double()).sample
    assert_parity(mine, oracles, reference, "eps")


@only_v1
@pytest.mark.parametrize("size", LATENTS, ids=str)
@torch.no_grad()
def test_the_fast_decoder_agrees_with_diffusers(
    checkpoint: Path, configs: Path, size: tuple[int, int]
) -> None:
    z = randn(1, 4, *size, seed=8)
    ours, theirs = load_vae(checkpoint), oracle("vae", checkpoint, configs)
    optimize(ours)
    mine, oracles = ours.decode(z), theirs.decode(z).sample
    assert_parity(mine, oracles, theirs.double().decode(z.double()).sample, "picture")


@only_v1
@pytest.mark.parametrize("size", [(72, 104), (64, 64)], ids=str)
@torch.no_grad()
def test_the_fast_encoder_agrees_with_diffusers(
    checkpoint: Path, configs: Path, size: tuple[int, int]
) -> None:
    # Four pictures: the largest errors of a few hundred numbers would compare two draws of luck.
    x = randn(4, 3, *size, seed=7).clamp(-1, 1)
    ours, theirs = load_vae(checkpoint), oracle("vae", checkpoint, configs)
    optimize(ours)
    mine, oracles = ours.encode(x), theirs.encode(x).latent_dist
    reference = theirs.double().encode(x.double()).latent_dist
    assert_parity(mine.mean, oracles.mean, reference.mean, "mean")
    assert_parity(mine.logvar, oracles.logvar, reference.logvar, "logvar")


@text_in_fp64
@torch.no_grad()
def test_the_fast_text_encoder_agrees_with_transformers(checkpoint: Path, configs: Path) -> None:
    ids = torch.randint(0, 518, (2, 77), generator=torch.Generator().manual_seed(9))
    ours, theirs = load_text_encoder(checkpoint), oracle("text", checkpoint, configs)
    optimize(ours)
    mine, oracles = ours.encode(ids), theirs(input_ids=ids).last_hidden_state
    reference = theirs.double()(input_ids=ids).last_hidden_state
    assert_parity(mine, oracles, reference, "context")
