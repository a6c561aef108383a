"""What is there is counted: one where there is one, and two where a model drew two."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

import ldm
from ldm.pipeline import TextToImage
from ldm.worlds.possible import LIMIT, fit, impossible
from ldm.worlds.reader import count, read
from ldm.worlds.scenes import Scene
from tests.binomial import fewest
from tests.worlds.doubled import copies, pasted

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def horizon() -> TextToImage:
    return ldm.load(device="cpu", dtype=torch.float32)


def decoded(pipe: TextToImage, scene: Scene) -> Pixels:
    """The scene as Horizon's autoencoder gives it back."""
    (image,) = pipe.decode(pipe.encode(scene.render(pipe.config.image_size)))
    return np.asarray(image)


def there(scene: Scene) -> dict[str, int]:
    """How many of each the scene shows."""
    return {
        "house": int(scene.house != "none"),
        "tree": int(scene.tree != "none"),
        "sun": int(scene.light != "none" and scene.sky != "night"),
        "moon": int(scene.light != "none" and scene.sky == "night"),
    }


# --------------------------------------------------------------------------------------- count


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("thing", ["house", "tree", "sun", "moon"])
def test_counts_what_is_pasted(thing: str, number: int) -> None:
    nothing = {"house": 0, "tree": 0, "sun": 0, "moon": 0}
    for seed in range(2):
        assert count(copies(thing, number, seed)) == nothing | {thing: number}


def test_counts_one_of_each_in_rendered_scenes() -> None:
    rng = np.random.default_rng(51)
    scenes = [Scene.sample(rng) for _ in range(30)]
    right = sum(count(scene.render(64)) == there(scene) for scene in scenes)
    assert right >= fewest(len(scenes), 0.999)


@pytest.mark.parametrize("number", [10, pytest.param(2000, marks=pytest.mark.slow)])
def test_seldom_sees_double_after_encoding_and_decoding(horizon: TextToImage, number: int) -> None:
    """Two of 2,000 may be doubled that are not."""
    rng = np.random.default_rng(52)
    doubled = sum(
        max(count(decoded(horizon, Scene.sample(rng))).values()) > 1 for _ in range(number)
    )
    assert doubled <= number - fewest(number, 0.999) if number < 2000 else doubled <= 2


def test_a_tree_half_hidden_by_a_house_is_a_tree() -> None:
    rng = np.random.default_rng(53)
    for _ in range(5):
        scene = Scene.sample(rng, house_position="right", house_size="large", tree="right")
        assert count(scene.render(64)) == there(scene)


def test_noise_holds_nothing_to_count() -> None:
    rng = np.random.default_rng(54)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(12)]
    empty = sum(not any(count(pixels).values()) for pixels in noise)
    assert empty >= fewest(len(noise), 0.93)


# ------------------------------------------------------------------------------------ possible


def test_a_scene_is_found_again_from_its_picture() -> None:
    rng = np.random.default_rng(55)
    for _ in range(4):
        scene = Scene.sample(rng, house="red", house_position="left", tree="right", sky="day")
        found = fit(scene.render(128))
        assert found.scene.attributes == scene.attributes and found.residual < LIMIT / 2
        for name, sd in (("horizon_height", 0.015), ("house_x", 0.012), ("tree_x", 0.014)):
            assert abs(getattr(found.scene, name) - getattr(scene, name)) < sd / 2


@pytest.mark.parametrize("number", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_true_scenes_are_possible_after_encoding_and_decoding(
    horizon: TextToImage, number: int
) -> None:
    rng = np.random.default_rng(56)
    possible = sum(not impossible(decoded(horizon, Scene.sample(rng))) for _ in range(number))
    assert possible >= fewest(number, 0.999)


@pytest.mark.parametrize("thing", ["house", "tree", "sun", "moon"])
def test_two_of_a_thing_are_impossible(thing: str) -> None:
    for seed in range(2):
        assert not impossible(copies(thing, 1, seed))
        assert fit(copies(thing, 2, seed)).residual > 2 * LIMIT


def test_half_a_house_and_a_wrong_place_are_impossible() -> None:
    rng = np.random.default_rng(57)
    fixed = {"sky": "day", "ground": "grass", "house": "red", "tree": "none", "light": "none"}
    scene = Scene.sample(rng, **fixed, house_position="middle", house_size="large")
    empty = Scene(**{**vars(scene), "house": "none", "house_width": 0.0})
    pixels, bare = np.array(scene.render(128)), np.asarray(empty.render(128))
    pixels[:, 64:] = bare[:, 64:]
    assert impossible(pixels) and not impossible(bare)
    # Six standard deviations to one side: no scene's house stands there.
    moved = Scene(**{**vars(scene), "house_x": scene.house_x + 0.1})
    assert read(moved.render(128))["house"] == "red" and impossible(moved.render(128))
    floating = pasted(empty, [Scene(**{**vars(scene), "house_y": scene.house_y + 0.1})], "house")
    assert impossible(floating)
