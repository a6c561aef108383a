"""A random model, two of its runs and a page: made once for all tests of the player."""

from __future__ import annotations

import pytest

from ldm.pipeline import TextToImage
from ldm.settings import Settings
from ldm.viz.player.film import Film, film
from ldm.viz.player.page import player_html
from tests.helpers import pipe_that_reads
from tests.viz.player.films import ALPHA_BAR, PROMPT, SETTINGS


@pytest.fixture(scope="package")
def pipe() -> TextToImage:
    """A random model with attention at two sizes, of which none is a square."""
    return pipe_that_reads(channel_mult=(1, 2), max_length=64)


@pytest.fixture(scope="package")
def asked(pipe: TextToImage) -> Settings:
    return Settings.of(pipe.config, PROMPT, **SETTINGS)


@pytest.fixture(scope="package")
def one(pipe: TextToImage, asked: Settings) -> Film:
    return film(pipe, asked)


@pytest.fixture(scope="package")
def alone(pipe: TextToImage) -> Film:
    """Fewer steps, another prompt, no guidance, and fresh noise at every step."""
    other = SETTINGS | {"steps": 3, "guidance_scale": 1.0, "eta": 1.0}
    return film(pipe, Settings.of(pipe.config, "a blue house", **other))


@pytest.fixture(scope="package")
def page(one: Film) -> str:
    return player_html([one], ALPHA_BAR)
