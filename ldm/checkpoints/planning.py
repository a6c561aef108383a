"""The third step: which tensor of a file becomes which parameter of a stage.

Planning is strict: every key is used, or known not to matter, or the error says which one it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from torch import nn

from ldm.checkpoints.diffusers.names import PART_OF
from ldm.checkpoints.entries import Entry
from ldm.checkpoints.keys import PREFIXES, key_map, unet_names, vae_names
from ldm.checkpoints.recognise import Weights
from ldm.checkpoints.spellings import ema_name, is_expendable
from ldm.checkpoints.stages import STAGES, empty_stage
from ldm.config import ModelConfig
from ldm.errors import DtypeError, KeysError, MissingPartsError, ShapeError, some

Ema: TypeAlias = Literal["auto"] | bool


@dataclass(frozen=True)
class Place:
    """Where a weight lies: under which key, and what is there."""

    key: str
    entry: Entry


@dataclass(frozen=True, repr=False)
class Plan:
    """How a stage is to be filled. Whatever can be wrong but the numbers themselves was checked.

    Attributes:
        stage: "unet", "vae" or "text".
        weights: what it is filled from.
        places: our key -> where that weight lies, for every weight.
        ema: whether those are the running means.
        model: the stage, without memory yet. It was built to be compared with the file, and is
            filled in the end: to build it takes a fifth of the time that loading takes.
    """

    stage: str
    weights: Weights
    places: Mapping[str, Place]
    ema: bool
    model: nn.Module = field(compare=False)

    @property
    def path(self) -> Path:
        return self.weights.path

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    def __repr__(self) -> str:
        """One line: what is taken from where. For each weight, see `places`."""
        size = sum(place.entry.span for place in self.places.values())
        means = ", the running means" if self.ema else ""
        told = f"{self.stage} of {self.config.name} from {self.path}"
        return f"Plan({told}: {len(self.places)} weights of {size:,} bytes{means})"


def plan(weights: Weights, stage: str, ema: Ema = "auto") -> Plan:
    """Find every weight of one stage.

    Args:
        ema: whether to take the running mean of the UNet's weights (LDM's training keeps one)
            rather than the weights themselves; "auto" takes it where the file has all of it.

    Raises:
        KeysError, ShapeError, DtypeError: one line names the keys that do not fit.
        MissingPartsError: EMA weights are asked for that are not there.
        ValueError: there is no such stage, or `ema` is none of the three.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}: there are {', '.join(STAGES)}")
    if not (ema == "auto" or isinstance(ema, bool)):
        raise ValueError(f"ema must be 'auto', True or False, not {ema!r}")
    entries, config = weights.entries, weights.config
    check_blocks(weights, stage)
    model = empty_stage(stage, config)
    official = key_map(model)
    from_ema = stage == "unet" and takes_ema(weights, official.values(), ema)
    names = {ours: ema_name(k) if from_ema else k for ours, k in official.items()}
    places = {ours: Place(key, entries[key]) for ours, key in names.items() if key in entries}
    shapes = {ours: tuple(value.shape) for ours, value in model.state_dict().items()}
    mine = (PREFIXES[stage], f"{PART_OF[stage]}/")  # a diffusers folder's unknown keys
    unexpected = entries.keys() - set(official.values())
    problems: dict[tuple[str, type[KeysError]], list[str]] = {
        ("missing", KeysError): [key for ours, key in names.items() if ours not in places],
        ("unexpected", KeysError): [
            key for key in unexpected if key.startswith(mine) and not is_expendable(key)
        ],
        ("wrongly shaped", ShapeError): [
            f"{place.key} (found {list(place.entry.shape)}, expected {list(shapes[ours])})"
            for ours, place in places.items()
            if not same_shape(place.entry.shape, shapes[ours])
        ],
        ("not floating-point numbers", DtypeError): [
            f"{place.key} ({str(place.entry.dtype).removeprefix('torch.')})"
            for place in places.values()
            if not place.entry.dtype.is_floating_point
        ],
    }
    found = {kind: sorted(keys) for kind, keys in problems.items() if keys}
    if found:
        told = "; ".join(f"{what}: {some(keys)}" for (what, _), keys in found.items())
        errors = {error for _, error in found}
        error = errors.pop() if len(errors) == 1 else KeysError
        raise error(f"{weights.path} does not fit the model; {told}")
    return Plan(stage, weights, places, from_ema, model)


def check_blocks(weights: Weights, stage: str) -> None:
    """A KeysError if most blocks of a stage are missing. A stage is built to be compared with a
    file, and the config may ask for hundreds of blocks that the file does not have: this is told
    by names alone, before."""
    entries, config = weights.entries, weights.config
    wanted = block_keys(stage, config)
    missing = [key for key in wanted if not entries.keys() & {key, ema_name(key)}]
    if 2 * len(missing) > len(wanted):
        found = f"{len(wanted) - len(missing)} of the {len(wanted)} blocks"
        raise KeysError(
            f"{weights.path} holds {found} that the {stage} of {config.name} has; "
            f"missing: {some(missing)}"
        )


def block_keys(stage: str, config: ModelConfig) -> list[str]:
    """The official key of one weight of each block of a stage."""
    if stage == "text":
        layers = [f"encoder.layers.{n}.mlp.fc1" for n in range(config.text.num_layers)]
    else:
        names = unet_names(config.unet) if stage == "unet" else vae_names(config.vae)
        layers = [theirs for ours, theirs in names.items() if ours.endswith(".conv1")]
    return [f"{PREFIXES[stage]}{layer}.weight" for layer in layers]


def same_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether two shapes agree but for ones at the end: a 1x1 convolution is a linear layer, and
    files hold the autoencoder's attention as either."""
    ones = (1,) * (len(expected) - len(found))
    return found + ones == expected


def takes_ema(weights: Weights, official: Iterable[str], ema: Ema) -> bool:
    """Whether the running means of the weights are to be loaded in their place.

    Raises:
        MissingPartsError: they were asked for, and are not (or not all) there.
    """
    needed = {ema_name(key) for key in official}
    missing = sorted(needed - weights.entries.keys())
    if ema is True and missing:
        count = len(needed) - len(missing)
        which = f"; missing: {some(missing)}" if count else ""
        raise MissingPartsError(
            f"{weights.path} has {count} of {len(needed)} EMA weights: leave ema at 'auto'{which}"
        )
    return ema is not False and not missing
