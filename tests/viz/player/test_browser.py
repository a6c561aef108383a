"""The page in a real browser.

These tests need Chromium, Playwright's Python package and axe-core's script, which
`npm install --no-save axe-core` puts into `node_modules`; without one of them they are skipped.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.viz.player.film import Film
from ldm.viz.player.page import player_html
from ldm.viz.player.story import percent, sentence, timeline
from tests.places import ROOT
from tests.viz.player.films import ALPHA_BAR, a_long_film

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def axe_core() -> str | None:
    """axe-core's script: in the folder that AXE_CORE names, or where npm puts it here."""
    folders = [os.environ.get("AXE_CORE"), ROOT / "node_modules" / "axe-core"]
    for folder in filter(None, folders):
        path = Path(folder) / "axe.min.js"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page in the browser, and all that it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(
            **({"viewport": {"width": 1280, "height": 800}} | options)
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_timeout(200)
        self.until("[...document.images].every((image) => image.complete)")

    def close(self) -> None:
        self.context.close()

    def until(self, condition: str) -> None:
        """Wait until a script's expression is true; `wait_for_function` would need an eval, which
        the page's policy forbids."""
        for _ in range(600):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never came: {condition}")

    def pixels(self, name: str, run: int = 0) -> str:
        """What is drawn in a panel of a run: x, x0 or guidance."""
        script = "([n, i]) => document.querySelectorAll(`.${n} canvas`)[i].toDataURL()"
        drawn: str = self.page.evaluate(script, [name, run])
        return drawn

    def at(self) -> int:
        return int(self.page.locator("#slider").input_value())

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text().strip()

    def word(self, text: str) -> Any:
        return self.page.get_by_role("button", name=text, exact=True)

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"input[name={name}][value='{value}']").check()


@pytest.fixture(scope="module")
def paths(
    tmp_path_factory: pytest.TempPathFactory, page: str, one: Film, alone: Film
) -> list[Path]:
    """The page of one run, and that of two."""
    folder = tmp_path_factory.mktemp("pages")
    pages = [folder / "one run.html", folder / "two.html"]
    pages[0].write_text(page, encoding="utf-8")
    pages[1].write_text(player_html([one, alone], ALPHA_BAR), encoding="utf-8")
    return pages


@pytest.fixture
def tab(browser: Any, paths: list[Path]) -> Iterator[Tab]:
    tab = Tab(browser, paths[0])
    yield tab
    tab.close()


@pytest.fixture
def two(browser: Any, paths: list[Path]) -> Iterator[Tab]:
    tab = Tab(browser, paths[1])
    yield tab
    tab.close()


def test_scrubbing_shows_each_step_as_it_was(tab: Tab, one: Film) -> None:
    seen = set()
    for position in range(6):
        tab.page.locator("#slider").fill(str(position))
        assert tab.text(".sentence") == sentence(one.run, position)
        assert tab.text("#where-now").startswith(f"{position + 1} / 6")
        for name, images in (("x", one.x), ("x0", one.x0)):
            script = (
                "(n) => { const c = document.querySelector(`.${n} canvas`); return [c.width, "
                "...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] }"
            )
            width, *values = tab.page.evaluate(script, name)
            drawn = np.array(values).reshape(-1, width, 4)[..., :3]
            np.testing.assert_array_equal(drawn, np.asarray(images[position]))
        seen.add(tab.pixels("guidance"))
    assert len(seen) == 6


