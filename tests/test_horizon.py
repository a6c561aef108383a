"""Horizon, as it ships: its file is what it says, and its pictures show what their prompts say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm
from ldm.pipeline import TextToImage
from ldm.reader import read
from ldm.scenes import Scene, training_scene
from tests.helpers import relative_error

FOLDER = Path(__file__).parents[1] / "weights" / "horizon"


@pytest.fixture(scope="module")
def horizon() -> TextToImage:
    return ldm.load(device="cpu", dtype=torch.float32)


def test_the_preset_is_the_shipped_models_config(horizon: TextToImage) -> None:
    assert horizon.config == ldm.HORIZON
    written = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(dataclasses.asdict(ldm.HORIZON)))


def test_the_folder_holds_one_small_half_precision_file_and_its_company() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {"model.safetensors", "config.json", "vocab.json", "merges.txt", "README.md"}
    assert ldm.shipped_weights() == FOLDER / "model.safetensors"
    assert (FOLDER / "model.safetensors").stat().st_size <= 32 * 2**20


def test_the_tokenizer_knows_the_worlds_words_whole(horizon: TextToImage) -> None:
    words = ["small", "red", "house", "left", "green", "grass", "night", "moon", "sunset", "sea"]
    tokenizer = horizon.text.require_tokenizer()
    assert [len(tokenizer.encode(word)) for word in words] == [1] * len(words)


def test_no_caption_of_the_world_is_too_long(horizon: TextToImage) -> None:
    rng = np.random.default_rng(5)
    tokenizer = horizon.text.require_tokenizer()
    lengths = [len(tokenizer.encode(Scene.sample(rng).caption(rng))) for _ in range(2000)]
    assert max(lengths) <= horizon.config.text.max_length - 2


def test_the_autoencoder_keeps_what_a_scene_shows(horizon: TextToImage) -> None:
    rng = np.random.default_rng(11)
    wrong = total = 0
    for _ in range(40):
        scene = Scene.sample(rng)
        (decoded,) = horizon.decode(horizon.encode(scene.render(horizon.config.image_size)))
        seen = read(decoded)
        wrong += sum(seen[name] != value for name, value in scene.attributes.items())
        total += len(seen)
    # 99.9% and more are read back right; 98% leaves room for an unlucky sample.
    assert wrong <= 0.02 * total


def test_latents_have_unit_std(horizon: TextToImage) -> None:
    rng = np.random.default_rng(12)
    images = [training_scene(rng).render(horizon.config.image_size) for _ in range(64)]
    assert horizon.encode(images).std().item() == pytest.approx(1.0, abs=0.1)


@pytest.fixture(scope="module")
def judged(horizon: TextToImage) -> list[tuple[Scene, dict[str, str]]]:
    """A few dozen prompts, drawn in 20 steps and read back."""
    rng = np.random.default_rng(21)
    scenes = [training_scene(rng) for _ in range(48)]
    prompts = [scene.describe(rng, keep={"sky", "ground", "house"})[0] for scene in scenes]
    images = horizon(prompts, steps=20, seed=100)
    return [(scene, read(image)) for scene, image in zip(scenes, images, strict=True)]


@pytest.mark.parametrize("attribute", ["sky", "ground"])
def test_sky_and_ground_are_drawn_as_said(
    judged: list[tuple[Scene, dict[str, str]]], attribute: str
) -> None:
    right = sum(seen[attribute] == scene.attributes[attribute] for scene, seen in judged)
    # Of 48, at 99%, one or two may fail; a model that ignored its prompt would get a third.
    assert right >= 44


def test_image_i_of_a_batch_is_the_image_made_alone(horizon: TextToImage) -> None:
    settings = {"steps": 20, "seed": 3}
    *_, together = horizon.denoise("a red house on green grass", num_images=3, **settings)
    for i in range(3):
        settings["seed"] = 3 + i
        *_, alone = horizon.denoise("a red house on green grass", **settings)
        assert relative_error(together.x_prev[i : i + 1], alone.x_prev) <= 1e-5
