"""How threads wait is chosen by what else the machine does; a step that waits is told, once."""

from __future__ import annotations

import os
import time
import warnings

import pytest

from ldm.pipeline import TextToImage
from ldm.speed import waiting
from tests.helpers import pipe_that_reads


@pytest.mark.parametrize(
    ("load", "users", "chosen"),
    [
        (0.0, None, None),
        (0.9, None, None),
        (1.0, None, "passive"),  # of four cores, a quarter
        (7.5, None, "passive"),
        (7.5, "ACTIVE", "ACTIVE"),
        (0.0, "passive", "passive"),
    ],
)
def test_threads_sleep_where_others_run_unless_the_user_says_otherwise(
    load: float, users: str | None, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0), raising=False)
    monkeypatch.setattr(waiting, "cores", lambda: 4)
    environment = {} if users is None else {"OMP_WAIT_POLICY": users}
    waiting.choose_wait_policy(environment)
    assert environment.get("OMP_WAIT_POLICY") == chosen


def test_a_system_that_does_not_tell_its_load_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown, raising=False)
    assert not waiting.is_busy()
    monkeypatch.delattr(os, "getloadavg")
    assert not waiting.is_busy()


@pytest.mark.parametrize(
    ("took", "worked", "told"),
    [(20.0, 1.9, True), (20.0, 2.1, False), (1.9, 0.0, False), (2.1, 0.2, True)],
)
def test_a_step_of_ten_times_its_cpu_time_is_told_once(
    took: float, worked: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = {"monotonic": 0.0, "thread_time": 0.0}
    for name in clocks:
        monkeypatch.setattr(time, name, lambda name=name: clocks[name])

    def ask(x: int, t: int) -> int:
        clocks["monotonic"] += took
        clocks["thread_time"] += worked
        return x + t

    asked = waiting.told_when_slow(ask)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert [asked(3, 4), asked(5, 6)] == [7, 11]
    assert len(found) == told
    for one in found:
        assert f"took {took:.0f} s" in str(one.message) and "OMP_WAIT_POLICY" in str(one.message)


def test_a_run_on_a_cpu_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: TextToImage = pipe_that_reads(channel_mult=(1, 1), max_length=9)
    for name in ("LONG", "SLOW"):
        monkeypatch.setattr(waiting, name, 0.0)  # so that any step is a slow one
    with pytest.warns(UserWarning, match="a step took") as found:
        pipe("a", steps=3)
    assert len(found) == 1