def test_keys_step_jump_and_play(tab: Tab) -> None:
    keys = tab.page.keyboard
    for key, expected in (
        *(("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 5)),
        *(("ArrowRight", 5), ("Home", 0), ("ArrowLeft", 0)),
    ):
        keys.press(key)
        assert tab.at() == expected, key
    tab.page.locator("#slider").focus()  # which moves by keys of its own: once, not twice
    keys.press("ArrowRight")
    assert tab.at() == 1
    keys.press("Space")
    assert tab.page.get_by_role("button", name="Pause").is_visible()
    keys.press("Space")
    assert tab.page.get_by_role("button", name="Play").is_visible()
    keys.press("Home")
    tab.page.get_by_role("button", name="Play").focus()  # a slider takes Control+ArrowRight too
    keys.press("Control+ArrowRight")  # the browser's own
    assert tab.at() == 0


@pytest.mark.slow
def test_play_goes_to_the_end_and_stops_and_says_nothing_on_its_way(tab: Tab) -> None:
    tab.page.locator("#slider").fill("3")
    tab.until("document.querySelector('#spoken').textContent !== ''")
    tab.page.evaluate(
        "window.said = []; new MutationObserver(() => said.push(document.querySelector('#slider')"
        ".value + document.querySelector('#spoken').textContent)).observe("
        "document.querySelector('#spoken'), {childList: true})"
    )
    before = tab.pixels("x0")
    tab.page.get_by_role("button", name="Play").click()
    tab.until("document.querySelector('#slider').value === '5'")
    assert tab.page.get_by_role("button", name="Play").is_visible()
    assert tab.pixels("x0") != before
    tab.until("document.querySelector('#spoken').textContent !== ''")
    said = [one for one in tab.page.evaluate("said") if len(one) > 1]
    assert len(said) == 1 and said[0].startswith("5Step 6 of 6")
    tab.page.get_by_role("button", name="Play").click()  # once more, from the start
    tab.until("document.querySelector('#slider').value !== '5'")


def test_a_word_lays_its_attention_over_the_picture(tab: Tab, one: Film) -> None:
    bare, noisy = tab.pixels("x0"), tab.pixels("x")
    tab.word("red").hover()
    red = tab.pixels("x0")
    assert red != bare and tab.pixels("x") == noisy
    tab.page.mouse.move(2, 2)
    assert tab.pixels("x0") == bare
    tab.word("start of text").focus()
    tab.page.keyboard.press("Tab")  # to "a"
    assert tab.pixels("x0") not in (bare, red)
    tab.page.keyboard.press("Tab")
    assert tab.pixels("x0") == red
    tab.page.keyboard.press("Enter")
    assert tab.word("red").get_attribute("aria-pressed") == "true"
    tab.page.keyboard.press("Tab")
    tab.page.locator("#slider").focus()
    assert tab.pixels("x0") == red  # it stays
    tab.page.keyboard.press("ArrowRight")
    later = tab.pixels("x0")
    assert later != red
    tab.page.keyboard.press("Escape")
    assert tab.pixels("x0") != later
    assert tab.word("red").get_attribute("aria-pressed") == "false"


def test_what_is_said_of_a_word_is_what_the_run_knew(tab: Tab, one: Film) -> None:
    tab.choose("where", "1")
    tab.word("red").click()
    (place,) = one.run.word("red").tokens
    coarse = torch.stack(list(one.run.layers(5).values())).float()[..., place].mean(0)  # (S, 5, 3)
    peak, mean = float(coarse[0].max()), float(coarse[0].mean())
    said = tab.text("#looking")
    assert f"up to {percent(peak)} of a place\u2019s attention at this step" in said
    (told,) = re.findall(r"picture is ([\d.]+)%", said)
    assert float(told) == pytest.approx(100 * mean, rel=0.06)  # it is told with two digits
    tab.choose("when", "average")
    peak = float(coarse.mean(0).max())
    assert f"up to {percent(peak)} of a place\u2019s attention on average" in tab.text("#looking")


@pytest.mark.slow
def test_step_or_average_size_and_scale_can_be_chosen(tab: Tab) -> None:
    tab.word("red").click()
    seen = [tab.pixels("x0")]
    for name, value in (("where", "0"), ("where", "1"), ("when", "average"), ("scale", "shared")):
        tab.choose(name, value)
        seen.append(tab.pixels("x0"))
    assert len(set(seen)) == 5
    tab.choose("when", "step")
    tab.choose("scale", "own")
    assert tab.pixels("x0") == seen[2]
    # The brightest cell of a map is where its peak is: 5 rows and 3 columns of 4 by 4 pixels.
    tab.choose("when", "average")
    assert tab.pixels("x0") == seen[3]


@pytest.mark.slow
def test_two_runs_stay_in_step(two: Tab, one: Film, alone: Film) -> None:
    assert "The slider follows run A" in two.text("#alignment")
    for position, (a, b) in enumerate(timeline([one, alone])):
        two.page.locator("#slider").fill(str(position))
        said = two.page.locator(".sentence").all_inner_texts()
        assert sentence(one.run, a) in said[0] and sentence(alone.run, b) in said[1]
        assert "guesses are" in said[1]
    assert two.pixels("x0", 0) != two.pixels("x0", 1)
    assert two.page.locator(".absent").count() == 1  # the run without guidance says so
    assert two.page.locator(".guidance canvas").count() == 1


@pytest.mark.slow
def test_a_word_shows_in_both_runs_where_both_have_it(two: Tab) -> None:
    bare = [two.pixels("x0", run) for run in (0, 1)]
    two.page.get_by_role("group", name="Words of run B").get_by_role("button", name="house").click()
    assert all(two.pixels("x0", run) != bare[run] for run in (0, 1))
    pressed = two.page.locator(".word[aria-pressed=true]")
    assert pressed.all_inner_texts() == ["house", "house"]
    two.page.keyboard.press("Escape")
    two.word("red").click()
    assert two.pixels("x0", 0) != bare[0] and two.pixels("x0", 1) == bare[1]
    assert "Run B has no such word." in two.text("#looking")


@pytest.mark.slow
def test_the_marker_moves_along_the_schedule_and_can_be_led(tab: Tab, one: Film) -> None:
    plot = tab.page.locator(".plot").first
    box = plot.bounding_box()
    for position in (0, 3):
        tab.page.locator("#slider").fill(str(position))
        dot = plot.locator(".dot").evaluate("(dot) => [dot.style.left, dot.style.top]")
        left, top = (float(value.rstrip("%")) for value in dot)
        assert left == pytest.approx(100 * (1 - one.run.t[position] / 999), abs=0.01)
        assert top == pytest.approx(100 - 92 * (1 - one.run.alpha_bar[position]), abs=0.01)
    plot.scroll_into_view_if_needed()
    plot.click(position={"x": box["width"] - 3, "y": 10})
    assert tab.at() == 5


def test_the_numbers_of_the_step_are_there(tab: Tab, one: Film) -> None:
    tab.page.get_by_text("The numbers of this step").click()
    tab.page.locator("#slider").fill("2")
    table = tab.text("#numbers table")
    norm = float(one.run.x[2].norm())
    for told in (str(one.run.t[2]), f"{one.run.alpha_bar[2]:.4g}", f"{norm:.4g}"):
        assert told in table


@pytest.mark.parametrize("which", [0, 1])
def test_nothing_is_asked_for_and_nothing_complains(
    browser: Any, paths: list[Path], which: int
) -> None:
    tab = Tab(browser, paths[which])
    for key in ("ArrowRight", "End", "Home", "Space", "Tab", "Tab", "Enter"):
        tab.page.keyboard.press(key)
    # Not even where somebody tries: the page's own policy says no.
    tab.page.evaluate("fetch('https://example.org/x').catch(() => {})")
    tab.page.wait_for_timeout(100)
    outside = [url for url in tab.requests if not url.startswith(("data:", "file:"))]
    files = [url for url in tab.requests if url.startswith("file:")]
    refused = [text for text in tab.complaints if "example.org" in text]
    assert outside == [] and len(files) == 1
    assert refused and tab.complaints == refused
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_serious(
    browser: Any, paths: list[Path], scheme: str, width: int
) -> None:
    axe = axe_core()
    if axe is None:
        pytest.skip("axe-core is not there: npm install --no-save axe-core")
    for path in paths:
        viewport = {"width": width, "height": 800}
        tab = Tab(browser, path, viewport=viewport, color_scheme=scheme)
        tab.page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        tab.word("red").click()
        tab.page.evaluate(axe)
        found = tab.page.evaluate("axe.run().then((results) => results.violations)")
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        assert [(one["id"], one["nodes"][0]["html"]) for one in serious] == []
        tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 400])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    browser: Any, paths: list[Path], width: int
) -> None:
    for path in paths:
        options = {"is_mobile": True, "has_touch": True}
        tab = Tab(browser, path, viewport={"width": width, "height": 740}, **options)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        bare = tab.pixels("x0")
        tab.word("red").tap()
        assert tab.pixels("x0") != bare
        small = "[...document.querySelectorAll('button, summary')].map((b) => b.clientHeight)"
        assert min(tab.page.evaluate(small)) >= 24  # WCAG 2.2, target size
        tab.close()


