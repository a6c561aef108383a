"""Traces that mean no good: what `Trace.load` makes of them, and what can be asked of them then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from ldm.observe.maps import Word
from ldm.observe.traces import METADATA, METHODS, STEPWISE, Trace
from ldm.settings import Settings
from tests.fuzz.edits import CHANGES, EDITS, Changes, Edits, changed, edited, every_change, to_json
from tests.fuzz.watching import Watch, assert_lines, fuzzed, outcome
from tests.helpers import randn, tiny_config

TOKENS = ("<|startoftext|>", "red</w>", "ho", "use</w>", "<|endoftext|>", "<|endoftext|>")
STEPS = 2


def small_trace() -> Trace:
    """Two steps of a picture of 16 x 16, with maps of two sizes."""
    settings = Settings.of(tiny_config(), "red house", steps=STEPS, height=16, width=16)
    latents = {name: randn(STEPS, 4, 8, 8, seed=n) for n, name in enumerate(STEPWISE)}
    return Trace(
        model="tiny",
        settings=settings,
        tokens=TOKENS,
        words=(Word(TOKENS[0], (0,)), Word("red", (1,)), Word("house", (2, 3)), Word("", (4, 5))),
        heads=2,
        t=(501, 1),
        t_prev=(1, 0),
        alpha_bar=(0.5, 0.99),
        **latents,
        latents=randn(1, 4, 8, 8),
        maps={
            f"{layer}.weights": randn(STEPS, side, side, len(TOKENS)).half()
            for layer, side in (("down.0", 8), ("mid", 4))
        },
        picture=torch.zeros(16, 16, 3, dtype=torch.uint8),
    )


class Run:
    """A trace in a file, which is written again with another header.

    Attributes:
        header: the file's own, as JSON has it, without the facts; `data` are the bytes behind it.
        facts: what the trace says of its run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.safetensors"
        self.watch = Watch(self.path)
        small_trace().save(self.path)
        self.saved = self.path.read_bytes()
        start = 8 + int.from_bytes(self.saved[:8], "little")
        self.header: dict[str, Any] = json.loads(self.saved[8:start])
        self.facts: dict[str, Any] = json.loads(self.header.pop("__metadata__")[METADATA])
        self.data = self.saved[start:]
        for way in ("for imports", "again"):
            assert self.read(self.with_facts(json.dumps(self.facts))) is None, way

    def with_header(self, header: str) -> bytes:
        text = header.encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + self.data

    def with_facts(self, facts: str) -> bytes:
        return self.with_header(json.dumps(self.header | {"__metadata__": {METADATA: facts}}))

    def read(self, data: bytes) -> str | None:
        """Read the trace, and ask it everything that it can be asked."""
        self.path.write_bytes(data)
        told: list[str] = []

        def look() -> None:
            trace = Trace.load(self.path)
            told.append(repr(trace))
            for method in METHODS:
                for word in trace.words:
                    trace.attention(word, method=method)
            if trace.eps_cond is not None and trace.eps_uncond is not None:
                assert len(trace.guidance_norms) == len(trace)

        message = outcome(self.watch, look, (ValueError,), len(data))
        if message is None:
            (line,) = told
            assert line.isprintable()
            assert_lines(line)
        else:
            assert str(self.path) in message and "is not a readable trace" in message, message
        return message


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("fuzz"))


@fuzzed(percent=6)
@given(CHANGES)
def test_changed_facts(run: Run, changes: Changes) -> None:
    run.read(run.with_facts(to_json(changed(run.facts, changes))))


@fuzzed(percent=3)
@given(CHANGES)
def test_a_changed_header(run: Run, changes: Changes) -> None:
    whole = run.header | {"__metadata__": {METADATA: json.dumps(run.facts)}}
    run.read(run.with_header(to_json(changed(whole, changes))))


@fuzzed(percent=3)
@given(EDITS)
def test_a_damaged_trace(run: Run, edits: Edits) -> None:
    run.read(edited(run.saved, run.saved, edits))


def test_every_fact_is_checked(run: Run) -> None:
    """Each fact with each hostile value: refused in one line, or one that can be asked."""
    for n, (_, text) in enumerate(every_change(run.facts)):
        if n % 9 == 0:  # all of them take half a minute
            run.read(run.with_facts(text))
