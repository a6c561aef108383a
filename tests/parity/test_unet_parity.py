"""The UNet against diffusers' UNet2DConditionModel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.checkpoints.loading import load_unet
from ldm.config import ModelConfig, UNetConfig
from ldm.unet import UNet
from tests import oracle_configs
from tests.helpers import randn, relative_error, small_config
from tests.parity import assert_parity, only_small

diffusers = pytest.importorskip("diffusers")

# A square picture of 128 pixels, and two whose latents are odd at every level: 264 x 328 pixels and
# 520 x 584.
SIZES = [(16, 16), (33, 41), pytest.param((65, 73), marks=pytest.mark.slow)]
Outputs = dict[str, Tensor]


@pytest.fixture(scope="session")
def ours(checkpoint: Path) -> UNet:
    return load_unet(checkpoint)


@pytest.fixture(scope="session")
def oracle(checkpoint: Path, config: ModelConfig) -> nn.Module:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    theirs = oracle_configs.unet(config.unet)
    model = diffusers.UNet2DConditionModel(**theirs)
    weights = convert_ldm_unet_checkpoint(load_file(checkpoint), theirs)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def inputs(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Two latents at different timesteps; but a single one where it is large, for its time."""
    batch = 1 if max(size) > 32 else 2
    x = randn(batch, 4, *size, seed=5)
    context = randn(batch, 77, small_config().unet.context_dim, seed=6)
    return x, torch.tensor([999, 1][:batch]), context


def outputs_of(
    model: nn.Module, names: dict[str, str], device: str, dtype: torch.dtype, args: Any
) -> Outputs:
    """What the whole model and every module named in `names` (module -> label) gives."""
    model = copy.deepcopy(model).to(device, dtype)
    found: Outputs = {}

    def keep(label: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = getattr(output, "sample", output)
            found[label] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, label in names.items():
        model.get_submodule(name).register_forward_hook(keep(label))
    x, t, context = args
    with torch.no_grad():
        output = model(x.to(device, dtype), t.to(device), context.to(device, dtype))
    return found | {"unet": getattr(output, "sample", output)}


def transformer_names(config: UNetConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Every transformer and its two attentions, in our tree and in diffusers': name -> label."""
    places = {"mid.transformer": "mid_block.attentions.0"}
    last = len(config.channel_mult) - 1
    for level in config.attention_levels:
        for block in range(config.num_res_blocks):
            ours = f"down.{level}.blocks.{block}.transformer"
            places[ours] = f"down_blocks.{level}.attentions.{block}"
        for block in range(config.num_res_blocks + 1):
            ours = f"up.{level}.blocks.{block}.transformer"
            places[ours] = f"up_blocks.{last - level}.attentions.{block}"
    parts = {
        "": "",
        ".self_attention": ".transformer_blocks.0.attn1",
        ".cross_attention": ".transformer_blocks.0.attn2",
    }
    pairs = [(a + x, b + y) for a, b in places.items() for x, y in parts.items()]
    return {a: a for a, _ in pairs}, {b: a for a, b in pairs}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_unet_and_each_of_its_transformers_agree_with_diffusers(
    ours: UNet, oracle: nn.Module, size: tuple[int, int], device: str
) -> None:
    args = inputs(size)
    our_names, oracle_names = transformer_names(ours.config)
    assert len(our_names) == 3 * 16  # 6 on the way down, 1 in the middle, 9 on the way up

    reference = outputs_of(oracle, oracle_names, "cpu", torch.float64, args)
    theirs = outputs_of(oracle, oracle_names, device, torch.float32, args)
    mine = outputs_of(ours, our_names, device, torch.float32, args)

    assert mine.keys() == theirs.keys() == reference.keys()
    assert mine["unet"].shape == args[0].shape
    for label, value in mine.items():
        assert_parity(value, theirs[label], reference[label], label)


NORMS = {
    "ResBlock": ("res.norm1", "res.norm2", "res1.norm1", "res2.norm2"),
    "SpatialTransformer's GroupNorm": ("transformer.norm_in",),
    "SpatialTransformer's LayerNorms": (
        "transformer.norm1",
        "transformer.norm2",
        "transformer.norm3",
    ),
    "output": ("norm_out",),
}


@only_small
@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
def test_parity_would_show_a_wrong_epsilon(
    ours: UNet,
    oracle: nn.Module,
    norms: tuple[str, ...],
) -> None:
    """The test above can see what it must: ten times the epsilon, at small activations, is far
    outside the bound of 1e-4."""
    args = inputs((16, 16))
    wrong = copy.deepcopy(ours)
    changed = [m for name, m in wrong.named_modules() if name.endswith(norms)]
    assert changed
    for norm in changed:
        norm.eps *= 10
    reference = outputs_of(oracle, {}, "cpu", torch.float64, args)["unet"]
    assert (
        relative_error(outputs_of(wrong, {}, "cpu", torch.float32, args)["unet"], reference) > 1e-3
    )
