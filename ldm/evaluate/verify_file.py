"""What only the file can tell: how much there is, its own tables, EMA against plain, its hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ldm.checkpoints.keys import schedule_entries
from ldm.checkpoints.planning import Plan, plan
from ldm.checkpoints.recognise import Weights
from ldm.checkpoints.spellings import EMA
from ldm.checkpoints.tokenizer_files import CLIP_VOCAB_SIZE, find_tokenizer
from ldm.config import SD_V1
from ldm.errors import CheckpointError
from ldm.evaluate.verify_tables import Fact
from ldm.files import file_sha256

PIECE = 1 << 20  # numbers that are compared at once
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text": 123_060_480}
"""Of Stable Diffusion v1."""
PROMPT = "a photograph of an astronaut riding a horse"
WORDS = (320, 8853, 539, 550, 18376, 6765, 320, 4558)
"""A prompt, and its words' ids in CLIP's vocabulary."""


def hashes_of(weights: Weights) -> dict[Path, str]:
    """The SHA-256 of every file that the weights lie in: all of each is read."""
    files = sorted({entry.file.path for entry in weights.entries.values()})
    return {file: file_sha256(file) for file in files}


def file_facts(
    weights: Weights, plans: Mapping[str, Plan], hashes: Mapping[Path, str]
) -> tuple[Fact, ...]:
    """All of them; `plans` are those of the stages that are there."""
    facts = [Fact("container", weights.archive.container), types(plans)]
    facts += [parameters(stage, plan) for stage, plan in plans.items()]
    facts.append(tables(weights))
    if "unet" in plans:
        facts.append(means(weights, plans["unet"]))
    if "text" in plans and weights.config.text.vocab_size == CLIP_VOCAB_SIZE:
        facts.append(tokenizer(weights))
    facts += [Fact("SHA-256", f"{sha256} ({file.name})") for file, sha256 in hashes.items()]
    return tuple(facts)


def types(plans: Mapping[str, Plan]) -> Fact:
    """In what precision the weights are stored: a half of one rounds more than the tolerances."""
    found = {place.entry.dtype for one in plans.values() for place in one.places.values()}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in found)
    rounded = found != {torch.float32}
    told = "; published numbers are those of float32, and need not hold for it" if rounded else ""
    return Fact("stored as", ", ".join(names) + told)


def parameters(stage: str, plan: Plan) -> Fact:
    """How many numbers a stage has."""
    count = sum(weight.numel() for weight in plan.model.parameters())
    expected = PARAMETERS[stage] if getattr(plan.config, stage) == getattr(SD_V1, stage) else count
    told = f"{count:,}" + ("" if count == expected else f", not {expected:,}")
    return Fact(f"parameters of {stage}", told, wrong=count != expected)


def tables(weights: Weights) -> Fact:
    """The file's own tables of the noise schedule, against those that we compute."""
    name = "noise schedule"
    if weights.schedule:
        return Fact(name, weights.schedule, wrong=weights.config.schedule != SD_V1.schedule)
    ours = schedule_entries(weights.config.schedule)
    off = {
        key: (entry.map().double() - ours[key].double()).abs().max().item()
        for key, entry in weights.entries.items()
        if key in ours and entry.shape == ours[key].shape
    }
    if not off:
        return Fact(name, "none in the file: the config's")
    most = max(off.values())
    return Fact(name, f"{len(off)} tables, off by {most:.2g} at most from those computed here")


def means(weights: Weights, used: Plan) -> Fact:
    """The running means of the UNet's weights against the weights: how far they are apart."""
    name = "EMA"
    if not any(key.startswith(EMA) for key in weights.entries):
        return Fact(name, "no second set of weights: what is there is measured")
    which = "the means are" if used.ema else "the plain weights are"
    try:
        mean, plain = plan(weights, "unet", True), plan(weights, "unet", False)
    except CheckpointError as error:
        return Fact(name, f"{which} measured; no comparison: {error}")
    square = apart = 0.0
    for key, place in plain.places.items():
        pieces = zip(place.entry.pieces(PIECE), mean.places[key].entry.pieces(PIECE), strict=True)
        for ours, theirs in pieces:
            square += ours.double().square().sum().item()
            apart += (ours.double() - theirs.double()).square().sum().item()
    off = (apart / square) ** 0.5 if square else 0.0
    return Fact(name, f"{which} measured; the two are {off:.2%} of the weights' RMS apart")


def tokenizer(weights: Weights) -> Fact:
    """Whether the tokenizer beside the weights, if any, splits a prompt as CLIP's does."""
    name = "tokenizer"
    try:
        found = find_tokenizer(weights.path, CLIP_VOCAB_SIZE)
    except ValueError as error:
        return Fact(name, str(error), wrong=True)
    if found is None:
        return Fact(name, "none on this machine: token ids were fed to the text encoder")
    ids = found.encode(PROMPT)
    wrong = ids != list(WORDS)
    return Fact(name, f"{PROMPT!r} is {ids}{f', not {list(WORDS)}' if wrong else ''}", wrong)
