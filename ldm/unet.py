"""The UNet: looks at a noisy latent and says what the noise in it is.

    x ── conv_in ─ down.0 ─ down.1 ─ ... ─ mid ─ ... ─ up.1 ─ up.0 ─ conv_out ── eps
                     └────────┼───── skips ────────────┼───────┘

On the way down the map gets smaller and the channels more; on the way up each block is handed the
map of the same size that was kept on the way down (a skip connection), so that fine detail does
not have to pass through the narrow middle. `down.i` and `up.i` work at the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.attention import SpatialTransformer
from ldm.config import UNetConfig
from ldm.layers import Downsample, ResBlock, TimeEmbedding, Upsample, zero_

NORM_EPS = 1e-5

Level = TypeVar("Level", bound=nn.Module)


class UNet(nn.Module):
    """eps(x, t, context): the noise in a latent, given its timestep and the text.

    One class, any size: `SD_V1.unet` makes Stable Diffusion v1's 859,520,964 parameters,
    `HORIZON.unet` our own few million. A fresh network predicts zero everywhere.

    Source: DDPM (arXiv:2006.11239) for the shape, LDM (arXiv:2112.10752) for the text.
    """

    def __init__(self, config: UNetConfig, num_timesteps: int = 1000) -> None:
        """`num_timesteps`: how long the table of its noise schedule is; t ends at the last."""
        super().__init__()
        self.config = config
        self.num_timesteps = num_timesteps
        widths = [config.model_channels * mult for mult in config.channel_mult]
        num_levels = len(widths)

        self.time_embedding = TimeEmbedding(config.model_channels)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        # `skips` holds the channels of every map that is kept on the way down, in order.
        channels, skips = widths[0], [widths[0]]
        down = []
        for level, width in enumerate(widths):
            has_attention = level in config.attention_levels
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                blocks.append(UNetBlock(channels, width, has_attention, config))
                channels = width
                skips.append(channels)
            if level == num_levels - 1:
                down.append(DownLevel(blocks, None))
            else:
                down.append(DownLevel(blocks, Downsample(channels, pad=(1, 1, 1, 1))))
                skips.append(channels)

        self.down = level_list(down)

        self.mid = Middle(channels, config)

        up: list[UpLevel] = []
        for level, width in reversed(list(enumerate(widths))):
            has_attention = level in config.attention_levels
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                blocks.append(UNetBlock(channels + skips.pop(), width, has_attention, config))
                channels = width
            up.insert(0, UpLevel(blocks, Upsample(channels) if level > 0 else None))
        self.up = level_list(up)

        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        zero_(self.conv_out)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: noisy latents, (B, in_channels, H, W); H and W of any size.
            t: timesteps, (B,): real numbers from 0 to `num_timesteps - 1`, 999, as integers or
                floats. Between those of the table it was not trained, but knows what to do.
            context: text states, (B, M, context_dim).

        Returns:
            eps, (B, out_channels, H, W).

        Raises:
            ValueError: a shape does not fit, or a timestep is outside the table. On a GPU, and in
                compiled code, only shapes are looked at.
        """
        check_inputs(x, t, context, self.config, self.num_timesteps)
        time = self.time_embedding(t)  # (B, 4 * model_channels)
        h = self.conv_in(x)

        skips = [h]
        for down in self.down:
            for block in down.blocks:
                h = block(h, time, context)
                skips.append(h)
            if down.downsample is not None:
                h = down.downsample(h)  # (B, C, ceil(H / 2), ceil(W / 2))
                skips.append(h)

        h = self.mid(h, time, context)

        for up in reversed(self.up):
            for block in up.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), time, context)
            if up.upsample is not None:
                h = up.upsample(h, size=skips[-1].shape[-2:])

        return self.conv_out(F.silu(self.norm_out(h)))


class UNetBlock(nn.Module):
    """A ResBlock and, at the levels that have attention, a spatial transformer after it."""

    def __init__(
        self, in_channels: int, out_channels: int, has_attention: bool, config: UNetConfig
    ) -> None:
        super().__init__()
        self.res = res_block(in_channels, out_channels, config)
        self.transformer = transformer(out_channels, config) if has_attention else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        h = self.res(x, time)
        return h if self.transformer is None else self.transformer(h, context)


class DownLevel(nn.Module):
    """The blocks of one size on the way down, then the step to the next smaller one."""

    def __init__(self, blocks: nn.ModuleList, downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample


class Middle(nn.Module):
    """The narrowest place: every position sees the whole picture and the whole prompt."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.res1 = res_block(channels, channels, config)
        self.transformer = transformer(channels, config)
        self.res2 = res_block(channels, channels, config)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        h = self.res1(x, time)
        h = self.transformer(h, context)
        return self.res2(h, time)


class UpLevel(nn.Module):
    """The blocks of one size on the way up, then the step to the next larger one."""

    def __init__(self, blocks: nn.ModuleList, upsample: Upsample | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.upsample = upsample


def check_inputs(
    x: Tensor, t: Tensor, context: Tensor, config: UNetConfig, num_timesteps: int
) -> None:
    """A ValueError in one line for the first argument of `UNet.forward` that does not fit. A shape
    that merely broadcasts does not: every latent has a timestep and a context of its own."""
    if x.ndim != 4 or x.shape[1] != config.in_channels or 0 in x.shape[2:]:
        raise ValueError(f"x must be (B, {config.in_channels}, H, W), not {tuple(x.shape)}")
    batch, width = x.shape[0], config.context_dim
    if not isinstance(t, Tensor):
        raise ValueError(f"t must be a tensor, a timestep for each of {batch} latents, not {t!r}")
    if t.shape != (batch,):
        raise ValueError(f"t must be ({batch},), a timestep for each latent, not {tuple(t.shape)}")
    if t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"t must hold integers or floats, not {t.dtype}")
    if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != width:
        raise ValueError(f"context must be ({batch}, M, {width}), not {tuple(context.shape)}")
    # Values only where they are at hand: to look at a tensor on a GPU is to wait for the GPU, at
    # every step of a run; and compiled code has none to look at yet.
    if t.device.type == "cpu" and not torch.compiler.is_compiling():
        inside = (t >= 0) & (t <= num_timesteps - 1)  # NaN is not
        if not inside.all():
            wrong = t[~inside][0].item()
            raise ValueError(f"t must be between 0 and {num_timesteps - 1}, not {wrong}")


def level_list(levels: list[Level]) -> Sequence[Level]:
    """An nn.ModuleList, said as what it holds: its own type forgets that."""
    return cast("Sequence[Level]", nn.ModuleList(levels))


def res_block(in_channels: int, out_channels: int, config: UNetConfig) -> ResBlock:
    """A ResBlock as the UNet has it: with time, and its own normalisation epsilon."""
    return ResBlock(
        in_channels,
        out_channels,
        norm_groups=config.norm_groups,
        eps=NORM_EPS,
        time_dim=4 * config.model_channels,
    )


def transformer(channels: int, config: UNetConfig) -> SpatialTransformer:
    """A spatial transformer that reads a context of the config's width."""
    return SpatialTransformer(
        channels,
        config.context_dim,
        config.heads(channels),
        config.norm_groups,
        config.linear_projections,
    )
