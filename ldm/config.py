"""What makes one model differ from another: numbers, in frozen dataclasses; and some models.

A config says how wide and how deep each stage is; the stages read it. All that it does is to check
its numbers when it is made: each has a range, stated here and nowhere else, so that whoever makes a
config, a program or one of the readers of files, gets one that a model can be built from, or a
`ConfigError` of one line. The ranges are wide: they keep out what is damaged, not what is unusual.

`SD_V1` is Stable Diffusion v1 (Rombach et al. 2022, arXiv:2112.10752); `SD_V2` and `SD_V2_768` are
Stable Diffusion 2.0 and 2.1, for pictures of 512 and of 768 pixels; `SD_V1_INPAINTING` and
`SD_V1_PIX2PIX` read a picture beside the latents; `HORIZON` is the tiny model
that ships with this package.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from ldm.errors import ConfigError

MOST_LEVELS = 16
MOST_BLOCKS = 16  # of a level
MOST_LAYERS = 64  # of the text transformer
WIDEST = 2**16  # channels of any layer
MOST_TIMESTEPS = 2**16
BETAS = (1e-6, 1.0)  # smaller ones vanish in float32; 1 leaves nothing of the picture
PREDICTIONS = ("eps", "v", "x0", "flow")  # what a denoiser can predict: `ldm.schedule.pair_from`
LEAST_LEFT = 1e-13  # of the picture before the last timestep: `alpha_bar` there


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser eps(x, t, context). Defaults are Stable Diffusion v1's."""

    in_channels: int = 4
    """1 to 1,024, as `out_channels`."""
    out_channels: int = 4
    model_channels: int = 320
    """Channels at the first level, an even number; level i has `model_channels * channel_mult[i]`,
    65,536 at most."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """One factor per level, of which there are 1 to 16."""
    num_res_blocks: int = 2
    """ResBlocks per level on the way down, 1 to 16; the way up has one more."""
    attention_levels: tuple[int, ...] = (0, 1, 2)
    """Levels whose blocks carry a spatial transformer (the middle always does), counted from 0 and
    in order."""
    num_heads: int = 8
    """Divides the channels wherever there is attention."""
    context_dim: int = 768
    """Width of the text states, 1 to 65,536."""
    norm_groups: int = 32
    """Divides the channels of every level."""
    head_width: int = 0
    """Channels of a head, a divisor of the channels wherever there is attention: wider levels have
    more heads, and `num_heads` does not count (Stable Diffusion 2: 64). 0: every level has
    `num_heads`."""
    linear_projections: bool = False
    """Whether a transformer's first and last layer are linear (Stable Diffusion 2), or convolutions
    of 1x1: the same sums, in weights of another shape."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a number out of its range."""
        check_whole(self, 1, 1024, "in_channels", "out_channels")
        check_levels(self)
        if self.model_channels % 2:
            raise wrong(self, "model_channels", "even: half of them are sines of the timestep")
        levels = self.attention_levels
        are_levels = is_row(levels) and set(levels) <= set(range(len(self.channel_mult)))
        if not are_levels or list(levels) != sorted(set(levels)):
            there = f"levels from 0 to {len(self.channel_mult) - 1}"
            raise wrong(self, "attention_levels", f"a rising tuple of {there}")
        attending = [self.channel_mult[level] for level in (*levels, -1)]
        widths = [self.model_channels * mult for mult in attending]
        check_whole(self, 0, WIDEST, "head_width")
        check_divides(self, "num_heads" if self.head_width == 0 else "head_width", widths)
        if not isinstance(self.linear_projections, bool):
            raise wrong(self, "linear_projections", "true or false")
        check_whole(self, 1, WIDEST, "context_dim")

    def heads(self, channels: int) -> int:
        """How many heads the attention over so many channels has."""
        return channels // self.head_width if self.head_width else self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pictures and latents. Defaults are Stable Diffusion v1's."""

    in_channels: int = 3
    """1 to 1,024, as `latent_channels`."""
    latent_channels: int = 4
    model_channels: int = 128
    """Channels at the first level; level i has `model_channels * channel_mult[i]`, 65,536 at
    most."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """One factor per level, of which there are 1 to 16."""
    num_res_blocks: int = 2
    """ResBlocks per encoder level, 1 to 16; a decoder level has one more."""
    norm_groups: int = 32
    """Divides the channels of every level."""
    scaling_factor: float = 0.18215
    """1 / std of the latents: the diffusion model sees `scaling_factor * z`, of std about 1. It is
    0.0001 to 10,000."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a number out of its range."""
        check_whole(self, 1, 1024, "in_channels", "latent_channels")
        check_levels(self)
        check_real(self, 1e-4, 1e4, "scaling_factor")

    @property
    def factor(self) -> int:
        """How many pixels, along one side, make one latent: 2 per level but the last."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text transformer. Defaults are those of CLIP ViT-L/14, which SD v1 uses."""

    vocab_size: int = 49408
    """2 to 1,048,576 tokens."""
    hidden_size: int = 768
    """1 to 65,536, as `mlp_size`."""
    num_layers: int = 12
    """1 to 64."""
    num_heads: int = 12
    """Divides `hidden_size`."""
    mlp_size: int = 3072
    max_length: int = 77
    """Places for tokens, those that start and end a prompt included: 2 to 65,536."""
    bos_token_id: int = 49406
    """Starts a prompt; a token of the vocabulary, as `eos_token_id`."""
    eos_token_id: int = 49407
    """Ends a prompt, and fills the rest of its `max_length` places."""
    open_clip: bool = False
    """Whether it is one of OpenCLIP's (Stable Diffusion 2): its layers have GELU where OpenAI's
    CLIP has a quick approximation, and the rest of the places is filled with token 0."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a number out of its range."""
        check_whole(self, 2, 2**20, "vocab_size")
        check_whole(self, 1, WIDEST, "hidden_size", "mlp_size")
        check_whole(self, 1, MOST_LAYERS, "num_layers")
        check_divides(self, "num_heads", [self.hidden_size])
        check_whole(self, 2, WIDEST, "max_length")
        check_whole(self, 0, self.vocab_size - 1, "bos_token_id", "eos_token_id")
        if not isinstance(self.open_clip, bool):
            raise wrong(self, "open_clip", "true or false")

    @property
    def pad_token_id(self) -> int:
        """What fills the places after a prompt's end."""
        return 0 if self.open_clip else self.eos_token_id


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule ("scaled linear": the square roots of the betas are evenly spaced)."""

    num_train_timesteps: int = 1000
    """1 to 65,536."""
    beta_start: float = 0.00085
    beta_end: float = 0.012
    """Betas are 0.000001 to 1, do not fall, and leave something of the picture at every timestep
    but the last: only there a beta may be 1."""
    betas: tuple[float, ...] | None = field(default=None, repr=False)
    """The table itself, one beta per timestep, where it is not that of the rule above: such betas
    may fall."""
    zero_terminal_snr: bool = False
    """Whether the rule's table is rescaled to leave nothing of the picture at the last timestep:
    see `ldm.schedule.ending_in_noise`. A table of its own is as it is."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep is pure noise. There a model cannot be asked for the noise, of
        which it sees all, but for the picture."""
        return self.zero_terminal_snr if self.betas is None else self.betas[-1] == 1

    def __post_init__(self) -> None:
        """Raises ConfigError for a number out of its range."""
        check_whole(self, 1, MOST_TIMESTEPS, "num_train_timesteps")
        check_real(self, *BETAS, "beta_start", "beta_end")
        if not isinstance(self.zero_terminal_snr, bool):
            raise wrong(self, "zero_terminal_snr", "true or false")
        if self.betas is not None:
            self.check_table(self.betas)
            return
        if self.zero_terminal_snr and self.num_train_timesteps < 2:
            raise wrong(self, "num_train_timesteps", "2 or more: the last is pure noise")
        if not self.beta_start <= self.beta_end:
            raise wrong(self, "beta_end", f"{self.beta_start} (beta_start) or more")
        if self.beta_start == 1:
            raise wrong(self, "beta_start", "less than 1")
        mean = (self.beta_start + (self.beta_start * self.beta_end) ** 0.5 + self.beta_end) / 3
        if math.exp(-mean * self.num_train_timesteps) < LEAST_LEFT:  # a bound of the product
            steps = f"{self.num_train_timesteps} timesteps"
            raise wrong(self, "beta_end", f"so small that a picture lasts for {steps}")

    def check_table(self, betas: tuple[float, ...]) -> None:
        """A ConfigError unless these can be a schedule's betas."""
        if not isinstance(betas, tuple) or len(betas) != self.num_train_timesteps:
            raise wrong(self, "betas", f"a tuple of {self.num_train_timesteps} numbers")
        for beta in betas:
            if not is_real(beta) or not BETAS[0] <= beta <= BETAS[1]:
                raise ConfigError(f"ScheduleConfig.betas must be {span(*BETAS)}, not {beta!r:.80}")
        if math.prod(1 - beta for beta in betas[:-1]) < LEAST_LEFT:
            raise wrong(self, "betas", "so small that a picture lasts until the last")


