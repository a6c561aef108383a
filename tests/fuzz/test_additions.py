"""LoRAs and words, in each form that they come in, that mean no good."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldm.checkpoints.embedding import read_embedding
from ldm.checkpoints.lora import read_lora
from ldm.errors import CheckpointError
from tests import loras
from tests.fuzz.edits import EDITS, PLACES, Edits, edited, pick
from tests.fuzz.watching import Watch, fuzzed, outcome
from tests.helpers import CONTAINERS, STAGES, randn, random_stage, tiny_config, write_weights

WIDTH = tiny_config().text.hidden_size


class Additions:
    """A file, written in one way or another, and read both as a LoRA and as a word.

    Attributes:
        tensors: what files of LoRAs and of words hold.
        files: the same, in every container.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "addition"
        self.watch = Watch(self.path)
        self.stages = {s: random_stage(s, tiny_config()) for s in STAGES if s != "vae"}
        found = loras.pairs(self.stages)
        self.tensors: list[dict[str, Tensor]] = [
            loras.kohya(self.stages, found),
            loras.peft(self.stages, found),
            loras.diffusers(self.stages, found),
            loras.processors(self.stages, found),
            {"emb_params": randn(2, WIDTH)},
            {"<word>": randn(WIDTH)},
            {"string_to_param.*": randn(1, WIDTH)},
        ]
        self.files = [
            write_weights(self.path, content, container).read_bytes()
            for content in self.tensors
            for container in CONTAINERS
        ]
        for data in self.files:  # Python imports what it needs when it is first needed
            assert None in self.read(data)

    def read(self, data: bytes) -> list[str | None]:
        """What is said against the file as a LoRA, and as a word."""
        self.path.write_bytes(data)
        ways = (
            lambda: read_lora(self.path, self.stages),
            lambda: read_embedding(self.path, WIDTH),
        )
        messages = [outcome(self.watch, way, (CheckpointError,), len(data)) for way in ways]
        assert all(message is None or str(self.path) in message for message in messages)
        return messages


@pytest.fixture(scope="module")
def additions(tmp_path_factory: pytest.TempPathFactory) -> Additions:
    return Additions(tmp_path_factory.mktemp("fuzz"))


@fuzzed(percent=3)
@given(PLACES, PLACES, EDITS)
def test_a_damaged_file(additions: Additions, one: int, two: int, edits: Edits) -> None:
    files = additions.files
    additions.read(edited(pick(files, one), pick(files, two), edits))


SHAPES = st.lists(st.integers(0, 5) | st.sampled_from([WIDTH, 32, 768]), max_size=5).filter(
    lambda shape: math.prod(shape) <= 2**20
)
DTYPES = st.sampled_from([torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64])
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["drop", "shape", "dtype", "rename", "double", "splice", "fill"]),
        PLACES,
        SHAPES,
        DTYPES,
        st.text(max_size=6) | st.sampled_from(["lora", ".alpha", "oft_", "a" * 5000, "\x1b[2J"]),
    ),
    min_size=1,
    max_size=3,
)


@fuzzed(percent=3)
@given(PLACES, PLACES, CHANGES)
def test_changed_tensors(additions: Additions, one: int, other: int, changes) -> None:
    tensors = dict(pick(additions.tensors, one))
    for kind, place, shape, dtype, text in changes:
        if not tensors:
            break
        key = pick(list(tensors), place)
        value = tensors[key]
        match kind:
            case "drop":
                del tensors[key]
            case "shape":
                tensors[key] = torch.ones(shape)
            case "dtype":
                tensors[key] = (value.real if value.is_complex() else value).to(dtype)
            case "rename":
                at = place % (len(key) + 1)
                tensors[key[:at] + text + key[at + len(text) :]] = tensors.pop(key)
            case "double":
                tensors[text + key] = value.clone()
            case "splice":
                tensors |= list(pick(additions.tensors, other).items())[: 1 + place % 4]
            case "fill":
                tensors[key] = torch.full(value.shape, pick([torch.nan, torch.inf, 1e38], place))
    additions.read(safetensors.torch.save({k: v.clone() for k, v in tensors.items()}))
