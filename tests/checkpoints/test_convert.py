"""From any weights to clean ones, and back, without a changed bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ldm
from ldm.checkpoints.convert import convert, stored_dtype
from ldm.checkpoints.keys import computed_entries
from ldm.checkpoints.planning import Place, Plan
from ldm.checkpoints.tokenizer_files import write_tokenizer
from ldm.errors import KeysError, MissingPartsError, NonFiniteError
from tests.helpers import (
    assert_filled,
    tiny_config,
    tiny_model,
    tiny_tensors,
    tiny_tokenizer,
    with_ema,
    write_training_run,
    write_weights,
)
from tests.places import ROOT

UNET_KEY = "model.diffusion_model.middle_block.0.in_layers.2.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of ours, with its tokenizer."""
    (tmp_path / "source").mkdir()
    return tiny_model(tmp_path / "source") / "model.safetensors"


def test_a_training_run_becomes_a_clean_file(source: Path, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    junk = with_ema(tensors) | {"loss.logvar": torch.zeros(())}
    ckpt = write_training_run(source.with_name("last.ckpt"), junk, "torch zip pickle")
    before = ckpt.read_bytes()
    for ema, factor in (("auto", 0.5), (True, 0.5), (False, 1.0)):
        (tmp_path / f"{ema}").mkdir()
        target = tmp_path / f"{ema}" / "clean.safetensors"
        convert(ckpt, target, ema=ema, config=tiny_config())
        pipe = ldm.load(target, ema=False)
        assert_filled(pipe.unet, {key: value * factor for key, value in tensors.items()})
        assert_filled(pipe.vae, tensors)
        assert pipe.config == tiny_config() and pipe.text.tokenizer == tiny_tokenizer()
        assert load_file(target).keys() == tensors.keys()
        names = sorted(path.name for path in target.parent.iterdir())
        assert names == ["clean.safetensors", "merges.txt", "vocab.json"]
    assert ckpt.read_bytes() == before


def test_to_a_folder_and_back_is_the_same_file(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "tiny")
    assert (tmp_path / "tiny" / "model_index.json").is_file()
    convert(tmp_path / "tiny", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == source.read_bytes()
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == source.with_name(name).read_bytes()


CONVERT = (
    "import sys; from ldm.checkpoints.convert import convert; convert(sys.argv[1], sys.argv[2])"
)


@pytest.mark.slow
def test_every_process_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    def run(seed: str, read: Path, name: str) -> Path:
        folder = tmp_path / seed
        folder.mkdir(exist_ok=True)
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", CONVERT, str(read), str(folder / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return folder / name

    first = run("1", source, "tiny")
    second = run("2", source, "tiny")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) > 8
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    convert(second, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("target", ["clean.safetensors", "folder"])
def test_half_precision_on_request(source: Path, tmp_path: Path, target: str) -> None:
    convert(source, tmp_path / target, dtype=torch.float16)
    pipe = ldm.load(tmp_path / target, dtype=torch.float16)
    assert_filled(pipe.unet, tiny_tensors(), torch.float16)
    assert set(ldm.inspect(tmp_path / target).dtypes) == {"float16"}


@pytest.mark.parametrize(
    "dtypes, kept",
    [
        ([torch.float32], torch.float32),
        ([torch.float16], torch.float16),
        ([torch.bfloat16], torch.bfloat16),
        ([torch.float64, torch.float16], torch.float64),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float8_e4m3fn, torch.float8_e5m2], torch.float16),
    ],
)
def test_stored_numbers_are_kept(source: Path, tmp_path: Path, dtypes, kept) -> None:
    stored = {
        key: value.to(dtypes[n % len(dtypes)])
        for n, (key, value) in enumerate(sorted(tiny_tensors().items()))
    }
    write_weights(source, stored, config=tiny_config())
    convert(source, tmp_path / "clean.safetensors")
    clean = load_file(tmp_path / "clean.safetensors")
    for key in clean.keys() - computed_entries():
        assert clean[key].dtype == kept
        assert torch.equal(clean[key].double(), stored[key].double()), key