@dataclass(frozen=True)
class DefaultsConfig:
    """How a model is drawn with where nobody says otherwise. Stable Diffusion v1's values are those
    of the paper's own scripts."""

    sampler: str = "ddim"
    steps: int = 50
    """1 to 65,536."""
    guidance_scale: float = 7.5
    """-1,000 to 1,000."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a number, or a name, out of its range."""
        check_name(self, "sampler")
        check_whole(self, 1, MOST_TIMESTEPS, "steps")
        check_real(self, -1000.0, 1000.0, "guidance_scale")


@dataclass(frozen=True)
class ModelConfig:
    """A whole text-to-image model: its four parts, the picture size it was trained on, and how it
    is best drawn with."""

    name: str
    """255 printable characters at most, as every name in a config."""
    image_size: int
    """Pixels along one side, 1 to 65,536."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    defaults: DefaultsConfig = field(default_factory=DefaultsConfig)
    prediction: str = "eps"
    """What the UNet predicts, one of `PREDICTIONS`: see `ldm.schedule.pair_from`."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a number, or a name, out of its range. Whether the stages fit
        together is told where they are put together: a part of a model has a config too."""
        check_name(self, "name")
        check_whole(self, 1, WIDEST, "image_size")
        if self.prediction not in PREDICTIONS:
            raise wrong(self, "prediction", f"one of {', '.join(PREDICTIONS)}")
        if self.prediction == "eps" and self.schedule.ends_in_noise:
            raise wrong(self, "prediction", "v, x0 or flow: the noise schedule ends in pure noise")


# --- What a number can be ----------------------------------------------------------------------


def wrong(config: object, name: str, wanted: str) -> ConfigError:
    """The error for a field that is not what it must be."""
    found = repr(getattr(config, name))
    return ConfigError(f"{type(config).__name__}.{name} must be {wanted}, not {found:.80}")


def span(least: float, most: float) -> str:
    """A range in words; the numbers of wide ones with commas."""
    return f"{least:,} to {most:,}"


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    return isinstance(value, float) or is_whole(value)


def is_row(value: object) -> bool:
    """Whether a value is a tuple of whole numbers."""
    return isinstance(value, tuple) and all(map(is_whole, value))


def check_whole(config: object, least: int, most: int, *names: str) -> None:
    """A ConfigError unless these fields are whole numbers within a range."""
    for name in names:
        value = getattr(config, name)
        if not is_whole(value) or not least <= value <= most:
            raise wrong(config, name, f"a whole number from {span(least, most)}")


def check_real(config: object, least: float, most: float, *names: str) -> None:
    """A ConfigError unless these fields are numbers within a range; NaN is within none."""
    for name in names:
        value = getattr(config, name)
        if not is_real(value) or not least <= value <= most:
            raise wrong(config, name, f"a number from {span(least, most)}")


def check_name(config: object, name: str) -> None:
    """A ConfigError unless this field is a name that can be shown in a line."""
    value = getattr(config, name)
    if not isinstance(value, str) or not value.isprintable() or len(value) > 255:
        raise wrong(config, name, "a name of 255 printable characters at most")


def check_levels(config: UNetConfig | VAEConfig) -> None:
    """A ConfigError unless these are levels of ResBlocks that can be built."""
    check_whole(config, 1, WIDEST, "model_channels")
    mults = config.channel_mult
    if not is_row(mults) or not 1 <= len(mults) <= MOST_LEVELS or min(mults) < 1:
        raise wrong(config, "channel_mult", f"a tuple of 1 to {MOST_LEVELS} whole numbers above 0")
    widths = [config.model_channels * mult for mult in mults]
    if max(widths) > WIDEST:
        raise wrong(config, "channel_mult", f"smaller: no level has more than {WIDEST:,} channels")
    check_whole(config, 1, MOST_BLOCKS, "num_res_blocks")
    check_divides(config, "norm_groups", widths)


def check_divides(config: object, name: str, widths: list[int]) -> None:
    """A ConfigError unless this field is a whole number that divides these numbers of channels."""
    check_whole(config, 1, WIDEST, name)
    for width in widths:
        if width % getattr(config, name):
            raise wrong(config, name, f"a divisor of {width} channels")


SD_V1 = ModelConfig(name="sd-v1", image_size=512)

SD_V2 = ModelConfig(
    name="sd-v2",
    image_size=512,
    unet=UNetConfig(head_width=64, linear_projections=True, context_dim=1024),
    text=TextConfig(
        hidden_size=1024,
        num_layers=23,  # of OpenCLIP ViT-H's 24: the last is not run
        num_heads=16,
        mlp_size=4096,
        open_clip=True,
    ),
)
SD_V2_768 = dataclasses.replace(SD_V2, name="sd-v2-768", image_size=768, prediction="v")

SD_V1_INPAINTING = dataclasses.replace(
    SD_V1,
    name="sd-v1-inpainting",
    unet=UNetConfig(in_channels=9),  # the latents, the mask, the latents of what is kept
)
SD_V1_PIX2PIX = dataclasses.replace(
    SD_V1,
    name="sd-v1-pix2pix",
    unet=UNetConfig(in_channels=8),  # the latents, those of the picture that is to be changed
)
OFFICIAL = (SD_V1, SD_V2, SD_V2_768, SD_V1_INPAINTING, SD_V1_PIX2PIX)

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
