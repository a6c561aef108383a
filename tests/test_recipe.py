"""Recipes: a picture carries how it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import LINE
from ldm.files import file_sha256
from ldm.inputs import Held
from ldm.recipe import KEY, LONGEST, Addition, Recipe, installed_versions, read_recipes, save_png
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
GIVEN = dataclasses.replace(RECIPE, inputs={"image": Held((16, 24, 3), "0" * 64), "callback": None})


def held(**changes: object) -> dict[str, object]:
    return {"shape": [16, 16, 3], "sha256": "0" * 64} | changes


def test_a_recipe_older_than_inputs_is_read() -> None:
    fields = RECIPE.as_dict()
    for name in [one.name for one in dataclasses.fields(Settings)][11:]:
        del fields["settings"][name]
    del fields["inputs"]
    assert Recipe.from_dict(fields) == RECIPE


def test_a_recipe_survives_in_the_picture_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGB", (24, 16), (3, 100, 200))
    drawn_with = dataclasses.replace(RECIPE, loras=(Addition("家", "0" * 64, -0.3),) * 2)
    save_png(image, path, [RECIPE, GIVEN, drawn_with])
    assert read_recipes(path) == [RECIPE, GIVEN, drawn_with]
    assert RECIPE.repeatable and not GIVEN.repeatable
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
    plain, text, jpeg = tmp_path / "plain.png", tmp_path / "text.png", tmp_path / "jpeg.png"
    Image.new("RGB", (8, 8)).save(plain)
    Image.new("RGB", (8, 8)).save(jpeg, format="JPEG")
    text.write_text("not a picture")
    with pytest.raises(ValueError, match="does not say how it was made"):
        read_recipes(plain)
    for other in (text, jpeg):
        with pytest.raises(ValueError, match="is not a PNG picture"):
            read_recipes(other)
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
        (lambda f: f["settings"].update(height=10**400), "height is 1000"),
        (lambda f: f["settings"].update(guidance_scale=10**400), "guidance_scale is 1000"),
        (lambda f: f.update(scale=0), "scale is 0"),
        (lambda f: f.update(scale=10**9), "scale is 1000000000"),
        (lambda f: f.update(captions=1), "captions is 1"),
        (lambda f: f["settings"].update(strength="all"), "strength is 'all'"),
        (lambda f: f["settings"].update(paste_back=1), "paste_back is 1"),
        (lambda f: f["settings"].update(guidance_interval=[1]), r"guidance_interval is \[1\]"),
        (lambda f: f["settings"].update(guidance_interval=[1, "a"]), "guidance_interval is"),
        (lambda f: f.update(inputs=[]), "inputs are of image, mask"),
        (lambda f: f.update(inputs={"picture": None}), "inputs are of image, mask"),
        (lambda f: f.update(inputs={"image": {"shape": [2]}}), "image has a shape and a sha256"),
        (lambda f: f.update(inputs={"image": held(shape=[2, -1])}), "the shape of image is"),
        (lambda f: f.update(inputs={"image": held(shape=[])}), "the shape of image is"),
        (lambda f: f.update(inputs={"image": held(shape=[2] * 99)}), "the shape of image is"),
        (lambda f: f.update(inputs={"image": held(sha256="\x1b[2J")}), "the sha256 of image is"),
        (lambda f: f.update(loras="a"), "loras is 'a'"),
        (lambda f: f.update(loras=[{"file": "a", "sha256": "0"}]), "loras is"),
        (lambda f: f.update(loras=[{"file": "a", "sha256": "0", "scale": True}]), "loras is"),
        (lambda f: f.update(loras=[{"file": "a", "sha256": "0", "scale": 1e9}]), "loras is"),
        (lambda f: f.update(model="\x1b]0;owned\x07" * 10**5, ema=3), "ema is 3"),
        (lambda f: f.update({"\x1b]0;owned\x07": 3}), "a recipe has the fields settings, model"),
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


def png(*texts: bytes, size: tuple[int, int] = (16, 16), more: bytes = b"") -> bytes:
    """A PNG that says it is of some size, with texts of ours, and all but no pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    ours = b"".join(chunk(b"iTXt", KEY.encode() + bytes(5) + text) for text in texts)
    return b"\x89PNG\r\n\x1a\n" + head + more + ours + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def recipe_with(old: str, new: str) -> bytes:
    """Our recipe as JSON, with something else in one place."""
    text = json.dumps([RECIPE.as_dict()])
    assert text.count(old) == 1
    return text.replace(old, new).encode()


def test_only_the_texts_of_a_picture_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    animation = chunk(b"acTL", struct.pack(">II", 0, 0))  # not quite one, of which Pillow warns
    path.write_bytes(png(recipe_with("tiny", "tiny"), size=(100_000, 100_000), more=animation))
    assert read_recipes(path) == [RECIPE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b" " * LONGEST + b"]", "longer than 4,000,000 characters"),
        (b"[" * 900 + b"]" * 900, "a recipe has the fields"),
        (b'{"a": 1}', "recipes are a list"),
        (b"5", "recipes are a list"),
        (b'"\x1b]0;owned\x07"', "cannot be read"),
        (b"[{\n\n\n", "cannot be read"),
        (b"\xff\xfe", "does not say how it was made"),
        (b"[]", "does not say how it was made"),
        (recipe_with('"steps": 7', '"steps": ' + "7" * 5000), "cannot be read"),
        (recipe_with('"steps": 7', '"steps": 1e999'), "steps is inf"),
        (recipe_with('"steps": 7', '"steps": true'), "steps is True"),
        (recipe_with('"steps": 7', '"steps": ' + "[" * 900 + "]" * 900), "steps is [[["),
        (recipe_with('"steps": 7', '"steps": "\\u001b[2J"'), r"steps is '\x1b[2J'"),
    ],
)
def test_any_text_in_a_picture_is_a_recipe_or_one_line(
    tmp_path: Path, text: bytes, message: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(text))
    with pytest.raises(ValueError) as error:
        read_recipes(path)
    told = str(error.value)
    assert message in told and told.isprintable() and len(told) <= LINE


def test_any_damage_to_a_picture_is_an_answer_or_one_line(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.png", random.Random(0)
    whole = png(recipe_with("tiny", "tiny"))
    kinds = [b"IHDR", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"tRNS", b"PLTE", b"zTXt", b"IDAT"]
    answers = set()
    for case in range(600):
        damaged = bytearray(whole)
        if case % 3 == 0:
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        elif case % 3 == 1:
            damaged = damaged[: rng.randrange(len(damaged))]
        else:
            extra = chunk(rng.choice(kinds), rng.randbytes(rng.randrange(30)))
            damaged = bytearray(png(recipe_with("tiny", "tiny"), more=extra))
        path.write_bytes(damaged)
        try:
            answers.add(type(read_recipes(path)))
        except ValueError as error:
            answers.add(type(error))
            assert str(error).isprintable() and len(str(error)) <= LINE
    assert answers == {list, ValueError}


def test_the_hash_is_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 100_000)
    assert file_sha256(path) == hashlib.sha256(b"weights" * 100_000).hexdigest()


def test_versions_name_what_decides_the_last_bits() -> None:
    assert set(installed_versions()) == {"ldm", "torch", "transformers", "python"}
    assert all(installed_versions().values())
