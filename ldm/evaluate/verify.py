"""Official weights, held on the user's machine against numbers that others published for them.

    file ── stages, one at a time ── the published inputs ── measured | published | verdict

A row agrees, or differs, or says that no number was published for it; nothing passes by default.
What is in a file that nobody knows by its hash is told by which of the UNet's numbers agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.filling import fill
from ldm.checkpoints.loading import check_sources
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.planning import Ema, Plan, plan
from ldm.checkpoints.recognise import Weights, recognise
from ldm.checkpoints.spellings import stages_in
from ldm.config import SD_V1, ModelConfig
from ldm.device import check_device
from ldm.errors import DivergedError, FamilyError, NonFiniteError, printable
from ldm.evaluate.verify_file import file_facts, hashes_of
from ldm.evaluate.verify_published import Published, published, version_by_hash
from ldm.evaluate.verify_stages import MEASURES, picture_contexts, picture_corner, picture_latents
from ldm.evaluate.verify_tables import (
    AGREES,
    DIFFERS,
    NOT_DRAWN,
    NOT_MEASURED,
    NOT_PUBLISHED,
    NOT_THERE,
    Fact,
    Row,
    Verification,
    machine,
)
from ldm.schedule import NoiseSchedule

ORDER = ("text", "unet", "vae")  # in which a picture needs them
PICTURE = "picture"

Found = Mapping[str, tuple[float, ...]]
"""What was measured, by the names of the `Published`."""


def verify(
    path: str | Path,
    *,
    version: str | None = None,
    picture: bool = False,
    device: str | torch.device = "cpu",
    ema: Ema = "auto",
    config: ModelConfig | None = None,
    numbers: Sequence[Published] | None = None,
) -> Verification:
    """Hold a file of official weights against what others published for them.

    Args:
        path: a file or a folder with some or all of the stages, as `ldm.inspect` takes it.
        version: "v1-1" to "v1-5", for a file that its hash does not tell: numbers of other versions
            are left out. None tells it by the hash, or by the UNet's number that agrees.
        picture: draw a whole picture too, as was published: minutes on a CPU.
        device: where to compute. It is done in float32, and without TensorFloat-32.
        ema: as `ldm.load` takes it; published numbers are of the running means.
        config: for weights that bring none and are not Stable Diffusion v1.
        numbers: other numbers than `published()`, of any model.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: it cannot be read, does not fit, or is no Stable Diffusion v1.
        ValueError: the version is none, or the device is not there.
    """
    device = check_device(device)
    known = published() if numbers is None else tuple(numbers)
    there = tuple(dict.fromkeys(version for number in known for version in number.of))
    if version is not None and version not in there:
        raise ValueError(f"unknown version {version!r:.80}: there are {', '.join(there)}")
    weights = recognise(open_archive(path), config)
    if numbers is None:
        check_official(weights)
    stages = [stage for stage in ORDER if stage in stages_in(weights.entries)]
    check_sources(dict.fromkeys(stages, weights))
    plans = {stage: plan(weights, stage, ema) for stage in stages}
    hashes = hashes_of(weights)
    told_by = "as you say" if version else "nothing tells"
    by_hash = {one for sha256 in hashes.values() if (one := version_by_hash(sha256))}
    if version is None and len(by_hash) == 1:
        (version,), told_by = by_hash, "by its hash"
    facts = file_facts(weights, plans, hashes)

    wanted = [number for number in known if version is None or version in number.of]
    if not picture or len(stages) < len(ORDER):
        wanted = [number for number in wanted if number.stage != PICTURE]
    found, broken = measure(plans, wanted, weights, device)
    if version is None and (agreeing := version_by_numbers(wanted, found)):
        version, told_by = agreeing, "by the numbers that agree"
        wanted = [number for number in wanted if version in number.of]
    rows = [compared(number, found.get(number.name)) for number in wanted]
    rows += rows_without(known, rows, stages, version, picture)
    order = (*ORDER, PICTURE)
    return Verification(
        path=str(path),
        version=version,
        told_by=told_by,
        rows=tuple(sorted(rows, key=lambda row: order.index(row.stage))),
        facts=facts + broken,
        machine=machine(str(device)),
    )


def check_official(weights: Weights) -> None:
    """A FamilyError for a model of other sizes than those whose numbers were published."""
    ours, theirs = weights.config, SD_V1
    if (ours.unet, ours.vae, ours.text) != (theirs.unet, theirs.vae, theirs.text):
        raise FamilyError(
            f"{weights.path} is {printable(ours.name)}: numbers were published for Stable "
            "Diffusion v1 alone"
        )


# --- Measuring -------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    plans: Mapping[str, Plan], wanted: Sequence[Published], weights: Weights, device: torch.device
) -> tuple[Found, tuple[Fact, ...]]:
    """All numbers that are wanted, stage by stage; and for each stage whether its weights are
    finite, without which nothing is measured of it, nor of a picture."""
    found: dict[str, tuple[float, ...]] = {}
    # Numbers of two versions may be of one picture: it is drawn once.
    pictures: dict[str, list[Published]] = {}
    for number in wanted:
        if number.stage == PICTURE:
            pictures.setdefault(repr(sorted(number.inputs.items())), []).append(number)
    made: dict[str, Tensor] = {}  # of each picture, by the stages so far
    facts = []
    for stage, one in plans.items():
        try:
            model = fill(one, device, torch.float32)
        except NonFiniteError as error:
            facts.append(Fact(f"numbers of {stage}", str(error), wrong=True))
            pictures.clear()
            continue
        facts.append(Fact(f"numbers of {stage}", "all finite"))
        with full_float32():
            for number in wanted:
                if number.stage == stage:
                    found[number.name] = listed(MEASURES[number.measure](model, **number.inputs))
            for inputs, numbers in list(pictures.items()):
                try:
                    before = made.get(inputs)
                    made[inputs] = picture_part(stage, model, before, numbers[0], weights.config)
                except DivergedError as error:
                    facts += [Fact(number.name, str(error), wrong=True) for number in numbers]
                    del pictures[inputs]
        del model  # before the next is read
    for inputs, numbers in pictures.items():
        found |= {number.name: listed(made[inputs]) for number in numbers}
    return found, tuple(facts)


def listed(numbers: Tensor) -> tuple[float, ...]:
    """(N,) on any device -> N numbers of Python."""
    return tuple(numbers.double().cpu().tolist())


def picture_part(
    stage: str, model: nn.Module, before: Tensor | None, number: Published, config: ModelConfig
) -> Tensor:
    """What a stage does of a whole picture, with what the stage before it made."""
    inputs = dict(number.inputs)
    words = inputs.pop("words")
    if stage == "text":
        return picture_contexts(model, words)  # type: ignore[arg-type]
    assert before is not None
    if stage == "vae":
        return picture_corner(model, before)  # type: ignore[arg-type]
    side = config.image_size // config.vae.factor
    schedule = NoiseSchedule(config.schedule)
    return picture_latents(model, before, schedule, side=side, **inputs)  # type: ignore[arg-type]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within it a GPU keeps all 23 bits of float32: TensorFloat-32, which convolutions have by
    default, keeps 10, which is less than was published."""
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