@pytest.mark.slow
@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_the_sentence_stands_under_the_picture_within_the_first_screen(
    browser: Any, tmp_path: Path, width: int, height: int
) -> None:
    film = a_long_film(size=128, latent=16, levels=(1,), words=7, steps=3)
    for films in ([film], [film, film]):
        path = tmp_path / f"{len(films)}.html"
        path.write_text(player_html(films, ALPHA_BAR), encoding="utf-8")
        tab = Tab(browser, path, viewport={"width": width, "height": height})
        box = "(s) => { const b = document.querySelector(s).getBoundingClientRect(); "
        x0 = tab.page.evaluate(box + "return b.bottom }", ".x0 canvas")
        said = tab.page.evaluate(box + "return b.top }", ".sentence")
        timeline = tab.page.evaluate(box + "return b.top }", ".transport")
        assert x0 <= said < timeline
        if len(films) == 1:  # two runs on a phone have narrow sentences, which go on below
            assert tab.page.evaluate(box + "return b.bottom }", ".sentence span") <= timeline
        tab.close()


@pytest.mark.slow
def test_tapping_a_word_on_a_phone_shifts_nothing(browser: Any, paths: list[Path]) -> None:
    options = {"is_mobile": True, "has_touch": True}
    tab = Tab(browser, paths[0], viewport={"width": 390, "height": 844}, **options)
    places = (
        "[...document.querySelectorAll('canvas, button, section, details')]"
        ".map((e) => [e.getBoundingClientRect().top, e.getBoundingClientRect().height])"
    )
    before = tab.page.evaluate(places)
    for word in ("red", "start of text", "end of text"):
        tab.word(word).tap()
        assert tab.page.evaluate(places) == before, word
    tab.close()


