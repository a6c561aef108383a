"""Attention, GEGLU and the spatial transformer against their equations, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.attention import Attention, AttentionWeights, FeedForward, SpatialTransformer
from tests.helpers import randn, randomise, relative_error, rng

# A few matrix products of up to 32 terms in fp32 (each rounded by 6e-8), on numbers of size 1.
FP32 = dict(rtol=1e-5, atol=1e-5)


def by_hand(layer: Attention, x: Tensor, context: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head."""
    q, k, v = x @ layer.to_q.weight.T, context @ layer.to_k.weight.T, context @ layer.to_v.weight.T
    width = q.shape[-1] // layer.num_heads
    heads = []
    for i in range(layer.num_heads):
        part = slice(i * width, (i + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        scores = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        heads.append(scores / scores.sum(dim=-1, keepdim=True) @ v[..., part])
    return torch.cat(heads, dim=-1) @ layer.to_out.weight.T + layer.to_out.bias


@pytest.mark.parametrize("num_heads", [1, 2, 8])
def test_cross_attention_is_softmax_of_scaled_products(num_heads: int, device: str) -> None:
    layer = randomise(Attention(16, 10, num_heads), rng()).to(device)
    x, context = randn(2, 6, 16).to(device), randn(2, 5, 10, seed=1).to(device)
    out = layer(x, context)
    assert out.shape == (2, 6, 16)
    torch.testing.assert_close(out, by_hand(layer, x, context), **FP32)


def test_self_attention_is_attention_to_itself(device: str) -> None:
    layer = randomise(Attention(16, 16, 4), rng()).to(device)
    x = randn(2, 6, 16).to(device)
    torch.testing.assert_close(layer(x, x), by_hand(layer, x, x), **FP32)


def test_attention_has_no_bias_in_its_projections_but_the_last() -> None:
    layer = Attention(16, 10, 2)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {f"to_{a}.weight" for a in ("q", "k", "v", "out")} | {"to_out.bias"}


def test_attention_refuses_channels_that_do_not_split_into_heads() -> None:
    with pytest.raises(ValueError, match="16 channels do not split into 3 heads"):
        Attention(16, 16, 3)


def test_watched_attention_is_the_same_attention(device: str) -> None:
    layer = randomise(Attention(16, 10, 2), rng()).to(device)
    x, context = randn(2, 6, 16).to(device), randn(2, 5, 10, seed=1).to(device)
    unwatched = layer(x, context)
    seen: list[Tensor] = []
    handle = layer.weights.register_forward_hook(lambda _, inputs, value: seen.append(value))
    assert relative_error(layer(x, context), unwatched) <= 1e-5
    torch.testing.assert_close(layer(x, context), by_hand(layer, x, context), **FP32)
    handle.remove()
    assert [value.shape for value in seen] == [(2, 2, 6, 5)] * 2
    assert torch.equal(layer(x, context), unwatched)
    assert len(seen) == 2


def test_the_fast_kernel_alone_runs_unless_the_weights_are_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    fast = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a: calls.append("fast") or fast(*a)
    )
    monkeypatch.setattr(AttentionWeights, "forward", lambda *_: pytest.fail("weights were made"))
    layer, x = randomise(Attention(16, 16, 2), rng()), randn(1, 6, 16)
    layer(x, x)
    assert calls == ["fast"]
    monkeypatch.undo()
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a: pytest.fail("the fast kernel ran")
    )
    layer.weights.register_forward_hook(lambda *_: None)
    layer(x, x)


def test_weights_are_known_in_size_before_they_are_made() -> None:
    weights = AttentionWeights()
    for dtype in (torch.float32, torch.float16):
        q, k = randn(2, 3, 6, 8).to(dtype), randn(2, 3, 5, 8).to(dtype)
        assert weights.output_bytes(q, k) == weights(q, k).nbytes


def test_weights_do_not_overflow_in_half_precision() -> None:
    # The products are 64 * 40 * 40 = 102,400, past float16's 65,504; scaled by 1/8 they fit.
    q = torch.full((1, 1, 2, 64), 40.0, dtype=torch.float16)
    assert torch.equal(AttentionWeights()(q, q), torch.full_like(q[..., :2], 0.5))


def test_weights_add_nothing_to_the_state() -> None:
    assert not AttentionWeights().state_dict()


def test_attention_does_not_depend_on_the_order_of_the_words() -> None:
    layer = randomise(Attention(16, 10, 2), rng())
    x, context = randn(1, 6, 16), randn(1, 5, 10, seed=1)
    torch.testing.assert_close(layer(x, context), layer(x, context.flip(1)), **FP32)


def test_geglu_gates_the_first_half_by_the_exact_gelu_of_the_second(device: str) -> None:
    layer = randomise(FeedForward(8), rng()).to(device).double()
    x = 3 * randn(2, 5, 8, dtype=torch.float64).to(device)
    hidden = x @ layer.proj_in.weight.T + layer.proj_in.bias
    value, gate = hidden[..., :32], hidden[..., 32:]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    expected = (value * gelu) @ layer.proj_out.weight.T + layer.proj_out.bias
    # fp64, so that the tanh approximation of GELU, 1e-4 away, cannot pass.
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def transformer(device: str = "cpu") -> SpatialTransformer:
    return randomise(SpatialTransformer(16, 10, 2, norm_groups=4), rng()).to(device)


def test_spatial_transformer_is_three_residual_lines_around_a_sequence(device: str) -> None:
    layer = transformer(device)
    x, context = randn(2, 16, 3, 5).to(device), randn(2, 7, 10, seed=1).to(device)
    h = layer.proj_in(layer.norm_in(x)).flatten(2).transpose(1, 2)  # (B, 15, 16), row by row
    h = h + by_hand(layer.self_attention, layer.norm1(h), layer.norm1(h))
    h = h + by_hand(layer.cross_attention, layer.norm2(h), context)
    h = h + layer.feed_forward(layer.norm3(h))
    h = h.transpose(1, 2).reshape(2, 16, 3, 5)
    torch.testing.assert_close(layer(x, context), x + layer.proj_out(h), **FP32)


def test_spatial_transformer_has_its_own_epsilons() -> None:
    layer = transformer()
    assert layer.norm_in.eps == 1e-6
    assert [n.eps for n in (layer.norm1, layer.norm2, layer.norm3)] == [1e-5] * 3


def test_fresh_spatial_transformer_is_the_identity() -> None:
    x = randn(1, 16, 3, 5)
    layer = SpatialTransformer(16, 10, 2, norm_groups=4)
    assert torch.equal(layer(x, randn(1, 7, 10)), x)


def test_each_image_reads_its_own_context(device: str) -> None:
    layer = transformer(device)
    x, context = randn(2, 16, 4, 4).to(device), randn(2, 7, 10, seed=1).to(device)
    out = layer(x, context)
    for i in range(2):
        torch.testing.assert_close(out[i : i + 1], layer(x[i : i + 1], context[i : i + 1]), **FP32)
    assert relative_error(layer(x, context.flip(0)), out) > 0.1  # and the context matters


def test_gradients_reach_every_parameter_and_input() -> None:
    layer = transformer()
    x, context = randn(2, 16, 4, 4).requires_grad_(), randn(2, 7, 10, seed=1).requires_grad_()
    layer(x, context).square().sum().backward()
    for key, tensor in [*layer.named_parameters(), ("x", x), ("context", context)]:
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, key
