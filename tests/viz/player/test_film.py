"""A film: every step of its run as the pipe decodes it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from ldm.pipeline import TextToImage
from ldm.settings import Settings
from ldm.viz.player.film import Film, film, shown_frames, work_of


def test_a_film_shows_every_step_as_the_pipe_decodes_it(pipe: TextToImage, one: Film) -> None:
    assert one.frames == tuple(range(6)) and len(one.x) == len(one.x0) == 6
    for shown, latents in ((one.x, one.run.x), (one.x0, one.run.x0)):
        for image, expected in zip(shown, pipe.decode(latents), strict=True):
            assert image.tobytes() == expected.tobytes() and image.size == (12, 20)
    assert one.picture.tobytes() == pipe.decode(one.run.latents)[0].tobytes()


def test_the_work_of_a_film_is_counted_and_changes_nothing(
    pipe: TextToImage, asked: Settings, one: Film
) -> None:
    counted: list[None] = []
    again = film(pipe, asked, on_work=lambda: counted.append(None) or True)
    assert len(counted) == work_of(6) == 6 + 2 * 6
    assert torch.equal(again.run.latents, one.run.latents)
    assert not pipe.unet._forward_hooks


def test_a_film_that_fails_leaves_no_hook(pipe: TextToImage, asked: Settings) -> None:
    with pytest.raises(ValueError, match="steps"):
        film(pipe, dataclasses.replace(asked, steps=0))
    assert not pipe.unet._forward_hooks


def test_of_many_steps_a_hundred_are_shown_with_the_first_and_the_last() -> None:
    assert shown_frames(100) == tuple(range(100))
    many = shown_frames(1000)
    assert len(many) == len(set(many)) == 100 and (many[0], many[-1]) == (0, 999)
    assert {b - a for a, b in itertools.pairwise(many)} == {10, 11}
    assert work_of(1000) == 1000 + 200
