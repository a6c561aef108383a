"""What is in a file of weights: told without loading a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoints.diffusers.names import text_layers
from ldm.checkpoints.entries import Archive, Entry
from ldm.checkpoints.families import known_config, other_family
from ldm.checkpoints.keys import PREFIXES, unet_names, vae_names
from ldm.checkpoints.loading import check_sources
from ldm.checkpoints.noise import told
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.planning import check_blocks, plan
from ldm.checkpoints.recognise import Weights, official_entries, own_config, understood
from ldm.checkpoints.spellings import EMA, ema_name, ignored_in, is_expendable, stages_in
from ldm.checkpoints.stages import STAGES
from ldm.config import (
    OFFICIAL,
    SD_V1,
    SD_V1_INPAINTING,
    SD_V1_PIX2PIX,
    SD_V2,
    SD_V2_768,
    ModelConfig,
    TextConfig,
)
from ldm.errors import CheckpointError, DtypeError, KeysError, ShapeError, printable, some
from ldm.files import file_sha256


@dataclass(frozen=True)
class Inspection:
    """A file or a folder of weights, from outside.

    Attributes:
        path, size: where, and how many bytes in all.
        container: as `ldm.checkpoints.entries.Archive` has it: "safetensors", say.
        family: "Stable Diffusion v1", "Stable Diffusion 2", the name in the file's own config, or
            what else it is.
        loads: whether ldm loads all stages that are there, as they are; what is wrong with single
            numbers is only found out by loading.
        refused: the line that says why not; empty if it loads.
        known_as: names of published files that it has the size (or the hash) of.
        schedule: what is to be said of the noise schedule; empty where the file has no other than
            its config.
        prediction: what the UNet predicts and who says so, in words; empty where nobody does.
        stages: stage -> number of keys, of the stages that are there; missing: those that are not.
        dtypes: type -> number of tensors that belong to a stage.
        ema: number of keys in a second set of weights, their running mean.
        takes_ema: whether that set is whole, so that loading takes it by default.
        ignored: what else is there and known not to matter: first word of the keys -> number.
        unknown: keys that belong to nothing, sorted.
        stubs: what a pickle asked for and was not given, in order: none of it was called.
        sha256: file -> its hash, where that was asked for; empty otherwise.
    """

    path: str
    size: int
    container: str
    family: str
    loads: bool
    refused: str
    known_as: tuple[str, ...]
    schedule: str
    prediction: str
    stages: dict[str, int]
    missing: tuple[str, ...]
    dtypes: dict[str, int]
    ema: int
    takes_ema: bool
    ignored: dict[str, int]
    unknown: tuple[str, ...]
    stubs: tuple[str, ...]
    sha256: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def __str__(self) -> str:
        """For people: a line per fact."""
        stages = [f"{stage}: {counted(n, 'key')}" for stage, n in self.stages.items()]
        use = "loaded by default" if self.takes_ema else "not a whole set: not loaded"
        facts = {
            "path": self.path,
            "size": f"{self.size:,} bytes",
            "container": self.container,
            "family": self.family,
            "refused": self.refused,
            "known as": " or ".join(self.known_as),
            "schedule": self.schedule,
            "prediction": self.prediction,
            "stages": ", ".join(stages) or "none",
            "missing": ", ".join(self.missing),
            "dtypes": ", ".join(
                f"{name}: {counted(n, 'tensor')}" for name, n in self.dtypes.items()
            ),
            "EMA weights": f"{counted(self.ema, 'key')}, {use}" if self.ema else "none",
            "ignored": some([f"{name}: {counted(n, 'key')}" for name, n in self.ignored.items()]),
            "unknown": some(self.unknown),
            "not called": some(self.stubs),
        }
        lines = [(name, told) for name, told in facts.items() if told]
        lines += zip(["sha256", *[""] * len(self.sha256)], self.told_hashes(), strict=False)
        return "\n".join(printable(f"{name:>12}  {told}") for name, told in lines)

    def told_hashes(self) -> list[str]:
        """The hashes; of several files, each with its name."""
        alone = len(self.sha256) == 1
        return [sha256 if alone else f"{sha256}  {file}" for file, sha256 in self.sha256.items()]


def counted(number: int, thing: str) -> str:
    """A number of things, in words: 1 key, 2 keys."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def inspect(path: str | Path, *, sha256: bool = False) -> Inspection:
    """What is in a file or a folder of weights. No tensor is read; the hash, on request, reads all.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: it is no file of weights, or a damaged one; see `ldm.errors`.
    """
    archive = open_archive(path)
    config = own_config(archive)
    entries = official_entries(archive, config)
    refused, schedule, prediction = refusal(archive, entries, config)
    family, config = family_of(entries, config)
    unknown = unknown_keys(entries, config)
    weights = {k: e for k, e in entries.items() if k not in unknown and not is_expendable(k)}
    stages = stages_in(weights)
    ema = {key for key in entries if key.startswith(EMA)}
    unet = {ema_name(key) for key in weights if key.startswith(PREFIXES["unet"])}
    files = sorted({entry.file.path for entry in entries.values()})
    sizes = {file: file.stat().st_size for file in files or [archive.path]}
    hashes = {file: file_sha256(file) for file in sizes} if sha256 else {}
    return Inspection(
        path=str(archive.path),
        size=sum(sizes.values()),
        container=archive.container,
        family=family,
        loads=not refused,
        refused=refused,
        known_as=known_as(sizes, hashes),
        schedule=schedule,
        prediction=prediction,
        stages=stages,
        missing=tuple(stage for stage in STAGES if stage not in stages),
        dtypes=dict(
            Counter(str(e.dtype).removeprefix("torch.") for e in weights.values()).most_common()
        ),
        ema=len(ema),
        takes_ema=bool(unet) and unet <= ema,
        ignored=ignored_in(entries.keys() - ema),
        unknown=tuple(sorted(unknown)),
        stubs=archive.stubs,
        sha256={str(file): sha256 for file, sha256 in hashes.items()},
    )


