"""The autoencoder: pictures to latents, `config.factor` times smaller along each side, and back.

The encoder does not give one latent but a Gaussian over latents, the `Posterior`; training keeps
it near a standard normal with a small KL weight (Kingma & Welling 2013, arXiv:1312.6114; LDM,
section 3.1 and appendix G). Sizes here are in the autoencoder's own, unscaled latents: the
diffusion model sees them times `config.scaling_factor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.attention import AttentionWeights
from ldm.config import VAEConfig
from ldm.device import sent
from ldm.layers import Downsample, ResBlock, Upsample, zero_

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, q(z | picture).

    Attributes:
        mean: (B, latent_channels, h, w).
        logvar: the logarithm of the variance, the same shape, within [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """The most likely latent, (B, latent_channels, h, w): the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One latent from the Gaussian, mean + std * noise (Kingma & Welling, eq. 10).

        The noise is drawn on the generator's device (the CPU's where there is none), so that a
        seed means the same latent on every device.
        """
        device = "cpu" if generator is None else generator.device
        return self.drawn(torch.randn(self.mean.shape, generator=generator, device=device))

    def drawn(self, noise: Tensor) -> Tensor:
        """The latent of this standard normal noise, of the mean's shape."""
        noise = sent(noise, self.mean.device, self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over each latent: (B,) (Kingma & Welling, app. B)."""
        kl = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return kl.flatten(1).sum(dim=1)


class AutoencoderKL(nn.Module):
    """Picture <-> latent. `SD_V1.vae` makes Stable Diffusion v1's 83,653,863 parameters."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: Tensor) -> Posterior:
        """Pictures in [-1, 1], (B, 3, H, W), H and W multiples of `config.factor`, to the
        Gaussian over their latents (B, latent_channels, H / factor, W / factor).

        Raises:
            ValueError: x has another shape.
        """
        check_maps("x", x, self.config.in_channels, self.config.factor)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, latent_channels, h, w) to pictures (B, 3, h * factor, w * factor).

        The pictures are near [-1, 1] but not clamped to it, so that gradients flow.

        Raises:
            ValueError: z has another shape.
        """
        check_maps("z", z, self.config.latent_channels, 1)
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Posterior]:
        """Encode, sample, decode, as one step of training does: (reconstruction, posterior)."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator)), posterior


class Encoder(nn.Module):
    """Picture (B, 3, H, W) -> moments (B, 2 * latent_channels, H / factor, W / factor)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.model_channels * mult for mult in config.channel_mult]
        channels = widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = nn.Sequential()
            for _ in range(config.num_res_blocks):
                blocks.append(res_block(channels, width, config))
                channels = width
            is_last = level == len(widths) - 1
            # One pixel at the right and the bottom only: so SD v1 was trained.
            self.down.append(
                DownLevel(blocks, None if is_last else Downsample(channels, pad=(0, 1, 0, 1)))
            )
        self.mid = Middle(channels, config)
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent (B, latent_channels, h, w) -> picture (B, 3, h * factor, w * factor).

    `up.i` works at the size of the encoder's `down.i`, so the last of them comes first.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.model_channels * mult for mult in config.channel_mult]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config)
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            blocks = nn.Sequential()
            for _ in range(config.num_res_blocks + 1):
                blocks.append(res_block(channels, width, config))
                channels = width
            self.up.insert(0, UpLevel(blocks, Upsample(channels) if level > 0 else None))
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid(h)
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class DownLevel(nn.Module):
    """ResBlocks at one size, then half that size (but for the last level)."""

    def __init__(self, blocks: nn.Sequential, downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(x)
        return h if self.downsample is None else self.downsample(h)


class UpLevel(nn.Module):
    """ResBlocks at one size, then twice that size (but for the last level)."""

    def __init__(self, blocks: nn.Sequential, upsample: Upsample | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(x)
        if self.upsample is None:
            return h
        return self.upsample(h, size=(2 * h.shape[2], 2 * h.shape[3]))


class Middle(nn.Module):
    """The smallest maps: a ResBlock, attention over all places, a ResBlock."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.res1 = res_block(channels, channels, config)
        self.attention = ConvAttention(channels, config)
        self.res2 = res_block(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.res2(self.attention(self.res1(x)))


class ConvAttention(nn.Module):
    """Self-attention with a single head, whose projections are 1x1 convolutions."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=NORM_EPS)
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_k = nn.Conv2d(channels, channels, 1)
        self.to_v = nn.Conv2d(channels, channels, 1)
        self.weights = AttentionWeights()
        self.to_out = nn.Conv2d(channels, channels, 1)
        zero_(self.to_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        h = self.norm(x)
        # Contiguous, as the fast kernels of attention want them: of others PyTorch writes down all
        # weights, (h w)^2 of them.
        q, k, v = (
            rearrange(a, "b c h w -> b 1 (h w) c").contiguous()
            for a in (self.to_q(h), self.to_k(h), self.to_v(h))
        )  # (B, 1, h w, C)
        h = self.weights.attend(q, k, v)  # (B, 1, h w, C)
        return x + self.to_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


def check_maps(name: str, maps: Tensor, channels: int, factor: int) -> None:
    """A ValueError that names the argument, unless it is a batch of maps with so many channels,
    whose sides are multiples of the factor."""
    if maps.ndim != 4 or maps.shape[1] != channels or 0 in maps.shape[2:]:
        raise ValueError(f"{name} must be (B, {channels}, H, W), not {tuple(maps.shape)}")
    height, width = maps.shape[2:]
    if height % factor or width % factor:
        raise ValueError(f"sides of {name} must be multiples of {factor}, not {height} and {width}")


def res_block(in_channels: int, out_channels: int, config: VAEConfig) -> ResBlock:
    """A ResBlock as the autoencoder has it: no time, and its own normalisation epsilon."""
    return ResBlock(in_channels, out_channels, norm_groups=config.norm_groups, eps=NORM_EPS)


# --- A tiny one --------------------------------------------------------------------------------


class TinyDecoder(nn.Module):
    """Latents to a picture, roughly and at once: what Stable Diffusion's decoder says with 49
    million parameters, in 1.2 million. It was trained to give the same pictures (TAESD, Ollin Boer
    Bohan 2023, https://github.com/madebyollin/taesd).

    Three times three residual blocks of 64 channels, twice the size after each three.
    """

    FACTOR = 8
    """How many pixels, along one side, make one latent."""

    def __init__(self, channels: int = 64, latent_channels: int = 4) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        parts: list[nn.Module] = [nn.Identity()]  # official names count from what `forward` clamps
        parts += [nn.Conv2d(latent_channels, channels, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            parts += [TinyBlock(channels) for _ in range(3)]
            parts += [nn.Upsample(scale_factor=2)]  # the nearest pixel
            parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
        parts += [TinyBlock(channels), nn.Conv2d(channels, 3, 3, padding=1)]
        self.layers = nn.Sequential(*parts)

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents, as the diffusion model sees them, (B, 4, h, w) -> (B, 3, 8 h, 8 w) within
        [0, 1]."""
        x = 3 * torch.tanh(latents / 3)  # no latent of a picture is far from this
        pictures: Tensor = self.layers(x)
        return pictures.clamp(0, 1)


class TinyBlock(nn.Module):
    """Three convolutions beside what comes in, and a ReLU of the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return F.relu(self.conv(x) + x)
