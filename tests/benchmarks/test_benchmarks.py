"""The benchmarks work: what they measure of a small model, between other tests, says nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from tests.benchmarks.__main__ import main
from tests.benchmarks.harness import Benchmark, Result, Run, Setting, measure, run_alone, table
from tests.helpers import tiny_config

ROOT = Path(__file__).parents[2]


def setting(file: Path) -> Setting:
    return Setting(file, tiny_config(), configs=file.parent)


def logs(setting: Setting, letter: str) -> Callable[[], object]:
    """A side that writes down that it ran."""

    def log() -> None:
        with setting.weights.open("a", encoding="utf-8") as file:
            file.write(letter)

    return log


def allocates(setting: Setting, megabytes: int) -> Callable[[], object]:
    """A side that gets ready slowly, in much memory, and does less."""
    ready = b"x" * 200_000_000
    time.sleep(1.5)

    def work() -> tuple[bytes, bytes]:
        time.sleep(0.1)
        return ready, b"x" * (megabytes * 1_000_000)

    return work


def fails(setting: Setting) -> Callable[[], object]:
    raise ValueError("not this one")


def test_sides_run_in_turn_after_a_warm_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = measure(
        Benchmark("in turn", partial(logs, letter="A"), partial(logs, letter="B")),
        setting(log),
        pairs=3,
    )
    assert log.read_text(encoding="utf-8") == "AB" + "ABABAB"
    assert result.name == "in turn" and len(result.pairs) == 3


def test_a_run_counts_its_own_time_and_memory_alone(tmp_path: Path) -> None:
    for _ in range(2):  # the second finds nothing of the first
        run = run_alone(partial(allocates, megabytes=100), setting(tmp_path / "none"))
        assert 0.1 <= run.seconds < 1.5
        assert 0.0 < run.cpu_seconds < run.seconds - 0.09  # it sleeps for 0.1 seconds
        assert 95e6 < run.memory < 140e6


def test_a_side_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="fails"):
        run_alone(fails, setting(tmp_path / "none"))


def test_the_ratio_is_that_of_pairs() -> None:
    seconds = [(1.0, 2.0), (4.0, 5.0), (9.0, 3.0)]
    pairs = tuple((Run(a, a, int(a * 1e9)), Run(b, 2 * b, int(b * 1e9))) for a, b in seconds)
    summary = Result("three", pairs).summary()
    assert summary["ours_seconds"] == 4.0 and summary["theirs_seconds"] == 3.0
    # 0.5, 0.8, 3.0; the ratio of the medians would be 1.33
    assert (summary["ratio"], summary["ratio_min"], summary["ratio_max"]) == (0.8, 0.5, 3.0)
    assert summary["cpu_ratio"] == 0.4
    assert (summary["ours_memory"], summary["theirs_memory"]) == (9e9, 5e9)
    *_, row = table([Result("three", pairs)])
    assert row == "| three | 4.000 | 3.000 | **0.80** | 0.50 to 3.00 | 0.40 | 9.00 | 5.00 |"


def test_the_load_suite_runs() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "load", "--small", "--pairs=1", "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert {"processor", "threads", "torch", "diffusers"} <= told["machine"].keys()
    rows = {row["name"]: row for row in told["results"]}
    assert {"load unet", "load vae", "load text", "load all"} <= rows.keys()
    for row in rows.values():
        ((ours, theirs),) = row["pairs"]
        assert row["ratio"] == ours["seconds"] / theirs["seconds"] > 0
    # What is loaded is in memory once it has been read, on either side.
    weights = 4 * 13_996_075  # bytes: parameters in fp32
    assert rows["load and read all"]["ours_memory"] > weights
    assert rows["load and read all"]["theirs_memory"] > weights


@pytest.mark.parametrize(
    "argument, told",
    [("--pairs=0", "1 or more"), ("--weights=nowhere.safetensors", "no file nowhere")],
)
def test_bad_arguments_are_told_in_one_line(
    argument: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "load", argument])
    with pytest.raises(SystemExit):
        main()
    *_, line = capsys.readouterr().err.splitlines()
    assert "error: " in line and told in line
