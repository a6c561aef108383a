"""Models whose own config, or safetensors header, was written by somebody who means no good."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.checkpoints.config_json import config_from_json, config_to_json
from ldm.checkpoints.tokenizer_files import write_tokenizer
from ldm.errors import CheckpointError
from tests.fuzz.edits import CHANGES, EDITS, Changes, Edits, changed, edited, every_change, to_json
from tests.fuzz.models import WAYS, check, is_sane, micro_config, warm_up
from tests.fuzz.watching import Watch, fuzzed
from tests.helpers import random_checkpoint, tiny_tokenizer

CONFIG = json.loads(config_to_json(micro_config())) | {
    "defaults": {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5}
}


class Model:
    """A random model in a file, which is written again with another header.

    Attributes:
        header: the file's own tensors, as JSON has them; `data` are the bytes behind it.
        few: the first of them: in a header so short, a change hits what matters more often.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        self.watch = Watch(folder)
        write_tokenizer(tiny_tokenizer(), folder)
        random_checkpoint(self.path, micro_config())
        whole = self.path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        self.header: dict[str, Any] = json.loads(whole[8:start])
        del self.header["__metadata__"]
        self.few = dict(itertools.islice(self.header.items(), 5))
        self.data = whole[start:]
        warm_up(self.path)
        for way in WAYS:
            self.write_config(json.dumps(CONFIG), way)
            assert self.read(way) is None

    def write(self, header: bytes, size: int | None = None) -> None:
        """A file of this header, and all of the bytes or the first of them."""
        data = self.data[:size]
        self.path.write_bytes(len(header).to_bytes(8, "little") + header + data)

    def size_of_few(self) -> int:
        """How many bytes the first tensors take."""
        return max(value["data_offsets"][1] for value in self.few.values())

    def write_config(self, text: str, way: str) -> None:
        """The config beside all tensors or, where only that is read, beside a few."""
        few = way == "recognise"
        header = {"__metadata__": {"ldm": text}} | (self.few if few else self.header)
        self.write(json.dumps(header).encode(), self.size_of_few() if few else None)

    def read(self, way: str) -> str | None:
        """Look at the file, or load it: the message, where it was refused."""
        return check(self.watch, self.path, way, self.path.stat().st_size)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("fuzz"))


@fuzzed(percent=10)
@given(st.sampled_from(WAYS), CHANGES)
def test_a_changed_config_of_ours(model: Model, way: str, changes: Changes) -> None:
    model.write_config(to_json(changed(CONFIG, changes)), way)
    model.read(way)


@fuzzed(percent=2)
@given(st.sampled_from(WAYS), EDITS)
def test_a_damaged_config_of_ours(model: Model, way: str, edits: Edits) -> None:
    text = json.dumps(CONFIG).encode()
    model.write_config(edited(text, text, edits).decode("latin-1"), way)
    model.read(way)


@fuzzed(percent=6)
@given(st.sampled_from(WAYS), CHANGES)
def test_a_changed_safetensors_header(model: Model, way: str, changes: Changes) -> None:
    # Few tensors, so that a change is as likely to be one of the metadata.
    header = {"__metadata__": {"ldm": json.dumps(CONFIG)}} | model.few
    text = to_json(changed(header, changes)).encode("utf-8", "surrogatepass")
    model.write(text, model.size_of_few())
    model.read(way)


def test_every_number_of_a_config_has_a_range() -> None:
    """Each field with each hostile value: refused in one line, or it makes a model."""
    path = Path("model.safetensors")
    accepted: list[str] = []
    for what, text in every_change(CONFIG):
        try:
            config = config_from_json(text, path)
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 1000, what
        else:
            assert is_sane(config), what
            accepted.append(what)
    assert "beta_end = 1.5" not in accepted and "model_channels = 32" not in accepted
    assert any(what.startswith("steps = ") for what in accepted)
