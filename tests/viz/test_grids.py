"""Pictures side by side: every picture is where it belongs, unchanged, and no text is cut off."""

from __future__ import annotations

import base64
import io
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import viz
from ldm.pipeline import TextToImage
from ldm.viz import grids
from ldm.viz.colours import heat
from ldm.viz.runs import drawn_by, spaced
from tests.viz.runs import STEPS, made_trace, steps_of, tiny_pipe, without_guidance

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def solid(colour: tuple[int, int, int], width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a colour in a picture, which must fill that rectangle."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


def edge_is_white(sheet: Image.Image, width: int = 4) -> bool:
    pixels = np.asarray(sheet)
    inner = np.zeros(pixels.shape[:2], bool)
    inner[width:-width, width:-width] = True
    return bool((pixels[~inner] == 255).all())


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return tiny_pipe()


# --- Grids ---------------------------------------------------------------------------------------


def test_pictures_stand_in_their_rows_and_columns_unchanged() -> None:
    sheet = viz.grid([[solid(RED), solid(GREEN)], [solid(BLUE)]], size=None)
    red, green, blue = box(sheet, RED), box(sheet, GREEN), box(sheet, BLUE)
    assert red[2] < green[0] and red[1] == green[1]
    assert red[3] < blue[1] and red[0] == blue[0]
    assert all((r - x, b - y) == (64, 64) for x, y, r, b in (red, green, blue))
    assert edge_is_white(sheet)


def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_reduced() -> None:
    left, top, right, bottom = box(viz.grid([[solid(RED, 10, 30)]], size=100), RED)
    assert (right - left, bottom - top) == (30, 90)
    left, top, right, bottom = box(viz.grid([[solid(RED, 400, 200)]], size=100), RED)
    assert (right - left, bottom - top) == (100, 50)
    latent = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    large = np.asarray(grids.fitted(latent, 9))
    assert (large == np.asarray(latent).repeat(4, axis=0).repeat(4, axis=1)).all()


def test_captions_change_no_picture_and_none_is_cut_off() -> None:
    long = "a very long caption about incomprehensibilities-that-cannot-be-broken-anywhere " * 2
    sheet = viz.grid(
        [[solid(RED), solid(GREEN)], [solid(BLUE), solid((9, 9, 9))]],
        captions=[[long, "short"], ["", long]],
        row_captions=[long, "second"],
        column_captions=["first", long],
        title=long,
        note=long,
        size=64,
    )
    boxes = [box(sheet, colour) for colour in (RED, GREEN, BLUE)]
    assert {(r - x, b - y) for x, y, r, b in boxes} == {(64, 64)}
    assert edge_is_white(sheet)


def test_a_title_wider_than_its_picture_widens_the_sheet() -> None:
    title = "a red house on green grass"
    width = grids.Text.wrapped(title, 480, grids.TITLE).width
    assert width > 64
    assert viz.strip([solid(RED)], title=title).width == width + 2 * grids.MARGIN


@pytest.mark.parametrize("width", [20, 60, 300])
@pytest.mark.parametrize(
    "text", ["a red house on green grass", "x" * 90, "one\ntwo", "ein größeres Haus"]
)
def test_text_is_broken_to_its_width_and_nothing_of_it_lost(text: str, width: int) -> None:
    wrapped = grids.Text.wrapped(text, width)
    assert wrapped.width <= width + 1
    assert re.sub(r"\s", "", "".join(wrapped.lines)) == re.sub(r"\s", "", text)
    assert wrapped.height >= len(wrapped.lines) * grids.TEXT


def test_words_that_fit_are_not_broken() -> None:
    assert grids.Text.wrapped("a red house", 500).lines == ("a red house",)
    assert grids.Text.wrapped("red house", 45).lines == ("red", "house")
    assert grids.Text.wrapped("one\ntwo", 500).lines == ("one", "two")


def test_letters_that_the_built_in_font_lacks_are_drawn_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    assert grids.Text.wrapped("größer", 500).font.getname()[0] == "DejaVu Sans"
    assert grids.Text.wrapped("larger", 500).font.getname()[0] != "DejaVu Sans"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    grids.font.cache_clear()  # DejaVu is in it
    plain = grids.Text.wrapped("größer", 500)
    grids.font.cache_clear()
    assert plain.lines == ("gro?er",) and plain.font.getname()[0] == "Aileron"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rows=[]), "needs pictures"),
        (dict(rows=[[]]), "needs pictures"),
        (dict(rows=[[solid(RED)]], row_captions=["a", "b"]), "row_captions: 1 are needed, not 2"),
        (dict(rows=[[solid(RED)]], column_captions="a"), "column_captions: 1 are needed"),
        (dict(rows=[[solid(RED)] * 2], captions=[["a"]]), "captions of a row: 2 are needed, not 1"),
        (dict(rows=[[solid(RED)]], size=0), "size must be 1 or more"),
    ],
)
def test_a_grid_refuses_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        viz.grid(**arguments)


