"""CLIP's byte-pair tokenizer: from a prompt to numbers.

Text is cleaned (NFC, runs of white space to one space, lower case), split into words, and each
word's bytes are merged pair by pair, the most frequent pairs of the training text first (Sennrich
et al. 2016, arXiv:1508.07909). The merging is done by the `tokenizers` library; the rules stand
here, so that token ids are the same whichever transformers is installed.

A vocabulary's files, and where they lie, are the business of `ldm.checkpoints.tokenizer_files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

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


class Tokenizer:
    """Prompt -> token ids, with a start and an end token, padded to a fixed length."""

    def __init__(
        self,
        vocab: Vocab,
        merges: Sequence[tuple[str, str]],
        words: Iterable[str] | None = None,
    ) -> None:
        """`vocab`: token -> id, `</w>` marking the end of a word; `merges`: best pair first;
        `words`: all that the model was trained on, where they are known and few (`unseen`).

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
        self.words = None if words is None else frozenset(words)
        self.bos_token_id = vocab[BOS]
        self.eos_token_id = vocab[EOS]
        self.added: dict[str, tuple[int, ...]] = {}
        """Words that are no text (`with_word`), and their ids, behind the vocabulary's."""
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
        merges = parse_pairs(json.loads(backend.to_str())["model"]["merges"])
        merges = merges[: vocab_size - len(base) - 2]
        return cls(vocab_of(merges), merges)

    def knowing(self, texts: Iterable[str]) -> Tokenizer:
        """The same tokenizer, of a model that sees the words of these texts and no others."""
        words = filter(str.isalpha, split_words("\n".join(texts)))
        return Tokenizer(self.vocab, self.merges, words)

    def with_word(self, word: str, length: int) -> Tokenizer:
        """The same tokenizer with one more word, of `length` new ids. It is found wherever it
        stands in a prompt, in upper or lower case, but not as a part of a longer word.

        Raises:
            ValueError: it cannot be a word of a prompt, or is one already.
        """
        word = word.lower()
        if not word.isprintable() or not word or set(word) & set(" ,") or len(word) > 100:
            told = "one word of 100 printable characters at most, without commas"
            raise ValueError(f"the word must be {told}, not {word!r:.80}")
        if word in self.added or f"{word}</w>" in self.vocab or word in (BOS, EOS):
            raise ValueError(f"the vocabulary has the word {word!r} already: pass another, word=")
        first = len(self.vocab) + sum(map(len, self.added.values()))
        other = Tokenizer(self.vocab, self.merges, self.words)
        other.added = {**self.added, word: tuple(range(first, first + length))}
        for one, ids in other.added.items():
            names = [one] if len(ids) == 1 else [f"{one}[{n}]" for n in range(1, len(ids) + 1)]
            other._tokens |= zip(ids, [*names[:-1], f"{names[-1]}</w>"], strict=True)
        return other

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
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += self.added.get(piece.lower()) or self._backend.encode(piece).ids
        return ids

    def _pieces(self, text: str) -> list[str]:
        """A text cut around the words that were added."""
        if not self.added:
            return [text]
        longest_first = sorted(self.added, key=len, reverse=True)
        words = "|".join(
            (r"\b" if word[0].isalnum() else "")
            + re.escape(word)
            + (r"\b" if word[-1].isalnum() else "")
            for word in longest_first
        )
        return re.split(f"({words})", text, flags=re.IGNORECASE)

    def unseen(self, text: str) -> list[str]:
        """The words of a text that the model was not trained on, in their order, each once; none
        where nobody knows. What is no word, such as a comma, is left out."""
        if self.words is None:
            return []
        text = " ".join(piece for piece in self._pieces(text) if piece.lower() not in self.added)
        words = dict.fromkeys(filter(str.isalpha, split_words(text)))
        return [word for word in words if word not in self.words]

    def pad(self, ids: Sequence[int], max_length: int, fill: int | None = None) -> list[int]:
        """Start token, as many ids as fit, end token, and up to `max_length` the token `fill`, by
        default the end token again."""
        kept = [self.bos_token_id, *ids[: max_length - 2], self.eos_token_id]
        return kept + [self.eos_token_id if fill is None else fill] * (max_length - len(kept))

    def strings(self, ids: Iterable[int]) -> list[str]:
        """The tokens themselves, for people: `"house</w>"` is a word that ends there."""
        return [self._tokens[int(i)] for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without start and end tokens."""
        from tokenizers.decoders import ByteLevel

        words = {word_ids[-1]: word for word, word_ids in self.added.items()}
        text, pieces = "", ""
        for i in map(int, ids):
            if i < len(self.vocab):
                pieces += "" if self._tokens[i] in (BOS, EOS) else self._tokens[i]
            elif i in words:  # by its last token
                text += ByteLevel().decode([pieces.replace("</w>", "Ġ")]) + words[i] + " "
                pieces = ""
        text += ByteLevel().decode([pieces.replace("</w>", "Ġ")])  # Ġ is the space's byte
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


def split_words(text: str) -> list[str]:
    """The words of a text as the rules clean and split it, whatever the vocabulary."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    backend = Backend(BPE())
    _set_rules(backend)
    cleaned = backend.normalizer.normalize_str(text)
    pieces = backend.pre_tokenizer.pre_tokenize_str(cleaned)
    return [cleaned[start:end] for _, (start, end) in pieces]


# --- How a vocabulary is laid out ------------------------------------------------------------


def parse_pairs(pairs: Iterable[str | Sequence[str]]) -> Merges:
    """Pairs, written as two tokens or (by the `tokenizers` library before version 0.20, and in
    files) as one string with a space between them."""
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
