"""From any file or folder of weights to a clean one: the parts that a model uses, and no more."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.diffusers.writing import save_folder
from ldm.checkpoints.download import require_tokenizer
from ldm.checkpoints.filling import fill
from ldm.checkpoints.folders import SUFFIXES
from ldm.checkpoints.loading import joint_config, open_model, plan_stages
from ldm.checkpoints.lora import bake
from ldm.checkpoints.planning import Ema, Plan
from ldm.checkpoints.saving import save_model
from ldm.checkpoints.tokenizer_files import check_beside
from ldm.config import ModelConfig
from ldm.device import check_dtype
from ldm.files import check_writable


def convert(
    source: str | Path,
    target: str | Path,
    *,
    ema: Ema = "auto",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    vae: str | Path | None = None,
    text: str | Path | None = None,
    prediction: str | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> None:
    """Write a whole model anew. The target appears whole or not at all.

    Args:
        source, ema, config, vae, text, prediction: as `ldm.load` takes them.
        target: a name that ends in `.safetensors` is a file in the official layout, with the
            tokenizer's two files beside it; any other is a new diffusers folder.
        dtype: None keeps the numbers as they are stored (where types are mixed, in the narrowest
            type that holds them all).
        loras: files, and how strongly each counts, to be merged into the weights.

    Raises:
        FileNotFoundError, CheckpointError: as `ldm.load`.
        ValueError: the target would overwrite the source, or cannot be written.
    """
    target = Path(target)
    dtype = None if dtype is None else check_dtype(dtype)
    sources = open_model(source, config, vae=vae, text=text, prediction=prediction)
    check_target(
        target,
        {entry.file.path for one in sources.values() for entry in one.entries.values()}
        | {Path(path) for path, _ in loras if Path(path).exists()},
    )
    plans = plan_stages(sources, ema)
    vocab_size = plans["text"].config.text.vocab_size
    tokenizer = require_tokenizer(plans["text"].path, vocab_size)
    if is_file(target):
        check_beside(target, tokenizer)
    config = joint_config(sources)
    dtype = stored_dtype(plans.values()) if dtype is None else dtype
    cpu = torch.device("cpu")
    stages: dict[str, Any] = {
        stage: fill(plan, cpu, dtype, tokenizer=tokenizer) for stage, plan in plans.items()
    }
    for path, scale in loras:
        bake(path, scale, stages)
    if is_file(target):
        save_model(target, **stages, config=config)
    else:
        save_folder(target, **stages, config=config, tokenizer=tokenizer)


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
