"""CLIP's tokenizer: a small one, trained here, and the real vocabulary against transformers."""

from __future__ import annotations

import gzip
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ldm.tokenizer import BOS, EOS, Tokenizer
from tests.helpers import TRANSFORMERS_5

REAL = Path(__file__).parents[2] / "shared" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
TEXTS = ["a red house on green grass at night", "the white house, by the lake's shore", "café 1984"]

PROMPTS = [
    "a red house on green grass at night",
    "An astronaut riding a horse on Mars, 4k, trending on ArtStation!!",
    "",
    " ",
    "  several   spaces\tand\nlines  ",
    "it's we've I'm they'll you'd don't they're 'tis o'clock ''quoted'' 'S",
    "1234567890 3.14159 42nd ½ ² Ⅷ ٣",
    "café naïve Ångström ﬁne",
    "cafe\u0301 n\u0303 A\u030a",  # not composed
    "ÄÖÜ ẞ İstanbul ΣΊΣΥΦΟΣ ΌΔΟΣ",
    "日本語の文章 한국어 العربية हिन्दी ไทย",
    "🎨🖌️ 👩‍👩‍👧 🇫🇷",
    "non\u00a0breaking\u2003em\u3000wide \u200bzero\u200d",
    "a\u0085b\u2028c\x1cd\x00e",
    "{json: [1, 2]} <html> </w> a</w> #tag @me $5 50% a_b c-d ... ?!?",
    "<|startoftext|> in the middle <|endoftext|> of it",
    "<|STARTOFTEXT|> <|EndOfText|>",
    "supercalifragilisticexpialidocious " * 30,
    "\\ / | ~ ` ^ ° § € £ ¥ © ™",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS * 5, vocab_size=540)


# --- A trained one ---------------------------------------------------------------------------


def test_trained_vocabulary_is_laid_out_as_clips(trained: Tokenizer) -> None:
    """256 bytes, 256 bytes that end a word, the merged pairs, then start and end."""
    tokens = trained.strings(range(len(trained)))
    assert len(tokens) == len(set(tokens)) == len(trained) <= 540
    assert tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    assert tokens[512:-2] == ["".join(pair) for pair in trained.merges]
    assert tokens[-2:] == [BOS, EOS]
    assert (trained.bos_token_id, trained.eos_token_id) == (len(trained) - 2, len(trained) - 1)


def test_training_reaches_the_asked_size_and_merges_frequent_words(trained: Tokenizer) -> None:
    assert len(trained) == 540
    assert trained.strings(trained.encode("the house")) == ["the</w>", "house</w>"]


