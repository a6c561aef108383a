"""Two programs that do the same, timed in turn: A B A B.

Every run has a process of its own, forked from a server that has imported everything: so none
finds memory that an earlier one left behind, and none waits for an import. No times of two
processes are ever compared but those of a pair, which ran one after the other.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ldm.config import ModelConfig

IMPORTS = ["ldm", "tests.benchmarks.diffusers_side", "transformers.models.clip.modeling_clip"]
GB = 1e9


@dataclass(frozen=True)
class Setting:
    """What both sides read.

    Attributes:
        weights: a file in the official layout; config: what it holds.
        configs: a folder with the same config as diffusers has it.
    """

    weights: Path
    config: ModelConfig
    configs: Path


Side = Callable[[Setting], Callable[[], object]]
"""Gets ready (imports, inputs), and returns what is to be timed. Must be importable by name."""


@dataclass(frozen=True)
class Benchmark:
    """The same work, done by us and by diffusers."""

    name: str
    ours: Side
    theirs: Side


@dataclass(frozen=True)
class Run:
    """One run of one side.

    Attributes:
        seconds: by the clock on the wall.
        cpu_seconds: what the processors spent on it, which a busy machine changes less.
        memory: by how many bytes the process grew at its largest, over what stood before.
    """

    seconds: float
    cpu_seconds: float
    memory: int


@dataclass(frozen=True)
class Result:
    """The pairs (ours, theirs) of a benchmark, in the order in which they ran."""

    name: str
    pairs: tuple[tuple[Run, Run], ...]

    def summary(self) -> dict[str, Any]:
        """Median seconds, the largest memory, the median ratios of the pairs and their range."""
        ours, theirs = zip(*self.pairs, strict=True)
        ratios = [a.seconds / b.seconds for a, b in self.pairs]
        return {
            "name": self.name,
            "ours_seconds": statistics.median(run.seconds for run in ours),
            "theirs_seconds": statistics.median(run.seconds for run in theirs),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "cpu_ratio": statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in self.pairs),
            "ours_memory": max(run.memory for run in ours),
            "theirs_memory": max(run.memory for run in theirs),
        }


def measure(benchmark: Benchmark, setting: Setting, pairs: int) -> Result:
    """Run both sides once to warm up (the file is then in the system's cache), then in turn."""
    run_alone(benchmark.ours, setting)
    run_alone(benchmark.theirs, setting)
    runs = (
        (run_alone(benchmark.ours, setting), run_alone(benchmark.theirs, setting))
        for _ in range(pairs)
    )
    return Result(benchmark.name, tuple(runs))


def run_alone(side: Side, setting: Setting) -> Run:
    """One run of a side, in a fresh process.

    Raises:
        RuntimeError: it failed; what it said stands above.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(side, setting, sender))
    process.start()
    sender.close()
    try:
        run: Run = receiver.recv()
    except EOFError:
        raise RuntimeError(f"a run of {side} ended without a result") from None
    finally:
        process.join()
    return run


def _report(side: Side, setting: Setting, sender: Connection) -> None:
    work = side(setting)
    before = peak_memory()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = work()  # kept until its memory has been looked at
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    sender.send(Run(seconds, cpu_seconds, peak_memory() - before))
    del result


def peak_memory() -> int:
    """The most bytes that this process has had in memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(results: list[Result]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield (
        "| | ours, s | theirs, s | ours / theirs | its range | of CPU time "
        "| memory: ours, GB | theirs, GB |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for result in results:
        s = result.summary()
        cells = (
            result.name,
            f"{s['ours_seconds']:.3f}",
            f"{s['theirs_seconds']:.3f}",
            f"**{s['ratio']:.2f}**",
            f"{s['ratio_min']:.2f} to {s['ratio_max']:.2f}",
            f"{s['cpu_ratio']:.2f}",
            f"{s['ours_memory'] / GB:.2f}",
            f"{s['theirs_memory'] / GB:.2f}",
        )
        yield f"| {' | '.join(cells)} |"
