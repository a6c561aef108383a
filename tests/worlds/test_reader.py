"""The reader gives back the names of a scene from its pixels, and invents nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from ldm.worlds.distribution import ATTRIBUTES
from ldm.worlds.reader import read
from ldm.worlds.scenes import Scene
from tests.binomial import fewest

Pixels = npt.NDArray[np.uint8]


def damaged(image: Image.Image, rng: np.random.Generator) -> Pixels:
    """Blurred by the same share of the picture at any size, then with noise of 6 grey levels."""
    radius = 0.8 if image.width == 64 else 1.5
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float64)
    noisy = pixels + rng.normal(0, 6, pixels.shape)
    return np.clip(noisy, 0, 255).round().astype(np.uint8)


# Few pictures show whether a reader of the wanted share could read so few of them right (once in a
# thousand, `fewest`): a value, a side or a size that is misread in one picture of six. Many show
# whether it has that share.


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("damage", "share"), [(False, 0.99), (True, 0.97)])
def test_reads_every_attribute(size: int, damage: bool, share: float) -> None:
    right = count_right(size, damage, 40)
    assert {name: n for name, n in right.items() if n < fewest(40, share)} == {}
    assert right.total() >= fewest(40 * len(ATTRIBUTES), share)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("damage", "count", "share"), [(False, 500, 0.99), (True, 300, 0.97)])
def test_reads_every_attribute_of_many(size: int, damage: bool, count: int, share: float) -> None:
    right = count_right(size, damage, count)
    assert {name: n / count for name, n in right.items() if n < share * count} == {}


def count_right(size: int, damage: bool, count: int) -> Counter[str]:
    """How often each attribute is read right."""
    rng = np.random.default_rng([31, size, damage])  # pictures that no threshold was tuned on
    right = Counter(dict.fromkeys(ATTRIBUTES, 0))
    for _ in range(count):
        scene = Scene.sample(rng)
        image = scene.render(size)
        seen = read(damaged(image, rng) if damage else image)
        assert list(seen) == list(ATTRIBUTES)
        assert all(seen[name] in values for name, values in ATTRIBUTES.items())
        right.update(name for name, value in scene.attributes.items() if seen[name] == value)
    return right


@pytest.mark.parametrize("size", [32, 100, 256])
def test_reads_other_sizes(size: int) -> None:
    rng = np.random.default_rng(1)
    scenes = [Scene.sample(rng) for _ in range(10)]
    wrong = [s for s in scenes if read(s.render(size)) != s.attributes]
    assert len(wrong) <= 1


def test_a_picture_and_its_array_read_alike() -> None:
    image = Scene.sample(np.random.default_rng(2), house="red").render(64)
    assert read(image) == read(np.asarray(image))


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_sees_no_house_beside_trees_and_suns(count: int) -> None:
    rng = np.random.default_rng(32)
    seen = []
    for i in range(count):
        image = Scene.sample(rng, house="none").render(64)
        seen.append(read(damaged(image, rng) if i % 2 else image)["house"])
    assert seen.count("none") >= 0.99 * count


@pytest.mark.parametrize("count", [18, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sky", ["day", "sunset"])
def test_a_blurred_sun_is_a_sun_and_a_cloud_is_not(sky: str, count: int) -> None:
    rng = np.random.default_rng(33)
    right = 0
    for i in range(count):
        scene = Scene.sample(rng, sky=sky, light=ATTRIBUTES["light"][i % 3])
        blurred = scene.render(64).filter(ImageFilter.GaussianBlur(1.5))
        right += read(blurred)["light"] == scene.light
    assert right >= count - 1


@pytest.mark.parametrize("count", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_invents_no_house_and_no_tree(count: int) -> None:
    """Empty scenes, damaged as may be, and pictures of one colour."""
    rng = np.random.default_rng(3)
    pictures = [
        damaged(Scene.sample(rng, house="none", tree="none").render(64), rng) for _ in range(count)
    ]
    pictures += [np.full((64, 64, 3), level, np.uint8) for level in (0, 128, 255)]
    for pixels in pictures:
        seen = read(pixels)
        assert (seen["house"], seen["house_position"], seen["house_size"]) == ("none",) * 3
        assert seen["tree"] == "none"


@pytest.mark.parametrize("count", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_noise_is_no_house_and_seldom_a_tree(count: int) -> None:
    """One picture of noise in fourteen looks like a tree to the reader."""
    rng = np.random.default_rng(3)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(count)]
    seen = [read(pixels) for pixels in noise]
    assert all(one["house"] == one["house_size"] == "none" for one in seen)
    assert sum(one["tree"] == "none" for one in seen) >= fewest(count, 0.93)


def test_a_smear_is_not_a_house() -> None:
    """A patch of the wall's colour, without a roof, is not enough."""
    rng = np.random.default_rng(4)
    for colour in ((214, 72, 62), (63, 111, 208), (246, 204, 69)):
        pixels = np.array(Scene.sample(rng, sky="day", ground="grass", house="none").render(64))
        pixels[36:48, 24:40] = colour
        blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))
        assert read(blurred)["house"] == "none"


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ],
)
def test_refuses_what_is_no_square_rgb_picture(pixels: Pixels) -> None:
    with pytest.raises(ValueError, match="to read is"):
        read(pixels)
