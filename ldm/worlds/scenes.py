"""The Horizon world: pictures whose distribution is known exactly.

Sea or land and sky meet at a horizon of Gaussian height. A scene is first a handful of *names*
(the sky, the ground, a house, ...), then a handful of *numbers* drawn given the names. Everything
visible follows from these two: `Scene.render` paints them (how is told in `ldm.worlds.painting`),
`Scene.masks` says which pixel belongs to what, and `Scene.describe` puts them into words.

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

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ldm.worlds import painting

if TYPE_CHECKING:
    from PIL.Image import Image

Mask = npt.NDArray[np.bool_]

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

_UNIFORM = ("drift", "roll")


# ---------------------------------------------------------------------------- the distribution


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
def _all_names() -> tuple[tuple[dict[str, str], float], ...]:
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


def _is_held_out(names: Mapping[str, str]) -> bool:
    return any(all(names[k] == v for k, v in case.items()) for case in HELD_OUT)


@lru_cache(maxsize=4096)
def _choices(
    fixed: frozenset[tuple[str, str]], training: bool
) -> tuple[tuple[dict[str, str], ...], npt.NDArray[np.float64]]:
    """The rows of `_all_names` that agree with `fixed`, and their cumulative probability."""
    wanted = dict(fixed)
    rows = [
        (names, p)
        for names, p in _all_names()
        if all(names.get(k, v) == v for k, v in wanted.items())
    ]
    if not rows:
        raise ValueError(_why_impossible(wanted))
    if training:
        rows = [(names, p) for names, p in rows if not _is_held_out(names)]
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


def _draw(rng: np.random.Generator, fixed: Mapping[str, Any], training: bool) -> Scene:
    """Names first, then numbers given the names, under what is `fixed`."""
    names = {k: v for k, v in fixed.items() if k in ATTRIBUTES}
    numbers = {k: v for k, v in fixed.items() if k not in ATTRIBUTES}
    known = [*continuous(dict.fromkeys(ATTRIBUTES, "none") | {"horizon": "low"}), *_UNIFORM]
    for key, value in names.items():
        if value not in ATTRIBUTES[key]:
            raise ValueError(f"{key} must be one of {', '.join(ATTRIBUTES[key])}, not {value!r}")
    for key, value in numbers.items():
        if key not in known:
            raise ValueError(f"unknown {key!r}: a scene has {', '.join([*ATTRIBUTES, *known])}")
        if not isinstance(value, (int, float, np.integer, np.floating)):
            raise ValueError(f"{key} must be a number, not {value!r}")
        if key in _UNIFORM and not 0.0 <= value < 1.0:
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
        raise ValueError(f"{given} lies outside what the names allow: see ldm.worlds.scenes.continuous")

    values = {k: _truncated(rng, mean, sd) for k, (mean, sd) in gaussians.items()}
    values |= {k: float(rng.random()) for k in _UNIFORM}
    values |= {k: float(v) for k, v in numbers.items()}
    return Scene(**drawn, **values)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """One picture of the Horizon world: eight names, then eleven numbers (see the module)."""

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

    @staticmethod
    def sample(rng: np.random.Generator, **fixed: str | float) -> Scene:
        """Draw from the whole world, given any names or numbers in `fixed`.

        Fixed names condition the distribution exactly: `house="red"` never meets the sea. A fixed
        number conditions the names only on allowing it (`continuous`): with `house_x=0.5` the house
        is in the middle. Raises ValueError for unknown or impossible values, as for a house on the
        sea.
        """
        return _draw(rng, fixed, training=False)

    @property
    def attributes(self) -> dict[str, str]:
        """The names, in the order of `ATTRIBUTES`; "none" for what is absent."""
        return {name: getattr(self, name) for name in ATTRIBUTES}

    @property
    def held_out(self) -> bool:
        """Whether the scene shows one of the `HELD_OUT` combinations."""
        return _is_held_out(self.attributes)

    def render(self, size: int = 128) -> Image:
        """The scene as an RGB picture of size x size pixels. Raises ValueError below 8 pixels."""
        from PIL import Image

        pixels = painting.paint(self, size)
        return Image.fromarray((np.clip(pixels, 0.0, 1.0) * 255 + 0.5).astype(np.uint8))

    def masks(self, size: int = 128) -> dict[str, Mask]:
        """Which pixel shows what: `{name: (size, size) bool}`, disjoint and covering everything.

        "sky" (with its clouds, stars and glow) and "ground" (with its shadows) are always there;
        "sun" or "moon", "house" and "tree" are there when the scene has them. Raises ValueError
        below 8 pixels.
        """
        shapes = painting.silhouettes(self, painting.Grid.of(size))
        shapes = {"sky": np.ones((size, size), np.float32)} | shapes
        label = np.zeros((size, size), np.int8)
        for index, alpha in enumerate(shapes.values()):  # in the order of painting: back to front
            label[alpha >= 0.5] = index
        return {name: label == index for index, name in enumerate(shapes)}

    def describe(
        self, rng: np.random.Generator, keep: Collection[str] | None = None
    ) -> tuple[str, dict[str, str]]:
        """A caption, and what it states: `{attribute: value}`.

        A house that is named without its colour, or a sun, moon or tree without its side, has the
        value `SOME`. Without `keep` the choice is random; with it exactly those attributes are
        stated, absent things included ("no house"), though a moon tells the night by the way.

        A caption is true, and lower-case ASCII of at most 40 words. Raises ValueError when `keep`
        holds an unknown attribute, or nothing.
        """
        return _describe(self, rng, keep)

    def caption(self, rng: np.random.Generator) -> str:
        """The text of `describe(rng)`."""
        return self.describe(rng)[0]


def training_scene(rng: np.random.Generator, **fixed: str | float) -> Scene:
    """Like `Scene.sample`, from the world without its `HELD_OUT` combinations.

    Raises ValueError where `Scene.sample` does, and when `fixed` itself is held out.
    """
    return _draw(rng, fixed, training=True)


# ------------------------------------------------------------------------------------- captions
#
# A caption first decides what to state, then how. What is present is stated more often than what is
# absent. Words for what is no attribute (a palm tree, stars) are used only where they are true.

# The probability that a caption states an attribute: where the thing is present, where it is not.
STATED: dict[str, tuple[float, float]] = {
    "sky": (0.88, 0.88),
    "ground": (0.88, 0.88),
    "house": (0.92, 0.36),
    "house_position": (0.66, 1.0),  # given that the house is stated; "no house" states all three
    "house_size": (0.66, 1.0),
    "light": (0.66, 0.36),
    "tree": (0.70, 0.36),
    "horizon": (0.45, 0.45),
}
# Where the colour of a house, or the side of a sun, moon or tree, is left open, half of the
# captions name the thing all the same: there is some.
NAMED = 0.5
SOME = "some"

_WHEN = {
    "day": ("by day", "in daylight", "during the day", "under a blue sky", "in the daytime"),
    "sunset": ("at sunset", "at sunset", "under a sunset sky", "in the evening", "at dusk"),
    "night": ("at night", "at night", "by night", "under a night sky", "under the stars"),
}
_SKY = {
    "day": ("day", "daylight", "a blue sky", "daytime"),
    "sunset": ("sunset", "a sunset sky", "an evening sky", "dusk"),
    "night": ("night", "a night sky", "a starry night", "nighttime"),
}
_GROUND = {
    "grass": ("green grass", "grass", "a green meadow", "a grassy field", "the grass"),
    "sand": ("sand", "a sandy beach", "the sand", "a beach", "sand dunes"),
    "snow": ("snow", "white snow", "a snowy field", "deep snow", "the snow"),
    "sea": ("the sea", "calm sea", "the ocean", "the calm sea", "sea"),
}
_EMPTY = {
    "grass": ("an empty meadow", "empty grass", "an empty green field"),
    "sand": ("an empty beach", "empty sand", "empty sand dunes"),
    "snow": ("an empty snowy field", "empty snow"),
    "sea": ("an empty sea", "the empty sea", "empty ocean"),
}
_TREE = {"grass": "tree", "sand": "palm tree", "snow": "fir tree"}
_SIDE = {
    "left": ("on the left", "on the left", "to the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right", "to the right", "on the right side", "at the right"),
    "middle": ("in the middle", "in the middle", "in the center", "in the centre"),
}
_SIZE = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
_HORIZON = {
    "low": ("a low horizon", "the horizon low", "a low skyline"),
    "middle": ("a middle horizon", "the horizon half way up", "the horizon at middle height"),
    "high": ("a high horizon", "the horizon high", "a high skyline"),
}


def _describe(
    scene: Scene, rng: np.random.Generator, keep: Collection[str] | None
) -> tuple[str, dict[str, str]]:
    """`Scene.describe`."""
    names = scene.attributes
    if keep is None:
        said = _choose(names, rng)
    else:
        unknown = set(keep) - set(ATTRIBUTES)
        if unknown or not keep:
            wrong = ", ".join(sorted(map(str, unknown))) or "nothing"
            raise ValueError(f"keep must hold some of {', '.join(ATTRIBUTES)}, not {wrong}")
        said = {name: names[name] for name in ATTRIBUTES if name in keep}

    parts = _phrases(names, said, rng)
    text = _sentence(parts, rng) if rng.random() < 0.65 else _list(parts, rng)
    if keep is None and names["sky"] == "night" and "light" in said:
        said["sky"] = "night"  # a moon, or its absence, says that it is night
    return text, said


def _choose(names: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    """What a random caption states; at least the ground or the sky."""
    said: dict[str, str] = {}
    for name, (present, absent) in STATED.items():
        value = names[name]
        part_of_house = name in ("house_position", "house_size")
        if part_of_house and "house" not in said:
            continue
        if rng.random() < (absent if value == "none" else present):
            said[name] = value
        elif name in ("house", "light", "tree") and value != "none" and rng.random() < NAMED:
            said[name] = SOME
    if not said.keys() & {"sky", "ground"}:
        name = "ground" if rng.random() < 0.5 else "sky"
        said[name] = names[name]
    return said


def _pick(rng: np.random.Generator, phrases: Collection[str]) -> str:
    """One of several ways to say the same."""
    return str(rng.choice(list(phrases)))


def _phrases(
    names: Mapping[str, str], said: Mapping[str, str], rng: np.random.Generator
) -> dict[str, str]:
    """What is to be said, as phrases that each stand alone: `{part of the caption: phrase}`.

    "when" and "sky" are two ways to say the same thing; a caption uses one of them.
    """
    parts: dict[str, str] = {}
    night, ground = names["sky"] == "night", names["ground"]
    if "sky" in said:
        parts["when"] = _pick(rng, _WHEN[said["sky"]])
        parts["sky"] = _pick(rng, _SKY[said["sky"]])
    if "ground" in said:
        parts["ground"] = _pick(rng, _GROUND[ground])

    if any(name in said for name in ("house", "house_position", "house_size")):
        if names["house"] == "none":
            parts["no house"] = _pick(rng, ("no house", "no house", "no houses"))
        else:
            words = [_pick(rng, _SIZE[said["house_size"]])] if "house_size" in said else []
            words += [said["house"]] if said.get("house", SOME) != SOME else []
            parts["house"] = " ".join(["a", *words, "house"])
            if "house_position" in said:
                parts["place"] = _pick(rng, _SIDE[said["house_position"]])

    if "light" in said:
        lamp, side = "moon" if night else "sun", said["light"]
        article = _pick(rng, ("the", "the", "a"))
        if side == "none":
            parts["light"] = f"no {lamp}"
        else:
            parts["light"] = _aside(f"{article} {lamp}", side, rng)
    if "tree" in said:
        known = "ground" in said and ground != "sea"
        kind, side = _pick(rng, (_TREE[ground], "tree")) if known else "tree", said["tree"]
        if side == "none":
            parts["tree"] = _pick(rng, ("no tree", "no trees"))
        else:
            parts["tree"] = _aside(f"a {kind}", side, rng)
    if "horizon" in said:
        parts["horizon"] = _pick(rng, _HORIZON[said["horizon"]])

    # The hour and the moon, or two absences, may share a word.
    if night and "sky" in said and said.get("light") == SOME and rng.random() < 0.6:
        del parts["light"]
        parts["when"], parts["sky"] = "under the moon", "a moonlit night"
    if night and "sky" in said and said.get("light") == "none" and rng.random() < 0.3:
        del parts["light"]
        parts["when"], parts["sky"] = "on a moonless night", "a moonless night"
    nothing = "no house" in parts and said.get("tree") == "none"
    if nothing and "ground" in said and rng.random() < 0.5:
        del parts["no house"], parts["tree"]
        parts["ground"] = _pick(rng, _EMPTY[ground])
    return parts


def _aside(thing: str, side: str, rng: np.random.Generator) -> str:
    """A thing and its side, where that is stated: "a tree on the left"."""
    return thing if side == SOME else f"{thing} {_pick(rng, _SIDE[side])}"


def _sentence(parts: Mapping[str, str], rng: np.random.Generator) -> str:
    """As one speaks: a red house on green grass at night with the moon on the left."""
    house, ground, when = parts.get("house", ""), parts.get("ground", ""), parts.get("when", "")
    place = parts.get("place", "")
    extras = [parts[k] for k in ("light", "tree", "horizon", "no house") if k in parts]
    rng.shuffle(extras)
    if house:
        where = [place, f"on {ground}" if ground else ""]
        if rng.random() < 0.5:
            where.reverse()
        head = " ".join(filter(None, [house, *where]))
    elif ground:
        head = ground
    else:
        return _list(parts, rng)
    if when and rng.random() < 0.25:
        head = f"{when}, {head}"
    elif when:
        head = f"{head} {when}"
    if not extras:
        return head
    if rng.random() < 0.25:
        return ", ".join([head, *extras])
    *most, last = extras
    return f"{head} with " + (f"{', '.join(most)} and {last}" if most else last)


def _list(parts: Mapping[str, str], rng: np.random.Generator) -> str:
    """As one notes things down: a small red house on the left, green grass, sunset."""
    items = [parts[k] for k in ("ground", "sky", "light", "tree", "horizon") if k in parts]
    if "no house" in parts:
        items.append(parts["no house"])
    rng.shuffle(items)
    if "house" in parts:
        first = " ".join(filter(None, [parts["house"], parts.get("place", "")]))
        items.insert(0 if rng.random() < 0.7 else int(rng.integers(len(items) + 1)), first)
    if rng.random() < 0.2:  # as people type: no articles
        items = [item.removeprefix("a ").removeprefix("the ") for item in items]
    return ", ".join(items)