# --- Comparing -------------------------------------------------------------------------------


def compared(number: Published, measured: tuple[float, ...] | None) -> Row:
    """The row of a published number."""
    row = Row(
        stage=number.stage,
        verdict=NOT_MEASURED,
        told=number.told,
        name=number.name,
        published=number.values,
        atol=number.atol,
        source=number.where,
    )
    if measured is None:
        return row
    error = largest_difference(measured, number.values)
    verdict = AGREES if error <= number.atol else DIFFERS  # NaN is not within it
    return Row(**vars(row) | {"measured": measured, "error": error, "verdict": verdict})


def largest_difference(measured: Sequence[float], wanted: Sequence[float]) -> float:
    """Infinite where there are not as many numbers; NaN where one is."""
    if len(measured) != len(wanted):
        return float("inf")
    difference = torch.tensor(measured).double() - torch.tensor(wanted).double()
    return difference.abs().max().item()


def version_by_numbers(wanted: Sequence[Published], found: Found) -> str | None:
    """The version that a UNet's number is about, if one agrees and is about one version alone."""
    agreeing = {
        number.of
        for number in wanted
        if number.stage == "unet" and compared(number, found.get(number.name)).verdict == AGREES
    }
    of = agreeing.pop() if len(agreeing) == 1 else ()
    return of[0] if len(of) == 1 else None


def rows_without(
    known: Sequence[Published],
    rows: Sequence[Row],
    stages: Sequence[str],
    version: str | None,
    picture: bool,
) -> list[Row]:
    """What is to be said of each stage that has no row: it is not there, was not asked for, or has
    no published number."""
    without = []
    for stage in (*ORDER, PICTURE):
        if any(row.stage == stage for row in rows):
            continue
        whole = len(stages) == len(ORDER)
        about = [one for one in known if one.stage == stage and version in (None, *one.of)]
        if stage not in stages and not (stage == PICTURE and whole):
            told = "a picture takes all three stages" if stage == PICTURE else ""
            without.append(Row(stage, NOT_THERE, told))
        elif not about:
            told = f"nobody that is known here published one for {version}"
            without.append(Row(stage, NOT_PUBLISHED, told))
        elif not picture:
            without.append(Row(stage, NOT_DRAWN, "--picture draws it, in minutes"))
    return without
