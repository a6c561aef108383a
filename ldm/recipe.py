"""How a picture was made, carried inside the picture: everything needed to make it again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.files import written_whole
from ldm.settings import Settings
from ldm.version import ldm_version

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "ldm"


@dataclass(frozen=True)
class Recipe:
    """One picture's making.

    Attributes:
        settings: of the run that draws this picture alone.
        model, model_sha256: the name in the config, and the hash of the weights (`weights_sha256`).
        ema: which of two sets of weights was asked for: "auto", "yes" or "no".
        device, dtype: where it was drawn, and in what precision.
        versions: of ldm, torch, transformers and Python.
    """

    settings: Settings
    model: str
    model_sha256: str
    ema: str
    device: str
    dtype: str
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON has them; `Recipe.from_dict` turns them back."""
        return asdict(self) | {"settings": self.settings.as_dict()}

    @classmethod
    def from_dict(cls, fields: object) -> Recipe:
        """The recipe that `as_dict` gave.

        Raises:
            ValueError: there are other fields, or one is of another type.
        """
        names = cls.__dataclass_fields__
        if not isinstance(fields, Mapping) or fields.keys() != names.keys():
            raise ValueError(f"a recipe has the fields {', '.join(names)}")
        for name in names.keys() - {"settings", "versions"}:
            if not isinstance(fields[name], str):
                raise ValueError(f"{name} is {fields[name]!r:.80}")
        versions = fields["versions"]
        if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
            raise ValueError(f"versions is {versions!r:.80}")
        return cls(**{**fields, "settings": Settings.from_dict(fields["settings"])})


def installed_versions() -> dict[str, str]:
    """The versions that decide a picture's last bits, read without importing transformers."""
    return {
        "ldm": ldm_version(),
        "torch": torch.__version__,  # says which build it is, CPU or CUDA
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def save_png(image: Image, path: Path, recipes: Sequence[Recipe]) -> None:
    """Write a picture with its recipes (a grid has one per picture); whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, json.dumps([one.as_dict() for one in recipes], sort_keys=True))
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
        recipes = [Recipe.from_dict(fields) for fields in json.loads(text or "[]")]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the recipe in {path} cannot be read: {error}") from error
    if not recipes:
        raise ValueError(f"{path} does not say how it was made: it was not made by ldm")
    return recipes
