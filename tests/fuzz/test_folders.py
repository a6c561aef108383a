"""diffusers folders whose config files, or whose layout, mean no good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.checkpoints.diffusers.configs import ConfigFile, model_config
from ldm.checkpoints.opening import open_archive
from ldm.errors import CheckpointError, MissingPartsError
from tests.checkpoints.diffusers.helpers import random_models, save
from tests.fuzz.edits import (
    CHANGES,
    EDITS,
    PLACES,
    Changes,
    Edits,
    changed,
    edited,
    every_change,
    pick,
    to_json,
)
from tests.fuzz.models import WAYS, check, is_sane, micro_config, warm_up
from tests.fuzz.watching import Watch, fuzzed

UNET = "unet/diffusion_pytorch_model.safetensors"
INDEX = f"{UNET}.index.json"
CONFIGS = {  # stage -> its config file
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
    "schedule": "scheduler/scheduler_config.json",
}


class Folder:
    """A random model in a diffusers folder, its UNet in two files.

    Attributes:
        documents: the JSON files that are read, as they were.
    """

    def __init__(self, path: Path, ways: Sequence[str], most: int | None = None) -> None:
        """`most` is how many tensors of each part there are: all, unless it is given."""
        self.path = path
        self.watch = Watch(self.path)
        for file in self.path.rglob("*.safetensors"):
            tensors = safetensors.torch.load_file(file)
            safetensors.torch.save_file(dict(list(tensors.items())[:most]), file)
        tensors = safetensors.torch.load_file(self.path / UNET)
        (self.path / UNET).unlink()
        where = {}
        for n, name in enumerate(("one.safetensors", "two.safetensors")):
            part = dict(list(tensors.items())[n::2])
            safetensors.torch.save_file(part, self.path / "unet" / name)
            where |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (self.path / INDEX).write_text(json.dumps(index))
        names = ["model_index.json", *CONFIGS.values(), INDEX]
        self.documents: dict[str, Any] = {
            name: json.loads((self.path / name).read_bytes()) for name in names
        }
        self.size = size_of(self.path)
        assert [self.read(way, self.size) for way in ways] == [None] * len(ways)

    def read_with(self, way: str, name: str, text: bytes) -> str | None:
        """As `read`, with one file for another."""
        file = self.path / name
        before = file.read_bytes()
        file.write_bytes(text)
        try:
            return self.read(way, self.size - len(before) + len(text))
        finally:
            file.write_bytes(before)

    def read(self, way: str, size: int) -> str | None:
        """Look at the folder, or load it: the message, where it was refused."""
        return check(self.watch, self.path, way, size)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """The folder that each way reads: a whole model or, where only names and configs are read, a
    few tensors of each part."""
    path = tmp_path_factory.mktemp("fuzz")
    save(path / "micro", random_models(micro_config()), micro_config())
    shutil.copytree(path / "micro", path / "few")
    warm_up(path / "micro")
    whole = Folder(path / "micro", WAYS)
    return dict.fromkeys(WAYS, whole) | {"recognise": Folder(path / "few", ["recognise"], most=4)}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Folder]) -> Folder:
    return folders["inspect"]


@fuzzed(percent=8)
@given(st.sampled_from(WAYS), PLACES, CHANGES)
def test_a_changed_document(
    folders: dict[str, Folder], way: str, which: int, changes: Changes
) -> None:
    folder = folders[way]
    name = pick(list(folder.documents), which)
    text = to_json(changed(folder.documents[name], changes))
    folder.read_with(way, name, text.encode("utf-8", "surrogatepass"))


@fuzzed(percent=2)
@given(st.sampled_from(WAYS), PLACES, PLACES, EDITS)
def test_a_damaged_document(
    folders: dict[str, Folder], way: str, one: int, two: int, edits: Edits
) -> None:
    folder = folders[way]
    name, other = (pick(list(folder.documents), which) for which in (one, two))
    texts = [json.dumps(folder.documents[each]).encode() for each in (name, other)]
    folder.read_with(way, name, edited(*texts, edits))


def test_every_field_has_a_range() -> None:
    """Each field with each hostile value: refused in one line, or it makes a model."""
    from ldm.checkpoints.diffusers.writing import config_files

    written = config_files(micro_config())
    files = {stage: ConfigFile(Path(name), written[name]) for stage, name in CONFIGS.items()}
    for stage, file in files.items():
        for what, text in every_change(dict(file.fields)):
            try:
                fields = json.loads(text)
                if not isinstance(fields, dict):
                    continue  # as where it is read
                config = model_config("micro", files | {stage: ConfigFile(file.path, fields)})
            except CheckpointError as error:
                assert str(error).isprintable() and len(str(error)) < 1000, what
            except (ValueError, RecursionError):  # of the JSON
                continue
            else:
                assert is_sane(config), what


# --- What lies where -------------------------------------------------------------------------


def gone(file: Path, other: Path) -> None:
    file.unlink()


def emptied(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def a_folder(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


def its_own_link(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def another(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes())


def cut_off(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def unpacked_text(file: Path, other: Path) -> None:
    file.write_bytes(b"[" * 3_000_000)


@pytest.mark.parametrize(
    "change", [gone, emptied, a_folder, its_own_link, another, cut_off, unpacked_text]
)
def test_each_file_of_a_folder_may_be_anything(
    folder: Folder, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    """Of every file in turn: what is read is refused in one line, or was not needed."""
    copy = tmp_path / "micro"
    watch = Watch(copy)
    files = sorted(file for file in folder.path.rglob("*") if file.is_file())
    names = [file.relative_to(folder.path) for file in files]
    messages = set()
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        shutil.copytree(folder.path, copy)
        change(copy / name, copy / other)
        messages.add(check(watch, copy, "inspect", 2 * size_of(copy)))
        shutil.rmtree(copy)
    assert len(messages) > 3


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingPartsError, match="holds no weights"):
        open_archive(tmp_path)
