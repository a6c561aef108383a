"""All steps in a row: some stages of a file, or a whole model of one file or of several.

path -> open_archive -> recognise -> plan -> fill -> a stage
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoints.filling import fill
from ldm.checkpoints.folders import find_parts
from ldm.checkpoints.keys import PREFIXES
from ldm.checkpoints.noise import objection, told
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.planning import Ema, Plan, plan
from ldm.checkpoints.recognise import Weights, recognise
from ldm.checkpoints.spellings import ignored_in, is_expendable, stages_in
from ldm.checkpoints.stages import STAGES
from ldm.checkpoints.tokenizer_files import find_tokenizer
from ldm.config import ModelConfig
from ldm.device import check_device, check_dtype
from ldm.errors import ConfigError, FamilyError, KeysError, MissingPartsError, printable, some
from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

# --- Some stages -------------------------------------------------------------------------------


def load_unet(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
    ema: Ema = "auto",
    check: bool = True,
    trainable: bool = False,
) -> UNet:
    """The UNet of a checkpoint, alone. See `load_stages` for arguments and errors."""
    (unet,) = load_stages(
        path,
        ("unet",),
        device=device,
        dtype=dtype,
        config=config,
        ema=ema,
        check=check,
        trainable=trainable,
    )
    assert isinstance(unet, UNet)
    return unet


def load_vae(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
    check: bool = True,
    trainable: bool = False,
) -> AutoencoderKL:
    """The autoencoder of a checkpoint, alone. See `load_stages` for arguments and errors."""
    (vae,) = load_stages(
        path,
        ("vae",),
        device=device,
        dtype=dtype,
        config=config,
        check=check,
        trainable=trainable,
    )
    assert isinstance(vae, AutoencoderKL)
    return vae


def load_text_encoder(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
    check: bool = True,
    trainable: bool = False,
) -> CLIPTextEncoder:
    """The text encoder of a checkpoint, alone, with its tokenizer if that is on this machine. See
    `load_stages` for arguments and errors."""
    (text,) = load_stages(
        path,
        ("text",),
        device=device,
        dtype=dtype,
        config=config,
        check=check,
        trainable=trainable,
    )
    assert isinstance(text, CLIPTextEncoder)
    return text


def load_stages(
    path: str | Path,
    stages: Sequence[str] = STAGES,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
    ema: Ema = "auto",
    check: bool = True,
    trainable: bool = False,
) -> tuple[nn.Module, ...]:
    """Some stages of a file, which may lack the others.

    Args:
        path, config: as `open_archive` and `recognise` take them.
        stages: any of "unet", "vae", "text".
        ema: as `plan` takes it.
        device, dtype, check, trainable: as `fill` takes them. Stages come for drawing, without
            gradients, unless they are to be trained.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: the file cannot be read, or does not fit; see `ldm.errors`.
        ValueError: an argument is out of its range, or the tokenizer found is another model's.
    """
    device, dtype = check_device(device), check_dtype(dtype)
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"no stage {unknown.pop()!r}: there are {', '.join(STAGES)}")
    weights = recognise(open_archive(path), config)
    config = weights.config
    plans = plan_stages(dict.fromkeys(stages, weights), ema)
    tokenizer = find_tokenizer(weights.path, config.text.vocab_size) if "text" in plans else None
    return tuple(fill(plan, device, dtype, check, tokenizer, trainable) for plan in plans.values())


# --- A whole model, of one file or of several --------------------------------------------------


def open_model(
    path: str | Path,
    config: ModelConfig | None = None,
    *,
    vae: str | Path | None = None,
    text: str | Path | None = None,
    prediction: str | None = None,
) -> dict[str, Weights]:
    """The weights of each stage of a whole model: all in one place, or the autoencoder and the text
    encoder elsewhere. Arguments and errors as those of `open_archive` and `recognise`."""
    main = recognise(open_archive(path), config, prediction=prediction)
    sources = dict.fromkeys(STAGES, main)
    for stage, other in {"vae": vae, "text": text}.items():
        if other is not None:
            sources[stage] = recognise(open_archive(other), config, default=main.config)
    return sources


def joint_config(sources: Mapping[str, Weights]) -> ModelConfig:
    """The config of a whole model, each stage's from its own weights.

    Raises:
        ConfigError: the stages do not belong together.
    """
    unet, vae, text = (sources[stage].config for stage in STAGES)
    if vae.vae.latent_channels != unet.unet.out_channels:
        raise ConfigError(
            f"{sources['vae'].path} makes latents of {vae.vae.latent_channels} channels, "
            f"the unet of {sources['unet'].path} reads {unet.unet.out_channels}"
        )
    if text.text.hidden_size != unet.unet.context_dim:
        raise ConfigError(
            f"{sources['text'].path} makes text states of width {text.text.hidden_size}, "
            f"the unet of {sources['unet'].path} reads {unet.unet.context_dim}"
        )
    return dataclasses.replace(unet, vae=vae.vae, text=text.text)


def plan_stages(sources: Mapping[str, Weights], ema: Ema = "auto") -> dict[str, Plan]:
    """Find every weight of the stages that `sources` names, each in its own file.

    Raises:
        CheckpointError, ValueError: as in `load_stages`.
    """
    check_sources(sources)
    return {stage: plan(weights, stage, ema) for stage, weights in sources.items()}


def check_sources(sources: Mapping[str, Weights]) -> None:
    """What can be wrong before a single weight is looked for.

    Raises:
        CheckpointError: as `plan_stages`.
    """
    check_present(sources)
    if "unet" in sources and (wrong := objection(sources["unet"].predictions)):
        raise FamilyError(f"{sources['unet'].path} {wrong}")
    if len(sources) == len(STAGES):  # a whole model answers for all that is in its files
        joint_config(sources)
        for weights in sources.values():
            check_strays(weights)


def check_present(sources: Mapping[str, Weights]) -> None:
    """A MissingPartsError that names the stages of which a file has nothing, what it has, and what
    to do."""
    for weights in sources.values():
        there = stages_in(weights.entries)
        wanted = [stage for stage, source in sources.items() if source is weights]
        absent = [stage for stage in wanted if stage not in there]
        if not absent:
            continue
        if not there:
            raise MissingPartsError(f"{weights.path} holds no stage of a model that ldm knows")
        found, lacking = " and ".join(there), " and no ".join(absent)
        line = f"{weights.path} holds {found} only: there is no {lacking} in it"
        if len(sources) < len(STAGES):
            raise MissingPartsError(line)
        folder = weights.path.resolve().parent
        if "" in weights.archive.parts and len(find_parts(folder)) > 1:
            raise MissingPartsError(f"{line}: it is one part of a diffusers folder; pass {folder}")
        if "unet" in absent:
            raise MissingPartsError(f"{line}; load a file with a unet, and pass this one beside it")
        options = " and ".join(f"{stage}=" for stage in absent)
        raise MissingPartsError(f"{line}; pass {options}: a file or folder with it")


def check_strays(weights: Weights) -> None:
    """A KeysError for keys that belong to no stage and are not known not to matter."""
    known = tuple(PREFIXES.values())
    keys = sorted(key for key in weights.entries if not key.startswith(known))
    strays = [key for key in keys if not is_expendable(key)]
    if strays:
        raise KeysError(f"{weights.path} does not fit the model; unexpected: {some(strays)}")


@dataclass(frozen=True)
class Origin:
    """Where a model's weights came from.

    Attributes:
        paths: stage -> its file or folder.
        container: of the UNet's.
        ema: whether the UNet's weights are the running mean of those that were trained.
        schedule: what is to be said of the noise schedule; empty where it is the config's.
        predictions: what the UNet predicts, by each who says so.
        ignored: what else the files hold and is known not to matter: first word of keys -> number.
        stubs: the globals that a pickle named; none was called.
    """

    paths: Mapping[str, Path]
    container: str
    ema: bool
    schedule: str
    predictions: Mapping[str, str]
    ignored: Mapping[str, int]
    stubs: tuple[str, ...]

    def __str__(self) -> str:
        """One line for people."""
        main = self.paths["unet"]
        facts = [self.container]
        if self.ema:
            facts.append("EMA weights")
        if self.schedule:
            facts.append(self.schedule)
        if self.predictions:
            facts.append(told(self.predictions))
        facts += [f"{stage} from {path}" for stage, path in self.paths.items() if path != main]
        if self.ignored:
            ignored = [f"{count} of {name}" for name, count in self.ignored.items()]
            facts.append(f"ignored: {some(ignored)}")
        if self.stubs:
            facts.append(f"not called: {some(self.stubs)}")
        return printable(f"{main} ({'; '.join(facts)})")


def origin(plans: Mapping[str, Plan]) -> Origin:
    """Where a whole model comes from."""
    archives = {id(p.weights.archive): p.weights.archive for p in plans.values()}.values()
    keys = {key for plan in plans.values() for key in plan.weights.entries}
    taken = {place.key for plan in plans.values() for place in plan.places.values()}
    return Origin(
        paths={stage: plan.weights.path for stage, plan in plans.items()},
        container=plans["unet"].weights.archive.container,
        ema=plans["unet"].ema,
        schedule=plans["unet"].weights.schedule,
        predictions=plans["unet"].weights.predictions,
        ignored=ignored_in(keys - taken),
        stubs=tuple(dict.fromkeys(stub for archive in archives for stub in archive.stubs)),
    )
