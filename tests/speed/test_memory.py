"""Weights on a mapped file leave memory, and nothing that is not on a file ever does."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.entries import MappedFile
from ldm.speed.memory import linux_libc, release, trim
from tests.helpers import randn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell")

COUNT = 1 << 20  # 4 MB


def pages_in_memory(tensor: Tensor) -> int:
    """How many pages of a tensor this process has in its memory."""
    start, count = tensor.data_ptr() // mmap.PAGESIZE, tensor.nbytes // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as file:  # noqa: PTH123
        file.seek(8 * start)
        pages = file.read(8 * count)
    return sum(page[7] >> 7 for page in zip(*[iter(pages)] * 8, strict=True))


@pytest.fixture
def numbers() -> Tensor:
    return randn(COUNT)


@pytest.fixture
def mapped(numbers: Tensor, tmp_path: Path) -> Tensor:
    """The same, on a file, where they begin in the middle of a page; all of them looked at."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(400) + numbers.numpy().tobytes() + bytes(400))
    tensor = torch.frombuffer(MappedFile(path).bytes, dtype=torch.float32, count=COUNT, offset=400)
    assert torch.equal(tensor, numbers)
    assert pages_in_memory(tensor) == tensor.nbytes // mmap.PAGESIZE
    return tensor


def test_a_mapped_weight_leaves_memory_and_comes_back(mapped: Tensor, numbers: Tensor) -> None:
    release(mapped)
    # The first and the last page hold other bytes too, and stay; to ask reads nothing.
    assert pages_in_memory(mapped) <= 2
    assert torch.equal(mapped, numbers)
    assert pages_in_memory(mapped) > 1000


def test_what_was_written_to_is_kept(mapped: Tensor, numbers: Tensor) -> None:
    mapped[COUNT // 2] = 7.0
    before = pages_in_memory(mapped)
    release(mapped)
    assert pages_in_memory(mapped) == before > 0
    numbers[COUNT // 2] = 7.0
    assert torch.equal(mapped, numbers)


def test_what_was_written_to_through_numpy_is_kept(mapped: Tensor) -> None:
    mapped.numpy()[:] = 3.0
    release(mapped)
    assert (mapped == 3.0).all()


def test_memory_of_no_file_is_kept(numbers: Tensor) -> None:
    copy = numbers.clone()
    release(numbers)
    assert torch.equal(numbers, copy)


@pytest.mark.parametrize(
    "tensor", [torch.empty(0), torch.ones(3), torch.ones(64, 64).T, torch.ones(4, device="meta")]
)
def test_tensors_of_every_kind_may_be_passed(tensor: Tensor) -> None:
    release(tensor)
    assert tensor.is_meta or (tensor == 1).all()


def resident() -> int:
    """How many bytes this process has in its memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_what_was_freed_goes_back_to_the_system() -> None:
    large = torch.ones(7 << 20)
    del large  # from now on glibc keeps smaller blocks, once freed, for itself
    blocks = [torch.ones(1 << 18) for _ in range(200)]  # 1 MB each
    last = blocks.pop()  # so that what is freed lies in the middle
    full = resident()
    blocks.clear()
    kept = resident()
    trim()
    if full - kept > 150e6:
        pytest.skip("this C library keeps nothing")
    assert full - resident() > 150e6
    assert (last == 1).all()


# How much a process grows by a block of 200 MB: used, freed, and after `trim`.
KEEPS = """
import mmap
from pathlib import Path
import torch
from ldm.speed.memory import keep_freed, trim

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

keep_freed()
before = resident()
block = torch.ones(50_000_000)
used = resident()
del block
freed = resident()
trim()
print(used - before, freed - before, resident() - before)
"""


@pytest.mark.skipif(linux_libc("mallopt") is None, reason="this C library takes no such wish")
def test_what_is_freed_is_kept_until_it_is_trimmed() -> None:
    run = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, check=True)
    used, freed, trimmed = (int(number) for number in run.stdout.split())
    assert used > 199e6 and freed > 199e6
    assert trimmed < 20e6
