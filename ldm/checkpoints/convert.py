"""From any file or folder of weights to a clean one: the parts that a model uses, and no more."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from ldm.checkpoints.checkpoint import SUFFIXES, Ema, Plan, open_model, plan_stages
from ldm.config import ModelConfig
from ldm.device import check_dtype
from ldm.checkpoints.diffusers_layout import save_folder
from ldm.checkpoints.download import require_tokenizer
from ldm.files import check_writable
from ldm.pipeline import TextToImage, check_beside
from ldm.tokenizer import Tokenizer


def convert(
    source: str | Path,
    target: str | Path,
    *,
    ema: Ema = "auto",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    vae: str | Path | None = None,
    text: str | Path | None = None,
) -> None:
    """Write a whole model anew. The target appears whole or not at all.

    Args:
        source, ema, config, vae, text: as `ldm.load` takes them.
        target: a name that ends in `.safetensors` is a file in the official layout, with the
            tokenizer's two files beside it; any other is a new diffusers folder.
        dtype: None keeps the numbers as they are stored (where types are mixed, in the narrowest
            type that holds them all).

    Raises:
        FileNotFoundError, CheckpointError: as `ldm.load`.
        ValueError: the target would overwrite the source, or cannot be written.
    """
    target = Path(target)
    dtype = None if dtype is None else check_dtype(dtype)
    sources = open_model(source, config, vae=vae, text=text)
    check_target(
        target, {entry.file.path for one in sources.values() for entry in one.entries.values()}
    )

    def tokenizer(weights: Path, vocab_size: int) -> Tokenizer:
        found = require_tokenizer(weights, vocab_size)
        if is_file(target):
            check_beside(target, found)
        return found

    plans = plan_stages(sources, ema, tokenizer)
    dtype = stored_dtype(plans.values()) if dtype is None else dtype
    pipe = TextToImage.from_plans(plans, device=torch.device("cpu"), dtype=dtype)
    if is_file(target):
        pipe.save(target)
    else:
        save_folder(
            target,
            unet=pipe.unet,
            vae=pipe.vae,
            text=pipe.text,
            config=pipe.config,
            tokenizer=pipe.text.require_tokenizer(),
        )


def is_file(target: Path) -> bool:
    """Whether a file is asked for, and not a folder."""
    return target.suffix == ".safetensors"


def check_target(target: Path, read: Collection[Path]) -> None:
    """A ValueError in one line if the target cannot be written, or is one of the files read."""
    if target.exists() and any(target.samefile(path) for path in read):
        raise ValueError(f"{target} is what would be read: name another target")
    if not is_file(target) and target.suffix in SUFFIXES:
        raise ValueError(f"{target} cannot be written as a pickle: let it end in .safetensors")
    if not is_file(target) and target.exists():
        raise ValueError(f"{target} exists already: name a folder that does not")
    check_writable(target)


def stored_dtype(plans: Iterable[Plan]) -> torch.dtype:
    """The narrowest type that holds all numbers exactly. Those of 8 bits are taken as 16: in 8 bits
    no model computes."""
    stored = {place.entry.dtype for plan in plans for place in plan.places.values()}
    wide = {torch.float16 if dtype.itemsize == 1 else dtype for dtype in stored}
    return functools.reduce(torch.promote_types, wide)
