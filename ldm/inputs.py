"""What a run is given that is no number or name: a picture to start from, a mask, latents, noise.

    settings, inputs = asked(pipe.config, "a red house", {"image": "in.png", "strength": 0.6})
    for step in pipe.run(settings, inputs): ...

A picture's recipe carries all of the `Settings`; of the inputs it carries shapes and hashes
(`Held`), by which one knows them again. A new input is a field here, with its check; the same
keyword of `Keywords`; and words about it in `TextToImage.denoise`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypedDict

import torch
from torch import Tensor

from ldm.config import ModelConfig
from ldm.pictures import Picture, cropped, stack, to_rgb
from ldm.presets import PRESETS, Walk, check_noise_device
from ldm.samplers import Generators, Grid, Noise, Step, Steps, handed_in
from ldm.samplers.grids import Levels
from ldm.samplers.loop import number_of
from ldm.samplers.rules import falling
from ldm.schedule import NoiseSchedule
from ldm.settings import Settings, latent_shape

if TYPE_CHECKING:
    from PIL.Image import Image

Pictures: TypeAlias = "Picture | Sequence[Picture]"
"""One picture for the whole run, or one for each of its pictures."""

Callback = Callable[[Step, int], object]
"""callback(step, count): told of each step of so many. False, and nothing else, ends the run."""

STRENGTH = 0.75
"""From a picture, where nobody says otherwise; with a mask it is 1."""


class Keywords(TypedDict, total=False):
    """What `pipe(prompt, ...)` and `pipe.denoise(prompt, ...)` take besides the prompt: all fields
    of `Settings` and of `Inputs`, and how many pictures. Their meaning is said at `denoise`."""

    steps: int | None
    guidance_scale: float | None
    negative_prompt: str | Sequence[str]
    sampler: str | None
    eta: float
    seed: int
    num_images: int
    height: int | None
    width: int | None
    like: str | None
    spacing: str | None
    strength: float | None
    fit: str | None
    paste_back: bool
    variation_seed: int | None
    variation_strength: float
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    weighting: bool
    clip_skip: int
    long_prompts: bool
    image: Pictures | None
    mask: Pictures | None
    latents: Tensor | None
    noise: Noise | None
    timesteps: Grid | None
    context: Tensor | None
    uncond_context: Tensor | None
    callback: Callback | None


@dataclass(frozen=True)
class Held:
    """What a run was given, told so that it is known again.

    Attributes:
        shape: of a picture (height, width, 3), of a mask (height, width), of tensors theirs; of
            several, their number before that of the first.
        sha256: of the pixels or numbers, in hexadecimal. Of a picture they are those that a person
            sees, before it is cropped, in whatever kind of file they were.
    """

    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a run is given. `Inputs.of` reads the pictures; nothing given is a run from noise.

    Attributes:
        image: the picture to start from, or one for each of the run; "RGB".
        mask: what of it is redrawn, white, and what is kept, black; "L".
        latents: x at the first timestep, as noisy as that is, (B, C, h, w).
        noise: instead of the seeds': see `ldm.samplers.noise.Noise`.
        timesteps: the pairs (t, t_prev) to walk, instead of the settings' grid.
        context, uncond_context: instead of the prompts' text states and those of the negative
            prompt, (B, M, D), or (1, M, D) for all.
        callback: see `Callback`.
    """

    image: tuple[Image, ...] = ()
    mask: tuple[Image, ...] = ()
    latents: Tensor | None = None
    noise: Noise | None = None
    timesteps: Grid | None = None
    context: Tensor | None = None
    uncond_context: Tensor | None = None
    callback: Callback | None = None

    @classmethod
    def of(
        cls, *, image: Pictures | None = None, mask: Pictures | None = None, **rest: Any
    ) -> Self:
        """The inputs of a run, its pictures read (`ldm.pictures.to_rgb`).

        Raises:
            FileNotFoundError: nothing is at a path.
            ValueError: in one line, if a picture cannot be read.
        """
        masks = tuple(one.convert("L") for one in read(mask))
        return cls(image=read(image), mask=masks, **rest)

    def check(self, settings: Settings, config: ModelConfig) -> None:
        """A ValueError in one line for the first input that does not go with the others, with the
        settings of the run, or with a model of this config."""
        self.check_together(settings)
        count = settings.num_images
        for name, pictures in (("image", self.image), ("mask", self.mask)):
            if len(pictures) not in (0, 1, count):
                raise ValueError(
                    f"{name}: {len(pictures)} pictures for a run of {count}: pass one for all of "
                    "them, or one for each"
                )
            for picture in pictures:
                check_size(name, picture, settings)
        for mask in self.mask:
            if not redrawn_pixels(mask).getbbox():
                raise ValueError("nothing of the mask is white: nothing would be redrawn")
        shape = (count, *latent_shape(config, settings.height, settings.width))
        if self.latents is not None:
            check_tensor("latents", self.latents, shape)
        schedule = NoiseSchedule(config.schedule)
        if self.timesteps is not None and len(self.timesteps) != settings.steps:
            raise ValueError(f"{len(self.timesteps)} timesteps are not {settings.steps} steps")
        _, grid = self.walk(settings, schedule)
        self.check_noise(settings, shape, grid)
        self.check_contexts(settings, config)
        if self.callback is not None and not callable(self.callback):
            raise ValueError("callback must be a function of a step and their number")

    def check_together(self, settings: Settings) -> None:
        """A ValueError for what excludes, or needs, something else."""
        if self.image and self.latents is not None:
            raise ValueError("latents are x itself, image is what x is made of: pass one of them")
        if self.mask and not self.image:
            raise ValueError("mask says what of a picture is redrawn: pass image too")
        if self.image and settings.strength is None:
            raise ValueError("a run from a picture needs a strength")
        for name in ("strength", "fit"):
            if getattr(settings, name) is not None and not self.image:
                raise ValueError(f"{name} is of a picture to start from: pass image too")
        if settings.paste_back and not self.mask:
            raise ValueError("paste_back is of what a mask keeps: pass mask too")
        for name in ("latents", "noise"):
            if getattr(self, name) is not None and settings.variation_seed is not None:
                raise ValueError(f"a variation is of the seeds' own starting noise, not of {name}")
        if self.uncond_context is not None and settings.negative_prompt:
            raise ValueError("uncond_context stands in negative_prompt's place: pass one of them")

        if settings.long_prompts and (self.context is None) != (self.uncond_context is None):
            raise ValueError(
                "long_prompts makes contexts of one length: pass both context and uncond_context, "
                "or none"
            )

    def check_noise(self, settings: Settings, shape: tuple[int, ...], grid: Levels) -> None:
        """A ValueError if the noise cannot be drawn here, or is not what the run will draw."""
        if self.noise is None:
            check_noise_device(settings.like)
        elif isinstance(self.noise, Tensor) or not (
            callable(self.noise) or isinstance(self.noise, Sequence)
        ):
            raise ValueError("noise must be a list of tensors, or a function of number and shape")
        elif not callable(self.noise):
            for k, noise in enumerate(self.noise):
                check_tensor(f"noise {k}", noise, shape)
            draws = 0 if self.latents is not None else 1
            if settings.adds_noise:
                draws += sum(there.alpha_bar < 1.0 for _, there in grid)
            if len(self.noise) < draws:
                raise ValueError(
                    f"the run draws noise {draws} times: {len(self.noise)} are too few"
                )

    def check_contexts(self, settings: Settings, config: ModelConfig) -> None:
        """A ValueError if text states have not the shape that the UNet is asked with."""
        given = {"context": self.context, "uncond_context": self.uncond_context}
        there = {name: states for name, states in given.items() if states is not None}
        length = config.text.max_length
        if len(there) == 2 and isinstance(self.context, Tensor) and self.context.ndim == 3:
            length = self.context.shape[1]  # any, if both have it
        for name, states in there.items():
            batch = settings.num_images
            if isinstance(states, Tensor) and len(states) == 1:
                batch = 1
            check_tensor(name, states, (batch, length, config.unet.context_dim))

    # --- For the run -----------------------------------------------------------------------------

    def walk(self, settings: Settings, schedule: NoiseSchedule) -> Walk:
        """Where the run starts, and its steps: `Settings.walk`, of the timesteps that are given.

        Raises:
            ValueError: in one line, for timesteps that rise, or are no pairs, or none.
        """
        if self.timesteps is None:
            return settings.walk(schedule)
        if not len(self.timesteps):
            raise ValueError("timesteps are none: a run needs one step at least")
        return settings.walk(schedule, falling(self.timesteps, schedule))

    def source(self, settings: Settings) -> Generators:
        """What draws the run's noise, fresh."""
        if self.noise is not None:
            return handed_in(self.noise)
        return PRESETS[settings.like].generators(settings.seed, settings.num_images)

    def levels(self, settings: Settings) -> Tensor:
        """The pictures to start from, of the run's size: grey levels, uint8 (1 or B, H, W, 3)."""
        return stack([fitted(one, settings) for one in self.image])

    def redrawn(self, settings: Settings, factor: int) -> Tensor:
        """What is redrawn, in latents: 1 wherever any of the factor x factor pixels is, else 0;
        float32 (1 or B, 1, h, w)."""
        pixels = stack([redrawn_pixels(fitted(one, settings)) for one in self.mask])
        white = pixels[..., :1].movedim(-1, 1).float() / 255  # (B, 1, H, W)
        return torch.nn.functional.max_pool2d(white, factor)

    def pasted(self, images: Sequence[Image], settings: Settings) -> list[Image]:
        """The pictures of the run, but for the pixels that are kept: those of the originals."""
        from PIL import Image

        whole = [self.image[i % len(self.image)] for i in range(len(images))]
        masks = [self.mask[i % len(self.mask)] for i in range(len(images))]
        return [
            Image.composite(image, fitted(one, settings), redrawn_pixels(fitted(mask, settings)))
            for image, one, mask in zip(images, whole, masks, strict=True)
        ]

    # --- For the record --------------------------------------------------------------------------

    def held(self) -> dict[str, Held | None]:
        """What was given, by name; None for a function, since nobody can tell what it did: such a
        run cannot be repeated from its record."""
        found: dict[str, Held | None] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or value == ():
                continue
            if field.name == "timesteps":
                value = [tuple(map(number_of, pair)) for pair in value]
            found[field.name] = None if callable(value) else held(value)
        return found


