"""Reading the numbers: what they must be, and what memory they take."""

from __future__ import annotations

import dataclasses
import os
import re
import struct
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.keys import key_map
from ldm.checkpoints.loading import load_unet, load_vae
from ldm.checkpoints.stages import empty_stage
from ldm.config import SD_V1
from ldm.errors import (
    HalfOverflowError,
    NonFiniteError,
    UnreadableError,
)
from ldm.unet import UNet
from tests.checkpoints.helpers import LOADERS, UNET_KEY, VAE_KEY
from tests.helpers import (
    CONTAINERS,
    STAGES,
    Tensors,
    assert_filled,
    tiny_config,
    tiny_tensors,
    with_ema,
    write_weights,
)
from tests.places import ROOT

# --- Numbers that are none -------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("value, kind", [(torch.nan, "NaN"), (-torch.inf, "infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_number_that_is_none_is_found_and_named(tmp_path, container, value, kind, dtype) -> None:
    tensors = tiny_tensors()
    broken = tensors[UNET_KEY].clone()
    broken.view(-1)[-1] = value
    path = write_weights(tmp_path / "file", tensors | {UNET_KEY: broken}, container)
    with pytest.raises(NonFiniteError, match=f"{UNET_KEY} holds {kind}: the file is damaged"):
        load_unet(path, config=tiny_config(), dtype=dtype)
    assert_filled(load_vae(path, config=tiny_config()), tensors)  # which holds none of it


def flipped(path: Path, record: str) -> None:
    """Change one bit of the last byte of a record of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(record)
    data = bytearray(path.read_bytes())
    name_length, padding = struct.unpack_from("<HH", data, info.header_offset + 26)
    start = info.header_offset + 30 + name_length + padding
    data[start + info.file_size - 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_byte_that_is_not_the_one_that_was_written_is_found_and_named(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """A zip archive has a checksum of each record: here one bit of one weight is another."""
    keys = [UNET_KEY, VAE_KEY, "more"]  # so that the storages' names are known
    tensors = {key: tiny_tensors().get(key, torch.ones(3)) for key in keys} | tiny_tensors()
    path = write_weights(tmp_path / "file.ckpt", tensors, "torch zip pickle")
    flipped(path, "file/data/0")
    told = f"{path}: {UNET_KEY} is damaged: the record file/data/0 does not have its checksum"
    with pytest.raises(UnreadableError, match=re.escape(told)):
        load_unet(path, config=tiny_config(), dtype=dtype)
    assert_filled(load_vae(path, config=tiny_config()), tensors)  # which holds none of it
    damaged = load_unet(path, config=tiny_config(), dtype=dtype, check=False)
    assert isinstance(damaged, UNet)


def test_a_damaged_list_of_tensors_is_found_too(tmp_path: Path) -> None:
    """Where the pickle can still be read: another strip of numbers could be taken for a weight."""
    content = {"state_dict": tiny_tensors(), "note": "x" * 999}
    path = write_weights(tmp_path / "file.ckpt", content, "torch zip pickle")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"x" * 999, b"x" * 998 + b"y"))
    load_vae(path, config=tiny_config(), check=False)
    with pytest.raises(UnreadableError, match=r"record file/data\.pkl does not have its checksum"):
        load_vae(path, config=tiny_config())


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    """As torch writes it when it is told to be quick."""
    path, tensors = tmp_path / "file.ckpt", tiny_tensors()
    torch.serialization.set_crc32_options(False)
    try:
        write_weights(path, tensors, "torch zip pickle")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
    assert_filled(load_vae(path, config=tiny_config()), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_the_check_no_number_is_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = tiny_tensors()
    tensors[UNET_KEY] = torch.full_like(tensors[UNET_KEY], torch.nan)
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    unet = load_unet(path, dtype=dtype, check=False)
    assert sum(bool(weight.isnan().all()) for weight in unet.parameters()) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_stages_come_without_gradients_unless_they_are_to_be_trained(
    tmp_path: Path, stage: str
) -> None:
    path = write_weights(tmp_path / "file", tiny_tensors(), config=tiny_config())
    load = LOADERS[stage]
    assert not any(weight.requires_grad for weight in load(path).parameters())
    model = load(path, trainable=True)
    assert all(weight.requires_grad for weight in model.parameters())
    # What is trained lies on a private mapping: the file stays what it was.
    before = path.read_bytes()
    sum(weight.square().sum() for weight in model.parameters()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert path.read_bytes() == before


def test_what_a_loaded_stage_says_is_a_plain_array_at_once(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file", tiny_tensors(), config=tiny_config())
    x, t, context = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 3, 24)
    assert load_unet(path)(x, t, context).numpy().shape == (1, 4, 8, 8)


def test_weights_that_need_not_change_stay_on_the_mapped_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file", tiny_tensors(), config=tiny_config())
    before = path.read_bytes()
    unet = load_unet(path)
    spans = sorted((w.data_ptr(), w.data_ptr() + w.nbytes) for w in unet.parameters())
    # All of them within the length of one file, each on its own.
    assert spans[-1][1] - spans[0][0] <= len(before)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    with torch.no_grad():
        for weight in unet.parameters():
            weight.zero_()  # as training does
    assert path.read_bytes() == before


OVERFLOWS = [
    (torch.float32, 1e5, torch.float16, "100000, too large for float16: load it as float32"),
    (torch.float64, 1e39, torch.float32, "1e.39, too large for float32: load it as float64"),
    (torch.float32, 3.4e38, torch.bfloat16, "3.4e.38, too large for bfloat16: load it as float32"),
]


@pytest.mark.parametrize("stored, value, asked, told", OVERFLOWS)
def test_a_number_too_large_for_the_asked_type_is_said_to_be_that(
    tmp_path: Path, stored, value, asked, told
) -> None:
    tensors = {key: tensor.to(stored) for key, tensor in tiny_tensors().items()}
    tensors[VAE_KEY] = tensors[VAE_KEY].clone()
    tensors[VAE_KEY].view(-1)[5] = value
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    assert_filled(load_vae(path, dtype=stored), tensors, stored)
    with pytest.raises(HalfOverflowError, match=f"{VAE_KEY} holds {told}"):
        load_vae(path, dtype=asked)


def test_large_numbers_whose_sum_alone_overflows_are_no_error(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors[VAE_KEY] = torch.full_like(tensors[VAE_KEY], 3e38)
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    assert_filled(load_vae(path), tensors)


# --- Memory ----------------------------------------------------------------------------------


# A UNet alone, which needs no transformers: 77 million numbers, 310 MB in fp32.
LARGE = dataclasses.replace(
    SD_V1,
    name="large",
    unet=dataclasses.replace(SD_V1.unet, model_channels=96, context_dim=288),
)


MEASURE = """
import sys, torch, ldm
def resident(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name))
    return int(line.split()[1]) * 1024
