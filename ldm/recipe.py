"""How a picture was made, carried inside the picture: everything needed to make it again."""

from __future__ import annotations

import dataclasses
import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.checkpoints.lora import LARGEST
from ldm.errors import printable
from ldm.files import written_whole
from ldm.inputs import Held, held_as_dict, held_from_dict
from ldm.settings import Settings
from ldm.version import ldm_version

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "ldm"
LONGEST = 4_000_000  # characters of a picture's recipes
MOST_LORAS = 100
MAX_SCALE = 64  # a latent of Stable Diffusion's as a square of 512 pixels


@dataclass(frozen=True)
class Addition:
    """A LoRA that a picture was drawn with.

    Attributes:
        file, sha256: its file's name and hash.
        scale: how strongly it counted.
    """

    file: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class Recipe:
    """One picture's making.

    Attributes:
        settings: of the run that draws this picture alone.
        model, model_sha256: the name in the config, and the hash of the weights (`weights_sha256`).
        ema: which of two sets of weights was asked for: "auto", "yes" or "no".
        device, dtype: where it was drawn, and in what precision.
        versions: of ldm, torch, transformers and Python.
        scale: how many times as wide and high the picture is shown as it was drawn.
        captions: whether its sheet says under each picture what differs.
        inputs: what else the run was given, by name (`Inputs.held`): whoever repeats it must have
            the same again. None is a function, of which there is no record.
        loras: in the order in which they were loaded.
    """

    settings: Settings
    model: str
    model_sha256: str
    ema: str
    device: str
    dtype: str
    versions: Mapping[str, str]
    scale: int = 1
    captions: bool = False
    inputs: Mapping[str, Held | None] = field(default_factory=dict)
    loras: tuple[Addition, ...] = ()

    @property
    def repeatable(self) -> bool:
        """Whether the recipe, and what it says that it was given, make the picture again."""
        return None not in self.inputs.values()

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON has them, `loras` only where there are any; `Recipe.from_dict` turns
        them back."""
        inputs = held_as_dict(self.inputs)
        fields = asdict(self) | {"settings": self.settings.as_dict(), "inputs": inputs}
        fields["loras"] = [asdict(one) for one in self.loras]
        return fields if self.loras else {k: v for k, v in fields.items() if k != "loras"}

    @classmethod
    def from_dict(cls, fields: object) -> Recipe:
        """The recipe that `as_dict` gave.

        Raises:
            ValueError: there are other fields, or one is of another type.
        """
        kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        later = {"scale", "captions", "inputs", "loras"}  # older recipes have none of these
        needed = kinds.keys() - later
        if not isinstance(fields, Mapping) or not needed <= fields.keys() <= kinds.keys():
            raise ValueError(f"a recipe has the fields {', '.join(kinds)}")
        settings = Settings.from_dict(fields["settings"])
        inputs = held_from_dict(fields.get("inputs", {}))
        for name in fields.keys() - {"settings", "inputs"}:
            if not IS_A[kinds[name]](fields[name]):
                raise ValueError(f"{name} is {fields[name]!r:.80}")
        loras = tuple(Addition(**one) for one in fields.get("loras", ()))
        return cls(**{**fields, "settings": settings, "inputs": inputs, "loras": loras})


def is_addition(value: object) -> bool:
    """Whether a value of JSON is an `Addition`."""
    match value:
        case {"file": str(), "sha256": str(), "scale": int() | float() as scale, **rest}:
            return not rest and type(scale) is not bool and abs(scale) <= LARGEST
    return False


# What each type of a field may be in JSON.
IS_A: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int and 1 <= value <= MAX_SCALE,
    "tuple[Addition, ...]": lambda value: (
        isinstance(value, list) and len(value) <= MOST_LORAS and all(map(is_addition, value))
    ),
    "bool": lambda value: isinstance(value, bool),
    "Mapping[str, str]": lambda value: (
        isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
    ),
}


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
    """The recipes in a PNG. Only its texts are read, and no pixel, whatever size it says it has.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: in one printable line: it is not a PNG, or carries no recipe of ldm.
    """
    from PIL.PngImagePlugin import PngImageFile

    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an animation, say, that is not quite one
            with PngImageFile(path) as image:
                text = image.info.get(KEY)
    except (SyntaxError, OSError, ValueError) as error:  # Pillow's own for a bad file is the first
        raise ValueError(printable(f"{path} is not a PNG picture that can be read")) from error
    try:
        if text and len(text) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST:,} characters")
        found = json.loads(text or "[]")
        if not isinstance(found, list):
            raise ValueError("recipes are a list")
        recipes = [Recipe.from_dict(fields) for fields in found]
    except ValueError as error:
        raise ValueError(printable(f"the recipe in {path} cannot be read: {error}")) from error
    except RecursionError:
        raise ValueError(
            printable(f"the recipe in {path} cannot be read: it is nested too deeply")
        ) from None
    if not recipes:
        raise ValueError(printable(f"{path} does not say how it was made: it was not made by ldm"))
    return recipes
