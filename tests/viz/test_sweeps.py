"""A sweep draws what the pipeline draws, or is refused before its first picture."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ldm import viz
from ldm.pipeline import TextToImage
from ldm.viz import sweeps
from tests.viz.runs import tiny_pipe


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return tiny_pipe()


def test_a_sweep_draws_what_the_pipeline_draws_with_these_settings(pipe: TextToImage) -> None:
    rows, columns = ("guidance_scale", [1.0, 4.0]), ("steps", (1, 2))
    images = viz.sweep_images(pipe, "a red house", rows, columns, seed=3)
    for (i, guidance), (j, steps) in itertools.product(enumerate(rows[1]), enumerate(columns[1])):
        (own,) = pipe("a red house", guidance_scale=guidance, steps=steps, seed=3)
        assert images[i][j].tobytes() == own.tobytes()
    assert len({image.tobytes() for row in images for image in row}) == 4


def test_a_sweeps_sheet_says_its_settings(
    pipe: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(sweeps, "grid", lambda rows, **more: asked.update(more))
    viz.sweep(pipe, "a house", ("eta", [0.0, 1.0]), ("seed", range(3)), steps=1)
    assert asked["row_captions"] == ["eta = 0.0", "eta = 1.0"]
    assert asked["column_captions"] == ["seed = 0", "seed = 1", "seed = 2"]
    assert asked["title"] == "a house"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rows=("temperature", [1])), "no setting 'temperature': .*guidance_scale"),
        (dict(rows=("num_images", [1])), "no setting 'num_images'"),
        (dict(rows=("steps", [1])), "steps is given twice"),
        (dict(seed=1, rows=("seed", [1])), "seed is given twice"),
        (dict(rows=("guidance_scale", [])), "guidance_scale needs a list of values"),
        (dict(rows=("sampler", "ddim")), "sampler needs a list of values"),
        (dict(rows=("sampler", ["ddim", "eluer"])), "unknown sampler 'eluer'"),
        (dict(columns=("steps", [2, 0])), "steps must be between"),
        (dict(eta=3.0), "eta must be between 0 and 1"),
        (dict(prompt=" "), "the prompt is empty"),
        (dict(prompt=["a", "b"]), "one prompt"),
    ],
)
def test_a_sweep_is_refused_before_its_first_picture(
    pipe: TextToImage, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(pipe, "decode", never)
    monkeypatch.setattr(pipe.unet, "forward", never)
    defaults = dict(prompt="a house", rows=("guidance_scale", [1.0]), columns=("steps", [1, 2]))
    with pytest.raises(ValueError, match=message):
        viz.sweep(pipe, **(defaults | changes))
