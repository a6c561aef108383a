"""The Horizon world is distributed as its docstring says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ldm.worlds import distribution
from ldm.worlds.distribution import ATTRIBUTES, HELD_OUT, TRUNCATION, continuous
from ldm.worlds.scenes import Scene, training_scene
from tests.worlds.drawn import worlds


def close(count: int, total: int, p: float) -> bool:
    """Within five standard deviations of a binomial: one such check in two million fails."""
    return abs(count - total * p) <= 5 * float(np.sqrt(total * p * (1 - p))) + 1e-9


@pytest.mark.parametrize("name", ["sky", "light", "horizon", "ground"])
def test_free_names_are_uniform(name: str) -> None:
    counts = Counter(scene.attributes[name] for scene in worlds())
    assert set(counts) == set(ATTRIBUTES[name])
    for count in counts.values():
        assert close(count, len(worlds()), 1 / len(ATTRIBUTES[name]))


def test_houses_and_trees_stand_on_land_as_often_as_stated() -> None:
    sea = [s for s in worlds() if s.ground == "sea"]
    assert all(s.house == s.house_position == s.house_size == s.tree == "none" for s in sea)
    land = [s for s in worlds() if s.ground != "sea"]
    houses = [s for s in land if s.house != "none"]
    assert close(len(houses), len(land), 0.65)
    for name in ("house", "house_position", "house_size"):
        counts = Counter(s.attributes[name] for s in houses)
        assert set(counts) == set(ATTRIBUTES[name]) - {"none"}
        for count in counts.values():
            assert close(count, len(houses), 1 / len(counts))
    for count in Counter(s.tree for s in land).values():
        assert close(count, len(land), 1 / 3)


def test_numbers_are_truncated_gaussians_given_the_names() -> None:
    scores: dict[str, list[float]] = {}
    for scene in worlds():
        for number, (mean, sd) in continuous(scene.attributes).items():
            value = getattr(scene, number)
            if sd == 0.0:
                assert value == mean == 0.0
            else:
                scores.setdefault(number, []).append((value - mean) / sd)
    assert len(scores) == 9
    for number, z in scores.items():
        assert max(map(abs, z)) <= TRUNCATION
        # A standard Gaussian truncated at 3 has mean 0 and sd 0.9866. Standard errors are
        # 1 / sqrt(n) and about 0.7 / sqrt(n): allow five.
        assert abs(np.mean(z)) < 5 / len(z) ** 0.5, number
        assert abs(np.std(z) - 0.9866) < 3.5 / len(z) ** 0.5, number


# The table of the module's docstring, in full: (number, the names it depends on, mean, sd).
STATED_NUMBERS: list[tuple[str, dict[str, str], float, float]] = [
    ("horizon_height", {"horizon": "low"}, 0.30, 0.015),
    ("horizon_height", {"horizon": "middle"}, 0.46, 0.015),
    ("horizon_height", {"horizon": "high"}, 0.62, 0.015),
    ("light_x", {"light": "left"}, 0.17, 0.016),
    ("light_x", {"light": "right"}, 0.83, 0.016),
    ("light_y", {"light": "left", "sky": "day"}, 0.86, 0.012),
    ("light_y", {"light": "right", "sky": "night"}, 0.86, 0.012),
    ("light_y", {"light": "left", "sky": "sunset", "ground": "sea", "horizon": "low"}, 0.42, 0.012),
    ("light_y", {"light": "left", "sky": "sunset", "tree": "none", "house": "none",
                 "horizon": "middle"}, 0.58, 0.012),
    ("light_y", {"light": "right", "sky": "sunset", "tree": "left", "house_position": "middle",
                 "horizon": "high"}, 0.74, 0.012),
    ("light_y", {"light": "left", "sky": "sunset", "tree": "left"}, 0.86, 0.012),
    ("light_y", {"light": "right", "sky": "sunset", "house_position": "right"}, 0.86, 0.012),
    ("house_x", {"house_position": "left", "tree": "none"}, 0.25, 0.012),
    ("house_x", {"house_position": "middle"}, 0.50, 0.012),
    ("house_x", {"house_position": "right", "tree": "left"}, 0.75, 0.012),
    ("house_x", {"house_position": "right", "tree": "right"}, 0.68, 0.012),
    ("house_y", {"house": "red", "horizon": "low"}, 0.165, 0.008),
    ("house_y", {"house": "red", "horizon": "middle"}, 0.25, 0.008),
    ("house_y", {"house": "red", "horizon": "high"}, 0.335, 0.008),
    ("house_width", {"house_size": "small"}, 0.22, 0.008),
    ("house_width", {"house_size": "large"}, 0.36, 0.008),
    ("tree_x", {"tree": "left", "house_position": "middle"}, 0.15, 0.014),
    ("tree_x", {"tree": "right", "house": "none"}, 0.85, 0.014),
    ("tree_x", {"tree": "left", "house_position": "left"}, 0.08, 0.007),
    ("tree_height", {"tree": "left"}, 0.31, 0.012),
    ("tint", {}, 0.0, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("number", "names", "mean", "sd"), STATED_NUMBERS)
def test_means_and_spreads_are_those_of_the_docstring(
    number: str, names: dict[str, str], mean: float, sd: float
) -> None:
    rng = np.random.default_rng(10)
    n = 400
    z = (np.array([getattr(Scene.sample(rng, **names), number) for _ in range(n)]) - mean) / sd
    # Five standard errors: 1 / sqrt(n) of the mean, 0.7 / sqrt(n) of the standard deviation.
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.std() - 0.9866) < 3.5 / n**0.5


def test_what_is_absent_has_no_numbers() -> None:
    for scene in worlds():
        for name, numbers in (
            ("light", ("light_x", "light_y")),
            ("house", ("house_x", "house_y", "house_width")),
            ("tree", ("tree_x", "tree_height")),
        ):
            if scene.attributes[name] == "none":
                assert all(getattr(scene, number) == 0.0 for number in numbers)
            else:
                assert all(getattr(scene, number) > 0.0 for number in numbers)


def test_drift_and_roll_are_uniform() -> None:
    for number in ("drift", "roll"):
        values = np.array([getattr(s, number) for s in worlds()])
        assert values.min() >= 0 and values.max() < 1
        assert abs(values.mean() - 0.5) < 5 * (1 / 12 / len(values)) ** 0.5


def test_names_never_overlap() -> None:
    def span(name: str, number: str, value: str) -> tuple[float, float]:
        values = [getattr(s, number) for s in worlds() if s.attributes[name] == value]
        return min(values), max(values)

    for name, number, order in (
        ("horizon", "horizon_height", ("low", "middle", "high")),
        ("house_position", "house_x", ("left", "middle", "right")),
        ("house_size", "house_width", ("small", "large")),
        ("light", "light_x", ("left", "right")),
        ("tree", "tree_x", ("left", "right")),
    ):
        spans = [span(name, number, value) for value in order]
        for (_, high), (low, _) in pairwise(spans):
            assert low - high > 0.05, number


def test_nothing_leaves_the_picture_or_hides_the_light() -> None:
    for scene in worlds():
        if scene.house != "none":
            assert scene.house_x - 0.52 * scene.house_width > 0.0
            assert scene.house_x + 0.52 * scene.house_width < 1.0
            assert scene.house_y < scene.horizon_height
        if scene.light != "none":
            assert scene.light_y + 0.07 < 1.0 and scene.light_y - 0.07 > scene.horizon_height - 0.05


def test_conditioning_is_exact() -> None:
    rng = np.random.default_rng(1)
    n = 2000
    # P(sea | no tree) = 1/4 / (1/4 + 3/4 * 1/3) = 1/2.
    counts = Counter(Scene.sample(rng, tree="none").ground for _ in range(n))
    assert close(counts["sea"], n, 0.5)
    counts = Counter(Scene.sample(rng, house="red").ground for _ in range(n))
    assert counts["sea"] == 0
    assert close(counts["snow"], n, 1 / 3)


def test_fixed_is_honoured() -> None:
    rng = np.random.default_rng(2)
    for scene in worlds()[:150]:
        assert Scene.sample(rng, **scene.attributes).attributes == scene.attributes
    for _ in range(50):
        scene = Scene.sample(rng, horizon_height=0.47, sky="night")
        assert scene.horizon_height == 0.47 and scene.horizon == "middle" and scene.sky == "night"
        scene = Scene.sample(rng, house_x=0.5, drift=0.25)
        assert scene.house_position == "middle" and scene.drift == 0.25
    names = worlds()[0].attributes
    numbers = {k: getattr(worlds()[0], k) for k in continuous(names)} | {"drift": 0.5, "roll": 0.5}
    exact = Scene.sample(rng, **names, **numbers)
    assert exact == replace(worlds()[0], drift=0.5, roll=0.5)


def test_fixed_numbers_may_be_of_numpy() -> None:
    rng = np.random.default_rng(11)
    scene = Scene.sample(rng, tint=np.float32(0.5), drift=np.float64(0.25), roll=np.int64(0))
    assert (scene.tint, scene.drift, scene.roll) == (0.5, 0.25, 0.0)


def test_fixed_numbers_that_few_names_allow_are_found() -> None:
    """A scene in a thousand: a large house beside a tree, a sun that sets low on the other side."""
    rng = np.random.default_rng(12)
    scene = Scene.sample(rng, house_x=0.32, house_width=0.36, light_y=0.42)
    assert scene.tree == scene.house_position == "left" and scene.house_size == "large"
    assert (scene.sky, scene.light, scene.horizon) == ("sunset", "right", "low")


def test_the_same_generator_draws_the_same_scenes() -> None:
    one, two = np.random.default_rng(3), np.random.default_rng(3)
    assert [Scene.sample(one) for _ in range(9)] == [Scene.sample(two) for _ in range(9)]


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"house": "red", "ground": "sea"}, "a house cannot stand on the sea"),
        ({"house_size": "large", "ground": "sea"}, "a house cannot stand on the sea"),
        ({"tree": "left", "ground": "sea"}, "a tree cannot stand on the sea"),
        ({"house": "none", "house_size": "small"}, "needs one"),
        ({"house": "green"}, "house must be one of none, red, blue, white, yellow"),
        ({"weather": "rain"}, "unknown 'weather'"),
        ({"horizon_height": 0.9}, "outside"),
        ({"horizon_height": 0.3, "horizon": "high"}, "outside"),
        ({"drift": 1.5}, "drift must lie in"),
        ({"tint": "warm"}, "tint must be a number"),
        ({"tint": float("nan")}, "outside"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    fixed: dict[str, str | float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "MAX_DRAWS", 200)
    for draw in (Scene.sample, training_scene):
        with pytest.raises(ValueError, match=message) as error:
            draw(np.random.default_rng(0), **fixed)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- held out


def test_training_scenes_hold_out_what_they_say() -> None:
    def missing(s: Scene) -> bool:
        """Held out, spelled out."""
        return (
            (s.house == "blue" and s.ground == "sand")
            or (s.house == "yellow" and s.sky == "night")
            or (s.house == "white" and s.house_position == "right" and s.ground == "snow")
        )

    rng = np.random.default_rng(4)
    assert not any(missing(training_scene(rng)) for _ in range(3000))
    assert all(s.held_out == missing(s) for s in worlds())
    # The parts of what is held out are all there.
    assert any(training_scene(rng, house="white", ground="snow").tree == "left" for _ in range(50))
    assert training_scene(rng, house="yellow", sky="sunset").house == "yellow"
    assert not any(training_scene(rng, house="blue").ground == "sand" for _ in range(200))
    assert 0.02 < np.mean([s.held_out for s in worlds()]) < 0.2
    for case in HELD_OUT:
        assert Scene.sample(rng, **case).held_out
        with pytest.raises(ValueError, match="held out"):
            training_scene(rng, **case)
