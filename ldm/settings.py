"""What a run is asked for: one frozen value of numbers and names, filled in and checked here.

    settings = Settings.of(pipe.config, "a red house", seed=3)
    for step in pipe.run(settings): ...

The pipeline draws by it; recipes, traces, pages and sweeps carry it. A new setting is a field here,
with a default (so that older recipes can be read), a keyword of `Settings.of` and its check; the
same keyword in `ldm.inputs.Keywords`; an option in `ldm.cli.options`; and, where people are to see
it, words in `ldm.viz.player.captions`. What is no number or name is an input: `ldm.inputs`.
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
from ldm.presets import MAX_SEED, PRESETS, Walk, check_preset
from ldm.prompts import Reading, parts_of
from ldm.samplers import SAMPLERS, SPACINGS
from ldm.samplers.grids import Levels
from ldm.schedule import NoiseSchedule

Value = TypeVar("Value")

MAX_BYTES = 2**36
"""What a run may have to hold at once, at most: 64 GiB. More is a mistake, or a recipe that is to
bring a machine down, and is refused before any of it is asked for."""

FITS = ("crop",)


@dataclass(frozen=True)
class Settings:
    """One run, as numbers and names. `Settings.of` fills in a model's defaults and checks it all.

    Attributes:
        prompts: what to draw, one for each picture of the run.
        negative_prompt: what to move away from; empty is the plain unconditional model. One for all
            pictures, or where they differ one for each.
        sampler: one of `ldm.samplers.SAMPLERS`.
        steps: how many intervals the sampler's grid has.
        guidance_scale: how hard to follow the prompts; 1 is without guidance.
        eta: for ddim, from 0 (the seed alone decides) to 1 (noise at every step).
        seed: picture i draws its noise from a generator seeded `seed + i`; but see `like`.
        height, width: of the pictures, in pixels.
        like: whose picture of the seed to draw (`ldm.presets`); None is our own.
        spacing: how the steps are spaced, one of `ldm.samplers.SPACINGS`; None is the sampler's own
            way.
        strength: of a run that starts from a picture, how much of the grid it walks: above 0, where
            the picture stays as it is, to 1, where it is redrawn. None starts from noise alone.
        fit: what becomes of such a picture of another size: None, it is refused; "crop", its middle
            is taken, and resized.
        paste_back: whether the pixels that a mask keeps are those of the picture, and not the
            decoder's.
        variation_seed, variation_strength: a second seed, and how far the starting noise goes
            towards its own, from 0 to 1 (`ldm.samplers.slerp`).
        guidance_rescale: from 0 to 1, how far guided predictions get back the contrast that the
            prompt's own have (`ldm.samplers.guide`).
        guidance_interval: the timesteps, low and high, from and to which there is guidance; None is
            everywhere.
        weighting, clip_skip, long_prompts: how prompts are read (`ldm.prompts.Reading`).
    """

    prompts: tuple[str, ...]
    negative_prompt: str | tuple[str, ...]
    sampler: str
    steps: int
    guidance_scale: float
    eta: float
    seed: int
    height: int
    width: int
    like: str | None = None
    spacing: str | None = None
    strength: float | None = None
    fit: str | None = None
    paste_back: bool = False
    variation_seed: int | None = None
    variation_strength: float = 0.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    weighting: bool = False
    clip_skip: int = 0
    long_prompts: bool = False

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        prompt: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        sampler: str | None = None,
        eta: float = 0.0,
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        like: str | None = None,
        spacing: str | None = None,
        strength: float | None = None,
        fit: str | None = None,
        paste_back: bool = False,
        variation_seed: int | None = None,
        variation_strength: float = 0.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        weighting: bool = False,
        clip_skip: int = 0,
        long_prompts: bool = False,
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
            negative_prompt=one_or_each(prompt, negative_prompt, num_images),
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
            strength=None if strength is None else number("strength", strength),
            fit=fit,
            paste_back=paste_back,
            variation_seed=None
            if variation_seed is None
            else whole("variation_seed", variation_seed),
            variation_strength=number("variation_strength", variation_strength),
            guidance_rescale=number("guidance_rescale", guidance_rescale),
            guidance_interval=None if guidance_interval is None else two(guidance_interval),
            weighting=weighting,
            clip_skip=whole("clip_skip", clip_skip),
            long_prompts=long_prompts,
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
        if not isinstance(self.negative_prompt, str) and not (
            len(self.negative_prompt) == self.num_images
        ):
            raise ValueError(f"negative_prompt must be one, or {self.num_images}, one for each")
        self.reading.check(config.text)
        if self.weighting:
            for prompt in dict.fromkeys((*self.prompts, *self.negative_prompts)):
                parts_of(prompt)
        total = config.schedule.num_train_timesteps
        if not 1 <= self.steps <= total:
            raise ValueError(f"steps must be between 1 and {total}, not {self.steps}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, not {self.guidance_scale}")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(
                f"guidance_rescale must be between 0 and 1, not {self.guidance_rescale}"
            )
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low <= high <= total - 1:
                raise ValueError(
                    f"guidance_interval must be two timesteps, the lower first, between 0 and "
                    f"{total - 1}, not {low:g} and {high:g}"
                )
        check_sampler(self.sampler)
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must be between 0 and 1, not {self.eta}")
        if self.eta != 0.0 and "eta" not in SAMPLERS[self.sampler].options:
            raise ValueError(f"eta is a setting of ddim: {self.sampler} has none")
        if self.spacing not in [None, *SPACINGS]:
            near = did_you_mean(str(self.spacing), SPACINGS)
            there = ", ".join(SPACINGS)
            raise ValueError(f"unknown spacing {self.spacing!r:.80}: there are {there}{near}")
        for name, seed in (("the seed", self.seed), ("variation_seed", self.variation_seed)):
            if seed is not None and not 0 <= seed <= MAX_SEED - self.num_images + 1:
                raise ValueError(f"{name} must be between 0 and {MAX_SEED}, not {seed}")
        if not 0.0 <= self.variation_strength <= 1.0:
            raise ValueError(
                f"variation_strength must be between 0 and 1, not {self.variation_strength}"
            )
        if (self.variation_seed is None) != (self.variation_strength == 0.0):
            raise ValueError(
                "a variation needs both: variation_seed, and variation_strength above 0"
            )
        if self.strength is not None and not 0.0 < self.strength <= 1.0:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")
        if self.fit not in [None, *FITS]:
            raise ValueError(f"unknown fit {self.fit!r:.80}: there is {', '.join(FITS)}")
        if not isinstance(self.paste_back, bool):
            raise ValueError(f"paste_back must be True or False, not {self.paste_back!r:.80}")
        check_bytes(
            f"num_images={self.num_images}, height={self.height} and width={self.width}",
            bytes_held(config, self.num_images, self.height, self.width),
        )
        schedule = NoiseSchedule(config.schedule)
        check_preset(
            self.like,
            sampler=self.sampler,
            steps=self.steps,
            spacing=self.spacing,
            schedule=schedule,
            guidance_scale=self.guidance_scale,
            seed=max(self.seed, self.variation_seed or 0),
        )
        self.walk(schedule)

    @property
    def num_images(self) -> int:
        """How many pictures the run draws, of all prompts together."""
        return len(self.prompts)

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """What each picture moves away from."""
        negative = self.negative_prompt
        return (negative,) * self.num_images if isinstance(negative, str) else negative

    @property
    def reading(self) -> Reading:
        """How the prompts are read."""
        return Reading(self.weighting, self.clip_skip, self.long_prompts)

    @property
    def negative_reading(self) -> Reading:
        """How the negative prompts are."""
        if PRESETS[self.like].skips_negative:
            return self.reading
        return dataclasses.replace(self.reading, clip_skip=0)

    @property
    def adds_noise(self) -> bool:
        """Whether steps add fresh noise, so that more than the starting noise decides."""
        return self.eta > 0.0 or SAMPLERS[self.sampler].always_draws

    @property
    def prompt(self) -> str:
        """The prompt of a run of one picture."""
        (prompt,) = self.prompts
        return prompt

    def walk(self, schedule: NoiseSchedule, grid: Levels | None = None) -> Walk:
        """Where the run starts, and the pairs of noise levels that it walks in a model of this
        schedule: one step for each.

        Args:
            grid: another one than the settings' own, of as many steps.

        Raises:
            ValueError: in one line, if the strength leaves no step of it.
        """
        preset = PRESETS[self.like]
        if grid is None:
            grid = preset.grid(self.sampler, self.steps, schedule, self.spacing)
        if self.strength is None:
            return Walk(grid[0][0], grid)
        return preset.begun(self.sampler, grid, self.steps, self.strength)

    def grid(self, schedule: NoiseSchedule) -> Levels:
        """The pairs of noise levels that the run walks: those of `walk`."""
        return self.walk(schedule).grid

    def alone(self, index: int) -> Self:
        """The run that draws picture `index` of this one by itself: the same picture, since its
        noise comes from its own seed (but with a `like` whose noise depends on the whole batch)."""
        prompt, negative = self.prompts[index], self.negative_prompts[index]
        return dataclasses.replace(self.later(index), prompts=(prompt,), negative_prompt=negative)

    def later(self, count: int) -> Self:
        """The same run, of seeds that are so many later."""
        second = None if self.variation_seed is None else self.variation_seed + count
        return dataclasses.replace(self, seed=self.seed + count, variation_seed=second)

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON has them; `Settings.from_dict` turns them back."""
        fields = dataclasses.asdict(self)
        return {
            k: list(value) if isinstance(value, tuple) else value for k, value in fields.items()
        }

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
        read: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return cls(**read)


