"""CLIP's byte-pair tokenizer: from a prompt to numbers.

Text is cleaned (NFC, runs of white space to one space, lower case), split into words, and each
word's bytes are merged pair by pair, the most frequent pairs of the training text first (Sennrich
et al. 2016, arXiv:1508.07909). The merging is done by the `tokenizers` library; the rules stand
here, so that token ids are the same whichever transformers is installed.

A vocabulary is read from any of the forms that CLIP's is published in, and `find` looks for it
where weights have theirs: beside them, then in the Hub's cache.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ldm.files import write_text

if TYPE_CHECKING:
    import tokenizers

Vocab: TypeAlias = dict[str, int]  # token -> id
Merges: TypeAlias = list[tuple[str, str]]  # best pair first

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# English contractions, runs of letters, single digits, runs of anything else (Radford et al. 2021,
# arXiv:2103.00020, section 2.4, and the code released with it). What becomes a special token's name
# by lower-casing alone ("<|EndOfText|>") is set apart, and then split like any other text.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>"
    r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)

# CLIP's vocabulary: 256 bytes, 256 bytes that end a word, the merged pairs, start and end.
CLIP_MERGES = 48894
CLIP_VOCAB_SIZE = 256 + 256 + CLIP_MERGES + 2

# The largest form of CLIP's vocabulary has 4 MB. More is something else, and is not read.
MAX_BYTES = 8 * 2**20

# Where CLIP's vocabulary is on the Hub; and whose files in the Hub's cache may hold it, in which of
# their folders.
CLIP_REPO = "openai/clip-vit-large-patch14"
CACHED = (
    (CLIP_REPO, ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer/"),
)


class Tokenizer:
    """Prompt -> token ids, with a start and an end token, padded to a fixed length."""

    def __init__(self, vocab: Vocab, merges: Sequence[tuple[str, str]]) -> None:
        """`vocab`: token -> id, `</w>` marking the end of a word; `merges`: best pair first.

        Raises:
            ValueError: the vocabulary is not laid out as CLIP's: it lacks the start or the end
                token, or a byte, or its ids do not count from 0.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        needed = [BOS, EOS, *base_tokens()]
        if missing := [token for token in needed if token not in vocab]:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise ValueError(
                f"this is not a CLIP vocabulary: it lacks {', '.join(missing[:4])}{more}"
            )
        if set(vocab.values()) != set(range(len(vocab))):
            raise ValueError(
                f"this is not a CLIP vocabulary: the ids of its {len(vocab)} tokens are not "
                f"0 to {len(vocab) - 1}, each once"
            )
        self.vocab = vocab
        self.merges = list(merges)
        self.bos_token_id = vocab[BOS]
        self.eos_token_id = vocab[EOS]
        self._tokens = {i: token for token, i in vocab.items()}
        self._backend = Backend(
            BPE(
                vocab=vocab,
                merges=self.merges,
                end_of_word_suffix="</w>",
                unk_token=EOS,
            )
        )
        _set_rules(self._backend)
        self._backend.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in (BOS, EOS)]
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a vocabulary in any form that CLIP's is published in: `vocab.json` with
        `merges.txt`, `tokenizer.json` (of which only the vocabulary and the merges count: the
        rules are ours), or OpenAI's `bpe_simple_vocab_16e6.txt.gz`. The first that is there is it.

        Raises:
            FileNotFoundError: none of them is there.
            ValueError: it cannot be read, or is not CLIP's.
        """
        folder = Path(folder)
        files = files_in(folder)
        if files is None:
            raise FileNotFoundError(f"no tokenizer in {folder}: it has neither {HOW_IT_COMES}")
        try:
            vocab, merges = FORMS[files](*(read_bounded(folder / name) for name in files))
            if len(vocab) == CLIP_VOCAB_SIZE and len(merges) != CLIP_MERGES:
                # A file that was cut off would give other ids, and no error.
                raise ValueError(f"it has {len(merges)} merges, CLIP's has {CLIP_MERGES}")
            return cls(vocab, merges)
        except Exception as error:  # whatever gzip, json or the backend say of a broken file
            reason = str(error).partition("\n")[0]
            message = f"no readable CLIP tokenizer in {folder / files[0]}: {reason}"
            raise ValueError(message) from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn the merges from texts: bytes, then bytes that end a word, then merged pairs, then
        the start and end tokens as the two last ids, as in CLIP's own vocabulary. Pairs that are
        equally frequent are merged in no fixed order: the same texts may give other merges."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE
        from tokenizers.trainers import BpeTrainer

        backend = Backend(BPE(end_of_word_suffix="</w>"))
        _set_rules(backend)
        base = base_tokens()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=base[:256],
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        _, merges = parse_tokenizer_json(backend.to_str())
        merges = merges[: vocab_size - len(base) - 2]
        return cls(vocab_of(merges), merges)

    def save(self, folder: str | Path) -> None:
        """Write `vocab.json` and `merges.txt` into a folder that exists."""
        folder = Path(folder)
        write_text(folder / "vocab.json", json.dumps(self.vocab, ensure_ascii=False) + "\n")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        write_text(folder / "merges.txt", "\n".join(lines) + "\n")

    def __eq__(self, other: object) -> bool:
        """The same vocabulary and merges, hence the same ids for every text."""
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return self.vocab == other.vocab and self.merges == other.merges

    __hash__ = None  # type: ignore[assignment]  # its vocabulary is a dict

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """The ids of a text alone: no start, no end, no padding, no limit.

        Raises:
            ValueError: it is no text, or holds half a surrogate pair.
        """
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"this is not a text that can be encoded: {text!r}")
        return list(self._backend.encode(text).ids)

    def pad(self, ids: Sequence[int], max_length: int) -> list[int]:
        """Start token, as many ids as fit, end token, and end tokens up to `max_length`."""
        kept = [self.bos_token_id, *ids[: max_length - 2]]
        return kept + [self.eos_token_id] * (max_length - len(kept))

    def strings(self, ids: Iterable[int]) -> list[str]:
        """The tokens themselves, for people: `"house</w>"` is a word that ends there."""
        return [self._tokens[int(i)] for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without start and end tokens."""
        from tokenizers.decoders import ByteLevel

        pieces = "".join(t for t in self.strings(ids) if t not in (BOS, EOS))
        text: str = ByteLevel().decode([pieces.replace("</w>", "Ġ")])  # Ġ is the space's byte
        return text.strip()


