"""Recipes: a picture carries how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files import file_sha256
from ldm.recipe import KEY, Recipe, installed_versions, read_recipes, save_png
from ldm.settings import Settings

RECIPE = Recipe(
    settings=Settings(
        prompts=("a naïve house, 家",),
        negative_prompt="blur",
        sampler="ddim",
        steps=7,
        guidance_scale=2.25,
        eta=0.1,
        seed=2**40,
        height=16,
        width=24,
        like="diffusers",
    ),
    model="tiny",
    model_sha256="0" * 64,
    ema="auto",
    device="cpu",
    dtype="float32",
    versions={"torch": "1"},
)


def test_a_recipe_survives_in_the_picture_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGB", (24, 16), (3, 100, 200))
    save_png(image, path, [RECIPE, RECIPE])
    assert read_recipes(path) == [RECIPE, RECIPE]
    with Image.open(path) as again:
        assert again.tobytes() == image.tobytes()


def test_a_failed_save_leaves_the_old_picture_and_no_half_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (8, 8)), path, [RECIPE])
    before = path.read_bytes()

    class Broken(Image.Image):
        def save(self, fp, *args, **kwargs):  # type: ignore[no-untyped-def]
            Path(fp).write_bytes(b"half a pict")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_png(Broken(), path, [RECIPE])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_what_is_not_ours_is_refused_in_one_line(tmp_path: Path) -> None:
    plain, text = tmp_path / "plain.png", tmp_path / "text.png"
    Image.new("RGB", (8, 8)).save(plain)
    text.write_text("not a picture")
    with pytest.raises(ValueError, match="does not say how it was made"):
        read_recipes(plain)
    with pytest.raises(ValueError, match="not a picture"):
        read_recipes(text)
    with pytest.raises(FileNotFoundError, match="no picture"):
        read_recipes(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("settings"), "a recipe has the fields settings, model"),
        (lambda f: f.update(index=3), "a recipe has the fields settings, model"),
        (lambda f: f.update(model=5), "model is 5"),
        (lambda f: f.update(versions={"torch": 2}), "versions is {'torch': 2}"),
        (lambda f: f["settings"].pop("steps"), "settings have the fields prompts, neg"),
        (lambda f: f["settings"].update(seed=1.5), "seed is 1.5"),
        (lambda f: f["settings"].update(like=["compvis"]), "like is \\['compvis'\\]"),
    ],
)
def test_a_recipe_of_another_form_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path, fields, info = tmp_path / "a.png", RECIPE.as_dict(), PngInfo()
    change(fields)
    info.add_itxt(KEY, json.dumps([fields]))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match=f"the recipe in .* cannot be read: {message}") as error:
        read_recipes(path)
    assert len(str(error.value).splitlines()) == 1


def test_the_hash_is_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 100_000)
    assert file_sha256(path) == hashlib.sha256(b"weights" * 100_000).hexdigest()


def test_versions_name_what_decides_the_last_bits() -> None:
    assert set(installed_versions()) == {"ldm", "torch", "transformers", "python"}
    assert all(installed_versions().values())
