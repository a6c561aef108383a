"""Recipes: a picture carries how it was made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from ldm.recipe import Recipe, file_sha256, installed_versions, read_recipes, save_png

RECIPE = Recipe(
    prompt="a naïve house, 家",
    negative_prompt="blur",
    seed=2**40,
    index=3,
    sampler="ddim",
    steps=7,
    guidance_scale=2.25,
    eta=0.1,
    height=16,
    width=24,
    device="cpu",
    dtype="float32",
    model="tiny",
    model_sha256="0" * 64,
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


def test_the_hash_is_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 100_000)
    assert file_sha256(path) == hashlib.sha256(b"weights" * 100_000).hexdigest()


def test_versions_name_what_decides_the_last_bits() -> None:
    assert set(installed_versions()) == {"ldm", "torch", "transformers", "python"}
    assert all(installed_versions().values())
