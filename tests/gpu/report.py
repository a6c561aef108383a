"""What a run found. Every section is guarded: one that fails or takes too long loses nothing of the
others, and what it had found is kept."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

BEGIN, END = "<!-- begin: python -m tests.gpu -->", "<!-- end: python -m tests.gpu -->"
Value = float | int | str | bool


class OutOfTimeError(Exception):
    """A section has reached its limit."""


@dataclass(frozen=True)
class Check:
    """Something that must be so: a value that is at most its bound (NaN is not)."""

    name: str
    value: float
    bound: float
    holds: bool


@dataclass
class Report:
    """What is known so far.

    Attributes:
        seconds: how long all sections may take together.
        device: where they run; `small`: at toy size.
        path: where the JSON goes, after every section.
        peak: the best product's TFLOP/s, by type.
    """

    device: torch.device
    small: bool
    seconds: float
    path: Path | None = None
    machine: dict[str, Value] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    rows: list[dict[str, Value]] = field(default_factory=list)
    sections: dict[str, dict[str, Value]] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def check(self, name: str, value: float, bound: float) -> None:
        """Note whether something holds."""
        self.checks.append(Check(name, float(value), bound, bool(value <= bound)))

    def row(self, name: str, **figures: Value) -> None:
        """Note figures."""
        self.rows.append({"what": name, **figures})

    def run(self, section: Callable[[Report], None], limit: float) -> None:
        """Run a section, for so many seconds at most."""
        name, begun = section.__name__, time.monotonic()
        limit = min(limit, self.left())
        if limit < 1:
            self.sections[name] = {"skipped": "no time was left"}
            return
        told: dict[str, Value] = {}
        try:
            with stopped_after(limit), torch.no_grad():
                section(self)
        except OutOfTimeError:
            told["stopped"] = f"after {limit:.0f} s"
        except Exception as error:  # one that fails must not lose the rest
            told["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            told["where"] = traceback.format_exc()[-1500:]
        self.sections[name] = {"seconds": round(time.monotonic() - begun, 1), **told}
        with contextlib.suppress(RuntimeError):  # of a GPU that an error has left unusable
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            self.free()
        if self.path is not None:
            self.path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def milliseconds(self, work: Callable[[], object], repeat: int = 20, warm: int = 3) -> float:
        """The median time of a call, by the GPU's own clock where there is one."""
        for _ in range(warm):
            work()
        times, begun = [], time.monotonic()
        while len(times) < repeat and (not times or time.monotonic() - begun < 6):
            if self.on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                clock = time.perf_counter()
                work()
                times.append(1000 * (time.perf_counter() - clock))
        return statistics.median(times)

    def seconds_of(self, work: Callable[[], object]) -> float:
        """The time of one call by the clock on the wall, until the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    @contextlib.contextmanager
    def memory(self) -> Iterator[dict[str, Value]]:
        """Takes note of the most memory that tensors took within, in GB; on a GPU alone."""
        noted: dict[str, Value] = {}
        if self.on_gpu:
            self.free()
            torch.cuda.reset_peak_memory_stats()
        yield noted
        if self.on_gpu:
            torch.cuda.synchronize()
            noted["memory, GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)

    def share(self, milliseconds: float, gflop: float, dtype: torch.dtype) -> dict[str, Value]:
        """A call's time, and its share of the peak."""
        told: dict[str, Value] = {"ms": round(milliseconds, 3)}
        told["calls a second"] = round(1000 / milliseconds, 1)
        if peak := self.peak.get(str(dtype).removeprefix("torch.")):
            told["of the peak"] = f"{gflop / milliseconds / peak:.1%}"
        return told

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = ("machine", "checks", "rows", "sections", "peak")
        return {name: value for name, value in asdict(self).items() if name in names}


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """An OutOfTimeError after so many seconds, where the system has such a clock."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- Telling -----------------------------------------------------------------------------------


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What was found, as Markdown."""
    yield ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    yield ""
    yield "| what | figures |"
    yield "| --- | --- |"
    for row in found["rows"]:
        figures = ", ".join(f"{name} {row[name]}" for name in row if name != "what")
        yield f"| {row['what']} | {figures} |"
    yield ""
    yield "| check | value | bound | holds |"
    yield "| --- | --- | --- | --- |"
    for check in found["checks"]:
        holds = "yes" if check["holds"] else "**no**"
        value = "NaN" if math.isnan(check["value"]) else f"{check['value']:.3g}"
        yield f"| {check['name']} | {value} | {check['bound']:g} | {holds} |"
    yield ""
    for name, section in found["sections"].items():
        for word in ("skipped", "stopped", "error"):
            if word in section:
                reason = str(section[word]).replace("\n", " ")
                yield f"- {name}: {word}: {reason}"


def failed(found: dict[str, Any]) -> bool:
    """Whether a check does not hold, or a section failed."""
    sections = found["sections"].values()
    return not all(check["holds"] for check in found["checks"]) or any(
        "error" in section for section in sections
    )


def write_into(page: Path, found: dict[str, Any]) -> None:
    """Put what was found into a page, between its two marks.

    Raises:
        ValueError: the page does not have the marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} does not have the marks {BEGIN} and {END}")
    told = "\n".join(lines(found)).strip()
    page.write_text(f"{before}{BEGIN}\n{told}\n{END}{after}", encoding="utf-8")
