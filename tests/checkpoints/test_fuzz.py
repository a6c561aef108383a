"""Files of weights that were cut, flipped and spliced: an error in one line, and nothing else.

`LDM_FUZZ_CASES=100000 pytest tests/checkpoints/test_fuzz.py` draws that many cases, others each
time; the 2,000 that are drawn otherwise are always the same.
"""

from __future__ import annotations

import codecs
import itertools
import os
import pickle
import pickletools
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.checkpoints.opening import open_archive
from ldm.errors import CheckpointError
from tests.checkpoints.malicious import (
    MALICIOUS,
    legacy_file,
    number,
    pickle_of,
    table,
    tensor,
    zip_file,
)
from tests.checkpoints.pickles.helpers import bits, save
from tests.helpers import a_million_dicts, randn

T = TypeVar("T")
CASES = int(os.environ.get("LDM_FUZZ_CASES", "2000"))
TESTS = 5
TIME, BYTES = 100, 64_000_000  # of a case; the time in millions of dicts

fuzzed = settings(
    max_examples=CASES // TESTS,
    deadline=None,
    database=None,
    derandomize="LDM_FUZZ_CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


# --- What must not happen --------------------------------------------------------------------

EXECUTION = ("import", "exec", "compile", "pickle.find_class", "ctypes.dlopen", "socket.connect")
PROCESSES = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen")


class Watch:
    """Sees whether Python imports, compiles or runs anything, or opens a file, while it is on.

    Python itself tells, by its audit hooks. They cannot be taken away again: this has a switch.
    """

    def __init__(self, path: str) -> None:
        self.path = path  # the one file that may be opened
        self.seen: list[tuple[str, Any]] | None = None
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: Any) -> None:
        if self.seen is None:
            return
        if event in EXECUTION + PROCESSES or (event == "open" and str(arguments[0]) != self.path):
            self.seen.append((event, arguments))

    def __enter__(self) -> list[tuple[str, Any]]:
        self.seen = []
        return self.seen

    def __exit__(self, *_: object) -> None:
        self.seen = None


class Bench:
    """Reads one file after another, and checks each reading.

    Attributes:
        safetensors_files, zip_files, legacy_files: what is to be changed; it can all be read, but
            for some malicious ones.
        programs: the pickles in some of them, by their instructions.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.marker = folder / "weights", folder / "marker"
        self.watch = Watch(str(self.path))
        evil = [table(evil=make(self.marker), w=tensor()) for make in MALICIOUS.values()]
        fragments = [table(w=tensor(), n=tensor()), *evil]
        self.programs = [instructions(fragment) for fragment in fragments]
        self.safetensors_files = safetensors_files()
        self.zip_files = [
            *(save(content, self.path, "zip").read_bytes() for content in contents()),
            *map(zip_file, fragments),
        ]
        self.legacy_files = [
            *(save(content, self.path, "legacy").read_bytes() for content in contents()),
            *map(legacy_file, fragments),
        ]
        # Python imports a module for each, when a zip, or JSON, or a key first needs it.
        for encoding in ("cp437", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
            codecs.lookup(encoding)
        codecs.lookup("unicode_escape")

    def read(self, data: bytes) -> bool:
        """Whether the file can be read, all of its tensors included."""
        self.path.write_bytes(data)
        message = None
        tracemalloc.start()
        started = time.process_time()
        with self.watch as seen:
            try:
                for entry in open_archive(self.path).entries.values():
                    bits(entry.map()).sum()
            except CheckpointError as error:
                message = str(error)
        seconds = time.process_time() - started
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < TIME * a_million_dicts()
        assert peak < BYTES + 2 * len(data)
        assert not seen and not self.marker.exists()
        if message is not None:
            assert message.startswith(str(self.path)) and message.isprintable()
        return message is None


def contents() -> list[object]:
    base = randn(3, 4)
    return [
        {"state_dict": {"w": base, "t": base.t(), "h": base[1:].half(), "s": torch.tensor(1.0)}},
        {"epoch": 1, "optimizer_states": [{"state": {0: {"step": 1, "avg": randn(2)}}}]},
        [randn(2).bfloat16(), torch.zeros(0, 3), torch.ones(2).to(torch.float8_e4m3fn)],
    ]


def safetensors_files() -> list[bytes]:
    tensors = {
        "w": randn(3, 4),
        "half": randn(5).half(),
        "none": torch.zeros(0),
        "i": torch.ones(2),
    }
    return [
        safetensors.torch.save(tensors),
        safetensors.torch.save(tensors, {"format": "pt", "config": '{"a": [1, 2]}'}),
        safetensors.torch.save({}),
    ]


def instructions(fragment: bytes) -> list[bytes]:
    """A fragment, cut where one instruction ends and the next begins."""
    program = pickle_of(fragment)
    starts = [at for _, _, at in pickletools.genops(program)]
    return [program[a:b] for a, b in itertools.pairwise(starts[1:])]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


def test_what_is_changed_below_is_readable_at_first(bench: Bench) -> None:
    """So that an error below comes from a change. Some malicious ones are refused as they are."""
    real = len(contents())
    assert all(map(bench.read, bench.safetensors_files))
    for files in (bench.zip_files, bench.legacy_files):
        assert all(map(bench.read, files[:real]))
        assert sum(map(bench.read, files[real:])) > len(MALICIOUS) // 2
    assert [zip_file(b"".join(program)) for program in bench.programs] == bench.zip_files[real:]


# --- Changed bytes ---------------------------------------------------------------------------

Edits = list[tuple[str, int, bytes]]  # what to do, where, and with what
PLACES = st.integers(0, 1 << 20)
# Small counts, signs, and the largest numbers of 1, 2, 4 and 8 bytes.
PIECES = st.binary(min_size=1, max_size=4) | st.sampled_from(
    [bytes(8), b"\xff", b"\xff" * 2, b"\xff" * 4, b"\xff" * 7 + b"\x7f", b"\xff" * 8, b"\x80"]
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "write", "insert", "drop", "splice"]), PLACES, PIECES
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, other: bytes, edits: Edits) -> bytes:
    """A file after some edits; a place is taken modulo the file's length."""
    for kind, place, piece in edits:
        at = place % (len(data) + 1)
        length = 1 + 8 * piece[0]
        match kind:
            case "cut":
                data = data[:at]
            case "flip":
                data = data[:at] + bytes(b ^ piece[0] for b in data[at : at + 1]) + data[at + 1 :]
            case "write":
                data = data[:at] + piece + data[at + len(piece) :]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "drop":
                data = data[:at] + data[at + length :]
            case "splice":
                start = place // 7 % len(other)
                data = data[:at] + other[start : start + length] + data[at:]
    return data