def _set_rules(backend: tokenizers.Tokenizer) -> None:
    """Cleaning and splitting, the same when the vocabulary is learnt and when it is used."""
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Lowercase, Replace
    from tokenizers.normalizers import Sequence as Normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    backend.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    backend.pre_tokenizer = PreTokenizers(
        [
            Split(Regex(WORDS), behavior="removed", invert=True),
            ByteLevel(add_prefix_space=False),
        ]
    )


# --- The forms that a vocabulary comes in ----------------------------------------------------


def parse_vocab_and_merges(vocab: str, merges: str) -> tuple[Vocab, Merges]:
    """`vocab.json` is an object, token -> id; `merges.txt` has a comment, then a pair per line."""
    ids = json.loads(vocab)
    if not isinstance(ids, dict):
        raise ValueError("it is not an object of tokens and ids")
    lines = merges.splitlines()
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    return ids, parse_pairs(line for line in lines if line.strip())


def parse_tokenizer_json(text: str) -> tuple[Vocab, Merges]:
    """The file of the `tokenizers` library. Before version 0.20 it wrote a pair as one string."""
    match json.loads(text):
        case {"model": {"vocab": dict(vocab), "merges": list(merges)}}:
            return vocab, parse_pairs(merges)
        case {"model": {"type": kind}}:
            raise ValueError(f"it is a tokenizer of type {kind}, not BPE")
    raise ValueError("it is not a file of the tokenizers library")


