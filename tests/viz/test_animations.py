"""Pictures that move: all of them, each for its time."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import viz
from tests.viz.pictures import BLUE, GREEN, RED, solid


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_has_its_frames_and_its_times(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    images = [solid(colour) for colour in (RED, GREEN, BLUE)]
    viz.animation(images, 50, hold_ms=700).save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with Image.open(path) as film:
        assert film.n_frames == 3
        assert film.info["loop"] == 0
        durations = []
        for i, colour in enumerate((RED, GREEN, BLUE)):
            film.seek(i)
            film.load()
            durations.append(film.info["duration"])
            middle = np.asarray(film.convert("RGB").getpixel((32, 32)), int)
            assert np.abs(middle - colour).max() <= 8, "WebP is lossy"
    assert durations == [50, 50, 700]


def test_an_animation_shows_itself() -> None:
    html = viz.animation([solid(RED), solid(BLUE)])._repr_html_()
    (data,) = re.findall('src="data:image/webp;base64,([^"]+)"', html)
    with Image.open(io.BytesIO(base64.b64decode(data))) as film:
        assert (film.n_frames, film.size) == (2, (64, 64))


def test_an_animation_refuses_what_cannot_move(tmp_path: Path) -> None:
    film = viz.animation([solid(RED), solid(BLUE)])
    for name, message in (("run.mp4", "a .gif or a .webp"), ("nowhere/run.gif", "no folder")):
        with pytest.raises(ValueError, match=message):
            film.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="needs pictures"):
        viz.animation([])
    with pytest.raises(ValueError, match="one size"):
        viz.animation([solid(RED), solid(RED, 8, 8)])
    with pytest.raises(ValueError, match="20 ms or more, not 5"):
        viz.animation([solid(RED)], 5)
