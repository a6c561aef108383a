"""The benchmarks work: what they measure of a small model, between other tests, says nothing."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from ldm.config import SD_V1
from tests.benchmarks import commands, models
from tests.benchmarks.__main__ import main, product_side
from tests.benchmarks.harness import (
    Benchmark,
    Result,
    Run,
    Setting,
    Worker,
    measure,
    run_alone,
    table,
)
from tests.helpers import tiny_config


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


def counts(setting: Setting, step: float) -> Callable[[], object]:
    """A side whose result tells how often it ran in this process: (3,)."""
    count = 0.0

    def work() -> torch.Tensor:
        nonlocal count
        count += step
        return torch.tensor([count, 0.0, -count])

    return work


def fails(setting: Setting) -> Callable[[], object]:
    raise ValueError("not this one")


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False])
def test_sides_run_in_turn_after_a_warm_up(fresh: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    result = measure(
        Benchmark("in turn", partial(logs, letter="A"), partial(logs, letter="B"), fresh),
        setting(log),
        pairs=3,
    )
    assert log.read_text(encoding="utf-8") == "AB" + "ABABAB"
    assert result.name == "in turn" and len(result.pairs) == 3
    assert result.difference is None


def test_a_run_counts_its_own_time_and_memory_alone(tmp_path: Path) -> None:
    for _ in range(2):  # the second finds nothing of the first
        start = time.perf_counter()
        run = run_alone(partial(allocates, megabytes=100), setting(tmp_path / "none"))
        assert 0.1 <= run.seconds < time.perf_counter() - start - 1.5
        assert 0.0 < run.cpu_seconds < run.seconds - 0.09  # it sleeps for 0.1 seconds
        assert 95e6 < run.memory < 140e6


@pytest.mark.parametrize("fresh", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_last_outputs_are_compared(fresh: bool, tmp_path: Path) -> None:
    sides = (partial(counts, step=step) for step in (1.5, 1.0))
    result = measure(Benchmark("counts", *sides, fresh), setting(tmp_path / "none"), pairs=2)
    # 1.5 n, 0, -1.5 n against n, 0, -n, whose standard deviation is n: half of it, however often.
    assert result.difference == pytest.approx(0.5)


def test_a_side_has_one_process_unless_each_run_is_fresh(tmp_path: Path) -> None:
    with Worker(partial(counts, step=1.0), setting(tmp_path / "none")) as worker:
        outputs = [worker.run().output for _ in range(3)]
    assert [float(output[0]) for output in outputs if output is not None] == [1.0, 2.0, 3.0]
    assert not worker.process.is_alive()


def test_a_side_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="fails"):
        run_alone(fails, setting(tmp_path / "none"))


def starts(setting: Setting) -> Callable[[], object]:
    """A side that tells how its process was started, before any GPU would be asked for."""
    setting.weights.write_text(type(multiprocessing.current_process()).__name__, encoding="utf-8")
    raise ValueError("that was all")


@pytest.mark.parametrize(
    "device, kind",
    [
        ("cpu", "ForkServerProcess"),
        pytest.param("cuda", "SpawnProcess", marks=pytest.mark.slow),  # imports all anew
    ],
)
def test_no_process_that_uses_a_gpu_is_a_fork(device: str, kind: str, tmp_path: Path) -> None:
    told = dataclasses.replace(setting(tmp_path / "kind"), device=device)
    with pytest.raises(RuntimeError, match="without a result"):
        run_alone(starts, told)
    assert told.weights.read_text(encoding="utf-8") == kind


def test_the_product_that_stands_for_the_peak_fills_a_gpu() -> None:
    assert product_side("cuda") >= 8192 > product_side("cpu")


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
    assert row == (
        "| three | 4.000 | 3.000 | **0.80** | 0.50 to 3.00 | 0.40 | 9.00 | 5.00 | 1.80 |  |  |  |"
    )
    *_, row = table([Result("three", pairs, difference=2e-6, gflop=30.0, peak=15.0)])
    # 30 operations at 15 a second take 2 seconds: half of ours, two thirds of theirs.
    assert row.endswith("| 1.80 | 2.0e-06 | 50% | 67% |")


def rows_of(
    suite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> dict[str, Any]:
    """A suite's rows by name, at small size, once."""
    arguments = ["benchmarks", suite, "--small", "--pairs=1", "--json", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    told = json.loads(capsys.readouterr().out)
    assert {"processor", "threads", "torch", "diffusers"} <= told["machine"].keys()
    assert told["results"]
    return {row["name"]: row for row in told["results"]}


# Bounds on the difference of both sides' outputs, in standard deviations, or grey levels over
# theirs: fp32 rounding through a deep network; a rounded grey level; bfloat16's in a training step.
ROUNDING, A_LEVEL, BFLOAT16 = 1e-4, 0.1, 0.02


@pytest.mark.parametrize(
    "suite, options, bound",
    [
        pytest.param("text", [], ROUNDING, marks=pytest.mark.slow),
        pytest.param("unet", ["--batch=3", "--size=128"], ROUNDING, marks=pytest.mark.slow),
        ("decode", ["--size=128"], ROUNDING),
        pytest.param("image", ["--steps=2"], A_LEVEL, marks=pytest.mark.slow),
        pytest.param("image", ["--steps=2", "--low-memory"], A_LEVEL, marks=pytest.mark.slow),
        ("horizon", ["--steps=3"], A_LEVEL),
        pytest.param("train-step", ["--batch=2"], BFLOAT16, marks=pytest.mark.slow),
    ],
)
def test_both_sides_compute_the_same(
    suite: str,
    options: list[str],
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for row in rows_of(suite, monkeypatch, capsys, *options).values():
        assert row["difference"] < bound, row["name"]
        assert row["ratio"] > 0 and row["ours_memory"] > 0
        if suite in ("unet", "decode"):
            assert row["gflop"] > 1 and row["ours_share"] > 0 and row["theirs_share"] > 0


def test_a_program_is_timed_from_its_start(tmp_path: Path) -> None:
    result = measure(commands.benchmark("two", "import ldm", "import json"), setting(tmp_path), 1)
    ((ours, theirs),) = result.pairs
    assert ours.seconds > 0.01 and theirs.seconds > 0.01  # no Python is less
    assert ours.cpu_seconds > theirs.cpu_seconds > 0.005


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["import", "first-step"])
def test_programs_are_timed_from_their_start(
    suite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in rows_of(suite, monkeypatch, capsys).values():
        for side in row["pairs"][0]:
            assert (
                side["cpu_seconds"] > 0.1 and side["memory"] > 50e6
            )  # no Python with torch is less


def test_operations_are_counted() -> None:
    """The two figures that are known of Stable Diffusion v1, without its attention, and the two
    products of each attention: 4 operations for every query, key and channel."""
    places = [(4096, 320)] * 5 + [(1024, 640)] * 5 + [(256, 1280)] * 5 + [(64, 1280)]
    attention = sum(4 * n * (n + 77) * channels for n, channels in places) / 1e9  # itself, the text
    (step,) = models.unet(SD_V1, batch=2, size=512, compile=False)
    (picture,) = models.decode(SD_V1, size=512)
    assert step.gflop == pytest.approx(1354 + 2 * attention, rel=0.001)
    assert picture.gflop == pytest.approx(2480 + 4 * 4096**2 * 512 / 1e9, rel=0.001)


@pytest.mark.slow
def test_the_load_suite_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of("load", monkeypatch, capsys)
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
