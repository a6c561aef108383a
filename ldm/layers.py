"""The building blocks: how the UNet knows the time, and what it shares with the autoencoder.

The same ResBlock, Downsample and Upsample appear in both; what differs between the two (the
normalisation's epsilon, the time embedding, the padding) is an argument.
"""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_watched(part: nn.Module) -> bool:
    """Whether someone looks at what goes into or out of a part, and may keep it or put a tensor of
    their own in its place. A hook that says whose it is, in its attribute `thread`, counts in that
    thread alone (`ldm.observe.hooks`)."""
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    if not hooks or torch.compiler.is_dynamo_compiling():  # which knows no threads
        return bool(hooks)
    here = threading.get_ident()
    return any(getattr(hook, "thread", here) == here for hook in hooks)


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sines and cosines of a timestep, from fast to slow: a position encoding of time.

    Args:
        t: timesteps, (B,), integer or float.
        dim: size of the embedding, even.
        max_period: the slowest wave repeats after `2 * pi * max_period` timesteps.

    Returns:
        (B, dim) float32; the first half are cosines, the second half sines.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5; DDPM, appendix B.
    """
    half = dim // 2
    # Always float32: in half precision neighbouring timesteps would share an embedding.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponents / half)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


class TimeEmbedding(nn.Module):
    """Timestep -> vector that tells every ResBlock how noisy its input is."""

    def __init__(self, dim: int) -> None:
        """`dim` sinusoids become an embedding of `4 * dim` numbers."""
        super().__init__()
        self.dim = dim
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, t: Tensor) -> Tensor:
        """t: (B,) -> (B, 4 * dim), in the dtype of the weights."""
        waves = sinusoidal_embedding(t, self.dim).to(self.linear1.weight.dtype)  # (B, dim)
        return self.linear2(F.silu(self.linear1(waves)))  # (B, 4 dim)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around which the input flows unchanged: `skip(x) + h(x)`.

    With `time_dim`, the time embedding is added between the two convolutions: this is how the
    UNet knows the noise level at every depth (DDPM, appendix B).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm_groups: int,
        eps: float,
        time_dim: int | None = None,
    ) -> None:
        """`eps` is GroupNorm's: 1e-5 in SD v1's UNet, 1e-6 in its autoencoder."""
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = None if time_dim is None else nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Module = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )
        zero_(self.conv2)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: (B, in_channels, H, W), time: (B, time_dim) -> (B, out_channels, H, W); `time` goes
        with a block that was built with `time_dim`."""
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out_channels, H, W)
        if self.time_proj is not None:
            assert time is not None, "a block that was built with time_dim needs the time"
            h = h + self.time_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Downsample(nn.Module):
    """Halve height and width (an odd size rounds up) with a strided 3x3 convolution."""

    def __init__(self, channels: int, *, pad: tuple[int, int, int, int]) -> None:
        """`pad`: zeros at left, right, top, bottom; SD v1 has (1, 1, 1, 1) in the UNet and
        (0, 1, 0, 1) in the autoencoder."""
        super().__init__()
        self.pad = pad
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)) with the UNet's pad."""
        return self.conv(F.pad(x, self.pad))


class Upsample(nn.Module):
    """Repeat every pixel up to the asked size, then smooth with a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> (B, C, *size). The size is asked for, not doubled, so that an odd
        size on the way down is met again on the way up."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def zero_(module: nn.Conv2d | nn.Linear) -> None:
    """Set a layer's parameters to zero, so that a fresh residual branch adds nothing: the network
    starts as the identity and grows from there (Goyal et al. 2017, arXiv:1706.02677)."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
