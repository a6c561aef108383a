"""Pictures and masks of scenes show what their names and numbers say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from ldm.worlds.distribution import continuous
from ldm.worlds.scenes import Scene
from tests.worlds.drawn import worlds


@cache
def array(scene: Scene, size: int) -> npt.NDArray[np.float64]:
    return np.asarray(scene.render(size), np.float64)


# ---------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [32, 64, 100, 128, 512])
def test_any_size_shows_the_same_scene(size: int) -> None:
    for scene in worlds()[:4]:
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


def test_an_edited_scene_differs_in_what_was_asked_for_alone() -> None:
    scene = Scene.sample(
        np.random.default_rng(3), house="red", house_position="right", tree="left", ground="grass"
    )
    blue = scene.edited(house="blue")
    assert blue == replace(scene, house="blue")
    masks = scene.masks(64)
    changed = np.any(np.array(scene.render(64)) != np.array(blue.render(64)), axis=-1)
    assert changed[masks["house"]].mean() > 0.4
    assert changed[~masks["house"]].mean() < 0.02  # the house's antialiased edge


def test_a_thing_that_moves_stays_as_far_from_its_mean() -> None:
    scene = Scene.sample(np.random.default_rng(4), house="red", house_position="right", tree="none")
    moved = scene.edited(house_position="left")
    before, after = continuous(scene.attributes), continuous(moved.attributes)
    assert after["house_x"][0] != before["house_x"][0]
    for name, (mean, sd) in after.items():
        if sd:
            away = (getattr(scene, name) - before[name][0]) / before[name][1]
            assert (getattr(moved, name) - mean) / sd == pytest.approx(away)
    assert moved.edited(house_position="right").house_x == pytest.approx(scene.house_x)


def test_what_cannot_stay_without_what_was_taken_goes() -> None:
    scene = Scene.sample(np.random.default_rng(5), house="red", tree="left")
    bare = scene.edited(house="none")
    assert (bare.house_position, bare.house_size, bare.house_width) == ("none", "none", 0.0)
    assert bare.tree == "left"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"ground": "sea"}, "a house cannot stand on the sea"),
        ({"house": "green"}, "house must be one of none, red, blue, white, yellow, not 'green'"),
        ({"roof": "flat"}, "unknown 'roof'"),
    ],
)
def test_an_edit_that_no_scene_has_is_refused(names: dict[str, str], message: str) -> None:
    scene = Scene.sample(np.random.default_rng(5), house="red")
    with pytest.raises(ValueError, match=message):
        scene.edited(**names)
