"""What must not happen while something from outside is read: one case, watched.

A case is a function that reads a file, or a text, that somebody else wrote. It may give an answer,
or raise one of the exceptions that its documentation names, with a message of one printable line.
Besides, it may not: run or import anything, start a process, ask the network, write a file, or
open one elsewhere; take longer than some multiple of a loop that was timed in the same run; or
take more memory than `BYTES`, and `PER_BYTE` for each byte of the file.

`LDM_FUZZ_CASES=20000 pytest tests/fuzz` draws that many cases in all, others each time; those
that are drawn otherwise are always the same.
"""

from __future__ import annotations

import codecs
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

# Our own modules that are imported where they are needed: here, before anything is watched.
import ldm.checkpoints.diffusers.configs
import ldm.checkpoints.download
import ldm.checkpoints.pickles.legacy
import ldm.checkpoints.pickles.zipped
import ldm.checkpoints.tiny  # noqa: F401
from tests.helpers import a_million_dicts

CASES = int(os.environ.get("LDM_FUZZ_CASES", "2000"))  # of all tests of the suites together
BYTES, PER_BYTE = 64_000_000, 8
TIME = 100  # of a case, in millions of dicts
LINE = 1000  # the longest message, in characters

EXECUTION = ("import", "exec", "compile", "pickle.find_class", "ctypes.dlopen", "socket.connect")
PROCESSES = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

OWN = tuple(filter(None, sys.path))  # Python and its libraries read files of their own

WIDTHS = ("8-sig", "16", "16-le", "16-be", "32", "32-le", "32-be")

RESET_PEAK, PEAK = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # of Linux


def fuzzed(percent: float) -> settings:
    """Hypothesis' settings for a test that draws so many percent of all cases."""
    return settings(
        max_examples=max(1, round(CASES * percent / 100)),
        deadline=None,
        database=None,
        derandomize="LDM_FUZZ_CASES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )


class Watch:
    """Sees whether Python imports, compiles or runs anything, or opens a file, while it is on.

    Python itself tells, by its audit hooks. They cannot be taken away again: this has a switch.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)  # this file, or what lies in this folder, may be opened to be read
        self.seen: list[tuple[str, Any]] | None = None
        # What json may find a text to be written in, and what an error says it in: Python imports
        # a codec when it is first used.
        for name in (*("utf-" + width for width in WIDTHS), "unicode_escape"):
            codecs.lookup(name)
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: Any) -> None:
        if self.seen is None:
            return
        if event in EXECUTION + PROCESSES + CHANGES or (
            event == "open" and not self.may_open(*arguments)
        ):
            self.seen.append((event, arguments))

    def may_open(self, path: object, mode: object, flags: int) -> bool:
        places = (self.path, *OWN)
        inside = any(str(path) == p or str(path).startswith(p + os.sep) for p in places)
        return inside and not flags & WRITING

    def __enter__(self) -> list[tuple[str, Any]]:
        self.seen = []
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.seen = None


def outcome(
    watch: Watch,
    read: Callable[[], object],
    documented: tuple[type[Exception], ...],
    size: int,
    time_limit: float = TIME,
    traced: bool = True,
) -> str | None:
    """Runs one case and checks what happened: the message of its error, or None where it has read.

    Args:
        documented: the exceptions that it may raise. Any other is a fault, and ends the test.
        size: of what it reads, in bytes.
        time_limit: in millions of dicts.
        traced: whether Python is asked for every object, which makes it four times as slow;
            the system is asked for the memory of the process either way.
    """
    message = None
    limit = time_limit * a_million_dicts()
    before = resident_peak()
    if traced:
        tracemalloc.start()
    started = time.process_time()
    try:
        with watch as seen:
            try:
                read()
            except documented as error:
                message = str(error)
        seconds = time.process_time() - started
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not seen, seen
    assert seconds < limit
    assert peak < BYTES + PER_BYTE * size
    assert resident_peak(reset=False) - before < 2 * BYTES + PER_BYTE * size
    if message is not None:
        assert message and message.isprintable() and len(message) <= LINE, message
    return message


def resident_peak(reset: bool = True) -> int:
    """The most memory that this process has had since the last reset, in bytes: torch's and
    Pillow's, which `tracemalloc` does not see. 0 where the system does not tell."""
    try:
        if reset:
            RESET_PEAK.write_text("5")
        status = PEAK.read_text()
    except OSError:
        return 0
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def assert_lines(text: str) -> None:
    """Nothing in what is printed moves the cursor, and no line is without end."""
    for line in text.split("\n"):
        assert line.isprintable() and len(line) <= LINE, line
