"""Folders of weights: one with a file of them, or a model in parts, as diffusers keeps it.

    model_index.json                              which class reads which folder
    unet/          config.json, diffusion_pytorch_model.safetensors
    vae/           config.json, diffusion_pytorch_model.safetensors
    text_encoder/  config.json, model.safetensors
    tokenizer/     vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json
    scheduler/     scheduler_config.json

Here is where things lie. What they mean is told in `ldm.checkpoints.diffusers`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.errors import MissingPartsError, UnreadableError, some

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # to find a file by, not to read it by

# What the file of weights is called where diffusers, or transformers, has written it.
DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
PARTS = {"unet": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": TRANSFORMERS}
MOST_JSON = 2_000_000  # bytes: Python's objects take twenty times that; an index has 100,000
INDEX, SCHEDULER, CONFIG = "model_index.json", "scheduler/scheduler_config.json", "config.json"
SCHEDULER_BESIDE = f"../{SCHEDULER}"  # of a part that is opened alone


def find_file(path: str | Path) -> Path:
    """The file of weights that a path means: itself, or the only one in this folder.

    Raises:
        FileNotFoundError: nothing is there.
        MissingPartsError: the folder has no file of weights, or several.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        files = [file for file in files if file.name == "model.safetensors"] or files
        if not files:
            needed = ", ".join(f"{part}/" for part in PARTS)
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


def is_diffusers_folder(folder: Path) -> bool:
    """Whether this is a diffusers folder, or one part of it, by what lies in it; it may lack most.

    Raises:
        UnreadableError: its config is damaged.
    """
    return (
        (folder / INDEX).is_file()
        or any((folder / part / CONFIG).is_file() for part in PARTS)
        or any(find_weights(folder / part, names) for part, names in PARTS.items())
        or is_part(folder)
    )


def is_part(folder: Path) -> bool:
    """Whether a folder is one part itself: its config says so, as diffusers and transformers write
    it. Other programs keep a `config.json` beside their weights too."""
    if not (folder / CONFIG).is_file():
        return False
    fields = read_document(folder / CONFIG)
    return "_class_name" in fields or fields.get("model_type") == "clip_text_model"


def find_parts(folder: Path) -> dict[str, Path]:
    """Part -> its file of weights (or the index of several), for those that a folder has. The only
    part of a folder that is one itself has no name."""
    names = {"": (*DIFFUSERS, *TRANSFORMERS)} if is_part(folder) else PARTS
    found = {part: find_weights(folder / part, files) for part, files in names.items()}
    return {part: weights for part, weights in found.items() if weights is not None}


def find_weights(folder: Path, names: Sequence[str]) -> Path | None:
    """The file with a part's weights, or the index of several such files, or None. Safetensors come
    before pickles, and the fp16 variant is taken only where there is no other."""
    for variant in ("", ".fp16"):
        for name in names:
            stem, _, kind = name.rpartition(".")
            single = f"{stem}{variant}.{kind}"
            # diffusers has changed its mind about the place of the variant in an index's name.
            for candidate in (single, f"{name}.index{variant}.json", f"{name}{variant}.index.json"):
                if (folder / candidate).is_file():
                    return folder / candidate
    return None


def find_documents(folder: Path, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The config files of a folder and of those of its parts: name -> fields.

    Raises:
        UnreadableError: one of them is damaged.
    """
    own = [CONFIG, SCHEDULER_BESIDE] if is_part(folder) else []
    names = [INDEX, *own, *(f"{part}/{CONFIG}" for part in parts if part), SCHEDULER]
    return {name: read_document(folder / name) for name in names if (folder / name).is_file()}


def read_document(path: Path) -> dict[str, Any]:
    """The fields of a JSON file, or an UnreadableError if it holds no JSON object or is huge."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_JSON + 1)
        if len(data) > MOST_JSON:
            raise UnreadableError(f"{path} has more than {MOST_JSON:,} bytes: it is not a config")
        fields = json.loads(data)
    except UnreadableError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UnreadableError(f"{path} is not a config: it holds no JSON object")
    return fields


def read_weight_map(index: Path) -> dict[str, str]:
    """What an index of several files says: key -> the file beside it that has this tensor.

    Raises:
        UnreadableError: it is damaged.
        MissingPartsError: a file that it names is not there.
    """
    where = read_document(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(map(is_file_name, where.values())):
        wanted = "an object that gives each key's file"
        raise UnreadableError(f"{index}: weight_map must be {wanted}, not {where!r:.80}")
    for name in sorted(set(where.values())):
        if not (index.parent / name).is_file():
            raise MissingPartsError(f"{index.parent / name} is missing: {index.name} names it")
    return where


def is_file_name(name: object) -> bool:
    """Whether this names a file beside us: an index must not lead out of its folder."""
    plain = isinstance(name, str) and name.isascii() and name.isprintable() and len(name) < 256
    return plain and Path(str(name)).name == name