@pytest.mark.parametrize("peak, shows", [(1.4, False), (1.6, True)])
def test_a_flat_map_is_said_to_be_one_and_does_not_glow(
    browser: Any, tmp_path: Path, peak: float, shows: bool
) -> None:
    film = a_long_film(size=32, latent=4, levels=(0,), words=2, steps=2)
    maps = {"0": torch.full((2, 4, 4, 4), 0.1)}
    # A mean of one tenth: what the brightest place has more, all others have less.
    maps["0"][..., 1] = 0.1 * (1 - (peak - 1) / 15)
    maps["0"][:, 2, 1, 1] = 0.1 * peak
    run = dataclasses.replace(film.run, maps=maps)
    path = tmp_path / "flat.html"
    path.write_text(player_html([dataclasses.replace(film, run=run)], ALPHA_BAR), encoding="utf-8")
    tab = Tab(browser, path)
    tab.word("word1").hover()
    assert ("nearly the same everywhere" in tab.text("#looking")) is not shows
    drawn = tab.pixels("x0")
    tab.choose("scale", "shared")  # where every word is shown as bright as it is
    assert tab.pixels("x0") != drawn or shows
    tab.close()


@pytest.mark.slow
def test_who_wants_less_motion_gets_slower_steps(browser: Any, paths: list[Path]) -> None:
    tab = Tab(browser, paths[0], reduced_motion="reduce")
    durations = (
        "[...document.querySelectorAll('*')].map((e) => getComputedStyle(e).transitionDuration)"
    )
    assert set(tab.page.evaluate(durations)) == {"0s"}
    tab.close()
