"""Weights on disk: any file of Stable Diffusion v1 that a user has, read safely, exactly and lean.

    a file ── archive.py: which tensors, and where ── recognise.py: by which official names ──
    keys.py: by our names ── each goes into a model that had no memory until then

Loading is strict: every key is used, or known not to matter, or the error says which one it was.
Nothing in a file is ever executed, and what is not asked for is not read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints.archive import Archive, Entry, open_archive
from ldm.config import SD_V1, ModelConfig
from ldm.device import check_device, check_dtype
from ldm.checkpoints.diffusers_layout import FOLDERS, is_diffusers_folder, read_folder
from ldm.errors import (
    ConfigError,
    DtypeError,
    FamilyError,
    HalfOverflowError,
    KeysError,
    MissingPartsError,
    NonFiniteError,
    ShapeError,
    UnreadableError,
    some,
)
from ldm.files import written_whole
from ldm.checkpoints.keys import POSITION_IDS, PREFIXES, computed_entries, key_map, schedule_entries
from ldm.speed.memory import release
from ldm.checkpoints.recognise import (
    ema_name,
    ignored_in,
    is_ignored,
    is_sd_v1,
    official_name,
    other_family,
    stages_in,
)
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.tokenizer import find as find_tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

Ema: TypeAlias = Literal["auto"] | bool
FindTokenizer: TypeAlias = Callable[[Path, int], Tokenizer | None]
STAGES = ("unet", "vae", "text")


# --- One stage ---------------------------------------------------------------------------------


def load_unet(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
    ema: Ema = "auto",
    check: bool = True,
) -> UNet:
    """The UNet of a checkpoint, alone. See `load_stages` for arguments and errors."""
    (unet,) = load_stages(
        path, ("unet",), device=device, dtype=dtype, config=config, ema=ema, check=check
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
) -> AutoencoderKL:
    """The autoencoder of a checkpoint, alone. See `load_stages` for arguments and errors."""
    (vae,) = load_stages(path, ("vae",), device=device, dtype=dtype, config=config, check=check)
    assert isinstance(vae, AutoencoderKL)
    return vae


def load_text_encoder(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
    check: bool = True,
) -> CLIPTextEncoder:
    """The text encoder of a checkpoint, alone, with its tokenizer if that is on this machine. See
    `load_stages` for arguments and errors."""
    (text,) = load_stages(path, ("text",), device=device, dtype=dtype, config=config, check=check)
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
) -> tuple[nn.Module, ...]:
    """Some stages of a file, which may lack the others.

    On a CPU, weights that are stored as they are asked for stay on the mapped file: they cost no
    copy, and the file may be replaced, but not written into, while the model lives.

    Args:
        path, config: as `open_weights` takes them.
        stages: any of "unet", "vae", "text".
        device, dtype: where the weights go, and as what.
        ema: whether to take the running mean of the UNet's weights (LDM's training keeps one)
            rather than the weights themselves; "auto" takes it where the file has all of it.
        check: look at every number now, so that NaN or infinity is an error here and not a black
            picture; False leaves what need not change unread until the model runs.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: the file cannot be read, or does not fit; see `ldm.errors`.
        ValueError: an argument is out of its range, or the tokenizer found is another model's.
    """
    device, dtype = check_device(device), check_dtype(dtype)
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"no stage {unknown.pop()!r}: there are {', '.join(STAGES)}")
    plans = plan_stages(dict.fromkeys(stages, open_weights(path, config)), ema)
    return tuple(fill(plan, device, dtype, check) for plan in plans.values())


# --- Opening -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A file or a folder of weights, opened: nothing is read yet.

    Attributes:
        archive: what it holds, by its own keys.
        entries: the same, by official keys.
        config: of the model that it belongs to.
    """

    archive: Archive
    entries: Mapping[str, Entry]
    config: ModelConfig

    @property
    def path(self) -> Path:
        return self.archive.path


