"""How a picture was made, carried inside the picture: everything needed to make it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ldm.files import written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "ldm"


@dataclass(frozen=True)
class Recipe:
    """One picture's making.

    Attributes:
        index: which picture of its run; its noise was seeded with `seed + index`.
        model, model_sha256: the name in the config, and the hash of the weights (`weights_sha256`).
        versions: of ldm, torch, transformers and Python.
        ema: which of two sets of weights was asked for: "auto", "yes" or "no".
        reproduce: whose pictures of a seed, `like` in `TextToImage.denoise`; empty is our own.
        The others: as `TextToImage.denoise` takes them.
    """

    prompt: str
    negative_prompt: str
    seed: int
    index: int
    sampler: str
    steps: int
    guidance_scale: float
    eta: float
    height: int
    width: int
    device: str
    dtype: str
    model: str
    model_sha256: str
    versions: dict[str, str]
    ema: str = "auto"
    reproduce: str = ""


def installed_versions() -> dict[str, str]:
    """The versions that decide a picture's last bits, read without importing anything."""
    from importlib.metadata import version

    import ldm

    return {
        "ldm": ldm.__version__,
        "torch": torch.__version__,  # says which build it is, CPU or CUDA
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(paths: Sequence[Path]) -> str:
    """One file's SHA-256; of several files, that of their hashes in hexadecimal, one per line."""
    hashes = [file_sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def save_png(image: Image, path: Path, recipes: Sequence[Recipe]) -> None:
    """Write a picture with its recipes (a grid has one per picture); whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, json.dumps([dataclasses.asdict(one) for one in recipes], sort_keys=True))
    with written_whole(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_recipes(path: Path) -> list[Recipe]:
    """The recipes in a picture.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not a picture, or carries no recipe of ldm.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a picture that can be read") from error
    try:
        recipes = [Recipe(**fields) for fields in json.loads(text or "[]")]
        for recipe in recipes:
            check_types(recipe)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the recipe in {path} cannot be read: {error}") from error
    if not recipes:
        raise ValueError(f"{path} does not say how it was made: it was not made by ldm")
    return recipes


def check_types(recipe: Recipe) -> None:
    """A TypeError unless every field is of the type that a recipe of ours has."""
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        if not isinstance(value, kinds.get(str(field.type), (dict,))) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {value!r}")
