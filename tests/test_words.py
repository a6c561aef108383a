"""Textual inversion: words that a model is taught from a file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ldm
from ldm.errors import FamilyError, NonFiniteError, ShapeError, UnreadableError
from ldm.pipeline import TextToImage
from ldm.tokenizer import Tokenizer
from tests.checkpoints import malicious as by_hand
from tests.helpers import randn, tiny_config, tiny_model, tiny_tokenizer

WIDTH = tiny_config().text.hidden_size


@pytest.fixture
def pipe(tmp_path: Path) -> TextToImage:
    (tmp_path / "model").mkdir()
    return ldm.load(tiny_model(tmp_path / "model"), device="cpu")


def a1111(path: Path, vectors: Tensor) -> Path:
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "another name",
        "step": 1500,
        "sd_checkpoint": "abcdef",
        "sd_checkpoint_name": None,
    }
    torch.save(content, path)
    return path


def diffusers_bin(path: Path, vectors: Tensor) -> Path:
    torch.save({"<style>": vectors[0] if len(vectors) == 1 else vectors}, path)
    return path


def diffusers_safetensors(path: Path, vectors: Tensor) -> Path:
    save_file({"<style>": vectors[0] if len(vectors) == 1 else vectors}, path)
    return path


def emb_params(path: Path, vectors: Tensor) -> Path:
    save_file({"emb_params": vectors}, path)
    return path


FORMATS = {
    "style.pt": (a1111, "style"),
    "style.bin": (diffusers_bin, "<style>"),
    "a.safetensors": (diffusers_safetensors, "<style>"),
    "style.safetensors": (emb_params, "style"),
}


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("length", [1, 3])
@torch.no_grad()
def test_a_word_is_encoded_as_by_a_larger_embedding(
    pipe: TextToImage, tmp_path: Path, file: str, length: int
) -> None:
    write, word = FORMATS[file]
    vectors = randn(length, WIDTH, seed=7)
    oracle = copy.deepcopy(pipe.text.transformer)
    weight = torch.cat([oracle.embeddings.token_embedding.weight, vectors])
    oracle.embeddings.token_embedding = nn.Embedding(len(weight), WIDTH, _weight=weight)
    before = pipe.text(["a red house"])
    assert pipe.load_embedding(write(tmp_path / file, vectors)) == word

    ids = pipe.text.tokenize([f"a {word.upper()}, red"])
    places = [int(i) for i in ids[0] if i >= tiny_config().text.vocab_size]
    assert places == [530, 531, 532][:length]
    assert torch.equal(pipe.text.encode(ids), oracle(input_ids=ids).last_hidden_state)
    assert torch.equal(pipe.text(["a red house"]), before)  # all else is as it was


def test_two_words_and_a_saved_model(pipe: TextToImage, tmp_path: Path) -> None:
    first, second = randn(2, WIDTH, seed=1), randn(1, WIDTH, seed=2)
    pipe.load_embedding(emb_params(tmp_path / "one.safetensors", first))
    pipe.load_embedding(emb_params(tmp_path / "two.safetensors", second), word="<two>")
    assert torch.equal(
        pipe.text.transformer.embeddings.token_embedding.added, torch.cat([first, second])
    )
    tokenizer = pipe.text.require_tokenizer()
    ids = tokenizer.encode("one house <two>one")
    assert [i for i in ids if i >= 530] == [530, 531, 532, 530, 531]
    (tmp_path / "saved").mkdir()
    pipe.save(tmp_path / "saved" / "model.safetensors")
    saved = (tmp_path / "saved" / "model.safetensors").read_bytes()
    assert saved == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert pipe.to(dtype=torch.float64).text(["one"]).dtype == torch.float64


def test_traces_name_the_word(pipe: TextToImage, tmp_path: Path) -> None:
    pipe.load_embedding(emb_params(tmp_path / "odd.safetensors", randn(2, WIDTH)), word="<odd>")
    found = ldm.trace(pipe, "red <odd> sea", steps=1)
    assert [word.text for word in found.words[1:-1]] == ["red", "<odd>", "sea"]
    assert found.tokens[2:4] == ("<odd>[1]", "<odd>[2]</w>") or "<odd>[1]" in found.tokens


def test_the_rest_of_a_prompt_is_cut_as_before() -> None:
    plain = tiny_tokenizer()
    tokenizer = plain.with_word("<odd>", 1)
    for text in ("a red house, at night", "  the   blue\nSEA!?"):
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.encode(f"{text} <odd> {text}") == [
            *plain.encode(text),
            530,
            *plain.encode(text),
        ]
    assert tokenizer.decode(tokenizer.encode("red <odd> house")) == "red <odd> house"
    assert tokenizer == plain and plain.added == {}


@pytest.mark.parametrize("word", ["", "two words", "a,b", "\x1b", "a" * 101])
def test_what_no_prompt_can_have_is_no_word(word: str) -> None:
    with pytest.raises(ValueError, match="the word must be one word"):
        tiny_tokenizer().with_word(word, 1)


def test_a_word_that_there_is_is_a_line() -> None:
    vocab = tiny_tokenizer().vocab
    known = next(t for t in vocab if t.endswith("</w>") and t[0].isalpha() and len(t) > 5)
    again = tiny_tokenizer().with_word("<odd>", 1)
    for tokenizer, word in ((tiny_tokenizer(), known.removesuffix("</w>")), (again, "<ODD>")):
        with pytest.raises(ValueError, match=f"has the word '{word.lower()}' already"):
            tokenizer.with_word(word, 1)


def test_an_encoder_without_tokenizer_learns_no_word() -> None:
    text = ldm.checkpoints.stages.build_stage("text", tiny_config())
    with pytest.raises(ValueError, match="has no tokenizer"):
        text.add_word("odd", randn(1, WIDTH))  # type: ignore[operator]


REFUSED = {
    "another width": ({"emb_params": torch.ones(1, 768)}, FamilyError, "width 768, that of .* 1; "),
    "no row": ({"emb_params": torch.ones(1, 1, 24)}, ShapeError, "no row of vectors"),
    "none": ({"emb_params": torch.ones(0, 24)}, ShapeError, "no row of vectors"),
    "whole numbers": ({"emb_params": torch.ones(1, 24).int()}, ShapeError, "no row"),
    "NaN": ({"emb_params": torch.full((1, 24), torch.nan)}, NonFiniteError, "holds NaN"),
    "too many": ({"emb_params": torch.ones(76, 24)}, UnreadableError, "76 vectors, more than 75"),
    "a LoRA": ({"a.lora_down.weight": torch.ones(2, 2)}, FamilyError, "is a LoRA"),
    "of XL": (
        {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
        FamilyError,
        "is 2 tensors; a textual inversion of one word is wanted",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(pipe: TextToImage, tmp_path: Path, name: str) -> None:
    tensors, error, told = REFUSED[name]
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(error, match=told) as caught:
        pipe.load_embedding(tmp_path / "file.safetensors")
    assert "\n" not in str(caught.value)
    assert pipe.text.added_tokens == 0 and not pipe.text.require_tokenizer().added


def test_nothing_in_a_pickle_is_executed(pipe: TextToImage, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    path = tmp_path / "evil.pt"
    param = by_hand.table(**{"*": by_hand.tensor()})
    content = by_hand.table(string_to_param=param, name=by_hand.by_os_system(marker))
    path.write_bytes(by_hand.zip_file(content))
    with pytest.raises((ShapeError, FamilyError)):  # of another width
        pipe.load_embedding(path)
    assert not marker.exists()
    assert isinstance(pipe.text.require_tokenizer(), Tokenizer)