torch.ones(1 << 20).half().sum()  # what torch sets up for its first work
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
unet = ldm.load_unet(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(resident("VmHWM") - before, sum(p.numel() for p in unet.parameters()))
assert "transformers" not in sys.modules
"""


def peak_over_fp32(path: Path, dtype: str) -> float:
    """The peak of resident memory, mapped pages included, that loading the UNet of a file adds in a
    fresh process, as a multiple of its bytes in fp32."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), dtype],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peak, numel = map(int, run.stdout.split())
    return peak / (4 * numel)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    model = empty_stage("unet", LARGE)
    state = model.state_dict()
    shapes = {official: state[ours].shape for ours, official in key_map(model).items()}
    numel = sum(shape.numel() for shape in shapes.values())
    assert 70e6 < numel < 90e6
    numbers = (
        torch.randn(1 << 20)
        .repeat(-(-numel >> 20))[:numel]
        .split([shape.numel() for shape in shapes.values()])
    )
    tensors = {k: v.view(shapes[k]) for k, v in zip(shapes, numbers, strict=True)}
    folder = tmp_path_factory.mktemp("large")
    return write_weights(folder / "unet.safetensors", tensors, config=LARGE), tensors


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc"
)
# What stays on the mapped file is looked at, tensor by tensor, and given back until it is used; the
# largest tensor and what Python imports are some hundredths.
ON_THE_FILE = 0.3


@linux
@pytest.mark.parametrize("dtype, bound", [("float32", ON_THE_FILE), ("float16", 0.6)])
def test_loading_takes_the_memory_of_what_is_copied(large, dtype: str, bound: float) -> None:
    assert peak_over_fp32(large[0], dtype) <= bound


@linux
@pytest.mark.slow
def test_what_is_not_loaded_costs_no_memory(large, tmp_path: Path) -> None:
    tensors = with_ema(large[1])
    states = {f"optimizer_states.{n}": value + 1 for n, value in enumerate(large[1].values())}
    path = write_weights(tmp_path / "unet.safetensors", tensors | states, config=LARGE)
    assert path.stat().st_size > 2.9 * large[0].stat().st_size
    assert peak_over_fp32(path, "float32") <= ON_THE_FILE
    path.unlink()


@linux
@pytest.mark.slow
def test_half_precision_in_the_file_costs_no_more(large, tmp_path: Path) -> None:
    halves = {key: value.half() for key, value in large[1].items()}
    path = write_weights(tmp_path / "unet.safetensors", halves, config=LARGE)
    assert peak_over_fp32(path, "float32") <= 1.05
    assert peak_over_fp32(path, "float16") <= 0.6
    path.unlink()
