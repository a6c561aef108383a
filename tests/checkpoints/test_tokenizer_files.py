"""A vocabulary's files: the forms that they come in, and where they are found."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.checkpoints import tokenizer_files
from ldm.checkpoints.tokenizer_files import (
    CLIP_MERGES,
    CLIP_VOCAB_SIZE,
    find_tokenizer,
    read_tokenizer,
    tokenizer_beside,
    write_tokenizer,
)
from ldm.tokenizer import EOS, Tokenizer, base_tokens
from tests.helpers import TRANSFORMERS_5, tiny_tokenizer
from tests.test_tokenizer import OPENAI, PROMPTS, TEXTS


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS * 5, vocab_size=540).knowing(TEXTS)


def test_saved_and_loaded_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(trained, tmp_path)
    loaded = read_tokenizer(tmp_path)
    assert loaded == trained
    assert loaded.vocab == trained.vocab and loaded.merges == trained.merges
    assert loaded.words == trained.words and "grass" in (loaded.words or ())
    assert [loaded.encode(p) for p in PROMPTS] == [trained.encode(p) for p in PROMPTS]
    names = ("vocab.json", "merges.txt", "words.txt")
    files = [(tmp_path / name).read_bytes() for name in names]
    write_tokenizer(loaded, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == files


def test_without_its_words_a_tokenizer_has_none(trained: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(Tokenizer(trained.vocab, trained.merges), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    assert read_tokenizer(tmp_path).words is None
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="no readable CLIP tokenizer"):
        read_tokenizer(tmp_path)


# --- The forms it comes in -------------------------------------------------------------------


def save_tokenizer_json(tokenizer: Tokenizer, folder: Path, as_strings: bool) -> None:
    """As the `tokenizers` library writes it: pairs, or (before version 0.20) strings; with rules
    that are not ours, which must not count."""
    merges = [" ".join(pair) if as_strings else list(pair) for pair in tokenizer.merges]
    model = {"type": "BPE", "unk_token": EOS, "vocab": tokenizer.vocab, "merges": merges}
    content = {"version": "1.0", "normalizer": None, "pre_tokenizer": None, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def save_openai(folder: Path, count: int = CLIP_MERGES, surplus: int = 100) -> list[tuple]:
    """A vocabulary of CLIP's size that anyone may have: every pair of two letters, in a row."""
    letters = base_tokens()[:256]
    pairs = list(itertools.islice(itertools.product(letters, letters), count + surplus))
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *map(" ".join, pairs), ""]
    with gzip.open(folder / OPENAI, "wt", encoding="utf-8", compresslevel=1) as file:
        file.write("\n".join(lines))
    return pairs[:count]


@pytest.mark.parametrize("as_strings", [True, False], ids=["strings", "pairs"])
def test_tokenizer_json_gives_the_same_tokenizer(
    trained: Tokenizer, tmp_path: Path, as_strings: bool
) -> None:
    save_tokenizer_json(trained, tmp_path, as_strings)
    loaded = read_tokenizer(tmp_path)
    assert loaded == trained
    assert [loaded.encode(p) for p in PROMPTS] == [trained.encode(p) for p in PROMPTS]


def test_openais_file_is_cut_after_clips_merges(tmp_path: Path) -> None:
    pairs = save_openai(tmp_path)
    loaded = read_tokenizer(tmp_path)
    assert len(loaded) == CLIP_VOCAB_SIZE == 49408
    assert (loaded.bos_token_id, loaded.eos_token_id) == (49406, 49407)
    assert loaded.merges == pairs
    assert loaded.strings(range(512, 49406)) == ["".join(pair) for pair in pairs]


def test_the_first_whole_form_counts(trained: Tokenizer, tmp_path: Path) -> None:
    save_openai(tmp_path)
    assert len(read_tokenizer(tmp_path)) == 49408
    save_tokenizer_json(trained, tmp_path, as_strings=False)
    assert read_tokenizer(tmp_path) == trained
    other = Tokenizer(trained.vocab, trained.merges[:-1])
    write_tokenizer(other, tmp_path)
    assert read_tokenizer(tmp_path) == other
    (tmp_path / "merges.txt").unlink()  # a vocab.json alone is no tokenizer
    assert read_tokenizer(tmp_path) == trained


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_folder_without_a_whole_form_is_told_what_to_hold(
    trained: Tokenizer, tmp_path: Path, name: str
) -> None:
    write_tokenizer(trained, tmp_path)
    (tmp_path / name).unlink()
    message = "neither vocab.json with merges.txt, nor tokenizer.json, nor bpe_simple_vocab_16e6"
    with pytest.raises(FileNotFoundError, match=message):
        read_tokenizer(tmp_path)


