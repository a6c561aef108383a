"""The law that a caption asks for is that of the scenes which such captions are told of."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from ldm.worlds.captions import SOME, chances
from ldm.worlds.distribution import ATTRIBUTES, HELD_OUT, is_held_out
from ldm.worlds.law import law
from ldm.worlds.scenes import Scene, training_scene

NO_HOUSE = {"house": "none", "house_position": "none", "house_size": "none"}


def probability(stated: dict[str, str], names: dict[str, str]) -> float:
    return math.prod(factors[names[name]] for name, factors in chances(stated).items())


@pytest.mark.parametrize(
    "fixed",
    [
        {"sky": "night", "light": "left", "house": "none", "tree": "right"},
        {"sky": "day", "light": "none", "house": "red", "tree": "none"},
        {"sky": "night", "light": "none", "ground": "sea"},
    ],
)
def test_captions_state_what_their_chances_say(fixed: dict[str, str]) -> None:
    rng = np.random.default_rng(1)
    scene, total = Scene.sample(rng, **fixed), 2000
    told = Counter(frozenset(scene.describe(rng)[1].items()) for _ in range(total))
    expected = {stated: probability(dict(stated), scene.attributes) for stated in told}
    assert min(expected.values()) > 0
    # What was told is nearly all that can be, and each as often as it should, to five sd.
    assert 0.9 < sum(expected.values()) <= 1 + 1e-9
    for stated, p in expected.items():
        assert abs(told[stated] - total * p) <= 5 * math.sqrt(total * p * (1 - p)) + 1, stated


def test_no_other_scene_could_have_been_told_so() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        scene = Scene.sample(rng)
        _, stated = scene.describe(rng)
        for names in law(stated, whole_world=True).sample(rng, 5):
            for name, value in stated.items():
                assert names[name] == value or (value == SOME and names[name] != "none")


def test_the_law_given_captions_is_that_of_the_scenes_they_are_told_of() -> None:
    """Over many captions of training scenes: what is so, less the probability that it is so."""
    rng = np.random.default_rng(3)
    differences: dict[tuple[str, ...], list[float]] = {}
    variances: Counter[tuple[str, ...]] = Counter()
    claims: list[dict[str, str]] = [
        {"house": "none"},
        {"house": "yellow"},
        {"tree": "left"},
        {"light": "none"},
        {"ground": "sea"},
        {"house": "none", "tree": "none"},
        {"house_size": "large", "light": "right"},
    ]
    for _ in range(120):
        scene = training_scene(rng)
        _, stated = scene.describe(rng)
        asked = law(stated)
        for claim in claims:
            p = asked.of(*claim).get(tuple(claim.values()), 0.0)
            so = claim.items() <= scene.attributes.items()
            differences.setdefault(tuple(claim), []).append(so - p)
            variances[tuple(claim)] += p * (1 - p)
    for claim, some in differences.items():
        assert abs(sum(some)) <= 5 * math.sqrt(variances[claim]) + 1e-9, claim


def test_silence_about_a_house_makes_it_less_likely() -> None:
    """By hand: 0.65 of scenes on land have a house, and 0.04 of their captions do not say so."""
    asked, silent = law({"ground": "grass"}, whole_world=True), 0.08 * 0.5
    house = 0.65 * silent / (0.65 * silent + 0.35 * 0.64)
    assert asked.of("house")["none",] == pytest.approx(1 - house)
    tree = 2 / 3 * 0.15 / (2 / 3 * 0.15 + 1 / 3 * 0.64)
    assert asked.of("tree")["left",] == pytest.approx(tree / 2)
    assert asked.of("house", "tree")["none", "left"] == pytest.approx((1 - house) * tree / 2)
    assert law({}, whole_world=True).of("house")["none",] == pytest.approx(0.25 + 0.75 * 0.35)


def test_training_shows_nothing_that_is_held_out() -> None:
    for stated in ({}, {"house": SOME}, {"ground": "sand"}):
        asked = law(stated)
        assert asked.held_out == 0 and not any(map(is_held_out, asked.names))
        assert asked.p.sum() == pytest.approx(1) and asked.p.min() > 0
        assert law(stated, whole_world=True).held_out > 0
    for case in HELD_OUT:
        with pytest.raises(ValueError, match="no caption of a training scene states just"):
            law(case)
        assert law(case, whole_world=True).held_out == pytest.approx(1)


def test_what_is_stated_is_closed_and_the_rest_is_open() -> None:
    asked = law({"tree": "left", "sky": "day"})  # a tree: so no sea
    assert set(asked.open) == set(ATTRIBUTES) - {"tree", "sky"}
    assert asked.of("ground").keys() == {("grass",), ("sand",), ("snow",)}
    assert law({"light": SOME}).of("sky").keys() == {("day",), ("sunset",)}  # the moon says night
    assert law(NO_HOUSE).open == ("sky", "light", "horizon", "ground", "tree")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"colour": "red"}, "unknown 'colour'"),
        ({"sky": "green"}, "no caption states the sky 'green'"),
        ({"sky": SOME}, "no caption states the sky 'some'"),
        ({"house": "none"}, "no caption of a training scene states just house='none'"),
        ({"house_position": "left"}, "no caption of a training scene"),
        ({"house": "red", "ground": "sea"}, "no caption of a training scene"),
    ],
)
def test_refuses_what_no_caption_states(stated: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        law(stated)
