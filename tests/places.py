"""Where the tests find things: the repository, what lies beside it, and a vocabulary of CLIP's.

It imports nothing but Python's own, so that `conftest.py` can read it before anything else.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
"""Files that are not the repository's to give away; most machines have none."""

# --- CLIP's vocabulary -------------------------------------------------------------------------

VOCABULARY = "LDM_CLIP_VOCABULARY"
NO_VOCABULARY = (
    "CLIP's vocabulary is not here: `hf download openai/clip-vit-large-patch14 vocab.json "
    "merges.txt`, or set LDM_CLIP_VOCABULARY to a folder with these two, with tokenizer.json or "
    "with bpe_simple_vocab_16e6.txt.gz"
)

# The forms that it comes in, and where the Hub's cache has it.
_FORMS = (("vocab.json", "merges.txt"), ("tokenizer.json",), ("bpe_simple_vocab_16e6.txt.gz",))
_IN_CACHE = (
    "models--openai--clip-vit-large-patch14/snapshots/*",
    "models--stable-diffusion-v1-5--stable-diffusion-v1-5/snapshots/*/tokenizer",
    "models--runwayml--stable-diffusion-v1-5/snapshots/*/tokenizer",
    "models--CompVis--stable-diffusion-v1-4/snapshots/*/tokenizer",
)


def clip_vocabulary(hub_cache: Path) -> Path | None:
    """The folder of CLIP's vocabulary: the one that LDM_CLIP_VOCABULARY names (or a file in it),
    else `../shared/clip`, else one in this cache of the Hub; None where there is none.

    Raises:
        FileNotFoundError: the variable names a place that has none.
    """
    if asked := os.environ.get(VOCABULARY):
        place = Path(asked).expanduser()
        folder = place if place.is_dir() else place.parent
        if not _is_whole(folder):
            raise FileNotFoundError(f"{VOCABULARY}={asked}: nothing there. {NO_VOCABULARY}")
        return folder
    cached = (place for pattern in _IN_CACHE for place in sorted(hub_cache.glob(pattern)))
    return next(filter(_is_whole, [SHARED / "clip", *cached]), None)


def _is_whole(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in _FORMS)


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloaded, by its own rules."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if place := os.environ.get(name):
            return Path(place).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"