def test_only_what_is_used_decides_the_type(source: Path, tmp_path: Path) -> None:
    tensors = with_ema({key: value.half() for key, value in tiny_tensors().items()})
    means = {k: v.float() for k, v in tensors.items() if k.startswith("model_ema.")}
    write_weights(source, tensors | means, config=tiny_config())
    for ema, kept in ((False, torch.float16), (True, torch.float32)):
        convert(source, tmp_path / f"{ema}.safetensors", ema=ema)
        assert load_file(tmp_path / f"{ema}.safetensors")[UNET_KEY].dtype == kept


def test_metadata_is_one_entry(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "clean.safetensors")
    with safe_open(tmp_path / "clean.safetensors", framework="pt") as file:
        assert file.metadata().keys() == {"ldm"}  # of several, the order would be drawn


def test_parts_from_other_files(source: Path, tmp_path: Path) -> None:
    other = write_weights(tmp_path / "vae.ckpt", tiny_tensors(5), "torch zip pickle")
    convert(source, tmp_path / "clean.safetensors", vae=other)
    pipe = ldm.load(tmp_path / "clean.safetensors")
    assert_filled(pipe.unet, tiny_tensors())
    assert_filled(pipe.vae, tiny_tensors(5))


# --- What is refused, before anything is written ---------------------------------------------


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_source_is_never_the_target(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "tiny")
    (tmp_path / "link.safetensors").symlink_to(source)
    (tmp_path / "hard.safetensors").hardlink_to(source)
    before = everything_in(tmp_path)
    part = tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    for read, target in [
        (source, source),
        (source.parent, source),
        (source, tmp_path / "link.safetensors"),
        (source, tmp_path / "hard.safetensors"),
        (tmp_path / "tiny", part),
    ]:
        with pytest.raises(ValueError, match="is what would be read: name another target"):
            convert(read, target)
    with pytest.raises(ValueError, match="is what would be read"):
        convert(source, part, vae=tmp_path / "tiny", text=tmp_path / "tiny" / "text_encoder")
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "tiny", tmp_path / "tiny")
    assert everything_in(tmp_path) == before


def test_targets_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for target, told in {
        "clean.ckpt": "cannot be written as a pickle: let it end in .safetensors",
        "there": "exists already",
        "none/clean.safetensors": "there is no folder",
        "none/folder": "there is no folder",
    }.items():
        with pytest.raises(ValueError, match=told):
            convert(source, tmp_path / target)
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        convert(source, tmp_path / "clean.safetensors", dtype=torch.int8)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there"}


def test_another_models_tokenizer_stays_and_is_told_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(ldm.tokenizer.Tokenizer.train(["blue"] * 9, 520), other)
    before = everything_in(tmp_path)
    monkeypatch.setattr(ldm.checkpoints.convert, "fill", None)
    with pytest.raises(ValueError, match="holds another model's tokenizer"):
        convert(source, other / "clean.safetensors")
    assert everything_in(tmp_path) == before


def test_a_version_in_a_folders_name_is_no_suffix(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "tiny-v1.5")
    assert (tmp_path / "tiny-v1.5" / "unet" / "config.json").is_file()


@pytest.mark.parametrize("target", ["clean.safetensors", "folder"])
def test_a_bad_source_leaves_nothing(source: Path, tmp_path: Path, target: str) -> None:
    tensors = tiny_tensors()
    without = {key: value for key, value in tensors.items() if key != UNET_KEY}
    only = {key: value for key, value in tensors.items() if key.startswith("model.")}
    broken = tensors | {UNET_KEY: torch.full_like(tensors[UNET_KEY], torch.nan)}
    for content, error in (
        (without, KeysError),
        (only, MissingPartsError),
        (broken, NonFiniteError),
    ):
        write_weights(source, content, config=tiny_config())
        with pytest.raises(error):
            convert(source, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_order_of_types_does_not_matter() -> None:
    class Stored:
        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    def plan(*dtypes: torch.dtype) -> Plan:
        places = {str(n): Place("", Stored(dtype)) for n, dtype in enumerate(dtypes)}  # type: ignore
        return Plan("unet", None, places, False, None)  # type: ignore[arg-type]

    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    assert stored_dtype([plan(half, brain)]) == stored_dtype([plan(brain), plan(half)]) == single
    assert stored_dtype([plan(half)]) == half
