"""What there is in words: captions of the Horizon world, and what each of them states.

    text, stated = describe(scene.attributes, rng)
    # "a small red house on green grass at night", {"sky": "night", "ground": "grass", ...}

A caption first decides what to state, then how. What is present is stated more often than what is
absent. Words for what is no attribute (a palm tree, stars) are used only where they are true. So a
caption is true, and lower-case ASCII of at most 40 words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from ldm.worlds.distribution import ATTRIBUTES

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
_NAMEABLE = ("house", "light", "tree")

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


def describe(
    names: Mapping[str, str], rng: np.random.Generator, keep: Collection[str] | None = None
) -> tuple[str, dict[str, str]]:
    """A caption of a scene with these names, and what it states: `{attribute: value}`.

    `names` gives every attribute. A house that is named without its colour, or a sun, moon or tree
    without its side, has the value `SOME`. Without `keep` the choice is random; with it exactly
    those attributes are stated, absent things included ("no house"), though a moon tells the night
    by the way.

    Raises:
        ValueError: `keep` holds an unknown attribute, or nothing.
    """
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
    """What a random caption states; the ground or the sky, where it would state nothing."""
    said: dict[str, str] = {}
    for name, (present, absent) in STATED.items():
        value = names[name]
        part_of_house = name in ("house_position", "house_size")
        if part_of_house and "house" not in said:
            continue
        if rng.random() < (absent if value == "none" else present):
            said[name] = value
        elif name in _NAMEABLE and value != "none" and rng.random() < NAMED:
            said[name] = SOME
    if not said:
        name = "ground" if rng.random() < 0.5 else "sky"
        said[name] = names[name]
    return said


def chances(stated: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """How the probability that a random caption states exactly this depends on the scene.

    It is a product of one factor for each attribute, and these are the factors of all values:
    `{attribute: {value: factor}}`. They follow `_choose`.

    Raises:
        ValueError: an attribute or a value is unknown.
    """
    for name, value in stated.items():
        if name not in ATTRIBUTES:
            raise ValueError(f"unknown {name!r}: a caption states {', '.join(ATTRIBUTES)}")
        if value not in (*ATTRIBUTES[name], *([SOME] if name in _NAMEABLE else [])):
            raise ValueError(f"no caption states the {name} {value!r}")

    def factor(name: str, value: str) -> float:
        said, chance = stated.get(name), STATED[name][value == "none"]
        if name in ("house_position", "house_size") and "house" not in stated:
            return float(said is None)
        if said == value:
            return chance
        if name in _NAMEABLE and value != "none" and said in (SOME, None):
            return (1 - chance) * (NAMED if said == SOME else 1 - NAMED)
        return 1 - chance if said is None else 0.0

    factors = {k: {value: factor(k, value) for value in values} for k, values in ATTRIBUTES.items()}
    # What would state nothing states the ground or the sky, so that each alone is said oftener.
    # This ties the two together: the sky's factor is that of both.
    sky, ground = STATED["sky"][0], STATED["ground"][0]
    last_resort = (1 - sky) * (1 - ground) / 2 if stated.keys() in ({"sky"}, {"ground"}) else 0.0
    for value, is_so in factors["ground"].items():
        factors["ground"][value] = float("ground" not in stated or is_so > 0)
    for value, is_so in factors["sky"].items():
        if value == "night" and "light" in stated:  # the moon tells the night by the way
            chance = 1.0 if "sky" in stated else 0.0
        else:
            chance = sky if "sky" in stated else 1 - sky
        both = chance * (ground if "ground" in stated else 1 - ground) + last_resort
        factors["sky"][value] = both if is_so else 0.0
    return factors


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
