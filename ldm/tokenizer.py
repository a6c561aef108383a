"""CLIP's byte-pair tokenizer: from a prompt to numbers.

Text is cleaned (NFC, runs of white space to one space, lower case), split into words, and each
word's bytes are merged pair by pair, the most frequent pairs of the training text first (Sennrich
et al. 2016, arXiv:1508.07909). The merging is done by the `tokenizers` library; the rules stand
here, so that token ids are the same whichever transformers is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.files import write_text

if TYPE_CHECKING:
    import tokenizers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# English contractions, runs of letters, single digits, runs of anything else (Radford et al. 2021,
# arXiv:2103.00020, section 2.4, and the code released with it).
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Prompt -> token ids, with a start and an end token, padded to a fixed length."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
        """`vocab`: token -> id, `</w>` marking the end of a word; `merges`: best pair first.

        Raises:
            ValueError: the vocabulary lacks CLIP's start or end token.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        if missing := {BOS, EOS} - vocab.keys():
            raise ValueError(
                f"this is not a CLIP vocabulary: it lacks {', '.join(sorted(missing))}"
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
        """Read `vocab.json` and `merges.txt`, as CLIP's tokenizer is published.

        Raises:
            FileNotFoundError: one of the two files is not there.
            ValueError: they cannot be read, or are not CLIP's.
        """
        folder = Path(folder)
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no tokenizer in {folder}: {name} is not there")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        if lines and lines[0].startswith("#version"):
            lines = lines[1:]
        try:
            vocab = dict(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
            merges = [(first, second) for first, second in map(str.split, filter(str.strip, lines))]
            return cls(vocab, merges)
        except Exception as error:  # whatever json or the backend say of a broken file
            reason = str(error).partition("\n")[0]
            raise ValueError(f"no readable CLIP tokenizer in {folder}: {reason}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn the merges from texts: bytes, then bytes that end a word, then merged pairs, then
        the start and end tokens as the two last ids, as in CLIP's own vocabulary."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
        from tokenizers.trainers import BpeTrainer

        backend = Backend(BPE(end_of_word_suffix="</w>"))
        _set_rules(backend)
        letters = sorted(ByteLevel.alphabet())
        base = letters + [letter + "</w>" for letter in letters]
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=letters,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        learnt = json.loads(backend.to_str())["model"]["merges"]
        # tokenizers before 0.20 writes a pair as one string.
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in learnt]
        merges = merges[: vocab_size - len(base) - 2]
        words = base + [a + b for a, b in merges] + [BOS, EOS]
        return cls({token: i for i, token in enumerate(words)}, merges)

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
        """The ids of a text alone: no start, no end, no padding, no limit."""
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
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
