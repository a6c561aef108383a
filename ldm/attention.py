"""Attention: how places in the picture look at each other and at the words of the prompt.

From the inside out: `AttentionWeights` (who looks where, for who wants to see it), `Attention`
(queries ask, keys answer, values are fetched), `FeedForward` (each place thinks for itself),
`SpatialTransformer` (self-attention, cross-attention and feed-forward over the places of a
picture).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.layers import is_watched, zero_


class AttentionWeights(nn.Module):
    """softmax(q k^T / sqrt(d)), as a value with a name: how much each query looks at each key.

    It has no parameters, and is asked only while a forward hook watches it (`ldm.observe.hooks`).
    """

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """q: (B, heads, N, d), k: (B, heads, M, d) -> (B, heads, N, M); each row sums to 1."""
        # Scaled before the product, which could overflow in half precision.
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the queries fetch, weights @ v: v (B, heads, M, d) -> (B, heads, N, d)."""
        # The fast kernel never writes the weights down, so it cannot show them.
        if is_watched(self):
            return self(q, k) @ v
        return F.scaled_dot_product_attention(q, k, v)  # the same

    def output_bytes(self, q: Tensor, k: Tensor) -> int:
        """The size of the weights, before there are any: they can be larger than the model."""
        return q.shape[:-1].numel() * k.shape[-2] * q.element_size()


class Attention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

    Queries come from `x`; keys and values from `context`. With the text as context this is
    cross-attention; with `x` itself it is self-attention.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not split into {num_heads} heads")
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.weights = AttentionWeights()
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (B, N, dim), context: (B, M, context_dim) -> (B, N, dim)."""
        q, k, v = (
            rearrange(a, "b n (heads d) -> b heads n d", heads=self.num_heads)
            for a in self.project(x, context)
        )  # (B, heads, N or M, dim / heads)
        h = self.weights.attend(q, k, v)  # (B, heads, N, dim / heads)
        return self.to_out(rearrange(h, "b heads n d -> b n (heads d)"))  # (B, N, dim)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """q (B, N, dim), k and v (B, M, dim)."""
        return self.to_q(x), self.to_k(context), self.to_v(context)


class FeedForward(nn.Module):
    """GEGLU: one half of a projection, gated by the GELU of the other (Shazeer 2020,
    arXiv:2002.05202, eq. 6), then projected back."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * mult * dim)
        self.proj_out = nn.Linear(mult * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        value, gate = self.proj_in(x).chunk(2, dim=-1)  # (B, N, 4 dim) each
        return self.proj_out(value * F.gelu(gate))


class Pointwise(nn.Linear):
    """A linear layer at each place of a feature map: a convolution of 1x1 whose weight is a matrix,
    as Stable Diffusion 2 has it."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features, H, W) -> (B, out_features, H, W)."""
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class SpatialTransformer(nn.Module):
    """A transformer block over the places of a feature map: look around, read the prompt, think.

    The map is laid out as a sequence, one token per place; then come three residual lines, each
    normalised first; then it is folded back (LDM, section 3.3 and appendix E.2.1).
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        num_heads: int,
        norm_groups: int,
        linear_projections: bool = False,
    ) -> None:
        super().__init__()

        def projection() -> nn.Linear | nn.Conv2d:
            if linear_projections:
                return Pointwise(channels, channels)
            return nn.Conv2d(channels, channels, 1)

        # 1e-6, where the UNet's ResBlocks have 1e-5: so SD v1 was trained.
        self.norm_in = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = projection()
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)
        self.proj_out = projection()
        zero_(self.proj_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (B, C, H, W), context: (B, M, context_dim) -> (B, C, H, W)."""
        h = self.proj_in(self.norm_in(x))
        h = rearrange(h, "b c h w -> b (h w) c")  # (B, H W, C)
        places = self.norm1(h)
        h = h + self.self_attention(places, places)
        h = h + self.cross_attention(self.norm2(h), context)
        h = h + self.feed_forward(self.norm3(h))
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])  # (B, C, H, W)
        return x + self.proj_out(h)
