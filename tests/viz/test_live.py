"""Watching a run: the steps pass through unchanged, and each is seen where it can be."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import viz
from ldm.samplers import Step, Steps, ddim
from ldm.schedule import NoiseSchedule
from tests.helpers import randn

# `ldm.viz.live` itself is the function.
MODULE = sys.modules["ldm.viz.live"]
SCHEDULE = NoiseSchedule()


def run(steps: int = 4) -> Steps:
    return ddim(lambda x, t: x / 2, randn(1, 4, 4, 4), SCHEDULE.ddim_timesteps(steps), SCHEDULE)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Image.Image]]]:
    """What a notebook's cell was told, as if this were one."""
    display = pytest.importorskip("IPython.display")
    told: list[tuple[str, Image.Image]] = []
    monkeypatch.setattr(MODULE, "in_jupyter", lambda: True)
    for name in ("display", "update"):
        monkeypatch.setattr(
            display.DisplayHandle, name, lambda _, image, name=name: told.append((name, image))
        )
    yield told


def test_the_steps_pass_through_unchanged() -> None:
    for ours, theirs in zip(viz.live(run()), run(), strict=True):
        assert (ours.index, ours.t) == (theirs.index, theirs.t)
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.x0, theirs.x0)


def test_what_is_sent_goes_on_to_the_run() -> None:
    new = randn(1, 4, 4, 4, seed=5)
    seen = viz.live(run())
    next(seen)
    assert torch.equal(seen.send(new).x, new)
    assert not torch.equal(next(seen).x, new)


def test_who_stops_watching_stops_the_run() -> None:
    steps = run()
    seen = viz.live(steps)
    next(seen)
    seen.close()
    assert next(steps, None) is None


def test_an_error_of_the_run_reaches_its_caller() -> None:
    def broken() -> Steps:
        yield next(run())
        raise RuntimeError("no more memory")

    seen = viz.live(broken())
    next(seen)
    with pytest.raises(RuntimeError, match="no more memory"):
        next(seen)


def test_in_a_notebook_one_output_shows_every_step(shown: list) -> None:
    drawn: list[Tensor] = []

    def draw(latents: Tensor) -> list[Image.Image]:
        drawn.append(latents)
        return [Image.new("RGB", (8, 8), (len(drawn), 0, 0))] * len(latents)

    steps: list[Step] = list(viz.live(run(), draw))
    assert [way for way, _ in shown] == ["display", "update", "update", "update"]
    assert all(torch.equal(one, step.x0) for one, step in zip(drawn, steps, strict=True))
    assert all(isinstance(image, Image.Image) for _, image in shown)
    assert len({image.tobytes() for _, image in shown}) == 4


def test_a_step_is_seen_before_it_is_passed_on(shown: list) -> None:
    for count, _ in enumerate(viz.live(run()), start=1):
        assert len(shown) == count


@pytest.mark.parametrize(("every", "seen"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3, 4])])
def test_every_nth_step_is_seen_and_the_last(every: int, seen: list[int], shown: list) -> None:
    asked: list[Tensor] = []

    def draw(latents: Tensor) -> list[Image.Image]:
        asked.append(latents)
        return [Image.new("RGB", (8, 8))]

    steps = list(viz.live(run(5), draw, every=every, show="x"))
    assert len(asked) == len(seen) == len(shown)
    assert all(torch.equal(x, steps[i].x) for x, i in zip(asked, seen, strict=True))


def test_without_a_way_to_draw_false_colours_are_shown(shown: list) -> None:
    list(viz.live(run(1)))
    (step,) = run(1)
    picture = viz.false_colours(4)(step.x0)
    assert shown[0][1].tobytes() == viz.strip(picture, title="step 1, t = 1", size=256).tobytes()


def test_a_terminal_has_one_line_and_a_file_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in viz.live(run(2)):
            pass
        text = stream.getvalue()
        if expected:
            assert text.count("\r") == 2 and text.count("\n") == 1 and text.endswith("\n")
            assert "step 2, t = 1" in text
        else:
            assert text == ""


def test_this_is_no_notebook() -> None:
    assert not MODULE.in_jupyter()


def test_what_cannot_be_shown_is_refused(shown: list) -> None:
    for arguments, message in ((dict(show="y"), "no 'y'"), (dict(every=0), "1 or more, not 0")):
        with pytest.raises(ValueError, match=message):
            viz.live(run(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without guidance"):
        next(viz.live(run(), show="eps_cond"))
