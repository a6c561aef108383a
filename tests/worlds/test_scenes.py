"""The Horizon world is what it says: its distribution, its pictures, its masks and its words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import pytest

from ldm.worlds.scenes import (
    ATTRIBUTES,
    HELD_OUT,
    SOME,
    TRUNCATION,
    Scene,
    continuous,
    training_scene,
)


@cache
def worlds() -> tuple[Scene, ...]:
    rng = np.random.default_rng(0)
    return tuple(Scene.sample(rng) for _ in range(6000))


def array(scene: Scene, size: int) -> npt.NDArray[np.float64]:
    return np.asarray(scene.render(size), np.float64)


# ----------------------------------------------------------------------------- distribution


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
def test_bad_arguments_are_told_in_one_line(fixed: dict[str, str | float], message: str) -> None:
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


# ---------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [32, 64, 100, 128, 512])
def test_any_size_shows_the_same_scene(size: int) -> None:
    for scene in worlds()[:6]:
        image = scene.render(size)
        assert image.size == (size, size) and image.mode == "RGB"
        assert image.tobytes() == scene.render(size).tobytes()
        box = array(scene, 512).reshape(size, -1, size, 512 // size, 3) if 512 % size == 0 else None
        if box is not None:
            # Only edges, waves and stars may differ, and those by little.
            assert np.abs(box.mean((1, 3)) - array(scene, size)).mean() < 2.5


def test_64_pixels_are_128_averaged() -> None:
    for scene in worlds()[:40]:
        averaged = array(scene, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
        difference = np.abs(averaged - array(scene, 64))
        assert difference.mean() < 1.0
        assert np.quantile(difference, 0.99) < 20


def test_a_picture_needs_pixels() -> None:
    with pytest.raises(ValueError, match="at least 8"):
        worlds()[0].render(4)


# ------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("size", [32, 64, 128])
def test_masks_part_the_picture(size: int) -> None:
    for scene in worlds()[:80]:
        masks = scene.masks(size)
        expected = {"sky", "ground"}
        if scene.light != "none":
            expected.add("moon" if scene.sky == "night" else "sun")
        expected |= {name for name in ("house", "tree") if scene.attributes[name] != "none"}
        assert set(masks) == expected
        assert all(mask.shape == (size, size) and mask.dtype == bool for mask in masks.values())
        assert (np.stack(list(masks.values())).sum(0) == 1).all()
        assert all(mask.any() for mask in masks.values())


def test_masks_measure_what_the_numbers_say() -> None:
    for scene in worlds()[:100]:
        masks = scene.masks(256)
        if scene.house != "none":
            across = np.flatnonzero(masks["house"].any(0))
            # The eaves are a little wider than the house: 1.04 of its width.
            assert abs((np.ptp(across) + 1) / 256 - 1.04 * scene.house_width) < 0.01
            assert abs((across.mean() + 0.5) / 256 - scene.house_x) < 0.01
        if scene.ground == "sea":
            assert abs(masks["ground"].mean() - scene.horizon_height) < 0.005


def test_land_swings_around_the_horizon() -> None:
    for scene in worlds()[:100]:
        bare = replace(scene, light="none", house="none", tree="none")  # the backdrop alone
        masks = bare.masks(128)
        assert set(masks) == {"sky", "ground"}
        tops = 1 - masks["ground"].argmax(0) / 128  # the upper edge of the ground, by column
        swing = 0.0 if scene.ground == "sea" else 0.024
        assert abs(tops - scene.horizon_height).max() <= swing + 1 / 128


def test_removing_the_house_changes_its_mask_and_its_shadow_only() -> None:
    checked = 0
    for scene in worlds()[:150]:
        if scene.house == "none" or scene.sky == "night":  # at night lamplight reaches further
            continue
        checked += 1
        without = replace(scene, house="none", house_position="none", house_size="none")
        changed = np.abs(array(scene, 128) - array(without, 128)).max(-1) > 3
        house = scene.masks(128)["house"]
        assert changed[house].mean() > 0.9
        # At an edge, and at the sharp tips of the eaves, less than half of a pixel is house.
        steps = range(-2, 3)
        around = np.any([np.roll(house, by, (0, 1)) for by in product(steps, steps)], 0)
        outside = changed & ~around
        rows, columns = np.nonzero(outside)
        y, x = 1 - (rows + 0.5) / 128, (columns + 0.5) / 128
        assert (abs(y - scene.house_y) < 0.16 * scene.house_width + 0.02).all()
        assert (abs(x - scene.house_x) < 1.3 * scene.house_width).all()
    assert checked > 30


def test_removing_the_light_changes_the_disc_most() -> None:
    for scene in worlds()[:60]:
        if scene.light == "none" or scene.ground == "sea":
            continue
        without = replace(scene, light="none", light_x=0.0, light_y=0.0)
        change = np.abs(array(scene, 64) - array(without, 64)).mean(-1)
        masks = scene.masks(64)
        disc = masks["moon" if scene.sky == "night" else "sun"]
        assert change[disc].mean() > 3 * change[masks["sky"]].mean()


# ------------------------------------------------------------------------------------- words

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