def pick(choices: Sequence[T], index: int) -> T:
    return choices[index % len(choices)]


@fuzzed
@given(PLACES, PLACES, EDITS)
def test_a_changed_safetensors_file(bench: Bench, one: int, two: int, edits: Edits) -> None:
    files = bench.safetensors_files
    bench.read(edited(pick(files, one), pick(files, two), edits))


@fuzzed
@given(PLACES, PLACES, EDITS)
def test_a_changed_zip_file(bench: Bench, one: int, two: int, edits: Edits) -> None:
    files = bench.zip_files
    bench.read(edited(pick(files, one), pick(files, two), edits))


@fuzzed
@given(PLACES, PLACES, EDITS)
def test_a_changed_legacy_file(bench: Bench, one: int, two: int, edits: Edits) -> None:
    files = bench.legacy_files
    bench.read(edited(pick(files, one), pick(files, two), edits))


# --- Changes by whole instructions -----------------------------------------------------------
# A flipped byte mostly makes nonsense, which is soon found out. Instructions that are each in order
# get further.


REARRANGED = st.lists(
    st.tuples(
        st.sampled_from(["number", "drop", "repeat", "move", "splice", "change"]), PLACES, PIECES
    ),
    min_size=1,
    max_size=3,
)
BARE = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None]


def rearranged(program: list[bytes], other: list[bytes], edits: Edits) -> bytes:
    steps = list(program)
    for kind, place, piece in edits:
        at = place % len(steps)
        there = (place // 11 + piece[0]) % len(steps)
        match kind:
            case "number":  # sizes, strides, offsets and counts
                numbers = [n for n, step in enumerate(steps) if step.startswith(pickle.LONG1)]
                if numbers:
                    steps[pick(numbers, place)] = number(
                        int.from_bytes(piece, "little", signed=True)
                    )
            case "drop" if len(steps) > 1:
                del steps[at]
            case "repeat":
                steps.insert(there, steps[at])
            case "move":
                steps.insert(there, steps.pop(at))
            case "splice":
                start = place // 7 % len(other)
                steps[at:at] = other[start : start + 1 + piece[0] % 16]
            case "change":  # to one without an argument, of all that there are
                steps[at] = pick(BARE, place // 13)
    return b"".join(steps)


@pytest.mark.parametrize("container", [zip_file, legacy_file])
@fuzzed
@given(PLACES, PLACES, REARRANGED)
def test_a_rearranged_program(
    bench: Bench, container: Callable[[bytes], bytes], one: int, two: int, edits: Edits
) -> None:
    program, other = pick(bench.programs, one), pick(bench.programs, two)
    bench.read(container(rearranged(program, other, edits)))
