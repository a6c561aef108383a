"""Horizon's own words: which are looked at from where their things are, and what they change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ldm
from ldm.evaluate.attention import (
    Overlap,
    coverage,
    most_covered,
    overlaps,
    own_and_others,
    pairwise_iou,
    told_scenes,
    watch,
)
from ldm.pipeline import TextToImage
from ldm.worlds.batches import OBJECTS, pictures
from ldm.worlds.scenes import Scene

pytestmark = pytest.mark.slow

TIMES = (100, 500, 900)


@pytest.fixture(scope="module")
def horizon() -> TextToImage:
    return ldm.load(device="cpu", dtype=torch.float32)


def points(found: Overlap, wanted: float = 1.5) -> bool:
    """Whether maps fit their own scenes so many times better than others."""
    return found.own > wanted * found.others


def test_words_for_houses_and_trees_point_and_those_for_lamps_need_not(
    horizon: TextToImage,
) -> None:
    """All maps of one size together, on fresh scenes: own IoU against that with other scenes."""
    looks = watch(horizon, told_scenes(22, seed=1), TIMES, seed=1)
    found = {name: overlaps(one, TIMES, seed=1).table for name, one in looks.items()}

    def at(name: str, size: str, t: int) -> Overlap:
        return found[name][f"all of {size}"][f"t = {t}"]

    assert all(points(at("house", "8x8", t), 2) for t in TIMES)
    assert all(points(at("tree", "8x8", t)) for t in (500, 900))
    assert points(at("tree + place", "4x4", 900), 2)
    assert all(at(lamp, "8x8", t).own < 0.25 for lamp in ("sun", "moon") for t in TIMES)


WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}


def told(scene: Scene, without: str = "") -> str:
    """A prompt with a phrase for each thing in the scene, but one."""
    lamp = "moon" if scene.sky == "night" else "sun"
    said = {
        "house": f"a {scene.house_size} {scene.house} house {WHERE.get(scene.house_position)}",
        "ground": scene.ground,
        "sky": scene.sky,
        "tree": f"a tree {WHERE.get(scene.tree)}",
        lamp: f"the {lamp} {WHERE.get(scene.light)}",
    }
    absent = {"house": scene.house, "tree": scene.tree, lamp: scene.light}
    there = [key for key in said if absent.get(key) != "none" and key != without]
    return ", ".join(said[key] for key in there)


@torch.no_grad()
def changed(horizon: TextToImage, scenes: list[Scene], thing: str, t: int) -> Tensor:
    """How much the answer changes at each place without the words for a thing: (B, places)."""
    x0 = horizon.vae.encode(pictures(scenes, horizon.config.image_size)).mode()
    x0 = x0 * horizon.config.vae.scaling_factor
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    times = torch.full((len(scenes),), t)
    x = horizon.schedule.add_noise(x0, noise, times)
    whole, less = (
        horizon.unet(x, times, horizon.context([told(scene, left_out) for scene in scenes]))
        for left_out in ("", thing)
    )
    return (whole - less).square().sum(dim=1).flatten(1)


def test_leaving_out_a_things_words_changes_the_answer_where_the_thing_is(
    horizon: TextToImage,
) -> None:
    """In much noise: own IoU against that with other scenes' masks, for all four."""
    scenes = [scene for scene, _ in told_scenes(22, seed=1)]
    size, side = horizon.config.image_size, horizon.config.image_size // horizon.config.vae.factor
    for thing in OBJECTS:
        masks = {i: scene.masks(size).get(thing) for i, scene in enumerate(scenes)}
        showing = [i for i, mask in masks.items() if mask is not None and mask.any()]
        exact = torch.stack([torch.from_numpy(masks[i]).float() for i in showing])
        true = most_covered(coverage(exact, (side, side)))
        effect = changed(horizon, [scenes[i] for i in showing], thing, 900)
        own, others = own_and_others(pairwise_iou(effect, true))
        assert own.mean() > 1.5 * others.mean(), thing