BROKEN = [
    ("vocab.json", "{", "Expecting property name"),
    ("vocab.json", "[1, 2]", "not an object of tokens and ids"),
    ("vocab.json", '{"a": 0}', "it lacks"),
    ("vocab.json", "[" * 100_000, "recursion"),
    ("merges.txt", "#version: 0.2\na b c\n", "'a b c' is not a pair of tokens"),
    ("merges.txt", "#version: 0.2\nzz yy\n", "zz"),
    ("tokenizer.json", "[]", "not a file of the tokenizers library"),
    ("tokenizer.json", '{"model": 1}', "not a file of the tokenizers library"),
    ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}', "Unigram, not BPE"),
    ("tokenizer.json", '{"model": {"vocab": {}, "merges": [["a", "b", "c"]]}}', "not a pair"),
    ("tokenizer.json", '{"model": {"vocab": {}, "merges": [["a", 1]]}}', "not a pair"),
    ("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 1}, "merges": []}}', "it lacks"),
    (OPENAI, "not packed", "Not a gzipped file"),
]


@pytest.mark.parametrize("name, content, reason", BROKEN, ids=[f"{n} {r}" for n, _, r in BROKEN])
def test_a_broken_file_is_refused_in_one_line(
    trained: Tokenizer, tmp_path: Path, name: str, content: str, reason: str
) -> None:
    if name in ("vocab.json", "merges.txt"):
        write_tokenizer(trained, tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"no readable CLIP tokenizer in .*{reason}") as error:
        read_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_openais_file_cut_short_is_refused(tmp_path: Path) -> None:
    save_openai(tmp_path)
    packed = (tmp_path / OPENAI).read_bytes()
    (tmp_path / OPENAI).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="no readable CLIP tokenizer"):
        read_tokenizer(tmp_path)
    save_openai(tmp_path, count=1000, surplus=0)
    with pytest.raises(ValueError, match="its merges make 1514 tokens, CLIP has 49408"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.json", OPENAI])
def test_a_file_far_too_large_is_not_read(trained: Tokenizer, tmp_path: Path, name: str) -> None:
    """Half a gigabyte, of which a packed file shows 2 MB on the disk and a plain one nothing."""
    if name == "merges.txt":
        write_tokenizer(trained, tmp_path)
    if name == OPENAI:
        packed = gzip.compress(bytes(2**24), compresslevel=1)
        (tmp_path / name).write_bytes(packed * 32)  # members follow each other in a gzip file
    else:
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**29)
    tracemalloc.start()
    with pytest.raises(ValueError, match="it is larger than 8,388,608 bytes"):
        read_tokenizer(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 4 * tokenizer_files.MAX_BYTES
    tracemalloc.stop()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_gives_a_tokenizer_or_a_value_error(tmp_path: Path, data) -> None:
    """Never another error: a panic of the backend is none that Python's `Exception` covers."""
    trained = tiny_tokenizer()
    name = data.draw(st.sampled_from(["vocab.json", "merges.txt", "tokenizer.json"]))
    for old in tmp_path.iterdir():
        old.unlink()
    if name == "tokenizer.json":
        save_tokenizer_json(trained, tmp_path, as_strings=data.draw(st.booleans()))
    else:
        write_tokenizer(trained, tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 20))
        pieces = (b"", b"-1", b"1e99", b'"', b"\xff", b"null", b"}", b"99999999999", b'"a": 3,')
        content[start : start + length] = data.draw(st.sampled_from(pieces) | st.binary(max_size=4))
    (tmp_path / name).write_bytes(content)
    try:
        tokenizer = read_tokenizer(tmp_path)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert set(tokenizer.encode("a house")) <= set(range(len(tokenizer)))


def test_clips_own_vocabulary_is_the_same_in_every_form(clip_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if not TRANSFORMERS_5:
        pytest.skip("transformers 4 writes other files")
    real = read_tokenizer(clip_folder)
    write_tokenizer(real, tmp_path)
    # What transformers' CLIP repository has, byte for byte, but for the spaces in vocab.json.
    vocab, merges = (tmp_path / name for name in ("vocab.json", "merges.txt"))
    compact = json.dumps(json.loads(vocab.read_bytes()), ensure_ascii=False, separators=(",", ":"))
    assert (len(compact.encode()), merges.stat().st_size) == (862328, 524619)
    assert read_tokenizer(tmp_path) == real
    (tmp_path / "theirs").mkdir()
    transformers.CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()
    assert read_tokenizer(tmp_path / "theirs") == real
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    lines = ["a comment", *map(" ".join, real.merges), "more than that"]
    with gzip.open(tmp_path / "theirs" / OPENAI, "wt", encoding="utf-8", compresslevel=1) as file:
        file.write("\n".join(lines))
    assert read_tokenizer(tmp_path / "theirs") == real


# --- Where it is found -----------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub in the place of this machine's own."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def in_cache(cache: Path, repo: str, inside: str) -> Path:
    """The folder of a repository's newest snapshot, as the Hub's own library lays it out."""
    top = cache / ("models--" + repo.replace("/", "--"))
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text("0" * 40)
    folder = top / "snapshots" / ("0" * 40) / inside
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "weights, place",
    [
        ("sd/model.ckpt", "sd"),
        ("sd/model.ckpt", "sd/tokenizer"),
        ("sd", "sd"),
        ("sd", "sd/tokenizer"),
        ("sd/text_encoder", "sd/tokenizer"),
        ("sd/text_encoder/model.safetensors", "sd/tokenizer"),
    ],
)
def test_a_tokenizer_beside_the_weights_is_found(
    trained: Tokenizer, tmp_path: Path, weights: str, place: str
) -> None:
    (tmp_path / "sd" / "text_encoder").mkdir(parents=True)
    (tmp_path / place).mkdir(exist_ok=True)
    assert tokenizer_beside(tmp_path / weights) is None
    save_tokenizer_json(trained, tmp_path / place, as_strings=False)
    assert tokenizer_beside(tmp_path / weights) == tmp_path / place
    assert find_tokenizer(tmp_path / weights, len(trained)) == trained