# --- The steps of a run --------------------------------------------------------------------------


class Recorder:
    """A way to draw that notes what it was asked for: each latent's first number as a grey."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        self.asked.append(latents)
        return [solid((i, i, i)) for i in range(len(latents))]


def test_steps_draws_the_first_the_last_and_those_between() -> None:
    run, draw = made_trace(), Recorder()
    viz.steps(run, draw, show=("x", "x0"), count=3)
    x, x0 = draw.asked
    assert torch.equal(x, run.x[[0, 2, 4]]) and torch.equal(x0, run.x0[[0, 2, 4]])


@pytest.mark.parametrize(
    ("total", "count", "indices"),
    [(5, 8, [0, 1, 2, 3, 4]), (20, 3, [0, 10, 19]), (1, 8, [0]), (9, 1, [8]), (3, 2, [0, 2])],
)
def test_chosen_steps_are_evenly_spaced(total: int, count: int, indices: list[int]) -> None:
    assert spaced(total, count) == indices


def test_a_list_of_steps_is_drawn_as_its_trace_is() -> None:
    run, rgb = made_trace(), viz.false_colours(4)
    show = ("x", "x0", "eps", "guidance")
    ours, theirs = viz.steps(run, rgb, show=show), viz.steps(steps_of(run), rgb, show=show)
    assert ours.tobytes() == theirs.tobytes()


def test_guidance_is_brightest_where_the_prompt_changes_most() -> None:
    run = made_trace()
    changed = run.eps_uncond.clone()
    changed[:, :, 5, 2] += torch.tensor([0.3, 0.0, 0.0, 0.4])
    changed[:, :, 1, 1] += 0.1
    run = made_trace(eps_cond=changed)
    sheet = np.asarray(viz.steps(run, show="guidance", count=1, size=8))
    (top, *_), (left, *_) = np.nonzero((sheet == (252, 255, 164)).all(axis=2))
    # A cell of 6 x 8 places, one pixel each: the one at row 5, column 2 is brightest, the one at
    # row 1, column 1 has 0.2 of 0.5, all others nothing.
    cell = sheet[top - 5 : top + 3, left - 2 : left + 4]
    expected = np.zeros((8, 6))
    expected[5, 2], expected[1, 1] = 1.0, 0.4
    assert (cell == heat(expected)).all()


def test_steps_refuses_what_the_run_does_not_have_before_drawing() -> None:
    draw = Recorder()
    for show, message in (("guidance", "without guidance"), ("y", "a step has no 'y'")):
        with pytest.raises(ValueError, match=message):
            viz.steps(without_guidance(made_trace()), draw, show=("x", show))
    with pytest.raises(ValueError, match="count must be 1 or more"):
        viz.steps(made_trace(), draw, count=0)
    for nothing in ([], iter(steps_of(made_trace())), "steps"):
        with pytest.raises(ValueError, match="a run is a Trace or list"):
            viz.steps(nothing, draw)  # type: ignore[arg-type]
    assert not draw.asked


def test_who_sees_a_linear_map_or_false_colours_is_told_so() -> None:
    run = made_trace()
    assert "linear map" in drawn_by(run, None)[1]
    assert "False colours" in drawn_by(steps_of(run), None)[1]
    assert drawn_by(run, Recorder())[1] == ""


def test_runs_side_by_side_each_show_their_own_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    short = steps_of(made_trace())[:2]
    asked: dict[str, Any] = {}
    monkeypatch.setattr(grids, "grid", lambda rows, **more: asked.update(rows=rows, **more))
    viz.side_by_side({"five": made_trace(), "two": short}, Recorder(), count=3)
    assert asked["captions"] == [["t = 801", "t = 401", "t = 1"], ["t = 801", "t = 601"]]
    assert asked["row_captions"] == ["five", "two"]
    assert [len(row) for row in asked["rows"]] == [3, 2]
    with pytest.raises(ValueError, match="no runs"):
        viz.side_by_side({})


# --- Animations ----------------------------------------------------------------------------------


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


def test_every_step_is_a_frame_and_all_frames_have_one_size() -> None:
    draw = Recorder()
    frames = viz.frames(made_trace(t=(999, 99, 9, 1, 0)), draw)
    assert len(frames) == STEPS and torch.equal(draw.asked[0], made_trace().x0)
    assert len({frame.size for frame in frames}) == 1
    assert len({frame.tobytes() for frame in frames}) == STEPS


# --- Sweeps --------------------------------------------------------------------------------------


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
    monkeypatch.setattr(grids, "grid", lambda rows, **more: asked.update(more))
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
        (dict(rows=("sampler", ["ddim", "euler"])), "unknown sampler 'euler'"),
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
