"""What makes one model differ from another: numbers, in frozen dataclasses; and two models.

Nothing here behaves. A config says how wide and how deep each stage is; the stages read it.
`SD_V1` is Stable Diffusion v1 (Rombach et al. 2022, arXiv:2112.10752); `HORIZON` is the tiny
model that ships with this package.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser eps(x, t, context). Defaults are Stable Diffusion v1's."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    """Channels at the first level; level i has `model_channels * channel_mult[i]`."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    """ResBlocks per level on the way down; the way up has one more."""
    attention_levels: tuple[int, ...] = (0, 1, 2)
    """Levels whose blocks carry a spatial transformer (the middle always does)."""
    num_heads: int = 8
    context_dim: int = 768
    norm_groups: int = 32


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pictures and latents. Defaults are Stable Diffusion v1's."""

    in_channels: int = 3
    latent_channels: int = 4
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    """ResBlocks per encoder level; a decoder level has one more."""
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    """1 / std of the latents: the diffusion model sees `scaling_factor * z`, of std about 1."""

    @property
    def factor(self) -> int:
        """How many pixels, along one side, make one latent: 2 per level but the last."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text transformer. Defaults are those of CLIP ViT-L/14, which SD v1 uses."""

    vocab_size: int = 49408
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    max_length: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    """Ends a prompt, and fills the rest of its `max_length` places."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule ("scaled linear": the square roots of the betas are evenly spaced)."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012


@dataclass(frozen=True)
class DefaultsConfig:
    """How a model is drawn with where nobody says otherwise. Stable Diffusion v1's values are those
    of the paper's own scripts."""

    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5


@dataclass(frozen=True)
class ModelConfig:
    """A whole text-to-image model: its four parts, the picture size it was trained on, and how it
    is best drawn with."""

    name: str
    image_size: int
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    defaults: DefaultsConfig = field(default_factory=DefaultsConfig)


SD_V1 = ModelConfig(name="sd-v1", image_size=512)

HORIZON = ModelConfig(
    name="horizon",
    image_size=128,
    unet=UNetConfig(
        model_channels=64,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_levels=(1, 2),
        num_heads=4,
        context_dim=128,
    ),
    vae=VAEConfig(
        model_channels=16,
        channel_mult=(1, 2, 4, 8),
        num_res_blocks=1,
        norm_groups=8,
        scaling_factor=0.27225,
    ),
    text=TextConfig(
        vocab_size=698,  # 2 x 256 bytes, 184 merges, start and end
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        mlp_size=512,
        max_length=40,
        bos_token_id=696,
        eos_token_id=697,
    ),
)
