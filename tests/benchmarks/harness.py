"""Two programs that do the same, timed in turn: A B A B.

Every program runs in a process of its own, forked from a server that has imported everything (for a
GPU, which no fork can use, started anew): so none finds memory that the other left behind, and none
waits for an import. Either each run has a
fresh process (loading, say, which is done once), or each side keeps one, which ran once to warm up
(a step of a model, which is done fifty times). No times are compared but those of a pair, which ran
one after the other.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ldm.config import ModelConfig

IMPORTS = ["ldm", "tests.benchmarks.diffusers_side", "transformers.models.clip.modeling_clip"]
GB = 1e9


@dataclass(frozen=True)
class Setting:
    """What both sides read.

    Attributes:
        weights: a file in the official layout; config: what it holds.
        configs: a folder with the same config as diffusers has it.
        device, dtype: where and in which type models run.
    """

    weights: Path
    config: ModelConfig
    configs: Path
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


Side = Callable[[Setting], Callable[[], object]]
"""Gets ready (imports, inputs), and returns what is to be timed. Must be importable by name."""


@dataclass(frozen=True)
class Benchmark:
    """The same work, done by us and by others.

    Attributes:
        fresh: each run has a process of its own; else each side has one, warmed up.
        gflop: how many operations the work is, in 1e9 (a multiplication and an addition are two).
    """

    name: str
    ours: Side
    theirs: Side
    fresh: bool = False
    gflop: float | None = None


@dataclass(frozen=True)
class Run:
    """One run of one side.

    Attributes:
        seconds: by the clock on the wall; on a GPU by its own clock.
        cpu_seconds: what the processors spent on it, which a busy machine changes less.
        memory: by how many bytes the process grew at its largest, over what stood before its first
            run; on a GPU, the most that was allocated there.
    """

    seconds: float
    cpu_seconds: float
    memory: int


class Finished(NamedTuple):
    """A run, and what it computed if that is a tensor."""

    run: Run
    output: Tensor | None


@dataclass(frozen=True)
class Result:
    """The pairs (ours, theirs) of a benchmark, in the order in which they ran.

    Attributes:
        difference: the largest difference of the last pair's outputs, in standard deviations of
            theirs; None where there is nothing to compare.
        gflop: as in the benchmark; peak: GFLOP/s of a matrix product on this machine.
    """

    name: str
    pairs: tuple[tuple[Run, Run], ...]
    difference: float | None = None
    gflop: float | None = None
    peak: float | None = None

    def summary(self) -> dict[str, Any]:
        """Median seconds, the largest memory, the median ratios of the pairs and their range."""
        ours, theirs = zip(*self.pairs, strict=True)
        ratios = [a.seconds / b.seconds for a, b in self.pairs]
        medians = [statistics.median(run.seconds for run in runs) for runs in (ours, theirs)]
        memory = [max(run.memory for run in runs) for runs in (ours, theirs)]
        work = None if self.gflop is None or self.peak is None else self.gflop / self.peak
        shares = [None if work is None else work / seconds for seconds in medians]
        return {
            "name": self.name,
            "ours_seconds": medians[0],
            "theirs_seconds": medians[1],
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "cpu_ratio": statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in self.pairs),
            "ours_memory": memory[0],
            "theirs_memory": memory[1],
            "memory_ratio": memory[0] / memory[1] if memory[1] > 0 else None,
            "difference": self.difference,
            "gflop": self.gflop,
            "ours_share": shares[0],
            "theirs_share": shares[1],
        }


def measure(
    benchmark: Benchmark, setting: Setting, pairs: int, peak: float | None = None
) -> Result:
    """Run both sides once to warm up (a file is then in the system's cache), then in turn."""
    sides = benchmark.ours, benchmark.theirs
    with ExitStack() as stack:
        if benchmark.fresh:
            run_ours, run_theirs = (partial(finish_alone, side, setting) for side in sides)
        else:
            run_ours, run_theirs = (stack.enter_context(Worker(s, setting)).run for s in sides)
        ours, theirs = run_ours(), run_theirs()
        runs = []
        for _ in range(pairs):
            ours, theirs = run_ours(), run_theirs()
            runs.append((ours.run, theirs.run))
    difference = None
    if ours.output is not None and theirs.output is not None:
        difference = largest_difference(ours.output, theirs.output)
    return Result(benchmark.name, tuple(runs), difference, benchmark.gflop, peak)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """In standard deviations of theirs; a single number has none, and is its own measure."""
    exact = theirs.double()
    scale = exact.std() if exact.numel() > 1 else exact.abs().max()
    return float((ours.double() - exact).abs().max() / scale)


def run_alone(side: Side, setting: Setting) -> Run:
    """One run of a side, in a fresh process.

    Raises:
        RuntimeError: it failed; what it said stands above.
    """
    return finish_alone(side, setting).run


def finish_alone(side: Side, setting: Setting) -> Finished:
    """The same, with what it computed."""
    with Worker(side, setting) as worker:
        return worker.run()


class Worker:
    """A process that gets a side ready and runs it whenever it is asked to."""

    def __init__(self, side: Side, setting: Setting) -> None:
        # A fork of a process that has asked for its GPUs, as diffusers does when it is imported,
        # cannot use them.
        on_gpu = setting.device.startswith("cuda")
        context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
        if not on_gpu:
            context.set_forkserver_preload(IMPORTS)
        self.side = side
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(side, setting, far_end))
        self.process.start()
        far_end.close()

    def run(self) -> Finished:
        """Raises RuntimeError if it fails."""
        try:
            self.connection.send("run")
            run, output = self.connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"a run of {self.side} ended without a result") from None
        return Finished(run, None if output is None else torch.from_numpy(output))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()  # which is how the process knows that it is no longer needed
        self.process.join()


