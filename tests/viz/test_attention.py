"""Attention over pictures: brightest where the word looked, on a scale that the picture states."""

from __future__ import annotations

import dataclasses
import math
import sys
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import viz
from ldm.observe.maps import Word
from ldm.observe.traces import Trace
from ldm.viz.attention import brightest, share
from ldm.viz.grids import GAP, MARGIN
from tests.viz.runs import COLUMNS, HOT, ROWS, made_trace

WIDTH, HEIGHT = 12 * COLUMNS, 12 * ROWS  # pixels: a place is 12 x 12
WHITE = Image.new("RGB", (WIDTH, HEIGHT), "white")

# `ldm.viz.attention` itself is the function.
MODULE = sys.modules["ldm.viz.attention"]


def brightness(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), float)


def cell(sheet: Image.Image, column: int) -> Image.Image:
    """A picture in the first row of a sheet that has captions below its pictures alone."""
    left = MARGIN + column * (WIDTH + GAP)
    return sheet.crop((left, MARGIN, left + WIDTH, MARGIN + HEIGHT))


def place(row: int, column: int) -> tuple[slice, slice]:
    return slice(12 * row, 12 * row + 12), slice(12 * column, 12 * column + 12)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was passed to `grid`, and what the key below the sheet says."""
    found: dict[str, Any] = {}

    def grid(rows: Any, **more: Any) -> None:
        found.update(rows=rows, **more)

    monkeypatch.setattr(MODULE, "grid", grid)
    monkeypatch.setattr(MODULE, "keyed", lambda sheet, text: found.update(key=text))
    return found


# --- One map -------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_an_overlay_is_brighter_where_the_weight_is_larger(smooth: bool, grey: int) -> None:
    weights = torch.linspace(0.0, 0.2, 6).repeat(3, 1)
    picture = Image.new("RGB", (60, 30), (grey, grey, grey))
    light = brightness(viz.overlay(picture, weights, smooth=smooth))[15, 5::10]
    assert (np.diff(light) > 2).all()


def test_an_overlay_is_brightest_where_its_map_is() -> None:
    weights = torch.zeros(ROWS, COLUMNS)
    weights[5, 1] = 0.01
    light = brightness(viz.overlay(WHITE, weights))
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert (row // 12, column // 12) == (5, 1)


def test_a_coarse_overlay_shows_each_place_as_the_rectangle_that_it_is() -> None:
    weights = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    shown = np.asarray(viz.overlay(WHITE, weights, smooth=False))
    for row in range(ROWS):
        for column in range(COLUMNS):
            assert len(np.unique(shown[place(row, column)].reshape(-1, 3), axis=0)) == 1


def test_what_lies_outside_of_the_scale_is_shown_as_its_ends() -> None:
    picture, weights = WHITE.resize((4, 1)), torch.tensor([[-0.5, 0.0, 1.0, 3.0]])
    below, zero, top, above = np.asarray(viz.overlay(picture, weights, 1.0, smooth=False))[0]
    assert (below == zero).all() and (above == top).all() and (zero != top).any()


def test_the_top_of_the_scale_decides_how_bright_a_weight_is() -> None:
    weights = torch.tensor([[0.0, 0.1]])
    own, shared = viz.overlay(WHITE, weights), viz.overlay(WHITE, weights, 0.4)
    assert viz.overlay(WHITE, 2 * weights, 0.8).tobytes() == shared.tobytes()
    assert viz.overlay(WHITE, 7 * weights).tobytes() == own.tobytes()
    assert brightness(own).max() > brightness(shared).max() + 20


def test_the_picture_stays_visible_below() -> None:
    picture = Image.new("RGB", (20, 10), "white")
    picture.paste((0, 0, 0), (0, 0, 10, 10))
    for weight in (0.0, 1.0):
        light = brightness(viz.overlay(picture, torch.full((2, 2), weight), 1.0))
        assert (light[:, 15] > light[:, 5] + 20).all()


def test_nothing_is_changed_and_empty_maps_are_dark() -> None:
    weights, before = torch.zeros(2, 2), WHITE.tobytes()
    assert brightness(viz.overlay(WHITE, weights)).max() < 150
    assert WHITE.tobytes() == before and not weights.any()
    with pytest.raises(ValueError, match="rows, columns"):
        viz.overlay(WHITE, torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="top must be above 0"):
        viz.overlay(WHITE, weights, 0.0)


# --- Words ---------------------------------------------------------------------------------------


def test_shares_are_means_that_sum_to_one_over_all_tokens() -> None:
    run = made_trace()
    for method, resolution in (("daam", None), ("daam", 4), ("prompt-to-prompt", 8)):
        for step in (None, 2):
            shares = [
                len(word.tokens) * share(run, word, step, resolution, method) for word in run.words
            ]
            # The weights are float16: six of them, each to 2^-11.
            total = torch.stack(shares).sum(dim=0)
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-3)
    house = share(run, run.word("house"), None, 8, "daam")
    assert house.max().item() == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("scale", ["per word", "absolute"])
def test_each_word_is_brightest_where_it_looked(scale: str) -> None:
    words = ["red", "house"]
    sheet = viz.attention(made_trace(), words, scale=scale, picture=WHITE, size=None)
    assert cell(sheet, 0).tobytes() == WHITE.tobytes()
    brightest_of = {}
    for column, word in enumerate(words, start=1):
        light = brightness(cell(sheet, column))
        at = np.unravel_index(light.argmax(), light.shape)
        # Bicubic upscaling of the coarse layer moves the top by less than one of its places.
        assert abs(at[0] // 12 - HOT[word][0]) <= 1 and abs(at[1] // 12 - HOT[word][1]) <= 1
        brightest_of[word] = light.max()
    if scale == "per word":
        assert brightest_of["red"] == pytest.approx(brightest_of["house"], abs=3)
    else:  # "red" has half of the attention that "house" has
        assert brightest_of["red"] < brightest_of["house"] - 20


def test_the_scale_is_said_with_its_range(asked: dict[str, Any]) -> None:
    viz.attention(made_trace(), ["red", "house"], resolution=8, picture=WHITE)
    assert asked["captions"] == [["the picture", "red\n0 to 30%", "house\n0 to 60%"]]
    assert asked["key"].startswith("scale per word") and "DAAM" in asked["key"]
    assert "the layers of 8 rows and all steps" in asked["key"]
    viz.attention(
        made_trace(), ["red", "house"], resolution=8, step=1, scale="absolute", picture=WHITE
    )
    assert asked["captions"] == [["the picture", "red", "house"]]
    assert "absolute scale, one for all words: up to 60%" in asked["key"]
    assert "step 2 (t = 601) alone" in asked["key"]


def test_one_scale_is_the_largest_of_all() -> None:
    maps = [[torch.tensor([[0.1, 0.2]])], [torch.tensor([[0.4, 0.0]])]]
    assert brightest(maps, "per word") == [math.inf, pytest.approx(0.4)]
    assert brightest(maps, "absolute") == pytest.approx([0.4, 0.4])
    with pytest.raises(ValueError, match="unknown scale 'global': there are per word, absolute"):
        brightest(maps, "global")


def test_a_map_that_is_nearly_flat_is_said_to_be_so_and_stays_dark(asked: dict[str, Any]) -> None:
    run = made_trace()
    maps = {name: torch.full_like(layer, 0.1) for name, layer in run.maps.items()}
    for layer in maps.values():
        layer[..., 0, 0, 2] = 0.14  # "red"
        layer[..., 0, 0, 3] = 0.2  # "house"
    viz.attention(made_trace(maps=maps), ["red", "house"], picture=WHITE, size=None)
    assert asked["captions"][0][1] == "red\nnearly the same everywhere"
    assert asked["captions"][0][2].startswith("house\n0 to ")
    _, red, house = (brightness(image) for image in asked["rows"][0])
    assert len(np.unique(red)) == 1 and red.max() < house.max() - 20


def test_all_words_are_shown_unless_some_are_named(asked: dict[str, Any]) -> None:
    run = made_trace()
    viz.attention(run, scale="absolute")
    assert [*chain(*asked["captions"])] == ["the picture", "a", "red", "house"]
    viz.attention(run, "Red", scale="absolute")
    assert [*chain(*asked["captions"])] == ["the picture", "red"]
    viz.attention(run, [run.words[0]], scale="absolute")
    assert [*chain(*asked["captions"])] == ["the picture", "<start>"]
    many = dataclasses.replace(run, words=(run.words[0], *[Word("a", (1,))] * 9, run.words[-1]))
    viz.attention(many)
    assert [len(row) for row in asked["rows"]] == [6, 4]


def test_words_and_scales_that_are_not_there_are_refused() -> None:
    run = made_trace()
    for words, message in ((["dog"], "no word 'dog'"), ([], "one word or more")):
        with pytest.raises(ValueError, match=message):
            viz.attention(run, words)
    with pytest.raises(ValueError, match="unknown scale"):
        viz.attention_by_resolution(run, scale="")
    with pytest.raises(ValueError, match="unknown method"):
        viz.attention(run, method="mean")


def moving() -> Trace:
    """A trace in which "house" looks at another row at every step, ever less."""
    run = made_trace()
    maps = {name: torch.zeros_like(layer) for name, layer in run.maps.items()}
    for i in range(len(run)):
        maps["fine"][i, i, 2, 3] = 0.5 - 0.1 * i
        maps["coarse"][i, 3, 0, 3] = 0.05
    return made_trace(maps=maps)


def test_every_step_shows_its_own_map_on_the_scale_of_its_word(asked: dict[str, Any]) -> None:
    viz.attention_over_steps(moving(), "house", count=3, resolution=8, picture=WHITE, size=None)
    assert asked["column_captions"] == ["step 1\nt = 801", "step 3\nt = 401", "step 5\nt = 1"]
    assert asked["row_captions"] == ["house\n0 to 50%"]
    (row,) = asked["rows"]
    tops = []
    for image, step in zip(row, (0, 2, 4), strict=True):
        light = brightness(image)
        at = np.unravel_index(light.argmax(), light.shape)
        assert (at[0] // 12, at[1] // 12) == (step, 2)
        tops.append(light.max())
    assert tops[0] > tops[1] + 10 and tops[1] > tops[2] + 10


def test_each_resolution_shows_its_own_places(asked: dict[str, Any]) -> None:
    viz.attention_by_resolution(moving(), "house", step=1, picture=WHITE, size=None)
    assert asked["column_captions"] == ["8 x 6\n1 layer", "4 x 3\n1 layer"]
    fine, coarse = (brightness(image) for image in asked["rows"][0])
    assert len(np.unique(fine[place(1, 2)])) == 1 and fine[place(1, 2)].max() == fine.max()
    assert (fine == fine.max()).sum() == 12 * 12
    assert (coarse == coarse.max()).sum() == 24 * 24
    assert coarse[24 * 3, 0] == coarse.max()
    assert coarse.max() < fine.max()  # one scale for the row


def test_maps_lie_over_the_traces_own_picture_where_none_is_given() -> None:
    run = made_trace()
    sheet = viz.attention(run, "red", size=None)
    own = Image.fromarray(run.picture.numpy())
    left = MARGIN + (56 - own.width) // 2  # narrower than a column
    assert sheet.crop((left, MARGIN, left + own.width, MARGIN + own.height)).tobytes() == (
        own.tobytes()
    )
    bare = made_trace(picture=None)
    assert viz.attention(bare, "red").size[0] > 0