def open_weights(
    path: str | Path, config: ModelConfig | None = None, default: ModelConfig | None = None
) -> Weights:
    """Open a file or a folder of weights, whatever its container.

    Args:
        path: a safetensors file, a pickle of torch's, a diffusers folder, or a folder that holds
            one file of weights.
        config: the model's. Without it the file's own counts, then `default`, and then Stable
            Diffusion v1's, if the weights have its width.

    Raises:
        FileNotFoundError: nothing is there.
        UnreadableError: it is no file of weights, or a damaged one.
        FamilyError: it is another kind of model.
        ConfigError: there is no config for it.
    """
    archive, stored = open_any(path)
    entries = official_entries(archive)
    config = config or stored or default
    if other := other_family(entries, config or SD_V1):
        raise FamilyError(f"{archive.path} is {other}; ldm loads Stable Diffusion v1 models")
    if config is None and stages_in(entries) and not is_sd_v1(entries):
        raise ConfigError(
            f"{archive.path} is not as wide as Stable Diffusion v1, and brings no config: "
            "pass its config"
        )
    return Weights(archive, entries, config or SD_V1)


def open_any(path: str | Path) -> tuple[Archive, ModelConfig | None]:
    """What a file or a folder holds, of whatever family, and the config that it brings, if any."""
    path = Path(path)
    if path.is_dir() and is_diffusers_folder(path):
        return read_folder(path)
    archive = open_archive(find_file(path))
    text = archive.metadata.get("ldm")
    return archive, None if text is None else config_from_json(text, archive.path)


def find_file(path: str | Path) -> Path:
    """The file of weights that a path means: itself, or the only one in this folder."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        files = [file for file in files if file.name == "model.safetensors"] or files
        if not files:
            needed = ", ".join(f"{folder}/" for folder in FOLDERS.values())
            raise MissingPartsError(
                f"{path} holds no weights: neither a file of them nor a diffusers folder's {needed}"
            )
        if len(files) > 1:
            names = some([file.name for file in files])
            raise MissingPartsError(f"{path} holds several files of weights: pass one of {names}")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    return path


SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # to find a file by, not to read it by


def official_entries(archive: Archive) -> dict[str, Entry]:
    """The tensors of an archive by official keys; a key that has none keeps its own.

    Raises:
        KeysError: two keys mean one weight.
    """
    entries: dict[str, Entry] = {}
    for key, entry in archive.entries.items():
        if entries.setdefault(official_name(key), entry) is not entry:
            raise KeysError(f"{archive.path} holds {some([official_name(key)])} under two names")
    return entries


# --- A whole model, of one file or of several --------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a model's weights came from.

    Attributes:
        paths: stage -> its file or folder.
        container: of the UNet's.
        ema: whether the UNet's weights are the running mean of those that were trained.
        ignored: what else the files hold and is known not to matter: first word of keys -> number.
        stubs: the globals that a pickle named; none was called.
    """

    paths: Mapping[str, Path]
    container: str
    ema: bool
    ignored: Mapping[str, int]
    stubs: tuple[str, ...]

    def __str__(self) -> str:
        """One line for people."""
        main = self.paths["unet"]
        facts = [self.container]
        if self.ema:
            facts.append("EMA weights")
        facts += [f"{stage} from {path}" for stage, path in self.paths.items() if path != main]
        if self.ignored:
            ignored = [f"{count} of {name}" for name, count in self.ignored.items()]
            facts.append(f"ignored: {some(ignored)}")
        if self.stubs:
            facts.append(f"not called: {some(self.stubs)}")
        return f"{main} ({'; '.join(facts)})"


def open_model(
    path: str | Path,
    config: ModelConfig | None = None,
    *,
    vae: str | Path | None = None,
    text: str | Path | None = None,
) -> dict[str, Weights]:
    """The weights of each stage of a whole model: all in one place, or the autoencoder and the text
    encoder elsewhere. Arguments and errors as in `open_weights`."""
    main = open_weights(path, config)
    sources = dict.fromkeys(STAGES, main)
    for stage, other in {"vae": vae, "text": text}.items():
        if other is not None:
            sources[stage] = open_weights(other, config, default=main.config)
    return sources