def _serve(side: Side, setting: Setting, connection: Connection) -> None:
    on_gpu = setting.device.startswith("cuda")
    if on_gpu:
        for name in IMPORTS:
            importlib.import_module(name)
    gc.freeze()  # else the collector looks at, and so copies, all that the parent has imported
    work = side(setting)
    before = 0 if on_gpu else peak_memory()
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        seconds, cpu_seconds, result = (timed_on_gpu if on_gpu else timed)(work)
        memory = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
        output = result.float().cpu().numpy() if isinstance(result, Tensor) else None
        connection.send((Run(seconds, cpu_seconds, memory - before), output))
        del result, output  # only now: it was in the memory that was looked at


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """Seconds, seconds of all processors, and the result."""
    start, cpu_start = time.perf_counter(), cpu_seconds()
    result = work()
    return time.perf_counter() - start, cpu_seconds() - cpu_start, result


def timed_on_gpu(work: Callable[[], object]) -> tuple[float, float, object]:
    """The same by the GPU's clock: the program runs ahead of it, so its own would say nothing."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu_start = cpu_seconds()
    start.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000, cpu_seconds() - cpu_start, result


def cpu_seconds() -> float:
    """What the processors have spent so far on this process, and on those that it waited for."""
    usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_memory() -> int:
    """The most bytes that this process has had in memory so far, and the largest one that it
    started and waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_maxrss for usage in usages) * unit


# --- How fast this machine multiplies ----------------------------------------------------------


def peak_gflops(setting: Setting, size: int) -> float:
    """GFLOP/s of a matrix product: the best of several, of PyTorch's own and of oneDNN's. No model
    is made of anything that is faster."""
    rates = []
    for side in (torchs_product, onednns_product):
        with Worker(partial(side, size=size), setting) as worker:
            rates += [2 * size**3 / worker.run().run.seconds / 1e9 for _ in range(6)]
    return max(rates)


def torchs_product(setting: Setting, size: int) -> Callable[[], object]:
    a, b = (torch.randn(size, size, dtype=setting.dtype, device=setting.device) for _ in "ab")
    return lambda: a @ b


def onednns_product(setting: Setting, size: int) -> Callable[[], object]:
    from ldm.speed.cpu import has_onednn, linear

    a, b = (torch.randn(size, size, dtype=setting.dtype, device=setting.device) for _ in "ab")
    if has_onednn() and setting.device == "cpu" and setting.dtype == torch.float32:
        return lambda: linear(a, b)
    return lambda: a @ b


# --- Telling -----------------------------------------------------------------------------------


def table(results: list[Result]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield (
        "| | ours, s | theirs, s | ours / theirs | its range | of CPU time | memory: ours, GB "
        "| theirs, GB | of memory | largest difference | share of a product: ours | theirs |"
    )
    yield f"|{' --- |' * 12}"
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
            told(s["memory_ratio"], ".2f"),
            told(s["difference"], ".1e"),
            told(s["ours_share"], ".0%"),
            told(s["theirs_share"], ".0%"),
        )
        yield f"| {' | '.join(cells)} |"


def told(value: float | None, form: str) -> str:
    """A number, or nothing where there is none."""
    return "" if value is None else format(value, form)
