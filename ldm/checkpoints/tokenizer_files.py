"""A vocabulary's files: the forms that CLIP's is published in, and where they lie."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ldm.errors import printable
from ldm.files import written_whole
from ldm.tokenizer import Merges, Tokenizer, Vocab, parse_pairs, vocab_of

# CLIP's vocabulary: 256 bytes, 256 bytes that end a word, the merged pairs, start and end.
CLIP_MERGES = 48894
CLIP_VOCAB_SIZE = 256 + 256 + CLIP_MERGES + 2

WORDS_FILE = "words.txt"  # ours: other code has no use for it

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


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a vocabulary in any form that CLIP's is published in: `vocab.json` with
    `merges.txt`, `tokenizer.json` (of which only the vocabulary and the merges count: the
    rules are ours), or OpenAI's `bpe_simple_vocab_16e6.txt.gz`. The first that is there is it.
    `words.txt`, if it is there too, has the words that the model was trained on, one a line.

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
        known = folder / WORDS_FILE
        return Tokenizer(vocab, merges, read_bounded(known).split() if known.is_file() else None)
    except Exception as error:  # whatever gzip, json or the backend say of a broken file
        reason = str(error).partition("\n")[0]
        message = printable(f"no readable CLIP tokenizer in {folder / files[0]}: {reason}")
        raise ValueError(message) from error


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write `vocab.json` and `merges.txt` into a folder that exists, and `words.txt` where the
    words are known: all, or none of them."""
    with tokenizer_written(tokenizer, Path(folder)):
        pass


@contextlib.contextmanager
def tokenizer_written(tokenizer: Tokenizer, folder: Path) -> Iterator[None]:
    """Write a tokenizer beside what is written in the meantime: its files appear after that, if
    nothing fails."""
    texts = {
        "vocab.json": json.dumps(tokenizer.vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, tokenizer.merges)]),
    }
    if tokenizer.words is not None:
        texts[WORDS_FILE] = "\n".join(sorted(tokenizer.words))
    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            stack.enter_context(text_written(folder / name, text))
        yield


@contextlib.contextmanager
def text_written(path: Path, text: str) -> Iterator[None]:
    """Write a text, which appears after what is done in the meantime, if nothing fails."""
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")
        yield


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
    merges = parse_pairs(itertools.islice(io.StringIO(text), 1, CLIP_MERGES + 1))
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


# --- Where a vocabulary is -------------------------------------------------------------------


def find_tokenizer(weights: str | Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of some weights, without asking the network; None where there is none.

    Looked for beside the weights (see `tokenizer_beside`), then, for CLIP's own vocabulary, in the
    Hub's cache: another model's is nowhere but with its weights.

    Args:
        weights: a file of weights, or a folder of them.
        vocab_size: of the text encoder.

    Raises:
        ValueError: what was found cannot be read, or has another size.
    """
    folder = tokenizer_beside(weights)
    if folder is None and vocab_size == CLIP_VOCAB_SIZE:
        folder = in_hub_cache()
    if folder is None:
        return None
    tokenizer = read_tokenizer(folder)
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} is not that of {weights}: it has {len(tokenizer)} tokens, "
            f"the text encoder {vocab_size}"
        )
    return tokenizer


def tokenizer_beside(weights: str | Path) -> Path | None:
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


def check_beside(path: Path, tokenizer: Tokenizer) -> None:
    """A ValueError in one line if another model's tokenizer lies where a file of weights is to be
    written: this model would be loaded with it."""
    folder = tokenizer_beside(path)
    if folder is not None and read_tokenizer(folder) != tokenizer:
        raise ValueError(f"{folder} holds another model's tokenizer: save into another folder")
