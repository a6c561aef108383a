"""What a run is asked for: one frozen value of numbers and names, filled in and checked here.

    settings = Settings.of(pipe.config, "a red house", seed=3)
    for step in pipe.run(settings): ...

The pipeline draws by it; recipes, traces, pages and sweeps carry it. A new setting is a field here,
with a default (so that older recipes can be read), a keyword of `Settings.of` and its check; the
same keyword of `TextToImage.__call__` and `denoise`; an option in `ldm.cli.options`; and, where
people are to see it, words in `ldm.viz.player.captions`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from ldm.config import ModelConfig
from ldm.errors import did_you_mean
from ldm.presets import MAX_SEED, PRESETS, check_preset
from ldm.samplers import SAMPLERS, SPACINGS
from ldm.samplers.grids import Levels
from ldm.schedule import NoiseSchedule

Value = TypeVar("Value")

MAX_BYTES = 2**36
"""What a run may have to hold at once, at most: 64 GiB. More is a mistake, or a recipe that is to
bring a machine down, and is refused before any of it is asked for."""


@dataclass(frozen=True)
class Settings:
    """One run, as numbers and names. `Settings.of` fills in a model's defaults and checks it all.

    Attributes:
        prompts: what to draw, one for each picture of the run.
        negative_prompt: what to move away from; empty is the plain unconditional model.
        sampler: one of `ldm.samplers.SAMPLERS`.
        steps: how many intervals the sampler's grid has.
        guidance_scale: how hard to follow the prompts; 1 is without guidance.
        eta: for ddim, from 0 (the seed alone decides) to 1 (noise at every step).
        seed: picture i draws its noise from a generator seeded `seed + i`; but see `like`.
        height, width: of the pictures, in pixels.
        like: whose picture of the seed to draw (`ldm.presets`); None is our own.
        spacing: how the steps are spaced, one of `ldm.samplers.SPACINGS`; None is the sampler's own
            way.
    """

    prompts: tuple[str, ...]
    negative_prompt: str
    sampler: str
    steps: int
    guidance_scale: float
    eta: float
    seed: int
    height: int
    width: int
    like: str | None = None
    spacing: str | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        prompt: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        like: str | None = None,
        spacing: str | None = None,
    ) -> Self:
        """The settings of `num_images` pictures of each prompt, by a model of this config; None is
        the model's own default, or that of a sampler which was made for another (lcm: 4 steps,
        guidance 1).

        Raises:
            ValueError: in one line, for the first setting that is out of its range.
        """
        defaults = config.defaults
        name = check_sampler(defaults.sampler if sampler is None else sampler)
        own = SAMPLERS[name]
        settings = cls(
            prompts=one_per_picture(config, prompt, num_images),
            negative_prompt=negative_prompt,
            sampler=name,
            steps=whole("steps", first(steps, own.steps, defaults.steps)),
            guidance_scale=number(
                "guidance_scale",
                first(guidance_scale, own.guidance_scale, defaults.guidance_scale),
            ),
            eta=number("eta", eta),
            seed=whole("seed", seed),
            height=whole("height", config.image_size if height is None else height),
            width=whole("width", config.image_size if width is None else width),
            like=like,
            spacing=spacing,
        )
        settings.check(config)
        return settings

    def check(self, config: ModelConfig) -> None:
        """A ValueError in one line for the first setting that a model of this config cannot
        follow."""
        unet = config.unet
        if unet.in_channels != unet.out_channels:
            told = f"{config.name} reads {unet.in_channels} channels, a picture beside the latents"
            raise ValueError(f"{told}: ldm loads and converts it, and cannot draw with it")
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("the prompt is empty")
        if not isinstance(self.negative_prompt, str):
            raise ValueError(f"negative_prompt must be a string, not {self.negative_prompt!r}")
        total = config.schedule.num_train_timesteps
        if not 1 <= self.steps <= total:
            raise ValueError(f"steps must be between 1 and {total}, not {self.steps}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, not {self.guidance_scale}")
        check_sampler(self.sampler)
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must be between 0 and 1, not {self.eta}")
        if self.eta != 0.0 and "eta" not in SAMPLERS[self.sampler].options:
            raise ValueError(f"eta is a setting of ddim: {self.sampler} has none")
        if self.spacing not in [None, *SPACINGS]:
            near = did_you_mean(str(self.spacing), SPACINGS)
            there = ", ".join(SPACINGS)
            raise ValueError(f"unknown spacing {self.spacing!r:.80}: there are {there}{near}")
        if not 0 <= self.seed <= MAX_SEED - self.num_images + 1:
            raise ValueError(f"the seed must be between 0 and {MAX_SEED}, not {self.seed}")
        check_bytes(
            f"num_images={self.num_images}, height={self.height} and width={self.width}",
            bytes_held(config, self.num_images, self.height, self.width),
        )
        check_preset(
            self.like,
            sampler=self.sampler,
            steps=self.steps,
            spacing=self.spacing,
            schedule=NoiseSchedule(config.schedule),
            guidance_scale=self.guidance_scale,
            seed=self.seed,
        )

    @property
    def num_images(self) -> int:
        """How many pictures the run draws, of all prompts together."""
        return len(self.prompts)

    @property
    def adds_noise(self) -> bool:
        """Whether steps add fresh noise, so that more than the starting noise decides."""
        return self.eta > 0.0 or SAMPLERS[self.sampler].always_draws

    @property
    def prompt(self) -> str:
        """The prompt of a run of one picture."""
        (prompt,) = self.prompts
        return prompt

    def grid(self, schedule: NoiseSchedule) -> Levels:
        """The pairs of noise levels that the run walks in a model of this schedule: one step for
        each."""
        return PRESETS[self.like].grid(self.sampler, self.steps, schedule, self.spacing)

    def alone(self, index: int) -> Self:
        """The run that draws picture `index` of this one by itself: the same picture, since its
        noise comes from its own seed (but with a `like` whose noise depends on the whole batch)."""
        return dataclasses.replace(self, prompts=(self.prompts[index],), seed=self.seed + index)

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON has them; `Settings.from_dict` turns them back."""
        return dataclasses.asdict(self) | {"prompts": list(self.prompts)}

    @classmethod
    def from_dict(cls, fields: object) -> Self:
        """The settings that `as_dict` gave, from a file of anybody's: `check` is the next thing.

        Raises:
            ValueError: there are other fields, or one is of another type.
        """
        kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if not isinstance(fields, Mapping) or not needed <= fields.keys() <= kinds.keys():
            raise ValueError(f"settings have the fields {', '.join(kinds)}")
        for name, value in fields.items():
            if not IS_A[kinds[name]](value):
                raise ValueError(f"{name} is {value!r:.80}")
        return cls(**{**fields, "prompts": tuple(fields["prompts"])})


