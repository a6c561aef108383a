"""Walks between prompts and seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm
from ldm import viz
from ldm.pipeline import TextToImage
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    return ldm.load(tiny_model(tmp_path_factory.mktemp("model")), device="cpu", dtype=torch.float32)


def drawn(pipe: TextToImage, prompt: str, seed: int) -> bytes:
    return pipe(prompt, seed=seed, steps=2)[0].tobytes()


def test_a_walk_begins_and_ends_at_its_stops(pipe: TextToImage) -> None:
    images = viz.walk_images(pipe, "red", seeds=[1, 2, 3], between=2, steps=2)
    assert len(images) == 5
    for place, seed in ((0, 1), (2, 2), (4, 3)):
        assert images[place].tobytes() == drawn(pipe, "red", seed)
    words = viz.walk_images(pipe, ["red", "blue"], seeds=1, between=3, steps=2)
    assert len({image.tobytes() for image in words}) == 4
    assert words[0].tobytes() == drawn(pipe, "red", 1)
    assert words[-1].tobytes() == drawn(pipe, "blue", 1)
    both = viz.walk_images(pipe, ["red", "blue"], seeds=[1, 2], between=1, steps=2)
    assert both[-1].tobytes() == drawn(pipe, "blue", 2)


def test_a_walk_is_a_gif(pipe: TextToImage, tmp_path: Path) -> None:
    viz.walk(pipe, "red", seeds=range(2), between=2, steps=1).save(tmp_path / "walk.gif")
    with Image.open(tmp_path / "walk.gif") as gif:
        assert gif.format == "GIF" and gif.size == (16, 16) and gif.n_frames == 3


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"prompts": "red"}, "1 prompts and 1 seeds do not make them"),
        ({"prompts": ["a", "b"], "seeds": [1, 2, 3]}, "2 prompts and 3 seeds"),
        ({"prompts": "red", "seeds": [1, 2], "between": 0}, "between must be 1 or more"),
        ({"prompts": "red", "seeds": [1, 2], "sampler": "ddpm"}, "add no noise at their steps"),
        ({"prompts": "red", "seeds": [1, 2], "num_images": 2}, "one picture of each"),
        ({"prompts": ["red", ""], "seeds": 1}, "the prompt is empty"),
        ({"prompts": "red", "seeds": [1, 2], "long_prompts": True}, "leave out long_prompts"),
        ({"prompts": "red", "seeds": [1, -2]}, "seed must be between 0"),
    ],
)
def test_what_is_no_walk_is_refused_before_any_picture(
    pipe: TextToImage, asked: dict, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "run", lambda *_: pytest.fail("work started"))
    with pytest.raises(ValueError, match=line):
        viz.walk(pipe, **asked)