def joint_config(sources: Mapping[str, Weights]) -> ModelConfig:
    """The config of a whole model, each stage's from its own weights.

    Raises:
        ConfigError: the stages do not belong together.
    """
    unet, vae, text = (sources[stage].config for stage in STAGES)
    if vae.vae.latent_channels != unet.unet.in_channels:
        raise ConfigError(
            f"{sources['vae'].path} makes latents of {vae.vae.latent_channels} channels, "
            f"the unet of {sources['unet'].path} reads {unet.unet.in_channels}"
        )
    if text.text.hidden_size != unet.unet.context_dim:
        raise ConfigError(
            f"{sources['text'].path} makes text states of width {text.text.hidden_size}, "
            f"the unet of {sources['unet'].path} reads {unet.unet.context_dim}"
        )
    return dataclasses.replace(unet, vae=vae.vae, text=text.text)


# --- Matching ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a weight lies: under which key, and what is there."""

    key: str
    entry: Entry


@dataclass(frozen=True)
class Plan:
    """How a stage is to be filled. Whatever can be wrong but the numbers themselves was checked.

    Attributes:
        weights: what it is filled from.
        model: the stage, without memory yet.
        places: our key -> where that weight lies, for every weight.
        ema: whether those are the running means.
    """

    weights: Weights
    model: nn.Module
    places: Mapping[str, Place]
    ema: bool


def plan_stages(
    sources: Mapping[str, Weights],
    ema: Ema = "auto",
    tokenizer: FindTokenizer = find_tokenizer,
) -> dict[str, Plan]:
    """Find every weight of the stages that `sources` names, each in its own file.

    Args:
        ema: as in `load_stages`.
        tokenizer: from the path of the text encoder's weights and its vocabulary's size.

    Raises:
        CheckpointError, ValueError: as in `load_stages`; and what `tokenizer` raises.
    """
    if not (ema == "auto" or isinstance(ema, bool)):
        raise ValueError(f"ema must be 'auto', True or False, not {ema!r}")
    check_present(sources)
    if len(sources) == len(STAGES):  # a whole model answers for all that is in its files
        joint_config(sources)
        for weights in sources.values():
            check_strays(weights)
    return {stage: plan(stage, weights, ema, tokenizer) for stage, weights in sources.items()}


def origin(plans: Mapping[str, Plan]) -> Origin:
    """Where a whole model comes from."""
    archives = {id(p.weights.archive): p.weights.archive for p in plans.values()}.values()
    taken = {place.key for plan in plans.values() for place in plan.places.values()}
    return Origin(
        paths={stage: plan.weights.path for stage, plan in plans.items()},
        container=plans["unet"].weights.archive.container,
        ema=plans["unet"].ema,
        ignored=ignored_in({key for archive in archives for key in archive.entries} - taken),
        stubs=tuple(dict.fromkeys(stub for archive in archives for stub in archive.stubs)),
    )


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


def is_expendable(key: str) -> bool:
    """Whether a model is whole without this key."""
    return key in computed_entries() or is_ignored(key)


def plan(stage: str, weights: Weights, ema: Ema, tokenizer: FindTokenizer) -> Plan:
    """Find every weight of one stage.

    Raises:
        KeysError, ShapeError, DtypeError: one line names the keys that do not fit.
        MissingPartsError: EMA weights are asked for that are not there.
        ConfigError: no model can be built from the config.
    """
    model = build_empty(stage, weights, tokenizer)
    official = key_map(model)
    from_ema = stage == "unet" and takes_ema(weights, official.values(), ema)
    names = {ours: ema_name(k) if from_ema else k for ours, k in official.items()}
    places = {
        ours: Place(key, weights.entries[key])
        for ours, key in names.items()
        if key in weights.entries
    }
    shapes = {ours: tuple(value.shape) for ours, value in model.state_dict().items()}
    mine = (PREFIXES[stage], f"{FOLDERS[stage]}/")  # a diffusers folder's unknown keys
    unexpected = weights.entries.keys() - set(official.values())
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
    return Plan(weights, model, places, from_ema)


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
    there = needed & weights.entries.keys()
    if ema is True and there != needed:
        raise MissingPartsError(
            f"{weights.path} has {len(there)} of {len(needed)} EMA weights: leave ema at 'auto'"
        )
    return ema is not False and there == needed


