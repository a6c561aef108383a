"""Where the distance from the truth comes from: a chain from the world to the model as it ships.

Each link of the chain adds one imperfection to the one before, and draws pictures of the same
prompts:

    the world        scenes, as the law of the prompt has them
    autoencoder      the same, encoded and decoded
    1,000 steps      latents of a perfect model of such scenes, drawn in a thousand steps
    its steps        the same in as few steps as the model is drawn with, by its sampler
    UNet             ours in the perfect model's place, without guidance
    guidance         ours as it ships

What a link adds is its bar, and the bars add up to what is wrong at the end: so they say where work
would pay. Each is measured three ways (`ldm.evaluate.distribution`): pictures that no scene could
have made, pictures that do not show what the prompt states, and how far what the prompt leaves open
is from the law.

The perfect model is the posterior of encoded scenes, drawn from the law of the prompt
(`ldm.worlds.posterior`). Over so many draws it is exact, but the law itself it knows as well as
they do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.evaluate.distribution import KINDS, law_of, see, summarise
from ldm.evaluate.distribution_tables import KindResults, markdown
from ldm.evaluate.prompts import EVALUATION_STREAM
from ldm.pipeline import TextToImage
from ldm.presets import PRESETS
from ldm.samplers import SAMPLERS, sample
from ldm.samplers.noise import draw_noise
from ldm.settings import Settings, latent_shape
from ldm.worlds.atoms import FiniteSet
from ldm.worlds.law import Law
from ldm.worlds.posterior import posterior
from ldm.worlds.scenes import Scene, training_scene

if TYPE_CHECKING:
    from PIL.Image import Image

OPEN_KINDS = ("green grass", "a tree", "a house", "a fir tree in the snow")
"""Prompts that leave much open, and in which things have been drawn twice."""
MANY_STEPS = 1000
BATCH = 32


@dataclass(frozen=True)
class Link:
    """What the pictures of one link are like.

    Attributes:
        name: what the link adds.
        impossible: the share of the pictures that no scene could have made.
        disobedient: the share that do not show what the prompt states.
        excess: how far what is open is from the law: the mean excess total variation.
    """

    name: str
    impossible: float
    disobedient: float
    excess: float


FIGURES = ("impossible", "disobedient", "excess")


@dataclass(frozen=True)
class Budget:
    """The links, from the world to the model as it ships, and what they were drawn with."""

    links: Sequence[Link]
    settings: dict[str, float | str]

    def bar(self, name: str, figure: str) -> float:
        """By how much a figure is larger at a link than at the one before."""
        names = [link.name for link in self.links]
        here, values = names.index(name), [getattr(link, figure) for link in self.links]
        return float(values[here] - (values[here - 1] if here else 0.0))

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"settings": self.settings, "links": [asdict(link) for link in self.links]}

    def as_markdown(self) -> str:
        """For people: each figure, and what the link added to it."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        heads = ["link", "impossible", "added", "disobedient", "added", "from the law", "added"]
        rows = []
        for link in self.links:
            cells = [link.name]
            for figure in FIGURES:
                value, bar = getattr(link, figure), self.bar(link.name, figure)
                form = "{:.3f}" if figure == "excess" else "{:.1%}"
                cells += [form.format(value), form.format(bar)]
            rows.append(cells)
        return f"What each link adds to what is wrong ({settings}):\n\n{markdown(heads, rows)}"


