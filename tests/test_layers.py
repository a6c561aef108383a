"""The building blocks, each against its equation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ldm.layers import (
    Downsample,
    ResBlock,
    TimeEmbedding,
    Upsample,
    sinusoidal_embedding,
    zero_,
)
from tests.helpers import randn, randomise, rng

# A handful of fp32 operations, each rounded by 6e-8, on numbers of size 1 to 10.
FP32 = dict(rtol=1e-5, atol=1e-5)


def test_sinusoidal_embedding_is_cosines_then_sines_from_fast_to_slow(device: str) -> None:
    out = sinusoidal_embedding(torch.tensor([0, 1, 37, 999], device=device), 8)
    expected = [
        [f(t * 10000.0 ** (-k / 4)) for f in (math.cos, math.sin) for k in range(4)]
        for t in (0, 1, 37, 999)
    ]
    # The angle reaches 999, where fp32 numbers are 6e-5 apart: that is the cosine's error there.
    torch.testing.assert_close(out.cpu(), torch.tensor(expected), rtol=0, atol=1e-4)
    assert out.dtype == torch.float32 and out.shape == (4, 8)


def test_sinusoidal_embedding_takes_its_max_period() -> None:
    out = sinusoidal_embedding(torch.tensor([3]), 4, max_period=100.0)
    expected = [[math.cos(3.0), math.cos(0.3), math.sin(3.0), math.sin(0.3)]]
    torch.testing.assert_close(out, torch.tensor(expected), **FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_time_embedding_tells_all_timesteps_apart_in_half_precision(dtype: torch.dtype) -> None:
    """The waves are computed in fp32 whatever the weights are: t = 998 and 999 are one number in
    bfloat16."""
    embedding = randomise(TimeEmbedding(64), rng()).to(dtype)
    with torch.no_grad():
        out = embedding(torch.arange(1000))
    assert out.dtype == dtype and out.shape == (1000, 256)
    assert len(torch.unique(out.float(), dim=0)) == 1000


def test_time_embedding_is_linear_silu_linear(device: str) -> None:
    embedding = randomise(TimeEmbedding(8), rng()).to(device)
    t = torch.tensor([5, 700], device=device)
    a, b = embedding.linear1, embedding.linear2
    hidden = sinusoidal_embedding(t, 8) @ a.weight.T + a.bias
    expected = (hidden * torch.sigmoid(hidden)) @ b.weight.T + b.bias
    torch.testing.assert_close(embedding(t), expected, **FP32)


@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("with_time", [True, False])
def test_res_block_is_skip_plus_two_convolutions(
    out_channels: int, with_time: bool, device: str
) -> None:
    time_dim = 6 if with_time else None
    block = ResBlock(8, out_channels, norm_groups=4, eps=1e-3, time_dim=time_dim)
    randomise(block, rng()).to(device)
    x = randn(2, 8, 5, 7).to(device)
    time = randn(2, 6, seed=1).to(device) if with_time else None

    def norm(layer: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        groups = x.reshape(2, 4, -1)
        variance = groups.var(dim=2, correction=0, keepdim=True)
        groups = (groups - groups.mean(dim=2, keepdim=True)) / torch.sqrt(variance + 1e-3)
        scale, shift = layer.weight[:, None, None], layer.bias[:, None, None]
        return groups.reshape(x.shape) * scale + shift

    h = block.conv1(F.silu(norm(block.norm1, x)))
    if time is not None:
        h = h + (F.silu(time) @ block.time_proj.weight.T + block.time_proj.bias)[..., None, None]
    h = block.conv2(F.silu(norm(block.norm2, h)))
    skip = x
    if out_channels != 8:
        skip = torch.einsum("oi,bihw->bohw", block.skip.weight[:, :, 0, 0], x)
        skip = skip + block.skip.bias[:, None, None]
    torch.testing.assert_close(block(x, time), skip + h, **FP32)


def test_fresh_res_block_is_the_identity() -> None:
    x = randn(1, 8, 4, 4)
    assert torch.equal(ResBlock(8, 8, norm_groups=4, eps=1e-5)(x), x)


def test_res_block_demands_an_epsilon() -> None:
    with pytest.raises(TypeError, match="eps"):
        ResBlock(8, 8, norm_groups=4)


@pytest.mark.parametrize("height, width", [(8, 8), (7, 8), (9, 5), (1, 1)])
def test_downsample_with_symmetric_padding_rounds_up(height: int, width: int) -> None:
    layer = randomise(Downsample(4, pad=(1, 1, 1, 1)), rng())
    x = randn(1, 4, height, width)
    out = layer(x)
    assert out.shape == (1, 4, math.ceil(height / 2), math.ceil(width / 2))
    expected = F.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=1)
    torch.testing.assert_close(out, expected, **FP32)


def test_downsample_pads_left_right_top_bottom_in_this_order() -> None:
    layer = Downsample(1, pad=(0, 1, 0, 1))
    with torch.no_grad():
        layer.conv.weight.fill_(1.0)
        layer.conv.bias.zero_()
    out = layer(torch.arange(16.0).view(1, 1, 4, 4))
    # The windows start at the corner itself, and reach one row and column of zeros at the end.
    assert out.view(-1).tolist() == [
        0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10,
        2 + 3 + 6 + 7 + 10 + 11,
        8 + 9 + 10 + 12 + 13 + 14,
        10 + 11 + 14 + 15,
    ]


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (6, 7)])
def test_upsample_repeats_pixels_up_to_the_asked_size(size: tuple[int, int], device: str) -> None:
    layer = randomise(Upsample(4), rng()).to(device)
    x = randn(1, 4, 3, 4).to(device)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    # Nearest to an odd size 2n - 1 takes floor(i n / (2n - 1)): not just a doubled map, cut.
    rows = torch.arange(size[0]) * 3 // size[0]
    columns = torch.arange(size[1]) * 4 // size[1]
    expected = layer.conv(x[:, :, rows][:, :, :, columns])
    out = layer(x, size=size)
    assert out.shape[-2:] == size
    torch.testing.assert_close(out, expected, **FP32)
    if size == (6, 8):
        torch.testing.assert_close(out, layer.conv(repeated), **FP32)


@pytest.mark.parametrize("bias", [True, False])
def test_zero_clears_weight_and_bias(bias: bool) -> None:
    layer = torch.nn.Conv2d(2, 2, 3, bias=bias)
    zero_(layer)
    assert all(torch.count_nonzero(p) == 0 for p in layer.parameters())


@pytest.mark.parametrize("name", ["time", "resblock", "down", "up"])
def test_gradients_reach_every_parameter(name: str) -> None:
    layer = {
        "time": TimeEmbedding(8),
        "resblock": ResBlock(8, 12, norm_groups=4, eps=1e-5, time_dim=6),
        "down": Downsample(8, pad=(1, 1, 1, 1)),
        "up": Upsample(8),
    }[name]
    randomise(layer, rng())
    x = randn(2, 8, 6, 6)
    args = {
        "time": (torch.tensor([3, 7]),),
        "resblock": (x, randn(2, 6, seed=1)),
        "down": (x,),
        "up": (x, (12, 12)),
    }[name]
    layer(*args).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
