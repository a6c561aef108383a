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
from ldm.worlds.reader import read
from ldm.worlds.scenes import Scene, training_scene
from ldm.train.clip import PAIR_FILE, load_pair
from ldm.evaluate.prompts import (
    DRAWN,
    NOT_DRAWN,
    Score,
    clip_score,
    draw_and_read,
    fresh_prompts,
    held_out_prompts,
    prompt_scores,
)
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
    assert names == {
        *("model.safetensors", "config.json", "clip.safetensors", "vocab.json", "merges.txt"),
        *("README.md", "training.jsonl"),
    }
    assert ldm.shipped_weights() == FOLDER / "model.safetensors"
    weights = [FOLDER / "model.safetensors", FOLDER / "clip.safetensors"]
    assert sum(path.stat().st_size for path in weights) <= 32 * 2**20


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
def scores(horizon: TextToImage) -> dict[str, Score]:
    """A few dozen prompts, drawn in 20 steps and read back; no other part of this project, and no
    training, has drawn them."""
    prompts = [*fresh_prompts(5, seed=21), *held_out_prompts(5, seed=21)]
    run = draw_and_read(
        horizon, prompts, steps=20, guidance_scale=7.5, sampler="ddim", seed=100, batch_size=16
    )
    judged = list(run)
    seen = prompt_scores(pair for pair in judged if not pair[0].held_out)
    unseen = prompt_scores(pair for pair in judged if pair[0].held_out)
    return seen | {f"held out: {what}": score for what, score in unseen.items()}


# Of the thousand and more prompts that the model card reports, each share is well above these: they
# leave room for an unlucky few dozen. A model that ignored its prompt would fail every one.
@pytest.mark.parametrize(
    ("what", "least"),
    [
        *((what, 0.9) for what in ("sky", "ground", DRAWN, NOT_DRAWN)),
        *((what, 0.8) for what in ("house colour", "house position", "house size")),
        *((what, 0.75) for what in ("sun or moon", "tree", "horizon")),
        *((what, 0.6) for what in ("held out: house colour", "held out: house position")),
    ],
)
def test_pictures_show_what_their_prompts_say(
    scores: dict[str, Score], what: str, least: float
) -> None:
    right, total = sum(scores[what].right.values()), sum(scores[what].total.values())
    assert total >= 10
    assert right / total >= least, scores[what]


def test_the_clip_pair_finds_a_pictures_own_caption(horizon: TextToImage) -> None:
    pair = load_pair(FOLDER / PAIR_FILE, horizon.text)
    score = clip_score(pair, 100, seed=21)
    assert score.right["caption"] >= 90  # of 100, and of 64 captions each: by chance one or two


def test_image_i_of_a_batch_is_the_image_made_alone(horizon: TextToImage) -> None:
    settings = {"steps": 20, "seed": 3}
    *_, together = horizon.denoise("a red house on green grass", num_images=3, **settings)
    for i in range(3):
        settings["seed"] = 3 + i
        *_, alone = horizon.denoise("a red house on green grass", **settings)
        assert relative_error(together.x_prev[i : i + 1], alone.x_prev) <= 1e-5
