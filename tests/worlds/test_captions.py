"""Captions are true, and say what they claim to say."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ldm.worlds.captions import SOME
from ldm.worlds.distribution import ATTRIBUTES
from ldm.worlds.scenes import Scene
from tests.worlds.drawn import worlds

# What a caption may say about each attribute, as regular expressions: read independently of the
# way in which captions are made.
SIDE = r"(?:on|to|at) the (left|right)"
SIZES = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large"}
WORDS: dict[str, dict[str, str]] = {
    "sky": {
        "day": r"\bday\b|daylight|daytime|blue sky",
        "sunset": r"sunset|evening|dusk",
        "night": r"night|stars|\bmoon\b",
    },
    "ground": {
        "grass": r"grass|meadow|green field",
        "sand": r"sand|beach|dunes",
        "snow": r"snow",
        "sea": r"\bsea\b|ocean",
    },
    "horizon": {
        "low": r"low (?:horizon|skyline)|horizon low",
        "middle": r"middle horizon|horizon half way up|horizon at middle height",
        "high": r"high (?:horizon|skyline)|horizon high",
    },
}
HOUSE = re.compile(r"(?:(small|little|tiny|large|big) )?(?:(red|blue|white|yellow) )?house\b")


def stated(text: str) -> dict[str, str]:
    """Every attribute that a caption states, read from its words."""
    found: dict[str, str] = {}
    for name, values in WORDS.items():
        # "blue sky" is day, yet "night sky" is not.
        matches = [value for value, pattern in values.items() if re.search(pattern, text)]
        assert len(matches) <= 1, (name, text)
        if matches:
            found[name] = matches[0]
    if re.search(r"no (?:sun|moon)\b|moonless", text):
        found["light"] = "none"
    elif match := re.search(rf"(?:sun|moon) {SIDE}", text):
        found["light"] = match[1]
    elif re.search(r"\b(?:sun|moon|moonlit)\b", text):
        found["light"] = SOME
    if re.search(r"no trees?\b|\bempty\b", text):
        found["tree"] = "none"
    elif match := re.search(rf"tree {SIDE}", text):
        found["tree"] = match[1]
    elif re.search(r"\btree\b", text):
        found["tree"] = SOME
    if re.search(r"no houses?\b|\bempty\b", text):
        found |= {"house": "none", "house_position": "none", "house_size": "none"}
    elif match := HOUSE.search(text):
        found["house"] = match[2] or SOME
        if match[1]:
            found["house_size"] = SIZES[match[1]]
        rest = re.sub(rf"(?:sun|moon|tree) {SIDE}", "", text)
        if place := re.search(r"(?:on|to|at|in) the (left|right|middle|center|centre)", rest):
            found["house_position"] = (
                place[1].replace("center", "middle").replace("centre", "middle")
            )
    return found


def assert_true(said: dict[str, str], scene: Scene) -> None:
    """What is said of a scene holds; `SOME` holds of whatever is there."""
    for name, value in said.items():
        true = scene.attributes[name]
        assert value == true or (value == SOME and true != "none"), (name, value, scene)


def test_captions_are_true_and_say_what_they_claim() -> None:
    rng = np.random.default_rng(5)
    for scene in worlds()[:4000]:
        text, said = scene.describe(rng)
        assert text == text.lower() and text.isascii() and 1 <= len(text.split()) <= 40
        assert not re.search(r"  |,,| ,|^[, ]|[, ]$", text), text
        # What is claimed is what can be read from the words, and it is true.
        assert stated(text) == said, (text, said)
        assert_true(said, scene)


def test_captions_vary() -> None:
    rng = np.random.default_rng(6)
    scene = Scene.sample(rng, house="red", ground="grass", sky="night", light="left", tree="right")
    assert len({scene.caption(rng) for _ in range(300)}) > 200


def test_captions_mention_everything_often_enough() -> None:
    rng = np.random.default_rng(7)
    told: dict[tuple[str, bool], list[bool]] = {}
    for scene in worlds()[:5000]:
        _, said = scene.describe(rng)
        for name, value in scene.attributes.items():
            told.setdefault((name, value != "none"), []).append(name in said)
    rate = {key: float(np.mean(values)) for key, values in told.items()}
    for name, low, high in (
        ("sky", 0.84, 0.93),
        ("ground", 0.84, 0.92),
        ("house", 0.93, 0.98),
        ("house_position", 0.58, 0.69),
        ("house_size", 0.58, 0.69),
        ("light", 0.80, 0.87),
        ("tree", 0.81, 0.89),
        ("horizon", 0.40, 0.50),
    ):
        assert low < rate[name, True] < high, (name, rate[name, True])
    for name in ("house", "house_position", "house_size", "light", "tree"):
        assert 0.30 < rate[name, False] < 0.41, (name, rate[name, False])


def test_keep_is_honoured() -> None:
    rng = np.random.default_rng(8)
    for scene in worlds()[:1500]:
        size = int(rng.integers(1, len(ATTRIBUTES) + 1))
        keep = {str(name) for name in rng.choice(list(ATTRIBUTES), size, replace=False)}
        text, said = scene.describe(rng, keep=keep)
        assert said == {name: scene.attributes[name] for name in keep}
        words = stated(text)
        assert_true(words, scene)
        # Some words cannot help saying more: the moon tells the night, "no house" all about it, and
        # "on the left" is said of a house.
        allowed = set(keep)
        if "light" in keep:
            allowed.add("sky")
        if keep & {"house_position", "house_size"}:
            allowed.add("house")
        if scene.house == "none" and any(name.startswith("house") for name in keep):
            allowed |= {"house", "house_position", "house_size"}
        assert keep <= set(words) <= allowed, (text, keep, words)


def test_keep_says_what_is_absent() -> None:
    rng = np.random.default_rng(9)
    scene = Scene.sample(rng, ground="sea", light="none", sky="day")
    assert "no house" in scene.describe(rng, keep={"house"})[0]
    assert "no tree" in scene.describe(rng, keep={"tree"})[0]
    assert scene.describe(rng, keep=["light"])[0] == "no sun"


@pytest.mark.parametrize("keep", [[], ["colour"]])
def test_keep_must_name_attributes(keep: list[str]) -> None:
    with pytest.raises(ValueError, match="keep must hold some of"):
        worlds()[0].describe(np.random.default_rng(0), keep=keep)