def asked(
    config: ModelConfig, prompt: str | Sequence[str], keywords: Mapping[str, Any]
) -> tuple[Settings, Inputs]:
    """The two values that the keywords of `pipe(prompt, ...)`, which are `Keywords`, make, checked.

    Raises:
        FileNotFoundError: a picture is not there.
        ValueError: in one line, for the first argument that is out of its range.
        TypeError: there is no such keyword.
    """
    names = {field.name for field in dataclasses.fields(Inputs)}
    given = {k: value for k, value in keywords.items() if k in names}
    inputs = Inputs.of(**given)
    numbers = {k: value for k, value in keywords.items() if k not in names}
    if inputs.image and numbers.get("strength") is None:
        numbers["strength"] = 1.0 if inputs.mask else STRENGTH
    if inputs.timesteps is not None:
        for name in ("steps", "spacing"):
            if numbers.get(name) is not None:
                raise ValueError(f"timesteps say which steps are taken: leave out {name}")
        numbers["steps"] = len(inputs.timesteps)
    settings = Settings.of(config, prompt, **numbers)
    inputs.check(settings, config)
    return settings, inputs


def told(steps: Steps, callback: Callback, count: int) -> Steps:
    """The same steps, of so many, each told to a callback before it is passed on; after one at
    which that says False there are no more."""
    with contextlib.closing(steps):
        sent = None
        while True:
            try:
                step = steps.send(sent)
            except StopIteration:
                return
            go_on = callback(step, count) is not False
            sent = yield step
            if not go_on:
                return


