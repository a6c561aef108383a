"""How the Horizon world is distributed: exactly, and written down here.

A scene is first a handful of *names* (the sky, the ground, a house, ...), then a handful of
*numbers* drawn given the names. Sea or land and sky meet at a horizon of Gaussian height.

**Coordinates.** `x` runs from 0 (left) to 1 (right) and `y` from 0 (bottom) to 1 (top), so lengths
are fractions of the picture's width. Nothing depends on the number of pixels.

**Names.** `sky`, `light` (the sun, or at night the moon) and `horizon` are uniform over their three
values and `ground` over its four. On the sea there is neither house nor tree. On land `house` is
"none" with probability 0.35, else uniform over its four colours; `house_position` and `house_size`
are uniform where there is a house and "none" where there is not; `tree` is uniform over its three
values.

**Numbers.** Given the names each is an independent Gaussian, redrawn until it lies within three
standard deviations of its mean, so that no two names overlap. `(mean, sd)` by name, with R(m) for
"m on the left, 1 - m on the right":

| number         | given the names                                                                |
| -------------- | ------------------------------------------------------------------------------ |
| horizon_height | low (0.30, 0.015), middle (0.46, 0.015), high (0.62, 0.015)                    |
| light_x        | (R(0.17), 0.016)                                                               |
| light_y        | (0.86, 0.012); where the sun sets over a free side (no house or tree on it),   |
|                | low (0.42, 0.012), middle (0.58, 0.012), high (0.74, 0.012)                    |
| house_x        | middle (0.50, 0.012), else (R(0.25), 0.012), or (R(0.32), 0.012) beside a tree |
| house_y        | the foot of the house: (0.165, 0.008), (0.25, 0.008), (0.335, 0.008) by horizon|
| house_width    | small (0.22, 0.008), large (0.36, 0.008)                                       |
| tree_x         | (R(0.15), 0.014), or (R(0.08), 0.007) beside a house                           |
| tree_height    | (0.31, 0.012)                                                                  |
| tint           | (0, 1): how cool or warm the colours are                                       |

The sea ends exactly at horizon_height; the ridge of the land swings around it by at most 0.024.
The numbers of a thing that is not there are 0. Two more are uniform on [0, 1): `drift`, how far
clouds and stars have wandered, and `roll`, the phase of the hills, dunes and waves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sky": ("day", "sunset", "night"),
    "light": ("none", "left", "right"),
    "horizon": ("low", "middle", "high"),
    "ground": ("grass", "sand", "snow", "sea"),
    "house": ("none", "red", "blue", "white", "yellow"),
    "house_position": ("none", "left", "middle", "right"),
    "house_size": ("none", "small", "large"),
    "tree": ("none", "left", "right"),
}

# Combinations that no training picture shows: can a model that knows the parts compose them?
HELD_OUT: tuple[dict[str, str], ...] = (
    {"house": "blue", "ground": "sand"},
    {"house": "yellow", "sky": "night"},
    {"house": "white", "house_position": "right", "ground": "snow"},
)

HOUSE_PROBABILITY = 0.65  # of a house, where there is land
TRUNCATION = 3.0  # standard deviations: no number is drawn further from its mean
MAX_DRAWS = 20_000  # of names to go with fixed numbers; the rarest that exist are 1 draw in 1,000

UNIFORM = ("drift", "roll")


@dataclass(frozen=True)
class Parameters:
    """One draw: eight names, then eleven numbers. All that is painted or told follows from them."""

    sky: str
    light: str
    horizon: str
    ground: str
    house: str
    house_position: str
    house_size: str
    tree: str
    horizon_height: float
    light_x: float
    light_y: float
    house_x: float
    house_y: float
    house_width: float
    tree_x: float
    tree_height: float
    tint: float
    drift: float
    roll: float

    @property
    def attributes(self) -> dict[str, str]:
        """The names, in the order of `ATTRIBUTES`; "none" for what is absent."""
        return {name: getattr(self, name) for name in ATTRIBUTES}

    @property
    def held_out(self) -> bool:
        """Whether the scene shows one of the `HELD_OUT` combinations."""
        return is_held_out(self.attributes)


def continuous(names: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """The Gaussian numbers of a scene with these names: `{number: (mean, sd)}`.

    `names` gives every attribute. The number of a thing that is absent is (0, 0).
    """
    level = ATTRIBUTES["horizon"].index(names["horizon"])
    absent = (0.0, 0.0)

    def side(value: str, left: float) -> float:
        return left if value == "left" else 1.0 - left

    numbers = {
        "horizon_height": ((0.30, 0.46, 0.62)[level], 0.015),
        "light_x": absent,
        "light_y": absent,
        "house_x": absent,
        "house_y": absent,
        "house_width": absent,
        "tree_x": absent,
        "tree_height": absent,
        "tint": (0.0, 1.0),
    }

    light, place, tree = names["light"], names["house_position"], names["tree"]
    if light != "none":
        # Low beside a house or a tree, the setting sun would hide behind it.
        sets = names["sky"] == "sunset" and light not in (place, tree)
        numbers["light_x"] = (side(light, 0.17), 0.016)
        numbers["light_y"] = ((0.42, 0.58, 0.74)[level] if sets else 0.86, 0.012)
    if names["house"] != "none":
        shared = place == tree  # both on one side: the house makes room
        x = 0.5 if place == "middle" else side(place, 0.32 if shared else 0.25)
        numbers["house_x"] = (x, 0.012)
        numbers["house_y"] = ((0.165, 0.25, 0.335)[level], 0.008)
        numbers["house_width"] = ({"small": 0.22, "large": 0.36}[names["house_size"]], 0.008)
    if tree != "none":
        numbers["tree_x"] = (
            (side(tree, 0.08), 0.007) if tree == place else (side(tree, 0.15), 0.014)
        )
        numbers["tree_height"] = (0.31, 0.012)
    return numbers


@cache
def all_names() -> tuple[tuple[dict[str, str], float], ...]:
    """Every possible (sky, ground, house, position, size, tree) with its probability."""
    table: list[tuple[dict[str, str], float]] = []
    for sky, ground in product(ATTRIBUTES["sky"], ATTRIBUTES["ground"]):
        weight = 1.0 / (len(ATTRIBUTES["sky"]) * len(ATTRIBUTES["ground"]))
        houses = [(("none", "none", "none"), 1.0)]
        trees = [("none", 1.0)]
        if ground != "sea":
            built = list(
                product(
                    ATTRIBUTES["house"][1:],
                    ATTRIBUTES["house_position"][1:],
                    ATTRIBUTES["house_size"][1:],
                )
            )
            houses = [(("none", "none", "none"), 1.0 - HOUSE_PROBABILITY)]
            houses += [(h, HOUSE_PROBABILITY / len(built)) for h in built]
            trees = [(t, 1.0 / len(ATTRIBUTES["tree"])) for t in ATTRIBUTES["tree"]]
        for (house, p), (tree, q) in product(houses, trees):
            names = {"sky": sky, "ground": ground, "house": house[0], "tree": tree}
            names |= {"house_position": house[1], "house_size": house[2]}
            table.append((names, weight * p * q))
    return tuple(table)


def is_held_out(names: Mapping[str, str]) -> bool:
    """Whether these names hold one of the `HELD_OUT` combinations."""
    return any(all(names[k] == v for k, v in case.items()) for case in HELD_OUT)


@lru_cache(maxsize=4096)
def _choices(
    fixed: frozenset[tuple[str, str]], training: bool
) -> tuple[tuple[dict[str, str], ...], npt.NDArray[np.float64]]:
    """The rows of `all_names` that agree with `fixed`, and their cumulative probability."""
    wanted = dict(fixed)
    rows = [
        (names, p)
        for names, p in all_names()
        if all(names.get(k, v) == v for k, v in wanted.items())
    ]
    if not rows:
        raise ValueError(_why_impossible(wanted))
    if training:
        rows = [(names, p) for names, p in rows if not is_held_out(names)]
        if not rows:
            said = ", ".join(f"{k}={v!r}" for k, v in sorted(wanted.items()))
            raise ValueError(f"{said} is held out of the training scenes")
    cumulative = np.cumsum([p for _, p in rows])
    return tuple(names for names, _ in rows), cumulative / cumulative[-1]


def _why_impossible(fixed: Mapping[str, str]) -> str:
    """One line on why no scene has these names."""
    built = [k for k in ("house", "house_position", "house_size") if fixed.get(k, "none") != "none"]
    missing = [k for k in ("house", "house_position", "house_size") if fixed.get(k) == "none"]
    if built and missing:
        return f"{missing[0]}='none' means no house, but {built[0]}={fixed[built[0]]!r} needs one"
    if built:
        return "a house cannot stand on the sea"
    return "a tree cannot stand on the sea"


def _truncated(rng: np.random.Generator, mean: float, sd: float) -> float:
    """A Gaussian number, redrawn until it lies within `TRUNCATION` standard deviations."""
    if sd == 0.0:
        return mean
    while True:
        z = rng.standard_normal()
        if abs(z) <= TRUNCATION:
            return float(mean + sd * z)


def draw(
    rng: np.random.Generator, fixed: Mapping[str, Any], *, training: bool = False
) -> Parameters:
    """Names first, then numbers given the names, under what is `fixed`; for `training` without the
    `HELD_OUT` combinations.

    Raises:
        ValueError: a fixed value is unknown or impossible, or held out.
    """
    names = {k: v for k, v in fixed.items() if k in ATTRIBUTES}
    numbers = {k: v for k, v in fixed.items() if k not in ATTRIBUTES}
    known = [*continuous(dict.fromkeys(ATTRIBUTES, "none") | {"horizon": "low"}), *UNIFORM]
    for key, value in names.items():
        if value not in ATTRIBUTES[key]:
            raise ValueError(f"{key} must be one of {', '.join(ATTRIBUTES[key])}, not {value!r}")
    for key, value in numbers.items():
        if key not in known:
            raise ValueError(f"unknown {key!r}: a scene has {', '.join([*ATTRIBUTES, *known])}")
        if not isinstance(value, (int, float, np.integer, np.floating)):
            raise ValueError(f"{key} must be a number, not {value!r}")
        if key in UNIFORM and not 0.0 <= value < 1.0:
            raise ValueError(f"{key} must lie in [0, 1), not {value}")

    rows, cumulative = _choices(frozenset(names.items()), training)
    # A fixed number restricts the names too: draw names until it lies in the range they allow.
    for _ in range(MAX_DRAWS):
        row = rows[min(int(np.searchsorted(cumulative, rng.random())), len(rows) - 1)]
        drawn = {
            key: names.get(key) or row.get(key) or str(rng.choice(values))
            for key, values in ATTRIBUTES.items()
        }
        gaussians = continuous(drawn)
        if all(
            abs(numbers[k] - mean) <= TRUNCATION * sd + 1e-9
            for k, (mean, sd) in gaussians.items()
            if k in numbers
        ):
            break
    else:
        given = ", ".join(f"{k}={v}" for k, v in numbers.items())
        raise ValueError(
            f"{given} lies outside what the names allow: see ldm.worlds.distribution.continuous"
        )

    values = {k: _truncated(rng, mean, sd) for k, (mean, sd) in gaussians.items()}
    values |= {k: float(rng.random()) for k in UNIFORM}
    values |= {k: float(v) for k, v in numbers.items()}
    return Parameters(**drawn, **values)  # type: ignore[arg-type]