def evaluate_budget(
    pipe: TextToImage,
    *,
    per_kind: int = 96,
    atoms: int = 500,
    kinds: Sequence[str] = OPEN_KINDS,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
) -> Budget:
    """Draw `per_kind` pictures of each kind of prompt at each link, with the same starting noise
    from the third on. Settings that are None are the model's own.

    Args:
        atoms: how many scenes of each kind the perfect model knows.
        kinds: some prompts of `ldm.evaluate.distribution.KINDS`.

    Raises:
        ValueError: before the first picture, for settings that `Settings.of` refuses.
    """
    if min(per_kind, atoms) < 1:
        raise ValueError(f"per_kind and atoms must be 1 or more, not {per_kind} and {atoms}")
    settings = Settings.of(
        pipe.config,
        list(kinds),
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        seed=seed,
    )
    found: dict[str, list[KindResults]] = {}
    for prompt in tqdm(kinds, desc="drawing", unit="kind", disable=None):  # None: on a terminal
        stated, rng = KINDS[prompt], np.random.default_rng([seed, EVALUATION_STREAM, 5])
        asked = law_of(stated)
        run = replace(settings, prompts=(prompt,) * per_kind)
        for name, images in chain(pipe, run, asked, atoms, rng):
            drawn = [see(image, prompt, seed + i) for i, image in enumerate(images)]
            found.setdefault(name, []).append(summarise(drawn, stated, asked, rng))
    told: dict[str, float | str] = {
        name: getattr(settings, name) for name in ("sampler", "steps", "guidance_scale")
    }
    links = [joined(name, results) for name, results in found.items()]
    return Budget(links, {"per_kind": per_kind, "atoms": atoms, **told, "seed": seed})


def chain(
    pipe: TextToImage, settings: Settings, asked: Law, atoms: int, rng: np.random.Generator
) -> Iterator[tuple[str, Sequence[Image]]]:
    """The pictures of each link, for one prompt: as many as the settings have."""
    size, count = pipe.config.image_size, settings.num_images
    truth = [scene.render(size) for scene in scenes_of(asked, count, rng)]
    yield "the world", truth
    yield "autoencoder", [pipe.decode(pipe.encode(image))[0] for image in truth]

    known = [pipe.encode(scene.render(size)) for scene in scenes_of(asked, atoms, rng)]
    perfect = FiniteSet(torch.cat(known), sampled=True)
    many = replace(settings, sampler="ddim", steps=MANY_STEPS, spacing=None)
    yield "1,000 steps", drawn_by(perfect, pipe, many)
    yield "its steps", drawn_by(perfect, pipe, settings)

    yield "UNet", in_batches(pipe, replace(settings, guidance_scale=1.0))
    yield "guidance", in_batches(pipe, settings)


def scenes_of(asked: Law, count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes drawn from the law."""
    scene = training_scene if asked.held_out == 0 else Scene.sample
    return [scene(rng, **names) for names in asked.sample(rng, count)]


def drawn_by(perfect: FiniteSet, pipe: TextToImage, settings: Settings) -> list[Image]:
    """What the pipeline would draw, had it a perfect model: the same noise, grid and decoder."""
    schedule, sampler = pipe.schedule, SAMPLERS[settings.sampler]

    def clean(x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t], which is known in pure noise too."""
        return posterior(perfect, x, schedule.alpha_bar_at(t[0].item())).mean

    generators = PRESETS[settings.like].generators(settings.seed, settings.num_images)
    shape = latent_shape(pipe.config, settings.height, settings.width)
    x = draw_noise(generators, like=perfect.atoms.new_empty(settings.num_images, *shape))
    options = {name: getattr(settings, name) for name in sampler.options}
    rule = functools.partial(sampler.rule, **options)
    grid = settings.grid(schedule)
    for step in sample(rule, clean, x, grid, schedule, generators=generators, prediction="x0"):
        latents = step.x_prev
    return pipe.decode(latents)


def in_batches(pipe: TextToImage, settings: Settings) -> list[Image]:
    """The pictures of a run, drawn some at a time."""
    images: list[Image] = []
    for start in range(0, settings.num_images, BATCH):
        prompts = settings.prompts[start : start + BATCH]
        images += pipe.draw(replace(settings, prompts=prompts, seed=settings.seed + start))
    return images


def joined(name: str, results: Sequence[KindResults]) -> Link:
    """A link's figures over all kinds of prompts, which count alike."""
    total = sum(kind.total for kind in results)
    shifts = [one.excess for kind in results for one in kind.attributes.values()]
    return Link(
        name,
        impossible=sum(kind.bad for kind in results) / total,
        disobedient=1 - sum(kind.obeyed for kind in results) / total,
        excess=sum(shifts) / len(shifts),
    )