# --- The record --------------------------------------------------------------------------------

MOST_DIMENSIONS = 8


def held_as_dict(inputs: Mapping[str, Held | None]) -> dict[str, Any]:
    """`Inputs.held` as JSON has it; `held_from_dict` turns it back."""
    return {name: None if one is None else dataclasses.asdict(one) for name, one in inputs.items()}


def held_from_dict(fields: object) -> dict[str, Held | None]:
    """What `held_as_dict` gave, from a file of anybody's.

    Raises:
        ValueError: it is something else.
    """
    names = [field.name for field in dataclasses.fields(Inputs)]
    if not isinstance(fields, Mapping) or not fields.keys() <= set(names):
        raise ValueError(f"inputs are of {', '.join(names)}")
    found: dict[str, Held | None] = {}
    for name, one in fields.items():
        found[name] = None
        if one is None:
            continue
        if not isinstance(one, dict) or one.keys() != {"shape", "sha256"}:
            raise ValueError(f"{name} has a shape and a sha256, not {one!r:.80}")
        shape, sha256 = one["shape"], one["sha256"]
        is_shape = isinstance(shape, list) and 1 <= len(shape) <= MOST_DIMENSIONS
        if not is_shape or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise ValueError(f"the shape of {name} is {shape!r:.80}")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"the sha256 of {name} is {sha256!r:.80}")
        found[name] = Held(tuple(shape), sha256)
    return found


