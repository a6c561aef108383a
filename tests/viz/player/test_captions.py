"""What the page says of whole runs."""

from __future__ import annotations

import pytest

from ldm.pipeline import TextToImage
from ldm.settings import Settings
from ldm.viz.player import captions
from ldm.viz.player.film import Film
from tests.viz.player.films import PROMPT, SETTINGS


def test_who_watches_two_runs_is_told_how_they_are_aligned(one: Film, alone: Film) -> None:
    words = captions.alignment_words([one, alone])
    assert words == (
        "The runs take 6 and 3 steps. The slider follows run A; the other is shown at its step "
        "nearest in noise."
    )
    assert "follows run B" in captions.alignment_words([alone, one])
    assert captions.alignment_words([one, one]) == captions.alignment_words([one]) == ""


def test_two_runs_are_called_by_what_they_have_different(one: Film, alone: Film) -> None:
    names = captions.headings([one, alone])
    assert names[0] == f"“{PROMPT}”, 6 steps, guidance scale 3, eta 0"
    assert names[1] == "“a blue house”, 3 steps, guidance scale 1, eta 1"
    assert captions.facts([one, alone]) == ["tiny", "DDIM", "seed 5", "12x20 pixels"]
    assert captions.facts([one])[1:4] == ["6 steps", "DDIM", "guidance scale 3"]


def test_how_prompts_were_read_is_said_where_it_is_not_the_plain_way() -> None:
    assert captions.setting_words("weighting", True) == "words weighed by brackets"
    assert captions.setting_words("weighting", False) == "brackets as text"
    assert captions.setting_words("clip_skip", 1) == "clip skip 1"


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        SETTINGS | {"steps": 2, "negative_prompt": "a 'blue' \n house", "eta": 0.5},
        {"steps": 1, "sampler": "ddpm", "like": "diffusers"},
        {"steps": 1, "weighting": True, "clip_skip": 1, "long_prompts": True},
    ],
)
def test_the_call_in_python_draws_the_same_run_again(
    pipe: TextToImage, settings: dict[str, object]
) -> None:
    asked = Settings.of(pipe.config, PROMPT, **settings)  # type: ignore[arg-type]

    def called(prompt: str, **keywords: object) -> Settings:
        return Settings.of(pipe.config, prompt, **keywords)  # type: ignore[arg-type]

    assert eval(captions.python_call(asked), {"pipe": called}) == asked
    (again,) = eval(captions.python_call(asked), {"pipe": pipe})
    assert again.tobytes() == pipe.draw(asked)[0].tobytes()