def refusal(
    archive: Archive, entries: Mapping[str, Entry], config: ModelConfig | None
) -> tuple[str, str, str]:
    """The line with which loading what is there would be refused, or nothing; and what is to be
    said of the noise schedule, and of the prediction."""
    schedule = prediction = ""
    try:
        weights = understood(archive, entries, config)
        schedule, prediction = weights.schedule, told(weights.predictions)
        stages = list(stages_in(k for k in entries if not is_expendable(k))) or STAGES
        check_sources(dict.fromkeys(stages, weights))
        for stage in stages:
            if stage == "text":
                check_text(weights)
            else:
                plan(weights, stage)
    except CheckpointError as error:
        return str(error), schedule, prediction
    return "", schedule, prediction


def check_text(weights: Weights) -> None:
    """What `plan` says of a text encoder, by what its layers are called and how large they are: to
    build one takes transformers, which takes longer to import than all else.

    Raises:
        KeysError, ShapeError, DtypeError: a weight is missing, or is not what it must be.
    """
    check_blocks(weights, "text")
    shapes = {
        PREFIXES["text"] + key: shape for key, shape in text_shapes(weights.config.text).items()
    }
    told = f"{weights.path} does not fit the model; "
    found = {key: entry for key, entry in weights.entries.items() if key in shapes}
    if missing := sorted(shapes.keys() - found.keys()):
        raise KeysError(f"{told}missing: {some(missing)}")
    if odd := sorted(key for key, entry in found.items() if entry.shape != shapes[key]):
        raise ShapeError(f"{told}wrongly shaped: {some(odd)}")
    if odd := sorted(k for k, entry in found.items() if not entry.dtype.is_floating_point):
        raise DtypeError(f"{told}not floating-point numbers: {some(odd)}")
    text = {key for key in weights.entries if key.startswith(PREFIXES["text"])}
    if odd := sorted(key for key in text - shapes.keys() if not is_expendable(key)):
        raise KeysError(f"{told}unexpected: {some(odd)}")


def text_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """The weights of a text encoder, as transformers calls them, and their shapes."""
    width, mlp = config.hidden_size, config.mlp_size
    others = {
        "token_embedding": (config.vocab_size, width),
        "position_embedding": (config.max_length, width),
        "fc1": (mlp, width),
        "fc2": (width, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in text_layers(config):
        name = layer.rpartition(".")[2]
        shape = others.get(name, (width, width) if name.endswith("_proj") else (width,))
        shapes[f"{layer}.weight"] = shape
        if not name.endswith("_embedding"):
            shapes[f"{layer}.bias"] = shape[:1]
    return shapes


FAMILIES = {
    SD_V1.name: "Stable Diffusion v1",
    SD_V2.name: "Stable Diffusion 2",
    SD_V2_768.name: "Stable Diffusion 2 (768)",
    SD_V1_INPAINTING.name: "Stable Diffusion v1, inpainting",
    SD_V1_PIX2PIX.name: "Stable Diffusion v1, instruct-pix2pix",
}


def family_of(
    entries: Mapping[str, Entry], config: ModelConfig | None
) -> tuple[str, ModelConfig | None]:
    """The name of the kind of model, and its config where that is known."""
    if other := other_family(entries, config):
        return other, None
    if config is not None and config not in OFFICIAL:
        return config.name, config
    found = config or known_config(entries)
    if found is not None:
        return FAMILIES[found.name], found
    if stages_in(entries):
        return "of another width than Stable Diffusion 1 or 2", None
    return "unknown", None


def unknown_keys(entries: Mapping[str, Entry], config: ModelConfig | None) -> set[str]:
    """The keys that belong to no stage or, where there is a config, to no layer of one."""
    layers = {
        stage: official_layers(stage, config) for stage in stages_in(entries) if config is not None
    }

    def is_known(key: str) -> bool:
        for stage, prefix in PREFIXES.items():
            if key.startswith(prefix) and not is_expendable(key):
                layer = key.removeprefix(prefix).rpartition(".")[0]
                return stage not in layers or layer in layers[stage]
        return is_expendable(key)

    return {key for key in entries if not is_known(key)}


def official_layers(stage: str, config: ModelConfig) -> set[str]:
    """The layers that a stage can have."""
    if stage == "unet":
        return set(unet_names(config.unet).values())
    if stage == "vae":
        return set(vae_names(config.vae).values())
    return set(text_layers(config.text))


def known_as(sizes: Mapping[Path, int], hashes: Mapping[Path, str]) -> tuple[str, ...]:
    """The published files that a file may be; none is a folder of several."""
    if len(sizes) != 1:
        return ()
    ((file, size),) = sizes.items()
    from ldm.checkpoints.download import identify

    return tuple(known.model for known in identify(size, hashes.get(file)))
