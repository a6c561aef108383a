"""Vocabularies, in each form that CLIP's is published in, that mean no good."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.checkpoints.tokenizer_files import MAX_BYTES, read_tokenizer, write_tokenizer
from tests.fuzz.edits import CHANGES, EDITS, PLACES, Changes, Edits, changed, edited, pick, to_json
from tests.fuzz.watching import Watch, fuzzed, outcome
from tests.helpers import tiny_tokenizer

VOCAB, MERGES, WHOLE, PACKED = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "bpe_simple_vocab_16e6.txt.gz",
)


class Vocabulary:
    """A folder with a vocabulary in it, which is written in one form or another.

    Attributes:
        vocab, merges, whole: what is in the three files; merges by lines.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.watch = Watch(folder)
        write_tokenizer(tiny_tokenizer(), folder)
        self.vocab: dict[str, Any] = json.loads((folder / VOCAB).read_text("utf-8"))
        self.merges: list[Any] = (folder / MERGES).read_text("utf-8").splitlines()
        pairs = [line.split() for line in self.merges[1:]]
        self.whole = {"model": {"type": "BPE", "vocab": self.vocab, "merges": pairs}}
        self.forms = {
            VOCAB: {VOCAB: json.dumps(self.vocab).encode(), MERGES: self.text_of_merges()},
            WHOLE: {WHOLE: json.dumps(self.whole).encode()},
            PACKED: {PACKED: gzip.compress(self.text_of_merges())},
        }
        for form, files in self.forms.items():
            for _ in range(2):  # Python imports what it needs when it is first needed
                if message := self.read(files):
                    assert form == PACKED and "CLIP has 49408" in message  # ours is smaller

    def text_of_merges(self) -> bytes:
        return "\n".join(self.merges).encode()

    def read(self, files: dict[str, bytes]) -> str | None:
        """Read a vocabulary of these files; one that is read can take a prompt apart."""
        for file in self.path.iterdir():
            file.unlink()
        for name, data in files.items():
            (self.path / name).write_bytes(data)

        def look() -> None:
            tokenizer = read_tokenizer(self.path)
            ids = tokenizer.encode("A red house, 3 trees — naïve 家 \x1b[2J")
            assert all(type(i) is int and 0 <= i < len(tokenizer) for i in ids)
            assert all(isinstance(token, str) for token in tokenizer.strings(ids))
            tokenizer.decode(ids)

        # A packed file may hold as much as is read of it, however small it is itself.
        size = max(sum(map(len, files.values())), MAX_BYTES if PACKED in files else 0)
        message = outcome(self.watch, look, (ValueError,), size)
        if message is not None:
            assert message.startswith(f"no readable CLIP tokenizer in {self.path}"), message
        return message


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return Vocabulary(tmp_path_factory.mktemp("fuzz"))


@fuzzed(percent=2)
@given(CHANGES)
def test_a_changed_vocab_json(vocabulary: Vocabulary, changes: Changes) -> None:
    text = to_json(changed(vocabulary.vocab, changes)).encode("utf-8", "surrogatepass")
    vocabulary.read({VOCAB: text, MERGES: vocabulary.text_of_merges()})


@fuzzed(percent=2)
@given(CHANGES)
def test_changed_lines_of_merges(vocabulary: Vocabulary, changes: Changes) -> None:
    lines = changed(vocabulary.merges, changes)
    text = "\n".join(map(str, lines)) if isinstance(lines, list) else to_json(lines)
    files = {VOCAB: json.dumps(vocabulary.vocab).encode()}
    vocabulary.read(files | {MERGES: text.encode("utf-8", "surrogatepass")})


@fuzzed(percent=2)
@given(CHANGES)
def test_a_changed_tokenizer_json(vocabulary: Vocabulary, changes: Changes) -> None:
    text = to_json(changed(vocabulary.whole, changes)).encode("utf-8", "surrogatepass")
    vocabulary.read({WHOLE: text})


@fuzzed(percent=3)
@given(PLACES, PLACES, EDITS)
def test_a_damaged_vocabulary(vocabulary: Vocabulary, one: int, two: int, edits: Edits) -> None:
    files = dict(pick(list(vocabulary.forms.values()), one))
    name = pick(list(files), two)
    files[name] = edited(files[name], vocabulary.text_of_merges(), edits)
    vocabulary.read(files)


@fuzzed(percent=1)
@given(st.sampled_from([b"\0", b"a", b"a b\n", b"[", b"\n"]), st.integers(1, 30), PLACES)
def test_a_packed_vocabulary_that_unpacks_to_anything(
    vocabulary: Vocabulary, piece: bytes, millions: int, cut: int
) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(packer.compress(piece * (1_000_000 // len(piece))) for _ in range(millions))
    data += packer.flush()
    vocabulary.read({PACKED: data[: len(data) - cut % 3 * cut % len(data)]})
