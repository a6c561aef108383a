"""The page that holds a model: its policy, its text, and in a browser the pictures of Python.

Those in a browser need Chromium, Playwright, onnx, and npm's onnxruntime-web, in the folder that
ORT_WEB names or in `node_modules`; without one of them they are skipped.
"""

from __future__ import annotations

import copy
import hashlib
import html
import io
import os
import re
import shutil
import tarfile
import urllib.error
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ldm
from ldm.config import HORIZON
from ldm.export.int8 import SMALLEST, channel_axis, to_int8
from ldm.export.writing import HALF
from ldm.pipeline import TextToImage
from ldm.settings import Settings
from ldm.viz.player import live, runtime
from ldm.viz.player.live import MODULES, check_live, explain_live, live_html
from ldm.viz.player.runtime import SHA256, runtime_files
from tests.places import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROMPT = 'a "red" house </script><img src=x onerror=alert(1)> {{files}}'


def test_the_policy_allows_hashes_and_the_runtime_alone() -> None:
    page = live_html({"a.onnx": b"\0" * 9}, HORIZON, Settings.of(HORIZON, PROMPT))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    allowed = re.sub(r"'sha256-[^']+'", "HASH", policy)
    assert allowed == (
        "default-src 'none'; img-src data:; style-src HASH; "
        "script-src HASH 'wasm-unsafe-eval' blob:; base-uri 'none'; form-action 'none'"
    )
    assert f'value="{html.escape(PROMPT)}"' in page and "<img src=x" not in page
    assert "import " not in page.partition('<script type="module">')[2].partition("import(url)")[0]


def test_every_module_is_in_the_page() -> None:
    there = {f.name for f in (files("ldm.viz.player") / "model").iterdir() if f.name[-3:] == ".js"}
    assert there == {f"{name}.js" for name in MODULES}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "euler"}, "by ddim alone"),
        ({"eta": 0.5}, "by ddim alone"),
        ({"spacing": "karras"}, "by ddim alone"),
        ({"height": 64}, "pictures of 128x128"),
        ({"num_images": 2}, "one picture at a time"),
    ],
)
def test_what_the_page_cannot_draw_is_refused_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "check_installed", lambda: None)
    settings = Settings.of(HORIZON, "a house", **changes)
    with pytest.raises(ValueError, match=message):
        check_live(HORIZON, settings, tmp_path / "a.html")


# --- The runtime ---------------------------------------------------------------------------------