# What each type of a field may be in JSON, where a whole number can stand for any other.
IS_A: dict[str, Callable[[Any], bool]] = {
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(map(IS_A["str"], value)),
    "str": lambda value: isinstance(value, str),
    "str | tuple[str, ...]": lambda value: isinstance(value, str) or IS_A["tuple[str, ...]"](value),
    "str | None": lambda value: value is None or isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int and abs(value) <= MAX_SEED,
    "int | None": lambda value: value is None or IS_A["int"](value),
    "float": lambda value: type(value) is float or IS_A["int"](value),
    "float | None": lambda value: value is None or IS_A["float"](value),
    "tuple[float, float] | None": lambda value: (
        value is None
        or (isinstance(value, list) and len(value) == 2 and all(map(IS_A["float"], value)))
    ),
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


def one_or_each(
    prompt: str | Sequence[str], negative: str | Sequence[str], num_images: int
) -> str | tuple[str, ...]:
    """The negative prompt of all pictures, or if they differ that of each: a list of prompts may
    have as many of them."""
    if isinstance(negative, str):
        return negative
    is_list = isinstance(negative, Sequence) and all(isinstance(one, str) for one in negative)
    if not is_list or isinstance(prompt, str) or len(negative) != len(prompt):
        raise ValueError(
            "negative_prompt must be a string, or with a list of prompts a list of as many, not "
            f"{negative!r:.80}"
        )
    each = tuple(one for one in negative for _ in range(num_images))
    return each if len(set(each)) > 1 else each[0]


def latent_shape(config: ModelConfig, height: int, width: int) -> tuple[int, int, int]:
    """The shape (C, h, w) of the latents of one picture of so many pixels: each side must be a
    positive multiple of the VAE's factor."""
    factor = config.vae.factor
    for name, size in (("height", height), ("width", width)):
        if size < factor or size % factor:
            raise ValueError(f"{name} must be a positive multiple of {factor}, not {size}")
    return config.vae.latent_channels, height // factor, width // factor


def bytes_held(
    config: ModelConfig, num_images: int, height: int, width: int, chunks: int = 1
) -> int:
    """What a run needs at once, in bytes, at least and in float32: of each picture its latents in
    a step's six tensors, two contexts (each of so many chunks of tokens) and the pixels; and, of
    the one that is being decoded, what goes into the decoder's widest layer and what comes out. The
    UNet's needs come on top of it."""
    channels, h, w = latent_shape(config, height, width)
    latents = channels * h * w
    context = chunks * config.text.max_length * config.text.hidden_size
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


def two(interval: object) -> tuple[float, float]:
    """The two numbers of a guidance interval, as Python's own."""
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        raise ValueError(f"guidance_interval must be two timesteps, not {interval!r:.80}")
    low, high = (number("guidance_interval", one) for one in interval)
    return low, high
