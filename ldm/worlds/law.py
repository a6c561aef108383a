"""The law of the pictures that a caption asks for: exactly, by Bayes' rule.

    asked = law({"ground": "grass"})          # what the caption "green grass" states
    asked.of("sky")                           # {("day",): 0.333, ("sunset",): 0.333, ...}
    asked.of("house", "tree")                 # of pairs; of any number of attributes
    asked.sample(rng, 200)                    # names, as drawn from it

A caption says something by what it leaves out, too: most scenes with a house have captions that say
so, and so a caption without a word about a house makes a house less likely (10%, not 65%).

    P(names | stated) = P(names) P(stated | names) / P(stated)

P(names) is that of the training scenes (`ldm.worlds.distribution`), P(stated | names) is how
captions choose what to state (`ldm.worlds.captions`). The wording adds nothing to that. Where
nothing is stated the law is P(names): training empties captions whatever their scenes show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

from ldm.worlds.captions import chances
from ldm.worlds.distribution import ATTRIBUTES, all_names, is_held_out

Names = dict[str, str]


@dataclass(frozen=True)
class Law:
    """A distribution over the names of scenes.

    Attributes:
        names: every possible scene's, `{attribute: value}`.
        p: their probabilities, (N,) float64, of sum 1.
    """

    names: tuple[Names, ...] = field(repr=False)
    p: npt.NDArray[np.float64] = field(repr=False)

    def of(self, *attributes: str) -> dict[tuple[str, ...], float]:
        """The probabilities of the values of some attributes together, without those that are 0."""
        table: dict[tuple[str, ...], float] = {}
        for names, p in zip(self.names, self.p, strict=True):
            key = tuple(names[name] for name in attributes)
            table[key] = table.get(key, 0.0) + float(p)
        return table

    @property
    def open(self) -> tuple[str, ...]:
        """The attributes that can have more than one value."""
        return tuple(name for name in ATTRIBUTES if len(self.of(name)) > 1)

    @property
    def held_out(self) -> float:
        """The probability of the combinations that training never shows."""
        return float(
            sum(p for names, p in zip(self.names, self.p, strict=True) if is_held_out(names))
        )

    def sample(self, rng: np.random.Generator, count: int) -> list[Names]:
        """Names drawn from the law: `training_scene(rng, **names)` draws the numbers."""
        return [self.names[i] for i in rng.choice(len(self.names), count, p=self.p)]


def law(stated: Mapping[str, str], *, whole_world: bool = False) -> Law:
    """The law of training scenes (of the `whole_world`: with its held-out combinations), given
    what a caption states and what it does not: `{attribute: value}`, as `Scene.describe` says.

    Raises:
        ValueError: an attribute or value is unknown, no caption can state just this, or no
            training scene has it.
    """
    return _law(frozenset(stated.items()), whole_world)


@lru_cache(maxsize=4096)
def _law(stated: frozenset[tuple[str, str]], whole_world: bool) -> Law:
    names, values, prior, held_out = _world()
    p = prior if whole_world else np.where(held_out, 0.0, prior)
    if stated:
        for column, factors in zip(values.T, chances(dict(stated)).values(), strict=True):
            p = p * np.array(list(factors.values()))[column]
    if not p.sum():
        said = ", ".join(f"{k}={v!r}" for k, v in sorted(stated))
        where = "scene" if whole_world else "training scene"
        raise ValueError(f"no caption of a {where} states just {said}")
    (possible,) = np.nonzero(p)
    return Law(tuple(names[i] for i in possible), p[possible] / p.sum())


@cache
def _world() -> tuple[
    tuple[Names, ...], npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.bool_]
]:
    """All names of the whole world, as values' indices (N, 8) too, their probabilities (N,), and
    which are held out (N,)."""
    names, prior = [], []
    free = ("light", "horizon")  # uniform, whatever the rest
    ways = list(product(*(ATTRIBUTES[name] for name in free)))
    for some, p in all_names():
        for way in ways:
            full = some | dict(zip(free, way, strict=True))
            names.append({name: full[name] for name in ATTRIBUTES})
            prior.append(p / len(ways))
    values = [[ATTRIBUTES[name].index(one[name]) for name in ATTRIBUTES] for one in names]
    held_out = np.array([is_held_out(one) for one in names])
    return tuple(names), np.array(values), np.array(prior), held_out