@pytest.mark.parametrize(
    "weights", ["sd/unet/model.safetensors", "sd/sub/model.ckpt", "model.ckpt"]
)
def test_a_tokenizer_elsewhere_is_not_taken(
    trained: Tokenizer, tmp_path: Path, weights: str
) -> None:
    (tmp_path / "sd" / "tokenizer").mkdir(parents=True)
    write_tokenizer(trained, tmp_path / "sd" / "tokenizer")
    assert tokenizer_beside(tmp_path / weights) is None


def test_the_tokenizer_folder_comes_before_the_weights_own(
    trained: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(trained, tmp_path)
    (tmp_path / "tokenizer").mkdir()
    assert tokenizer_beside(tmp_path / "model.ckpt") == tmp_path
    write_tokenizer(Tokenizer(trained.vocab, []), tmp_path / "tokenizer")
    assert find_tokenizer(tmp_path / "model.ckpt", len(trained)) == Tokenizer(trained.vocab, [])


def test_another_models_tokenizer_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(trained, tmp_path)
    with pytest.raises(ValueError, match=r"it has 540 tokens, the text encoder 49408$") as error:
        find_tokenizer(tmp_path / "model.ckpt", 49408)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def clip_sized(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("clip_sized")
    save_openai(folder)
    return read_tokenizer(folder)


def test_clips_vocabulary_with_merges_that_were_cut_off_is_refused(
    clip_sized: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(Tokenizer(clip_sized.vocab, clip_sized.merges[:40_000]), tmp_path)
    with pytest.raises(ValueError, match="it has 40000 merges, CLIP's has 48894"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("repo, inside", tokenizer_files.CACHED)
def test_clips_vocabulary_is_found_in_the_hubs_cache(
    clip_sized: Tokenizer, tmp_path: Path, hub_cache: Path, repo: str, inside: str
) -> None:
    assert find_tokenizer(tmp_path / "model.ckpt", 49408) is None
    write_tokenizer(clip_sized, in_cache(hub_cache, repo, inside))
    assert find_tokenizer(tmp_path / "model.ckpt", 49408) == clip_sized


def test_the_cache_may_hold_tokenizer_json_alone(
    clip_sized: Tokenizer, tmp_path: Path, hub_cache: Path
) -> None:
    save_tokenizer_json(
        clip_sized, in_cache(hub_cache, *tokenizer_files.CACHED[0]), as_strings=True
    )
    assert find_tokenizer(tmp_path / "model.ckpt", 49408) == clip_sized


def test_a_half_cached_repository_is_passed_over(
    trained: Tokenizer, tmp_path: Path, hub_cache: Path
) -> None:
    write_tokenizer(trained, in_cache(hub_cache, *tokenizer_files.CACHED[0]))
    (tokenizer_files.in_hub_cache() / "merges.txt").unlink()
    assert find_tokenizer(tmp_path / "model.ckpt", 49408) is None
    whole = in_cache(hub_cache, *tokenizer_files.CACHED[-1])
    write_tokenizer(trained, whole)
    assert tokenizer_files.in_hub_cache() == whole


def test_only_clips_own_vocabulary_is_looked_for_in_the_hubs_cache(
    trained: Tokenizer, tmp_path: Path, hub_cache: Path
) -> None:
    write_tokenizer(trained, in_cache(hub_cache, *tokenizer_files.CACHED[0]))
    assert find_tokenizer(tmp_path / "model.ckpt", len(trained)) is None


def test_what_lies_beside_the_weights_comes_before_the_cache(
    clip_sized: Tokenizer, tmp_path: Path, hub_cache: Path
) -> None:
    other = Tokenizer(clip_sized.vocab, clip_sized.merges[::-1])
    write_tokenizer(other, tmp_path)
    write_tokenizer(clip_sized, in_cache(hub_cache, *tokenizer_files.CACHED[0]))
    assert find_tokenizer(tmp_path / "model.ckpt", 49408) == other
