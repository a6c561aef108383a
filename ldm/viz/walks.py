"""From one picture to another, through those that lie between.

viz.walk(pipe, ["a red house", "a blue house"], seeds=3).save("walk.gif")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ldm.inputs import Inputs, asked
from ldm.settings import Settings
from ldm.viz.animations import Animation, animation

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

Stop = tuple[str, int]
"""A prompt and a seed."""


def walk(
    pipe: TextToImage,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    between: int = 12,
    ms: int = 80,
    **settings: Any,
) -> Animation:
    """Pictures on the way between prompts, between seeds, or both, as a GIF or a WebP.

        viz.walk(pipe, "a red house", seeds=[1, 2])
        viz.walk(pipe, ["a red house", "a blue house"], seeds=1)

    Text states go along a straight line, starting noise along an arc (`ldm.samplers.slerp`), where
    it stays noise of the variance that the model knows.

    Args:
        prompts, seeds: the stops: as many of each, or one that all share; two stops at least.
        between: how many steps it is from one stop to the next.
        ms: how long each picture stays, in milliseconds.
        settings: for all pictures, keywords of `pipe(...)`.

    Raises:
        ValueError: before any picture is drawn, for stops that do not go together, a sampler that
            draws noise at its steps (it would jump from stop to stop), or as `pipe(...)` does.
    """
    images = walk_images(pipe, prompts, seeds, between=between, **settings)
    return animation(images, ms)


def walk_images(
    pipe: TextToImage,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    between: int = 12,
    **settings: Any,
) -> list[Image.Image]:
    """The pictures of a `walk` alone: the first stop's, the last one's, and those between."""
    if between < 1:
        raise ValueError(f"between must be 1 or more, not {between}")
    stops = stops_of(prompts, seeds)
    shares = [k / between for k in range(1, between + 1)]
    runs = [run_at(pipe, stops[0], stops[1], 0.0, settings)]
    for start, end in pairwise(stops):
        runs += [run_at(pipe, start, end, share, settings) for share in shares]
    return [pipe.draw(*run)[0] for run in runs]


def stops_of(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> list[Stop]:
    """Prompts and seeds, paired."""
    words = [prompts] if isinstance(prompts, str) else list(prompts)
    numbers = list(seeds) if isinstance(seeds, Sequence) else [seeds]
    count = max(len(words), len(numbers))
    if count < 2 or {len(words), len(numbers)} - {1, count}:
        raise ValueError(
            f"a walk needs two stops or more: {len(words)} prompts and {len(numbers)} seeds do not "
            "make them"
        )
    every = (words * count)[:count], (numbers * count)[:count]
    return list(zip(*every, strict=True))


def run_at(
    pipe: TextToImage, start: Stop, end: Stop, share: float, settings: Mapping[str, Any]
) -> tuple[Settings, Inputs]:
    """The run of the picture that lies a share of the way, from 0 to 1, between two stops."""
    (prompt, seed), (other, other_seed) = start, end
    first, inputs = asked(pipe.config, prompt, {**settings, "seed": seed})
    asked(pipe.config, other, {**settings, "seed": other_seed})
    if first.adds_noise:
        raise ValueError(f"a walk is of samplers that add no noise at their steps: {first.sampler}")
    if first.num_images != 1 or first.variation_seed is not None or inputs.context is not None:
        raise ValueError("a walk makes seeds and contexts of its own, and one picture of each")
    if first.long_prompts:
        raise ValueError("a walk is between contexts of one length: leave out long_prompts")
    if other_seed != seed and share > 0.0:
        first = dataclasses.replace(first, variation_seed=other_seed, variation_strength=share)
    if other != prompt:
        here, there = (pipe.context([words], first.reading) for words in (prompt, other))
        context = torch.lerp(here, there, share)
        inputs = dataclasses.replace(inputs, context=context)
    inputs.check(first, pipe.config)
    return first, inputs
