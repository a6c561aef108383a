"""The player: a page that tells the truth about its runs, in few bytes, in a real browser.

The browser's tests need Chromium, Playwright's Python package and axe-core's script, which
`npm install --no-save axe-core` puts into `node_modules`; without one of them they are skipped.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import main as cli
from ldm.pipeline import TextToImage
from ldm.schedule import NoiseSchedule
from ldm.observe.traces import Trace, Word
from ldm.viz import player
from ldm.viz.player import Film, explain, film, player_html
from tests.helpers import pipe_that_reads, randn, rng, tiny_model

ROOT = Path(__file__).parents[2]
PROMPT = "a red house, and a house </script><img src=x onerror=alert(1)> & {{data}}"
SETTINGS: dict[str, Any] = {"steps": 6, "seed": 5, "guidance_scale": 3.0, "height": 20, "width": 12}
ALPHA_BAR = NoiseSchedule().alpha_bar.tolist()


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    """A random model with attention at two sizes, of which none is a square."""
    return pipe_that_reads(channel_mult=(1, 2), max_length=64)


@pytest.fixture(scope="module")
def one(pipe: TextToImage) -> Film:
    return film(pipe, PROMPT, **SETTINGS)


@pytest.fixture(scope="module")
def alone(pipe: TextToImage) -> Film:
    """Fewer steps, another prompt, no guidance, and fresh noise at every step."""
    other = SETTINGS | {"steps": 3, "guidance_scale": 1.0, "eta": 1.0}
    return film(pipe, "a blue house", **other)


def page_data(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data: dict[str, Any] = json.loads(text)
    return data


def numbers_of(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def picture_of(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


# --- A film --------------------------------------------------------------------------------------


def test_a_film_shows_every_step_as_the_pipe_decodes_it(pipe: TextToImage, one: Film) -> None:
    assert one.frames == tuple(range(6)) and len(one.x) == len(one.x0) == 6
    for shown, latents in ((one.x, one.run.x), (one.x0, one.run.x0)):
        for image, expected in zip(shown, pipe.decode(latents), strict=True):
            assert image.tobytes() == expected.tobytes() and image.size == (12, 20)
    assert one.picture.tobytes() == pipe.decode(one.run.latents)[0].tobytes()


def test_the_work_of_a_film_is_counted_and_changes_nothing(pipe: TextToImage, one: Film) -> None:
    counted: list[None] = []
    again = film(pipe, PROMPT, on_work=lambda: counted.append(None) or True, **SETTINGS)
    assert len(counted) == player.work_of(6) == 6 + 2 * 6 + 1
    assert torch.equal(again.run.latents, one.run.latents)
    assert not pipe.unet._forward_hooks


def test_a_film_that_fails_leaves_no_hook(pipe: TextToImage) -> None:
    with pytest.raises(ValueError, match="steps"):
        film(pipe, PROMPT, steps=0)
    assert not pipe.unet._forward_hooks


def test_of_many_steps_a_hundred_are_shown_with_the_first_and_the_last() -> None:
    assert player.shown_frames(100) == tuple(range(100))
    many = player.shown_frames(1000)
    assert len(many) == len(set(many)) == 100 and (many[0], many[-1]) == (0, 999)
    assert {b - a for a, b in itertools.pairwise(many)} == {10, 11}
    assert player.work_of(1000) == 1000 + 200 + 1


# --- What happens at a step ----------------------------------------------------------------------


def a_trace(**changes: Any) -> Trace:
    """Three steps of two by one latents, whose norms can be seen."""

    def steps(*values: tuple[float, float]) -> torch.Tensor:
        return torch.tensor(values)[:, None, :, None]  # (3, 1, 2, 1)

    parts: dict[str, Any] = dict(
        model="made up",
        prompt="a house",
        settings={
            **{"steps": 3, "sampler": "ddim", "guidance_scale": 5.0, "eta": 0.0, "seed": 0},
            **{"negative_prompt": "", "height": 2, "width": 1, "like": None},
        },
        tokens=("<s>", "a</w>", "house</w>", "</s>"),
        words=tuple(Word(t, (i,)) for i, t in enumerate(("<s>", "a", "house", "</s>"))),
        heads=1,
        t=(900, 500, 100),
        t_prev=(500, 100, 0),
        alpha_bar=(0.002, 0.25, 0.95),
        x=steps((3.0, 4.0), (0.0, 2.0), (1.0, 0.0)),
        eps=steps((0.0, 1.0), (0.0, 2.0), (0.0, 3.0)),
        x0=steps((0.0, 10.0), (0.0, 4.0), (0.0, 3.96)),
        eps_uncond=steps((0.0, 2.0), (4.0, 0.0), (0.0, 1.0)),
        eps_cond=steps((0.0, 2.5), (4.0, 3.0), (0.0, 1.02)),
        latents=torch.zeros(1, 1, 2, 1),
        maps={"layer": torch.full((3, 2, 1, 4), 0.25, dtype=torch.float16)},
    )
    return Trace(**(parts | changes))


def test_the_numbers_of_a_step_are_what_they_say() -> None:
    told = [player.numbers(a_trace(), i) for i in range(3)]
    assert [one.noise for one in told] == pytest.approx([0.998, 0.75, 0.05])
    assert told[0].moved is None
    assert [one.moved for one in told[1:]] == pytest.approx([0.6, 0.01])
    assert [one.prompt_change for one in told] == pytest.approx([0.25, 0.75, 0.02], rel=1e-5)
    assert [one.difference for one in told] == pytest.approx([0.5, 3.0, 0.02], rel=1e-5)
    assert [(one.x, one.eps, one.x0) for one in told[:2]] == [(5.0, 1.0, 10.0), (2.0, 2.0, 4.0)]


def test_the_sentence_tells_the_numbers_of_its_step() -> None:
    run = a_trace()
    assert player.sentence(run, 0) == (
        "Step 1 of 3: nearly nothing but noise (99.8% noise, 0.2% picture). The model makes its "
        "first guess of the finished picture. The prompt changes the predicted noise by 25%; "
        "guidance makes that 5 times as much: 125%."
    )
    assert player.sentence(run, 1) == (
        "Step 2 of 3: more noise than picture (75% noise, 25% picture). The guess of the finished "
        "picture changed by 60%: it is being redrawn. The prompt changes the predicted noise by "
        "75%; guidance makes that 5 times as much: 375%."
    )
    assert player.sentence(run, 2) == (
        "Step 3 of 3: nearly clean (5% noise, 95% picture). The guess of the finished picture "
        "changed by 1%: hardly at all. The prompt changes the predicted noise by 2%; guidance "
        "makes that 5 times as much: 10%. This is the last step: it leaves the picture."
    )


def test_the_sentence_knows_runs_of_other_kinds() -> None:
    settings = a_trace().settings
    unguided = a_trace(eps_cond=None, eps_uncond=None)
    assert "There is no guidance: the model is asked with the prompt" in player.sentence(
        unguided, 1
    )
    noisy = "Fresh noise is added on the way to the next step."
    for changes, added in (({"eta": 0.5}, True), ({"sampler": "ddpm"}, True), ({}, False)):
        run = a_trace(settings={**settings, **changes})
        assert [noisy in player.sentence(run, i) for i in range(3)] == [added, added, False]
    negative = a_trace(settings={**settings, "negative_prompt": "fog"})
    assert "Put in the negative prompt's place, the prompt changes" in player.sentence(negative, 1)
    away = a_trace(settings={**settings, "guidance_scale": -2.0})
    assert "guidance makes that -2 times as much: 150%." in player.sentence(away, 1)


def test_words_change_where_they_should() -> None:
    assert player.noise_words(0.3).startswith("more picture than noise (30% noise, 70% picture)")
    assert player.moved_words(0.2).endswith("by 20%: it is taking shape.")
    assert player.moved_words(0.05).endswith("by 5%: it is being refined.")
    assert [player.percent(x) for x in (0.0713, 0.995, 1.254, 0.5, 0.0)] == [
        *("7.1%", "99.5%", "125%", "50%", "0%")
    ]


# --- Two runs ------------------------------------------------------------------------------------


def test_two_runs_stand_side_by_side_at_the_nearest_noise(one: Film, alone: Film) -> None:
    assert one.run.t == (831, 665, 499, 333, 167, 1)
    assert alone.run.t == (667, 334, 1)
    # 831 and 665 are nearest to 667; 499 is 165 from 334 and 168 from 667; 167 is 166 from 1.
    expected = [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert player.timeline([one, alone]) == expected
    assert player.timeline([alone, one]) == [(b, a) for a, b in expected]
    assert player.timeline([alone]) == [(0,), (1,), (2,)]
    words = player.alignment_words([one, alone])
    assert words == (
        "The runs take 6 and 3 steps. The slider follows run A; the other is shown at its step "
        "nearest in noise."
    )
    assert "follows run B" in player.alignment_words([alone, one])
    assert player.alignment_words([one, one]) == player.alignment_words([one]) == ""


def test_two_runs_are_called_by_what_they_have_different(one: Film, alone: Film) -> None:
    names = player.headings([one, alone])
    assert names[0] == f"“{PROMPT}”, 6 steps, guidance scale 3, eta 0"
    assert names[1] == "“a blue house”, 3 steps, guidance scale 1, eta 1"
    assert player.facts([one, alone]) == ["tiny", "DDIM", "seed 5", "12x20 pixels"]
    assert player.facts([one])[1:4] == ["6 steps", "DDIM", "guidance scale 3"]


def test_the_distance_of_two_guesses_is_relative_to_the_first(one: Film, alone: Film) -> None:
    positions = player.timeline([one, alone])
    told = player.apart(one, alone, positions)
    a, b = one.run.x0[4], alone.run.x0[2]
    assert told[4] == pytest.approx(float((b - a).norm() / a.norm()))
    assert player.apart(one, one, [(0, 0), (1, 1)]) == [0.0, 0.0]


# --- The page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(one: Film) -> str:
    return player_html([one], ALPHA_BAR)


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
    assert [frame["sentence"] for frame in data["frames"]] == [
        player.sentence(run, i) for i in range(6)
    ]
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


# --- Bytes ---------------------------------------------------------------------------------------


def a_long_film(
    size: int, latent: int, levels: tuple[int, ...], words: int, steps: int = 50
) -> Film:
    """Noise wherever a run has numbers, which no format makes small: pictures of `size`, attention
    at the latents' size halved so often, a prompt of so many words."""
    numbers = np.random.default_rng(0)
    tokens = words + 2
    noise = randn(steps, 4, latent, latent)
    # A few pictures, taken in turn: what weighs is how many there are.
    noisy = [
        Image.fromarray(numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(2)
    ]
    smooth = [image.resize((size // 8, size // 8)).resize((size, size)) for image in noisy]
    maps = {
        f"{level}": torch.rand(
            steps, latent >> level, latent >> level, tokens, generator=rng()
        ).half()
        for level in levels
    }
    run = a_trace(
        settings={**a_trace().settings, "height": size, "width": size, "steps": steps},
        tokens=tuple("x" * tokens),
        words=tuple(Word(f"word{i}", (i,)) for i in range(tokens)),
        t=tuple(range(20 * steps - 19, 0, -20)),
        t_prev=(0,) * steps,
        alpha_bar=tuple(ALPHA_BAR[t] for t in range(20 * steps - 19, 0, -20)),
        **dict.fromkeys(("x", "eps", "x0", "eps_cond"), noise),
        eps_uncond=noise.roll(1),
        latents=noise[:1],
        maps=maps,
    )
    shown = player.shown_frames(steps)
    return Film(
        run,
        shown,
        x=tuple(noisy[i % 2] for i in shown),
        x0=tuple(smooth[i % 2] for i in shown),
        picture=smooth[0],
    )


def test_fifty_steps_of_horizon_take_at_most_5_mb_and_so_do_two_runs() -> None:
    long = a_long_film(size=128, latent=16, levels=(1, 2), words=38)
    for films in ([long], [long, long]):
        assert len(player_html(films, ALPHA_BAR).encode()) <= 5_000_000


@pytest.mark.full_size
@pytest.mark.parametrize("count", [1, 2])
def test_fifty_steps_of_stable_diffusion_take_at_most_25_mb(count: int) -> None:
    long = a_long_film(size=512, latent=64, levels=(0, 1, 2, 3), words=75)
    page = player_html([long] * count, ALPHA_BAR)
    assert len(page.encode()) <= 25_000_000
    # Not by giving up on what can be seen.
    (maps, *_) = page_data(page)["runs"][0]["attention"]
    assert maps["rows"] >= 8


def test_a_page_is_as_fine_as_its_bytes_allow(one: Film) -> None:
    long = a_long_film(size=128, latent=16, levels=(1, 2), words=8, steps=10)
    sizes = [len(player_html([long], ALPHA_BAR, max_bytes=n)) for n in (10**7, 400_000, 200_000)]
    assert sizes[0] > 400_000 >= sizes[1] > 200_000 >= sizes[2]


# --- explain, and the command --------------------------------------------------------------------


def test_explain_writes_one_page_and_takes_what_differs(
    pipe: TextToImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.html"
    asked = SETTINGS | {"steps": 2}
    explain(pipe, "a red house", path, compare={"guidance_scale": 1.0}, progress=True, **asked)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.html"]
    data = page_data(path.read_text(encoding="utf-8"))
    assert data["headings"] == ["guidance scale 3", "guidance scale 1"]
    assert [run["guidance"] is None for run in data["runs"]] == [False, True]
    assert "14/14" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "run.htm"}, "must end in .html"),
        ({"path": "nowhere/run.html"}, "there is no folder"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": ["a", "b"]}, "one picture"),
        ({"num_images": 2}, "one picture"),
        ({"steps": 0}, "steps must be between"),
        ({"compare": {"steps": 0}}, "steps must be between"),
        ({"compare": {"width": 24}}, "cannot compare by width"),
        ({"compare": {}}, "nothing to compare"),
        ({"compare": {"seed": 5, "eta": 0.0}}, "the first again"),
        ({"compare": {"prompt": ""}}, "the prompt is empty"),
    ],
)
def test_bad_input_is_refused_before_any_step(
    pipe: TextToImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipe.unet, "forward", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match=message) as caught:
        explain(pipe, **({"prompt": "a house", "path": "run.html"} | SETTINGS | changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_the_page_that_was_there(
    pipe: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.html"
    path.write_text("as it was")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explain(pipe, "a house", path, **SETTINGS | {"steps": 1})
    assert path.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_the_command_writes_a_page_named_after_the_prompt(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["explain", "A red house!", "--weights", str(model), "--device", "cpu", "--steps=3"]
    assert cli.main([*command, "--compare", "blue", "--compare-sampler", "ddpm"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "a-red-house.html\n" and "\nseed " in printed.err
    data = page_data(Path("a-red-house.html").read_text(encoding="utf-8"))
    assert data["headings"] == ["“A red house!”, DDIM", "“blue”, DDPM"]
    assert cli.main([*command, "--seed", "1"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-red-house-2.html", "a-red-house.html"]
    assert "seed 1 " in Path("a-red-house-2.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "-o", "a.png"], "must end in .html"),
        (["a", "-o", "no/a.html"], "no folder"),
        (["  "], "the prompt is empty"),
        (["a", "--steps", "0"], "steps must be between"),
        (["a", "--compare-steps", "0"], "steps must be between"),
        (["a", "--compare-sampler", "euler"], "unknown sampler"),
        (["a", "--seed", "1", "--compare-seed", "1"], "the first again"),
        (["a", "--height", "7"], "height must be"),
    ],
)
def test_the_command_refuses_before_the_weights_are_read(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "plan_stages", lambda *_: pytest.fail("weights were read"))
    assert cli.main(["explain", "--weights", str(model), "--device", "cpu", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- In a browser --------------------------------------------------------------------------------

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
        assert tab.text("#sentences") == player.sentence(one.run, position)
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


def test_play_goes_to_the_end_and_stops_and_says_nothing_on_its_way(tab: Tab) -> None:
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
    assert f"up to {player.percent(peak)} of a place\u2019s attention at this step" in said
    (told,) = re.findall(r"picture is ([\d.]+)%", said)
    assert float(told) == pytest.approx(100 * mean, rel=0.06)  # it is told with two digits
    tab.choose("when", "average")
    peak = float(coarse.mean(0).max())
    assert f"up to {player.percent(peak)} of a place\u2019s attention on average" in tab.text(
        "#looking"
    )


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


def test_two_runs_stay_in_step(two: Tab, one: Film, alone: Film) -> None:
    assert "The slider follows run A" in two.text("#alignment")
    for position, (a, b) in enumerate(player.timeline([one, alone])):
        two.page.locator("#slider").fill(str(position))
        said = two.page.locator(".sentence").all_inner_texts()
        assert player.sentence(one.run, a) in said[0] and player.sentence(alone.run, b) in said[1]
        assert "guesses are" in said[1]
    assert two.pixels("x0", 0) != two.pixels("x0", 1)
    assert two.page.locator(".absent").count() == 1  # the run without guidance says so
    assert two.page.locator(".guidance canvas").count() == 1


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


def test_who_wants_less_motion_gets_slower_steps(browser: Any, paths: list[Path]) -> None:
    tab = Tab(browser, paths[0], reduced_motion="reduce")
    durations = (
        "[...document.querySelectorAll('*')].map((e) => getComputedStyle(e).transitionDuration)"
    )
    assert set(tab.page.evaluate(durations)) == {"0s"}
    tab.close()
