"""What a notebook shows of a trace: small, safe, and sensible whatever the trace lacks."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from ldm.observe import traces
from ldm.observe.maps import Word
from ldm.observe.traces import Trace
from ldm.viz.card import trace_html
from tests.helpers import randn
from tests.places import ROOT
from tests.viz.runs import MADE, STEPS, made_trace, without_guidance


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for _, data in found]


class Balanced(HTMLParser):
    """Fails on an element that is not closed in its turn; collects text and names of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.names.add(tag)
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


def test_a_card_tells_the_facts_and_shows_steps_and_words() -> None:
    html = trace_html(made_trace())
    text = read(html).text
    for fact in ("a red house", "tiny", "24 x 32", "ddim", "guidance scale 3.0", "seed 7"):
        assert fact in text
    assert "t = 801" in text and "linear map" in text and "negative prompt" not in text
    shown = pictures(html)
    assert len(shown) == 1 + 2 * STEPS + 3
    assert shown[0].size == (24 * 5, 32 * 5)  # a whole factor, up to 160 pixels
    assert {image.size for image in shown[1 : 1 + 2 * STEPS]} == {(6, 8)}


def test_prompts_and_settings_cannot_write_html() -> None:
    evil = '<script>alert("&")</script>'
    run = made_trace(
        model=evil,
        settings=dataclasses.replace(MADE, prompts=(evil,), negative_prompt=evil, sampler=evil),
        words=(Word("<start>", (0,)), Word(evil, (1,)), Word("<end>", (5,))),
    )
    html = trace_html(run)
    parsed = read(html)
    assert "script" not in parsed.names
    assert parsed.text.count(evil) == 5


@pytest.mark.parametrize("picture", [True, False])
def test_a_card_of_a_large_run_stays_small(picture: bool) -> None:
    places, steps = 77, 50
    words = tuple(Word(f"word{i}", (i,)) for i in range(places))
    weights = torch.rand(steps, 16, 16, places, generator=torch.Generator().manual_seed(0))
    noise = (randn(512, 512, 3) * 60 + 128).clamp(0, 255).byte()
    run = made_trace(
        tokens=("x</w>",) * places,
        words=words,
        t=tuple(range(steps, 0, -1)),
        t_prev=tuple(range(steps - 1, -1, -1)),
        alpha_bar=(0.5,) * steps,
        x=randn(steps, 4, 64, 64),
        x0=randn(steps, 4, 64, 64),
        eps=randn(steps, 4, 64, 64),
        eps_cond=None,
        eps_uncond=None,
        latents=randn(1, 4, 64, 64),
        maps={"mid": weights.half()},
        picture=noise if picture else None,
    )
    html = trace_html(run)
    assert len(html) < 200_000
    text = read(html).text
    assert "the first 24 of 75 words" in text and "word25" not in text


@pytest.mark.parametrize("run", [made_trace(picture=None), without_guidance(made_trace())])
def test_a_card_of_a_trace_that_lacks_something_shows_the_rest(run: Trace) -> None:
    html = trace_html(run)
    assert len(pictures(html)) == (run.picture is not None) + 2 * STEPS + 3
    assert ("False colours" in html) == (run.picture is None)


def test_a_prompt_of_no_words_has_no_row_of_them() -> None:
    run = made_trace(words=(Word("<start>", (0,)), Word("<end>", (4, 5))))
    assert "which places looked" not in trace_html(run)


def test_jupyter_shows_the_card_that_was_registered_last_or_plain_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = made_trace()
    assert run._repr_html_() == trace_html(run)  # `ldm.viz` registered it
    monkeypatch.setattr(traces, "_card", None)
    assert run._repr_html_() is None
    traces.show_as(lambda trace: f"<b>{trace.prompt}</b>")
    assert run._repr_html_() == "<b>a red house</b>"


def test_a_trace_of_the_front_door_shows_its_card_and_loads_viz_only_then() -> None:
    program = """
import sys, ldm
from tests.viz.runs import made_trace
ldm.trace
run = made_trace()
assert not any(name.startswith(("ldm.viz", "PIL")) for name in sys.modules), sys.modules.keys()
assert "<img" in run._repr_html_() and "ldm.viz.card" in sys.modules
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
