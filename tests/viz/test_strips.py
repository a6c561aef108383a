"""The steps of a run as pictures: those that were asked for, in their order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import viz
from ldm.viz import strips
from ldm.viz.colours import heat
from ldm.viz.runs import drawn_by, spaced
from tests.viz.pictures import solid
from tests.viz.runs import STEPS, made_trace, steps_of, without_guidance


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
    monkeypatch.setattr(strips, "grid", lambda rows, **more: asked.update(rows=rows, **more))
    viz.side_by_side({"five": made_trace(), "two": short}, Recorder(), count=3)
    assert asked["captions"] == [["t = 801", "t = 401", "t = 1"], ["t = 801", "t = 601"]]
    assert asked["row_captions"] == ["five", "two"]
    assert [len(row) for row in asked["rows"]] == [3, 2]
    with pytest.raises(ValueError, match="no runs"):
        viz.side_by_side({})


def test_every_step_is_a_frame_and_all_frames_have_one_size() -> None:
    draw = Recorder()
    frames = viz.frames(made_trace(t=(999, 99, 9, 1, 0)), draw)
    assert len(frames) == STEPS and torch.equal(draw.asked[0], made_trace().x0)
    assert len({frame.size for frame in frames}) == 1
    assert len({frame.tobytes() for frame in frames}) == STEPS