def parse_openai_merges(text: str) -> tuple[Vocab, Merges]:
    """OpenAI's file has a comment, then a pair per line: more of them than CLIP uses."""
    merges = parse_pairs(text.splitlines()[1 : CLIP_MERGES + 1])
    vocab = vocab_of(merges)
    if len(vocab) != CLIP_VOCAB_SIZE:
        raise ValueError(f"its merges make {len(vocab)} tokens, CLIP has {CLIP_VOCAB_SIZE}")
    return vocab, merges


FORMS: dict[tuple[str, ...], Callable[..., tuple[Vocab, Merges]]] = {
    ("vocab.json", "merges.txt"): parse_vocab_and_merges,
    ("tokenizer.json",): parse_tokenizer_json,
    ("bpe_simple_vocab_16e6.txt.gz",): parse_openai_merges,
}
HOW_IT_COMES = ", nor ".join(" with ".join(files) for files in FORMS)


def files_in(folder: Path) -> tuple[str, ...] | None:
    """The files of the first form that is whole in a folder; None where none is."""
    whole = (files for files in FORMS if all((folder / name).is_file() for name in files))
    return next(whole, None)


def read_bounded(path: Path) -> str:
    """The text of a file, unpacked if it is packed, or a ValueError where there is too much."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    return data.decode("utf-8")


def parse_pairs(pairs: Iterable[str | Sequence[str]]) -> Merges:
    """Pairs, written as two tokens or as one string with a space between them."""
    merges = []
    for pair in pairs:
        match pair.split() if isinstance(pair, str) else pair:
            case [str(first), str(second)]:
                merges.append((first, second))
            case _:
                raise ValueError(f"{str(pair)[:40]!r} is not a pair of tokens")
    return merges


def vocab_of(merges: Iterable[tuple[str, str]]) -> Vocab:
    """CLIP's layout: bytes, bytes that end a word, merged pairs, start and end."""
    tokens = [*base_tokens(), *(first + second for first, second in merges), BOS, EOS]
    # Two pairs can make one token, when it is learnt from few texts: it has one id.
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def base_tokens() -> list[str]:
    """A letter for each of the 256 bytes, then the same with the mark of a word's end.

    Bytes that print stand for themselves, the others for code points from 256 on; so OpenAI's
    order (first those that print, then the others) is that of the code points.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    return letters + [letter + "</w>" for letter in letters]


# --- Where a vocabulary is -------------------------------------------------------------------


def find(weights: str | Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of some weights, without asking the network; None where there is none.

    Looked for beside the weights (see `beside`), then, for CLIP's own vocabulary, in the Hub's
    cache: another model's is nowhere but with its weights.

    Args:
        weights: a file of weights, or a folder of them.
        vocab_size: of the text encoder.

    Raises:
        ValueError: what was found cannot be read, or has another size.
    """
    folder = beside(weights)
    if folder is None and vocab_size == CLIP_VOCAB_SIZE:
        folder = in_hub_cache()
    if folder is None:
        return None
    tokenizer = Tokenizer.from_folder(folder)
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} is not that of {weights}: it has {len(tokenizer)} tokens, "
            f"the text encoder {vocab_size}"
        )
    return tokenizer


def beside(weights: str | Path) -> Path | None:
    """The folder of the tokenizer that lies with some weights, or None.

    First `tokenizer`, then the weights' own folder. The text encoder of a diffusers folder has its
    tokenizer in a folder beside its own.
    """
    weights = Path(weights)
    folder = weights if weights.is_dir() else weights.parent
    places = [folder / "tokenizer", folder]
    if folder.name == "text_encoder":
        places.append(folder.parent / "tokenizer")
    return next((place for place in places if files_in(place)), None)


def in_hub_cache() -> Path | None:
    """The folder of CLIP's vocabulary in the cache of Hugging Face's Hub, or None."""
    from huggingface_hub import try_to_load_from_cache

    for repo, inside in CACHED:
        for name in ("vocab.json", "tokenizer.json"):
            path = try_to_load_from_cache(repo, inside + name)
            if isinstance(path, str) and files_in(Path(path).parent):
                return Path(path).parent
    return None