def build_empty(stage: str, weights: Weights, tokenizer: FindTokenizer) -> nn.Module:
    """A stage without memory or random numbers: the file has the values.

    Raises:
        KeysError: it would have more layers than the file has tensors.
        ConfigError: there is no such model.
    """
    config, path = weights.config, weights.path
    if too_small(weights.entries, stage, config):
        raise KeysError(
            f"{path} holds {len(weights.entries)} tensors: too few for the {stage} of {config.name}"
        )
    vocabulary = tokenizer(path, config.text.vocab_size) if stage == "text" else None
    try:
        with torch.device("meta"), Unfilled():
            return build_stage(stage, config, vocabulary)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"no {stage} can be built for {path}: {reason}") from error


class Unfilled(TorchFunctionMode):
    """Layers draw their initial weights when they are built: on the meta device too, where nothing
    is drawn and the calls alone take a fifth of a stage's time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return (kwargs or {})["tensor"]  # as it is
        return func(*args, **(kwargs or {}))


def too_small(entries: Mapping[str, Entry], stage: str, config: ModelConfig) -> bool:
    """Whether a file holds fewer tensors than a stage has. A damaged config may ask for millions
    of blocks, so this is asked before any is built; each has 8 tensors or more."""
    part = config.vae if stage == "vae" else config.unet
    if stage == "text":
        blocks = config.text.num_layers
    else:
        blocks = len(part.channel_mult) * part.num_res_blocks
    return 8 * blocks > len(entries)


def build_stage(stage: str, config: ModelConfig, tokenizer: Tokenizer | None = None) -> nn.Module:
    """A stage by its name, freshly initialised (or, under `torch.device("meta")`, empty)."""
    if stage == "unet":
        return UNet(config.unet)
    if stage == "vae":
        return AutoencoderKL(config.vae)
    return CLIPTextEncoder(config.text, tokenizer)


# --- Copying -----------------------------------------------------------------------------------

CHUNK = 1 << 20  # numbers that are copied at once: few enough to be checked while still in cache


def fill(plan: Plan, device: torch.device, dtype: torch.dtype, check: bool = True) -> nn.Module:
    """Give a stage its weights, in the order in which they lie on disk, and return it.

    Raises, with `check`:
        NonFiniteError: NaN or infinity is among them.
        HalfOverflowError: a value that only `dtype` cannot hold.
    """
    model, shapes = plan.model, {k: v.shape for k, v in plan.model.state_dict().items()}
    in_order = sorted(
        plan.places.items(), key=lambda item: (item[1].entry.file.path, item[1].entry.offset)
    )
    tensors = {
        ours: read(place, device, dtype, check).view(shapes[ours]) for ours, place in in_order
    }
    model.load_state_dict(tensors, strict=True, assign=True)
    if isinstance(model, CLIPTextEncoder):
        model.rebuild_buffers()
    return model.eval()


def read(place: Place, device: torch.device, dtype: torch.dtype, check: bool) -> Tensor:
    """A tensor of the file. What need not change stays where it is, on the mapped file: nothing is
    copied. All else gets memory of its own."""
    entry = place.entry
    is_plain = entry.stride is None and entry.offset % entry.dtype.itemsize == 0
    if device.type == "cpu" and entry.dtype == dtype and is_plain:
        mapped = entry.map()
        if check:
            check_finite(place, mapped, mapped)
            release(mapped)  # a stage takes memory when it runs, not before
        return mapped
    return copied(place, dtype, check).to(device)


def copied(place: Place, dtype: torch.dtype, check: bool) -> Tensor:
    """A tensor of the file in memory of its own, in another dtype: piece by piece, each checked
    while it is still in cache. At most one piece exists twice."""
    result = torch.empty(place.entry.shape, dtype=dtype)
    targets = result.view(-1).split(CHUNK)
    for target, source in zip(targets, place.entry.pieces(CHUNK), strict=True):
        target.copy_(source)
        if check:
            check_finite(place, source, target)
    return result


def check_finite(place: Place, source: Tensor, target: Tensor) -> None:
    """An error unless all numbers of the file, and all that became of them, are finite."""
    # A sum is the fastest look at every number. It may overflow on its own: then look again.
    if target.sum().isfinite():
        return
    stored, arrived = source.double(), target.double()
    where = f"{place.entry.file.path}: {place.key}"
    if not stored.isfinite().all():
        kind = "NaN" if stored.isnan().any() else "infinity"
        raise NonFiniteError(f"{where} holds {kind}: the file is damaged")
    if not arrived.isfinite().all():
        name = str(target.dtype).removeprefix("torch.")
        wider = "float64" if target.dtype == torch.float32 else "float32"
        raise HalfOverflowError(
            f"{where} holds {stored.abs().max().item():g}, too large for {name}: load it as {wider}"
        )


# --- Writing -----------------------------------------------------------------------------------


def save_checkpoint(
    path: str | Path,
    *,
    unet: UNet,
    vae: AutoencoderKL,
    text: CLIPTextEncoder,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a whole model as one safetensors file in the official layout.

    The parameters in their own dtype, or in `dtype`; beside them `position_ids` and the schedule's
    tables, as official files have them. The config travels in the metadata, as one entry of sorted
    JSON, so that the same model always gives the same bytes. The file appears whole or not at all.
    """
    tensors = {
        theirs: model.state_dict()[ours].to(device="cpu", dtype=dtype).contiguous()
        for model in (unet, vae, text)
        for ours, theirs in key_map(model).items()
    }
    tensors[POSITION_IDS] = torch.arange(config.text.max_length)[None]  # (1, L)
    tensors |= schedule_entries(config.schedule)
    with written_whole(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"ldm": config_to_json(config)})


