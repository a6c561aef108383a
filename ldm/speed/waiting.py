"""Threads that wait for one another, on a machine where other programs run too.

PyTorch computes on a CPU with a thread per core (OpenMP), and after every layer each of them waits
for the slowest. A thread that waits can spin, and go on at once, or sleep, and leave its core to
others. Where every thread has a core, spinning is faster. Where another program has one of them,
threads that spin take the time of the very thread that they wait for: a step of Horizon that takes
a quarter of a second then took ten (docs/performance.md has the figures). OpenMP reads which it is
to be from OMP_WAIT_POLICY, once, when torch is loaded; so nothing here imports torch, and
`choose_wait_policy` is called before that.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, MutableMapping
from typing import TypeVar

BUSY = 0.25
"""From how many running programs a core on, over the last minute, threads are to sleep."""

SLOW, LONG = 10, 2.0
"""What is told: a step of as many times its CPU time, and of as many seconds at least."""

Result = TypeVar("Result")
Arguments = TypeVar("Arguments")


def choose_wait_policy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have threads sleep while they wait, if this machine is busy; called before torch is loaded.
    What the user has set stays, and on a quiet machine OpenMP's own way: to spin for a moment."""
    if "OMP_WAIT_POLICY" not in environment and is_busy():
        environment["OMP_WAIT_POLICY"] = "passive"


def is_busy() -> bool:
    """Whether, over the last minute, other programs ran on a quarter of the cores or more. A
    system that does not tell is taken to be quiet."""
    if not hasattr(os, "getloadavg"):
        return False
    try:
        load = os.getloadavg()[0]
    except OSError:
        return False
    return load >= BUSY * cores()


def cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def told_when_slow(
    ask: Callable[[Arguments, Arguments], Result],
) -> Callable[[Arguments, Arguments], Result]:
    """The same function of two arguments, an `eps_fn` on a CPU; the first of its calls that waits
    for most of its time is told in one warning, and no other.

    The thread that calls takes its part of all that is computed, so its own CPU time is about what
    the call would take on a machine for itself.
    """
    told = False

    def asked(x: Arguments, t: Arguments) -> Result:
        nonlocal told
        started, worked = time.monotonic(), time.thread_time()
        result = ask(x, t)
        took, work = time.monotonic() - started, time.thread_time() - worked
        if not told and took >= LONG and took >= SLOW * work:
            told = True
            warnings.warn(
                f"a step took {took:.0f} s, of which it computed for {work:.1f} s: other programs "
                "have the processor, or its weights come from a slow disk. With OMP_WAIT_POLICY="
                "passive in the environment threads do not hinder each other (docs/performance.md)",
                stacklevel=2,
            )
        return result

    return asked