# What each type of a field may be in JSON, where a whole number can stand for any other.
IS_A: dict[str, Callable[[Any], bool]] = {
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(map(IS_A["str"], value)),
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int": lambda value: type(value) is int and abs(value) <= MAX_SEED,
    "float": lambda value: type(value) is float or IS_A["int"](value),
}


# --- Checks, each a ValueError in one line ---------------------------------------------------


def one_per_picture(
    config: ModelConfig, prompt: str | Sequence[str], num_images: int
) -> tuple[str, ...]:
    """Each prompt as often as it is to be drawn, if so many of the smallest pictures fit."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"a prompt must be a string or a list of strings, not {prompt!r}")
    if whole("num_images", num_images) < 1:
        raise ValueError(f"num_images must be 1 or more, not {num_images}")
    count, factor = len(prompts) * num_images, config.vae.factor
    check_bytes(f"num_images={count}", bytes_held(config, count, factor, factor))
    return tuple(one for one in prompts for _ in range(num_images))


def latent_shape(config: ModelConfig, height: int, width: int) -> tuple[int, int, int]:
    """The shape (C, h, w) of the latents of one picture of so many pixels: each side must be a
    positive multiple of the VAE's factor."""
    factor = config.vae.factor
    for name, size in (("height", height), ("width", width)):
        if size < factor or size % factor:
            raise ValueError(f"{name} must be a positive multiple of {factor}, not {size}")
    return config.vae.latent_channels, height // factor, width // factor


def bytes_held(config: ModelConfig, num_images: int, height: int, width: int) -> int:
    """What a run needs at once, in bytes, at least and in float32: of each picture its latents in
    a step's six tensors, two contexts and the pixels; and, of the one that is being decoded, what
    goes into the decoder's widest layer and what comes out. The UNet's needs come on top of it."""
    channels, h, w = latent_shape(config, height, width)
    latents, context = channels * h * w, config.text.max_length * config.text.hidden_size
    widest = config.vae.model_channels * max(config.vae.channel_mult[:2])
    each = 4 * (6 * latents + 2 * context) + 3 * height * width
    return num_images * each + 4 * 2 * widest * height * width


def check_bytes(what: str, needed: int) -> None:
    """A ValueError in one line if `what` would need more memory than a run may take."""
    if needed > MAX_BYTES:
        raise ValueError(f"{what}: that takes {needed:,} bytes at once, more than {MAX_BYTES:,}")


def check_sampler(name: str) -> str:
    """The name itself, if a sampler has it."""
    if name not in list(SAMPLERS):  # a list: what has no hash is refused as well
        near = did_you_mean(str(name), SAMPLERS)
        there = ", ".join(SAMPLERS)
        raise ValueError(f"unknown sampler {name!r:.80}: there are {there}{near}")
    return name


def first(*values: Value | None) -> Value:
    """The first of these that is there."""
    return next(value for value in values if value is not None)


def whole(name: str, value: int) -> int:
    """A whole number of any type, as Python's own."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None


def number(name: str, value: float) -> float:
    """A real number of any type, NumPy's too, as Python's own."""
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        raise ValueError(f"{name} must be a number that a float can hold") from None
