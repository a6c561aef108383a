"""Does a network learn its world, or its training set by heart?

A network that reaches the least training loss draws the training set, picture by picture: the
least is the posterior of that finite set, which is known in closed form (`ldm.worlds.atoms`;
Scarvelis et al. 2023, arXiv:2310.12395). What it should have learnt is the posterior of the world,
and in a small world that is known as well (`ldm.worlds.quadrature`). So small networks are trained
on few pictures and on many, all alike otherwise, and while they learn it is asked of each

- which of the two perfect models it is near, on scenes that it has not seen, with noise on them:
  root mean square distances of its E[x0 | x_t] from theirs, in units of the distance of those two
  from each other. 0 from one and 1 from the other is to be that one; more than 1 from both is not
  to have been trained for long enough.
- how many of the pictures that it draws are copies: their nearest member of the training set is
  less than a third as far away as the second nearest (Yoon et al. 2023, "Diffusion Probabilistic
  Models Generalize when They Fail to Memorize"). Some fresh scenes are copies by this measure too,
  by chance: what is above those counts.
- whether a second network, trained on as many other pictures, draws the same picture from the same
  noise (Kadkhodaie et al. 2024, arXiv:2310.02557): what both learnt is then no matter of their
  training sets.

    print(evaluate_memorise(out=Path("memorise.jsonl")).as_markdown())

Each size of the training set is a line of the file; asked again, only what is missing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import UNetConfig
from ldm.evaluate.distribution_tables import markdown
from ldm.evaluate.kept import kept
from ldm.files import append_text
from ldm.samplers import ddim
from ldm.schedule import NoiseSchedule, noised, x0_from_eps
from ldm.train.data import rng_at
from ldm.train.state import Optimisation, TrainState
from ldm.unet import UNet
from ldm.worlds.atoms import FiniteSet
from ldm.worlds.ladder import House, Sea
from ldm.worlds.posterior import EpsFn, posterior

SIZES = (2, 8, 32, 128, 512, 2048, 8192)
SIZE = 16  # of a picture, in pixels
LEVELS = (100, 200, 400)  # the timesteps it is asked at
FRESH = 24  # scenes it is asked about
DRAWN = 64  # pictures
DRAWING_STEPS = 25
FIRST = 16  # steps before it is measured
BATCH = 32
COPY = 1 / 3

IN_WORDS = {
    "by heart": "nearer to its training set, by heart, with",
    "the world": "nearer to the world with",
    "neither": "not trained for long enough to be near to either with",
}

NETWORK = UNetConfig(
    in_channels=3,
    out_channels=3,
    model_channels=16,
    channel_mult=(1, 2, 4),
    num_res_blocks=1,
    attention_levels=(),
    num_heads=4,
    context_dim=8,  # there are no words: it is given zeros
    norm_groups=2,
)


@dataclass(frozen=True)
class Point:
    """A network at one time of its training.

    Attributes:
        steps: of training.
        from_set, from_truth: at each noise level, its distance from the perfect model of the
            training set and from that of the world; 1 is their distance from each other.
        copies: the share of its pictures that are copies.
        nearest: the mean distance of its pictures from their nearest member, over that of fresh
            scenes from theirs.
    """

    steps: int
    from_set: Sequence[float]
    from_truth: Sequence[float]
    copies: float
    nearest: float


@dataclass(frozen=True)
class Curve:
    """One size of the training set.

    Attributes:
        scenes: how many are trained on.
        points: over training time.
        by_chance: the share of fresh scenes that are copies.
        apart: how far, at the end, the pictures are that a second network draws from the same
            noise; 1 is how far two pictures from different noise are.
    """

    scenes: int
    points: Sequence[Point]
    by_chance: float
    apart: float

    @classmethod
    def read(cls, line: dict[str, Any]) -> Curve:
        """From what `asdict` made; TypeError or KeyError for anything else."""
        return cls(**line | {"points": [Point(**point) for point in line["points"]]})

    def learnt(self, level: int) -> str:
        """What it had learnt in the end: "by heart" if it is nearer to its training set; "the
        world" if it is nearer to that, and nearer than who knows the training set by heart;
        "neither" if it is farther: it has not been trained for long enough to tell."""
        end = self.points[-1]
        if end.from_set[level] < end.from_truth[level]:
            return "by heart"
        return "the world" if end.from_truth[level] < 1 else "neither"


@dataclass(frozen=True)
class MemoriseResults:
    """The curves, by the number of scenes, and what they were measured with."""

    curves: Sequence[Curve]
    settings: dict[str, Any]

    @property
    def middle(self) -> int:
        """Which of the noise levels is told of where there is room for one."""
        return len(self.settings["levels"]) // 2

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"settings": self.settings, "curves": [asdict(curve) for curve in self.curves]}

    def as_markdown(self) -> str:
        """For people: how each training ended."""
        told = ", ".join(
            f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in self.settings.items()
        )
        heads = ["scenes", *(f"t = {t}" for t in self.settings["levels"])]
        heads += ["copies", "by chance", "nearest", "second network"]
        rows = []
        for curve in self.curves:
            end = curve.points[-1]
            pairs = zip(end.from_set, end.from_truth, strict=True)
            rows.append(
                [
                    f"{curve.scenes:,}",
                    *(f"{by_heart:.2f} / {truth:.2f}" for by_heart, truth in pairs),
                    *(f"{end.copies:.0%}", f"{curve.by_chance:.0%}"),
                    *(f"{end.nearest:.2f}", f"{curve.apart:.2f}"),
                ]
            )
        return (
            f"Distance from the training set's posterior / from the world's ({told}):\n\n"
            f"{markdown(heads, rows)}\n\n{self.in_words()}"
        )

    def in_words(self) -> str:
        """Which sizes are learnt by heart, and from which the world is."""
        level = self.middle
        by_size = {curve.scenes: curve.learnt(level) for curve in self.curves}
        parts = []
        for what, told in IN_WORDS.items():
            sizes = [f"{scenes:,}" for scenes, found in by_size.items() if found == what]
            if sizes:
                parts.append(f"{told} {', '.join(sizes)} scenes")
        t, steps = self.settings["levels"][level], self.settings["steps"]
        return f"After {steps:,} steps, at t = {t}: {'; '.join(parts)}."

    def over_time(self, figure: str) -> dict[str, dict[float, float]]:
        """`{"32 scenes": {steps: figure}}` for `ldm.viz`, at the middle noise level; `figure` is an
        attribute of `Point`."""

        def value(point: Point) -> float:
            found = getattr(point, figure)
            return float(found[self.middle] if isinstance(found, (list, tuple)) else found)

        return {
            f"{curve.scenes:,} scenes": {point.steps: value(point) for point in curve.points}
            for curve in self.curves
        }

    def by_scenes(self) -> dict[str, dict[float, float]]:
        """`{what: {scenes: share}}` for `ldm.viz`: copies, and how far the second network is."""
        return {
            "copies": {one.scenes: one.points[-1].copies for one in self.curves},
            "copies by chance": {one.scenes: one.by_chance for one in self.curves},
            "second network": {one.scenes: one.apart for one in self.curves},
        }


def evaluate_memorise(
    *,
    world: Sea | House = House(),
    sizes: Sequence[int] = SIZES,
    steps: int = 1000,
    levels: Sequence[int] = LEVELS,
    fresh: int = FRESH,
    drawn: int = DRAWN,
    seed: int = 0,
    out: Path | None = None,
) -> MemoriseResults:
    """Train two networks for each size, on scenes that have none in common, and measure the first
    whenever it has been trained twice as long as before.

    Args:
        sizes: how many scenes are trained on, each 2 or more, rising.
        steps: of training.
        levels: timesteps, at which `fresh` scenes are asked about.
        drawn: how many pictures are drawn each time.
        out: JSON lines, one for each size.

    Raises:
        ValueError: before the first step, for numbers that cannot be, or an `out` that holds other
            results.
    """
    if not sizes or min(sizes) < 2 or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"sizes must be 2 or more, and rise, not {list(sizes)}")
    if min(fresh, drawn) < 2:
        raise ValueError(f"fresh and drawn must be 2 or more, not {fresh} and {drawn}")
    if not levels:
        raise ValueError("there are no noise levels to ask at")
    learning = Optimisation(
        steps=steps, batch_size=BATCH, learning_rate=1.5e-3, warmup=50, ema_decay=0.99, seed=seed
    )
    schedule = NoiseSchedule()
    for t in levels:
        schedule.check_timestep(t)
    told = {"world": type(world).__name__, "pixels": SIZE, "steps": steps, "levels": list(levels)}
    settings = {**told, "fresh": fresh, "drawn": drawn, "seed": seed}
    before = [] if out is None else kept(out, settings, Curve.read, "curves of these settings")
    known = {curve.scenes: curve for curve in before}

    missing = [scenes for scenes in sizes if scenes not in known]
    asked = ask(world, schedule, levels, fresh, seed) if missing else []
    bar = tqdm(missing, desc="training", unit="set", disable=None)  # None: on a terminal only
    for scenes in bar:
        curve = learnt_from(scenes, world, asked, schedule, learning, drawn)
        known[scenes] = curve
        if out is not None:
            append_text(out, json.dumps(asdict(curve)) + "\n")
    return MemoriseResults([known[scenes] for scenes in sizes], settings)


def learnt_from(
    scenes: int,
    world: Sea | House,
    asked: Sequence[Question],
    schedule: NoiseSchedule,
    learning: Optimisation,
    drawn: int,
) -> Curve:
    """The curve of one size."""
    seed = learning.seed
    members, others = world.render(world.sample(seeded(seed, 1), 2 * scenes), SIZE).split(scenes)
    fresh = world.render(world.sample(seeded(seed, 2), drawn), SIZE)
    start = torch.randn(fresh.shape, generator=seeded(seed, 3))
    by_heart = [by_heart_of(members, question) for question in asked]

    points = []
    for step, eps_fn in training(members, schedule, learning, seeded(seed, 4)):
        if (step < FIRST or step & (step - 1)) and step != learning.steps:  # no power of 2
            continue
        found = [agreement(eps_fn, *both) for both in zip(asked, by_heart, strict=True)]
        pictures = draw(eps_fn, start, schedule)
        points.append(
            Point(
                step,
                [from_set for from_set, _ in found],
                [from_truth for _, from_truth in found],
                copies(pictures, members),
                nearest(pictures, members) / nearest(fresh, members),
            )
        )
    *_, (_, another) = training(others, schedule, learning, seeded(seed, 5))
    second = draw(another, start, schedule)
    apart = rms(second - pictures) / rms(second - pictures.roll(1, dims=0))
    return Curve(scenes, points, copies(fresh, members), apart)


def seeded(seed: int, stream: int) -> torch.Generator:
    """Random numbers for one purpose."""
    return torch.Generator().manual_seed(int(rng_at(seed, stream).integers(2**62)))


# ------------------------------------------------------------------------------------- training


def training(
    members: Tensor, schedule: NoiseSchedule, learning: Optimisation, generator: torch.Generator
) -> Iterator[tuple[int, EpsFn]]:
    """A network that learns the noise in these pictures (DDPM, algorithm 1): after each step its
    number, and what the running mean of the network says."""
    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global one
        torch.default_generator.manual_seed(generator.initial_seed())
        state = TrainState(UNet(NETWORK), learning)

    def asking(network: Callable[..., Tensor]) -> EpsFn:
        return lambda x, t: network(x, t, x.new_zeros(len(x), 1, NETWORK.context_dim))

    model, ema = asking(state.model), asking(state.ema)
    while state.step < learning.steps:
        x0 = members[torch.randint(len(members), (learning.batch_size,), generator=generator)]
        t = torch.randint(len(schedule.alpha_bar), (len(x0),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        state.update((model(schedule.add_noise(x0, eps, t), t) - eps).square().mean())  # eq. 14
        yield state.step, ema


# ------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Question:
    """Fresh scenes with noise on them, and the right answer.

    Attributes:
        t, alpha_bar: how much noise.
        x_t: (B, C, H, W).
        truth: E[x0 | x_t] of the world, (B, C, H, W).
    """

    t: int
    alpha_bar: float
    x_t: Tensor
    truth: Tensor


def ask(
    world: Sea | House, schedule: NoiseSchedule, levels: Sequence[int], fresh: int, seed: int
) -> list[Question]:
    """The same scenes and noise at each level."""
    generator = seeded(seed, 0)
    pictures = world.render(world.sample(generator, fresh), SIZE)
    noise = torch.randn(pictures.shape, generator=generator)
    questions = []
    for t in levels:
        alpha_bar = schedule.alpha_bar_at(t)
        x_t = noised(pictures, noise, alpha_bar)
        questions.append(Question(t, alpha_bar, x_t, posterior(world, x_t, alpha_bar).mean))
    return questions


def by_heart_of(members: Tensor, question: Question) -> Tensor:
    """What the perfect model of the training set answers."""
    return posterior(FiniteSet(members), question.x_t, question.alpha_bar).mean


@torch.no_grad()
def agreement(eps_fn: EpsFn, question: Question, by_heart: Tensor) -> tuple[float, float]:
    """A model's distance from the training set's answer and from the right one; 1 is how far these
    two are from each other."""
    x_t = question.x_t
    eps = eps_fn(x_t, torch.full((len(x_t),), question.t))
    says = x0_from_eps(x_t, eps, question.alpha_bar)
    unit = rms(by_heart - question.truth)
    return rms(says - by_heart) / unit, rms(says - question.truth) / unit


@torch.no_grad()
def draw(eps_fn: EpsFn, start: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Pictures from noise, (B, C, H, W) both."""
    *_, last = ddim(eps_fn, start, schedule.ddim_timesteps(DRAWING_STEPS), schedule)
    return last.x0


def copies(pictures: Tensor, members: Tensor) -> float:
    """The share of the pictures that are copies of one member."""
    first, second = distances(pictures, members).topk(2, largest=False).values.unbind(dim=1)
    return (first < COPY * second).double().mean().item()


def nearest(pictures: Tensor, members: Tensor) -> float:
    """The mean distance of a picture from its nearest member."""
    return distances(pictures, members).min(dim=1).values.mean().item()


def distances(pictures: Tensor, members: Tensor) -> Tensor:
    """Of (B, C, H, W) from (N, C, H, W): (B, N); not the fast way, which rounds small ones off."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(pictures.flatten(1), members.flatten(1), compute_mode=exact)


def rms(error: Tensor) -> float:
    """Root mean square."""
    return error.double().square().mean().sqrt().item()
