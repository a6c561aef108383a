"""The check for GPUs runs: what it finds at toy size, on a CPU, says nothing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import right
from tests.gpu.__main__ import main
from tests.gpu.fast import environment, sections
from tests.gpu.report import BEGIN, END, Report, failed, lines, write_into
from tests.pretend_cuda import pretended_cuda

CPU = torch.device("cpu")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tests.gpu", *arguments])
    return main()


@pytest.mark.slow
def test_every_section_runs_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    assert run(monkeypatch, "--device=cpu", "--small", f"--json={file}") == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert list(found["sections"]) == [section.__name__ for section, _ in sections()]
    assert not [name for name, told in found["sections"].items() if "seconds" not in told]
    assert len(found["checks"]) > 20 and len(found["rows"]) > 8
    assert "UNet, batch 2, plain" in capsys.readouterr().out


@pytest.mark.slow
def test_sections_run_as_on_a_gpu() -> None:
    """On the stand-in, where graphs are captured and memory is asked for."""
    with pretended_cuda() as gpu:
        report = Report(torch.device("cuda", 0), small=True, seconds=600)
        for section in (environment, right.low_memory, right.stages_of_horizon):
            report.run(section, limit=300)
        assert gpu.operations["aten.convolution.default"] > 100
    assert not failed(report.as_dict()), report.as_dict()
    assert report.machine["GPU"] == "pretended"


def test_a_section_that_fails_or_hangs_loses_nothing(tmp_path: Path) -> None:
    def fails(report: Report) -> None:
        report.row("before it failed", ms=1.0)
        raise ValueError("not this\none")

    def hangs(report: Report) -> None:
        report.check("before it hung", 0.5, 1.0)
        time.sleep(60)

    def works(report: Report) -> None:
        report.check("not a number", float("nan"), 1.0)

    report = Report(CPU, small=True, seconds=60, path=tmp_path / "found.json")
    for section in (fails, hangs, works):
        report.run(section, limit=1.2)
    report.seconds = 0
    report.run(fails, limit=1)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["rows"] == [{"what": "before it failed", "ms": 1.0}]
    assert [check["holds"] for check in found["checks"]] == [True, False]
    assert failed(found)
    told = list(lines(report.as_dict()))
    assert "| before it failed | ms 1.0 |" in told
    assert "| not a number | NaN | 1 | **no** |" in told
    assert "- hangs: stopped: after 1 s" in told
    assert "- fails: skipped: no time was left" in told


def test_a_page_takes_in_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, file = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n", encoding="utf-8")
    report = Report(CPU, small=True, seconds=60)
    report.row("a step", ms=2.0)
    file.write_text(json.dumps(report.as_dict()), encoding="utf-8")
    for _ in range(2):  # again changes nothing
        assert run(monkeypatch, f"--into={page}", f"--json={file}") == 0
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
        assert text.count("| a step | ms 2.0 |") == 1 and "stale" not in text
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="marks"):
        write_into(page, report.as_dict())


@pytest.mark.parametrize(
    "argument, told",
    [
        ("--device=cuda:99", "no device 'cuda:99'"),
        ("--minutes=0", "above 0"),
        ("--only=nothing", "no section 'nothing'"),
        ("--into=page.md", "--json that is there"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    argument: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device=cpu", argument]
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    *_, line = capsys.readouterr().err.splitlines()
    assert "error: " in line and told in line