def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """Two made-up files in the runtime's place, and an empty cache."""
    content = {name: name.encode() for name in SHA256}
    hashes = {name: hashlib.sha256(one).hexdigest() for name, one in content.items()}
    monkeypatch.setattr(runtime, "SHA256", hashes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return content


def test_the_runtime_is_fetched_once_and_then_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = known(monkeypatch, tmp_path)
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        for name, one in content.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(one)
            archive.addfile(member, io.BytesIO(one))
    asked = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(package.getvalue())

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert runtime_files() == content
    assert runtime_files() == content and asked == [runtime.URL]


def test_offline_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known(monkeypatch, tmp_path)

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(OSError, match=r"cannot be fetched .no network.: .*--runtime") as caught:
        runtime_files()
    assert "\n" not in str(caught.value)


def test_another_file_than_the_known_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = known(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError, match="has no ort"):
        runtime_files(tmp_path)
    (tmp_path / "dist").mkdir()
    for name, one in content.items():
        (tmp_path / "dist" / name).write_bytes(one)
    assert runtime_files(tmp_path) == content
    (tmp_path / "dist" / name).write_bytes(b"else")
    with pytest.raises(ValueError, match="its hash is another"):
        runtime_files(tmp_path)


# --- In a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> TextToImage:
    return ldm.load(device="cpu")


@pytest.fixture(scope="module")
def pipe(whole: TextToImage) -> TextToImage:
    """Horizon with its weights rounded as the page has them: what a page draws is held against what
    Python draws of the same weights. How far rounding moves a picture is another question; where a
    run stands between two layouts, it may move all of it."""
    parts = {}
    for stage in ("unet", "vae", "text"):
        parts[stage] = copy.deepcopy(getattr(whole, stage))
        for name, weights in parts[stage].named_parameters():
            values = weights.detach().numpy()
            if values.ndim < 2 or values.size < SMALLEST:
                continue
            if f"{stage}.{name}".startswith(HALF):
                weights.data = weights.data.half().float()
            else:
                q, scale = to_int8(values, channel_axis(values))
                weights.data = torch.from_numpy(q * scale)
    return TextToImage(**parts, schedule=whole.schedule, config=whole.config)


@pytest.fixture(scope="module")
def page(whole: TextToImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page of Horizon, ready, in Chromium; it keeps what it complained of and asked for."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    pytest.importorskip("onnx", reason="onnx is not installed here")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed here")
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    folders = [os.environ.get("ORT_WEB"), ROOT / "node_modules" / "onnxruntime-web"]
    found = [Path(one) for one in folders if one and Path(one).is_dir()]
    if not found:
        pytest.skip("onnxruntime-web is not there: npm install --no-save onnxruntime-web@1.30.0")
    path = tmp_path_factory.mktemp("live") / "live.html"
    settings = Settings.of(whole.config, "a red house at night", steps=4, seed=0)
    explain_live(whole, settings, path, runtime_files(found[0]))
    assert path.stat().st_size <= 24_000_000
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.complaints, page.requests = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(path.as_uri())
        drawn(page)
        yield page
        browser.close()


def drawn(page: Any) -> np.ndarray:
    """The picture, once a run is at its end: (H, W, 3)."""
    for _ in range(1200):
        if page.evaluate("document.body.dataset.drawn || ''"):
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail(f"no picture came: {page.locator('#status').inner_text()}")
    page.evaluate("delete document.body.dataset.drawn")
    return shown(page)


def shown(page: Any) -> np.ndarray:
    """What is on the canvas."""
    width, *levels = page.evaluate(
        "() => { const c = document.querySelector('canvas'); return [c.width, "
        "...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] }"
    )
    return np.array(levels).reshape(-1, width, 4)[..., :3]


def ask(page: Any, **fields: object) -> np.ndarray:
    for name, value in fields.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#draw").click()
    return drawn(page)


def apart(drawn: np.ndarray, picture: Any) -> float:
    """The 99th percentile of the differences in grey levels."""
    return float(np.percentile(np.abs(drawn - np.asarray(picture).astype(int)), 99))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_a_seed_draws_the_picture_that_python_draws_of_the_same_weights(
    page: Any, pipe: TextToImage, seed: int
) -> None:
    prompt = "a red house on green grass at night"
    found = ask(page, prompt=prompt, seed=seed, steps=12, scale=7.5, negative="")
    (picture,) = pipe(prompt, seed=seed, steps=12, guidance_scale=7.5, sampler="ddim")
    assert apart(found, picture) <= 2
    assert apart(found, pipe(prompt, seed=seed + 1, steps=12, sampler="ddim")[0]) > 20


@pytest.mark.slow
def test_a_negative_prompt_draws_what_it_draws_in_python(page: Any, pipe: TextToImage) -> None:
    asked = dict(prompt="a blue house in the snow", seed=7, steps=12)
    found = ask(page, **asked, scale=4, negative="a tree")
    (picture,) = pipe(**asked, guidance_scale=4.0, negative_prompt="a tree", sampler="ddim")
    (without,) = pipe(**asked, guidance_scale=4.0, sampler="ddim")
    assert 3 * apart(found, picture) < apart(found, without)


@pytest.mark.slow
def test_steps_can_be_looked_at_again(page: Any, pipe: TextToImage) -> None:
    ask(page, prompt="calm sea at sunset", seed=1, steps=5, scale=5, negative="")
    steps = list(
        pipe.denoise("calm sea at sunset", seed=1, steps=5, guidance_scale=5.0, sampler="ddim")
    )
    for index in (1, 3):
        page.locator("#slider").fill(str(index))
        page.wait_for_timeout(1500)
        (picture,) = pipe.decode(steps[index].x0)
        assert apart(shown(page), picture) <= 3
        assert f"t = {steps[index].t}" in page.locator("#said").inner_text()


@pytest.mark.slow
def test_dragged_guidance_takes_that_step_again_and_the_rest_follows(
    page: Any, pipe: TextToImage
) -> None:
    prompt = "a red house at night"
    ask(page, prompt=prompt, seed=3, steps=6, scale=7.5, negative="")
    page.locator("#slider").fill("2")
    page.locator("#dragged").fill("2")
    page.locator("#dragged").dispatch_event("change")
    found = drawn(page)
    context, empty = pipe.context([prompt]), pipe.context([""])
    grid = pipe.schedule.ddim_timesteps(6)
    turn = grid[2][0]
    eps_fn = ldm.samplers.guide(pipe.unet, context, empty, lambda t: 2.0 if t <= turn else 7.5)
    (start,) = [step.x for step in pipe.denoise(prompt, seed=3, steps=6) if step.index == 0]
    prediction = pipe.config.prediction
    *_, last = ldm.samplers.ddim(eps_fn, start, grid, pipe.schedule, prediction=prediction)
    (picture,) = pipe.decode(last.x_prev)
    assert apart(found, picture) <= 2


@pytest.mark.slow
def test_unknown_words_are_told_while_typing(page: Any) -> None:
    page.locator("#prompt").fill("a lighthouse </script><b>")
    assert "“lighthouse”" in page.locator("#unseen").inner_text()
    page.locator("#prompt").fill("a red house")
    assert page.locator("#unseen").inner_text() == ""


@pytest.mark.slow
def test_nothing_leaves_the_file_and_nothing_complains(page: Any) -> None:
    assert page.complaints == []
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "blob", "data"}
    assert sum(url.startswith("file:") for url in page.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