@pytest.mark.parametrize("text", [*TEXTS, "words it has never seen: zyx, 2718", "🎨 日本語 naïve"])
def test_text_comes_back_from_its_ids(trained: Tokenizer, text: str) -> None:
    """But for the spaces between words, which no token holds."""
    assert trained.decode(trained.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_words_come_back_with_one_space_between_them(trained: Tokenizer) -> None:
    ids = [trained.bos_token_id, *trained.encode("a  red house"), trained.eos_token_id]
    assert trained.decode(ids) == "a red house"


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cn"]), max_size=40))
def test_any_text_comes_back_up_to_cleaning(text: str) -> None:
    tokenizer = _trained_once()
    assume(BOS not in text and EOS not in text)
    back = tokenizer.decode(tokenizer.encode(text))
    # Letter by letter: the last sigma of a word is no special case here.
    clean = "".join(letter.lower() for letter in unicodedata.normalize("NFC", text))
    assert "".join(back.split()) == "".join(clean.split())


_CACHE: list[Tokenizer] = []


def _trained_once() -> Tokenizer:
    if not _CACHE:  # hypothesis runs outside of fixtures' scopes
        _CACHE.append(Tokenizer.train(TEXTS * 5, vocab_size=540))
    return _CACHE[0]


@pytest.mark.parametrize(
    "text, same",
    [
        ("A RED House", "a red house"),
        ("cafe\u0301", "caf\u00e9"),
        ("a \t\n  red\u00a0house", "a red house"),
        ("  a red house  ", "a red house"),
    ],
    ids=["lower case", "NFC", "white space", "ends"],
)
def test_text_is_cleaned(trained: Tokenizer, text: str, same: str) -> None:
    assert trained.encode(text) == trained.encode(same)


def test_digits_stand_alone_and_contractions_split(trained: Tokenizer) -> None:
    ends = [token for token in trained.strings(trained.encode("1984")) if token.endswith("</w>")]
    assert ends == ["1</w>", "9</w>", "8</w>", "4</w>"]
    assert trained.encode("lake's") == trained.encode("lake") + trained.encode("'s")


def test_special_tokens_in_a_text_are_themselves(trained: Tokenizer) -> None:
    bos, eos = trained.bos_token_id, trained.eos_token_id
    assert trained.encode(f"{BOS}a{EOS}") == [bos, *trained.encode("a"), eos]
    assert bos not in trained.encode(BOS.upper())  # cleaned text never makes one


def test_empty_text_has_no_ids(trained: Tokenizer) -> None:
    assert trained.encode("") == trained.encode("  \n") == []


def test_pad_puts_start_and_end_around_and_fills_with_end(trained: Tokenizer) -> None:
    bos, eos = trained.bos_token_id, trained.eos_token_id
    assert trained.pad([], 4) == [bos, eos, eos, eos]
    assert trained.pad([5, 6], 4) == [bos, 5, 6, eos]
    assert trained.pad([5, 6, 7], 4) == [bos, 5, 6, eos]


def test_saved_and_loaded_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded == trained
    assert loaded.vocab == trained.vocab and loaded.merges == trained.merges
    assert [loaded.encode(p) for p in PROMPTS] == [trained.encode(p) for p in PROMPTS]
    names = ("vocab.json", "merges.txt")
    files = [(tmp_path / name).read_bytes() for name in names]
    loaded.save(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == files


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_file_is_named(trained: Tokenizer, tmp_path: Path, name: str) -> None:
    trained.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("vocab.json", "{"),
        ("vocab.json", '{"a": 0}'),
        ("merges.txt", "#version: 0.2\na b c\n"),
        ("merges.txt", "#version: 0.2\nzz yy\n"),
    ],
    ids=["no json", "not CLIP's", "three parts", "unknown tokens"],
)
def test_broken_file_is_refused(
    trained: Tokenizer, tmp_path: Path, name: str, content: str
) -> None:
    trained.save(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="no readable CLIP tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_another_vocabulary_or_other_merges_are_another_tokenizer(trained: Tokenizer) -> None:
    assert trained == Tokenizer(trained.vocab, trained.merges)
    assert trained != Tokenizer(trained.vocab, trained.merges[:-1])
    assert trained != "a tokenizer"


def test_vocabulary_without_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="endoftext"):
        Tokenizer({"a": 0, BOS: 1}, [])


# --- The real one ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    """CLIP's vocabulary, put together as OpenAI's own code does (simple_tokenizer.py)."""
    if not REAL.is_file():
        pytest.skip(f"CLIP's vocabulary is not part of the repository: no {REAL}")
    from tokenizers.pre_tokenizers import ByteLevel

    lines = gzip.decompress(REAL.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    # OpenAI's order: printable bytes first, then the others, which stand at code points from 256.
    letters = sorted(ByteLevel.alphabet())
    words = letters + [a + "</w>" for a in letters] + ["".join(pair) for pair in merges]
    return Tokenizer({word: i for i, word in enumerate([*words, BOS, EOS])}, merges)


@pytest.fixture(scope="module")
def oracle(real: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    transformers = pytest.importorskip("transformers")
    if not TRANSFORMERS_5:
        pytest.skip("the cleaning rules are transformers 5's; version 4 cleans in other ways")
    folder = tmp_path_factory.mktemp("clip")
    real.save(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_real_vocabulary_has_clips_ids(real: Tokenizer) -> None:
    assert len(real) == 49408
    assert (real.bos_token_id, real.eos_token_id) == (49406, 49407)
    # "a photo of a cat", as printed in many places.
    assert real.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_real_vocabulary_gives_transformers_ids(real: Tokenizer, oracle, prompt: str) -> None:
    theirs = oracle(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    assert real.pad(real.encode(prompt), 77) == theirs


_LETTERS = st.characters(codec="utf-8")


def test_real_vocabulary_gives_transformers_ids_for_any_text(real: Tokenizer, oracle) -> None:
    @settings(max_examples=150, deadline=None)
    @example("'''s'")
    @example("!'t")
    @given(st.text(st.one_of(_LETTERS, st.sampled_from("abcdst're 019'!.,<|> \n")), max_size=60))
    def check(text: str) -> None:
        theirs = oracle(text, add_special_tokens=False).input_ids
        assert real.encode(text) == theirs

    check()
