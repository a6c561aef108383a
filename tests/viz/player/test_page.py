"""The page tells the truth about its runs, in few bytes, and can ask for nothing."""

from __future__ import annotations

import dataclasses
import html
import re
from importlib.resources import files

import numpy as np
import pytest
import torch

from ldm.settings import Settings
from ldm.viz.player.film import Film
from ldm.viz.player.page import SCRIPT, player_html
from ldm.viz.player.story import sentence
from tests.viz.player.films import (
    ALPHA_BAR,
    PROMPT,
    a_long_film,
    numbers_of,
    page_data,
    picture_of,
)


def test_the_page_holds_the_attention_of_the_run(one: Film, page: str) -> None:
    (data,) = page_data(page)["runs"]
    words, run = one.run.words, one.run
    assert [word["text"] for word in data["words"]] == [word.text for word in words]
    assert [word["kind"] for word in data["words"]][:2] == ["start", "word"]
    assert data["words"][-1]["kind"] == "end"
    assert [maps["label"] for maps in data["attention"]] == ["10x6", "5x3"]
    total = 0
    for maps, (rows, columns) in zip(data["attention"], run.resolutions, strict=True):
        levels = numbers_of(maps["levels"], "u1", 7, len(words), rows, columns)
        peaks = numbers_of(maps["peaks"], "<f4", 7, len(words))
        shares = levels / 255 * peaks[..., None, None]
        layers = [m.float() for m in run.maps.values() if m.shape[1] == rows]
        assert maps["layers"] == len(layers)
        for i, word in enumerate(words):
            stacked = torch.stack(layers)[..., list(word.tokens)].sum(-1).mean(0)  # (S, r, c)
            expected = torch.cat([stacked, stacked.mean(0, keepdim=True)]).numpy()
            # A level is a 255th of the map's peak, and the nearest was taken.
            np.testing.assert_allclose(shares[:, i], expected, atol=float(expected.max() / 500))
        # At every place all words together have all of the attention.
        np.testing.assert_allclose(shares.sum(1), 1.0, atol=0.01)
        total += len(layers)
    assert total == len(run.maps)


def test_the_page_holds_the_guidance_and_the_numbers_of_the_run(one: Film, page: str) -> None:
    whole = page_data(page)
    (data,) = whole["runs"]
    run = one.run
    assert run.eps_cond is not None and run.eps_uncond is not None
    expected = (run.eps_cond - run.eps_uncond).norm(dim=1).numpy()
    peaks = np.array(data["guidance"]["peaks"])
    np.testing.assert_allclose(peaks, expected.max(axis=(1, 2)), rtol=1e-6)
    levels = numbers_of(data["guidance"]["levels"], "u1", 6, 10, 6)
    found = levels / 255 * peaks[:, None, None]
    np.testing.assert_allclose(found, expected, atol=peaks.max() / 500)
    assert [frame["t"] for frame in data["frames"]] == list(run.t)
    assert [frame["sentence"] for frame in data["frames"]] == [sentence(run, i) for i in range(6)]
    assert Settings.from_dict(data["settings"]) == run.settings
    assert whole["timeline"] == [[i] for i in range(6)] and whole["apart"] is None
    assert whole["schedule"][0] == pytest.approx([0, 1 - ALPHA_BAR[0]])
    assert whole["schedule"][-1] == pytest.approx([999, 1 - ALPHA_BAR[999]])


def test_small_pictures_are_kept_exactly(one: Film, page: str) -> None:
    (data,) = page_data(page)["runs"]
    for uris, images in ((data["x"], one.x), (data["x0"], one.x0)):
        for uri, image in zip(uris, images, strict=True):
            np.testing.assert_array_equal(picture_of(uri), np.asarray(image))


def test_a_prompt_is_text_and_nothing_else(page: str) -> None:
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img src=x" not in page and html.escape(PROMPT) in page
    assert page.count("<h1>") == 1 and f"<h1>{html.escape(PROMPT)}</h1>" in page
    assert "{{data}}" in page  # said by the prompt, and not taken for a place of the template


def test_the_page_can_ask_for_nothing(page: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "*" not in policy
    assert "url(" not in page and "@import" not in page
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_the_same_runs_give_the_same_page(one: Film, page: str) -> None:
    assert player_html([one], ALPHA_BAR) == page


def test_without_guidance_there_is_no_map_of_it(alone: Film) -> None:
    (data,) = page_data(player_html([alone], ALPHA_BAR))["runs"]
    assert data["guidance"] is None
    assert {frame["prompt_change"] for frame in data["frames"]} == {None}


def test_films_that_do_not_fit_together_are_refused(one: Film, alone: Film) -> None:
    with pytest.raises(ValueError, match="one run or two, not 3"):
        player_html([one] * 3, ALPHA_BAR)
    wide = dataclasses.replace(alone, picture=alone.picture.resize((20, 12)))
    with pytest.raises(ValueError, match="at one picture size"):
        player_html([one, wide], ALPHA_BAR)
    broken = dataclasses.replace(one.run, x0=one.run.x0 / 0)
    with pytest.raises(ValueError, match="not finite"):
        player_html([dataclasses.replace(one, run=broken)], ALPHA_BAR)


def test_every_file_of_the_script_is_in_the_page() -> None:
    there = {file.name for file in (files("ldm.viz.player") / "script").iterdir()}
    assert there == {f"{name}.js" for name in SCRIPT}


# --- Bytes ---------------------------------------------------------------------------------------


def test_fifty_steps_of_horizon_take_at_most_5_mb_and_so_do_two_runs() -> None:
    long = a_long_film(size=128, latent=16, levels=(1, 2), words=38)
    two = player_html([long, long], ALPHA_BAR)
    assert len(two.encode()) <= 5_000_000  # and so one run, which has half of that


@pytest.mark.full_size
@pytest.mark.parametrize("count", [1, 2])
def test_fifty_steps_of_stable_diffusion_take_at_most_25_mb(count: int) -> None:
    long = a_long_film(size=512, latent=64, levels=(0, 1, 2, 3), words=75)
    page = player_html([long] * count, ALPHA_BAR)
    assert len(page.encode()) <= 25_000_000
    # Not by giving up on what can be seen.
    (maps, *_) = page_data(page)["runs"][0]["attention"]
    assert maps["rows"] >= 8


def test_a_page_is_as_fine_as_its_bytes_allow() -> None:
    long = a_long_film(size=128, latent=16, levels=(1, 2), words=8, steps=10)
    sizes = [len(player_html([long], ALPHA_BAR, max_bytes=n)) for n in (10**7, 400_000, 200_000)]
    assert sizes[0] > 400_000 >= sizes[1] > 200_000 >= sizes[2]