def config_to_json(config: ModelConfig, indent: int | None = None) -> str:
    """A config as sorted JSON."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True, indent=indent)


def config_from_json(text: str, path: Path) -> ModelConfig:
    """The inverse of `config_to_json`, for a text that comes from `path`.

    Raises:
        UnreadableError: it is not such a config.
    """
    try:
        config: ModelConfig = read_like(SD_V1, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"what {path} holds is not a config of ldm: {error}") from error
    return config


LARGEST = 2**20  # of the whole numbers in a config


def read_like(example: Any, data: Any) -> Any:
    """A value of JSON as one of the same type as an example: a number, a name, a tuple of whole
    numbers, or a dataclass of such. A ValueError if it is not."""
    if dataclasses.is_dataclass(example) and not isinstance(example, type):
        names = [field.name for field in dataclasses.fields(example)]
        if not isinstance(data, dict) or data.keys() != set(names):
            raise ValueError(f"{str(data)[:80]} does not have just the fields {', '.join(names)}")
        return type(example)(**{n: read_like(getattr(example, n), data[n]) for n in names})
    if isinstance(example, tuple) and isinstance(data, list):
        return tuple(read_like(example[0], one) for one in data)
    if isinstance(example, str) and isinstance(data, str) and data.isprintable():
        return data
    if isinstance(example, int) and type(data) is int and 0 <= data <= LARGEST:
        return data
    if isinstance(example, float) and type(data) in (int, float) and 0 < data < math.inf:
        return float(data)
    raise ValueError(f"{str(data)[:80]!r} cannot stand where {example!r} could")