# --- Pictures ----------------------------------------------------------------------------------


def read(pictures: Pictures | None) -> tuple[Image, ...]:
    """One picture or several, as a person sees them."""
    if pictures is None:
        return ()
    if isinstance(pictures, str) or not isinstance(pictures, Sequence):
        pictures = [pictures]
    if not pictures:
        raise ValueError("pictures are an empty list: leave them out, or pass one")
    return tuple(map(to_rgb, pictures))


def fitted(picture: Image, settings: Settings) -> Image:
    """A picture of the run's size."""
    size = (settings.width, settings.height)
    return picture if picture.size == size else cropped(picture, *size)


def redrawn_pixels(mask: Image) -> Image:
    """A mask of any greys as black and white alone: what is lighter than darker is white."""
    return mask.point([0] * 128 + [255] * 128)


def check_size(name: str, picture: Image, settings: Settings) -> None:
    """A ValueError if a picture has not the run's size, and is not to be cropped to it."""
    if picture.size != (settings.width, settings.height) and settings.fit is None:
        raise ValueError(
            f"{name} is {picture.width}x{picture.height}, and the run draws {settings.width}x"
            f"{settings.height}: pass height and width, or fit='crop'"
        )


# --- Tensors -----------------------------------------------------------------------------------


def check_tensor(name: str, value: object, shape: tuple[int, ...]) -> None:
    """A ValueError unless it is a tensor of floating-point numbers of this shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != shape:
        kind = type(value).__name__
        what = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else kind
        raise ValueError(f"{name} must be a tensor of real numbers {shape}, not {what}")


def held(value: Tensor | Sequence[Any]) -> Held:
    """The shape and the hash of a tensor, of several of them, of pictures or of timesteps."""
    things = [value] if isinstance(value, Tensor) else list(value)
    digest = hashlib.sha256()
    for thing in things:
        digest.update(bytes_of(thing))
    shape = shape_of(things[0])
    return Held(shape if len(things) == 1 else (len(things), *shape), digest.hexdigest())


def bytes_of(thing: Any) -> bytes:
    """The numbers of a tensor, the pixels of a picture, or the text of two timesteps."""
    if isinstance(thing, Tensor):
        numbers = thing.detach().cpu().contiguous().flatten()
        return bytes(numbers.view(torch.uint8).numpy())
    return repr(thing).encode() if isinstance(thing, tuple) else thing.tobytes()


def shape_of(thing: Any) -> tuple[int, ...]:
    """(height, width, 3) of a picture, (height, width) of a mask; of a tensor its own."""
    if isinstance(thing, Tensor | tuple):
        return tuple(thing.shape) if isinstance(thing, Tensor) else (len(thing),)
    colours = len(thing.getbands())
    return (thing.height, thing.width) + ((colours,) if colours > 1 else ())
