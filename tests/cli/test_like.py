"""`ldm generate --like PNG`: what becomes of the recipe in a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.cli import main as cli
from ldm.files import file_sha256
from ldm.pipeline import TextToImage, load
from ldm.recipe import Addition, read_recipes, save_png
from tests import loras
from tests.helpers import tiny_model, write_weights


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--grid", "--num-images", "3"),
        ("--grid", "--num-images", "3", "--no-captions"),
        ("--scale", "3"),
        ("--grid", "--num-images", "2", "--scale", "2"),
    ],
)
def test_like_makes_the_same_picture_again_bit_for_bit(
    generate, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    args = ("a red house", "-o", "a.png", "--steps", "3", "--eta", "0.5", "--seed", "4")
    assert generate(*args, "--width", "24", *extra) == 0
    assert generate("--like", "a.png", "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_like_repeats_a_sampler_and_its_spacing(generate, tmp_path: Path) -> None:
    args = ("red", "-o", "a.png", "--steps", "3", "--seed", "4", "--sampler", "euler_ancestral")
    assert generate(*args, "--spacing", "karras") == 0
    (recipe,) = read_recipes(Path("a.png"))
    assert (recipe.settings.sampler, recipe.settings.spacing) == ("euler_ancestral", "karras")
    assert generate("--like", "a.png", "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert generate("--like", "a.png", "-o", "c.png", "--spacing", "karras", device=()) == 2


def test_like_makes_one_image_of_a_batch_again(generate, tmp_path: Path) -> None:
    assert generate("red", "-o", "a.png", "--num-images", "2", "--steps", "2", "--seed", "4") == 0
    assert generate("--like", "a-1.png", "-o", "b.png", device=()) == 0
    assert Path("a-1.png").read_bytes() == Path("b.png").read_bytes()


def test_a_grid_has_a_row_per_prompt_and_can_be_made_again_when_it_was_cut_short(
    generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("red", "blue", "--num-images", "3", "--grid", "--steps", "1", "--seed", "0")
    assert generate(*args, "--no-captions", "-o", "whole.png") == 0
    with Image.open("whole.png") as image:
        assert image.size == (3 * 20 - 4, 2 * 20 - 4)

    decode, left = TextToImage.decode, iter(range(4))

    def interrupted(self, latents):  # type: ignore[no-untyped-def]
        if next(left, None) is None:
            raise KeyboardInterrupt
        return decode(self, latents)

    with monkeypatch.context() as patch:
        patch.setattr(TextToImage, "decode", interrupted)
        assert generate(*args, "-o", "cut.png") == 130
    recipes = read_recipes(Path("cut.png"))
    assert [one.settings.prompt for one in recipes] == ["red"] * 3 + ["blue"]
    assert generate("--like", "cut.png", "-o", "again.png", device=()) == 0
    assert Path("cut.png").read_bytes() == Path("again.png").read_bytes()


def test_reproduce_draws_the_other_codes_picture_and_like_makes_it_again(
    generate, model: Path, tmp_path: Path
) -> None:
    args = ("red", "--steps", "3", "--seed", "2", "--eta", "0.5", "--reproduce", "diffusers")
    assert generate(*args, "-o", "a.png") == 0
    pipe = load(model, device="cpu")
    (expected,) = pipe("red", steps=3, seed=2, eta=0.5, like="diffusers")
    with Image.open("a.png") as image:
        assert image.tobytes() == expected.tobytes()
    assert generate("--like", "a.png", "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_like_never_overwrites_its_own_picture(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("red", "-o", "a.png", "--steps", "1") == 0
    before = Path("a.png").read_bytes()
    assert generate("--like", "a.png", "-o", "./a.png", device=()) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert Path("a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"steps": 5000}, {}, "steps must be between 1 and 1000"),
        ({"steps": "x"}, {}, "cannot be read: steps is 'x'"),
        ({"prompts": (5,)}, {}, "cannot be read: prompts is [5]"),
        ({"prompts": ("red", "blue")}, {}, "not one that ldm wrote"),
        ({"height": 15}, {}, "height must be a positive multiple of 2"),
        ({"eta": 3.0}, {}, "eta must be between 0 and 1"),
        ({}, {"device": "cuda:99"}, "no device 'cuda:99'"),
        ({}, {"dtype": "float64"}, "not one that ldm wrote"),
        ({}, {"ema": "maybe"}, "not one that ldm wrote"),
        ({}, {"versions": 1}, "cannot be read: versions is 1"),
        ({"height": 10**9}, {}, "bytes at once"),
        ({"height": 10**7, "width": 10**7}, {}, "bytes at once"),
        ({"height": 2**63}, {}, "cannot be read: height is 9223372036854775808"),
        ({"guidance_scale": float("inf")}, {}, "guidance_scale must be a finite number"),
        ({}, {"scale": 2**20}, "cannot be read: scale is 1048576"),
        ({"height": 4096, "width": 4096}, {"scale": 64}, "takes 412,316,860,416 bytes at once"),
        ({}, {"device": "\x1b]0;owned\x07"}, "device"),
    ],
)
def test_like_checks_a_recipe_before_any_work(
    generate,
    settings: Mapping[str, Any],
    change: Mapping[str, Any],
    message: str,
    no_work: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate("red", "-o", "a.png", "--steps", "1") == 0
    (recipe,) = read_recipes(Path("a.png"))
    other = dataclasses.replace(recipe.settings, **settings)
    with Image.open("a.png") as image:
        changed = dataclasses.replace(recipe, settings=other, **change)
        save_png(image, Path("b.png"), [changed])
    capsys.readouterr()
    no_work()
    assert generate("--like", "b.png", "-o", "c.png", device=()) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not Path("c.png").exists()


def test_like_refuses_other_weights_and_names_both(
    generate, tmp_path: Path, tmp_path_factory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("red", "-o", "a.png", "--steps", "1") == 0
    other = tiny_model(tmp_path_factory.mktemp("other"), seed=99)
    assert cli.main(["generate", "--weights", str(other), "--like", "a.png", "-o", "b.png"]) == 2
    error = capsys.readouterr().err
    ours = file_sha256(other / "model.safetensors")
    assert ours in error and read_recipes(Path("a.png"))[0].model_sha256 in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_of_other_versions_is_made_again_and_said_to_be(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("red", "-o", "a.png", "--steps", "1") == 0
    (recipe,) = read_recipes(Path("a.png"))
    other = dataclasses.replace(recipe, versions={**recipe.versions, "torch": "1.0"})
    with Image.open("a.png") as image:
        save_png(image, Path("old.png"), [other])
    capsys.readouterr()
    assert generate("--like", "old.png", "-o", "b.png", device=()) == 0
    assert "the last bits may differ" in capsys.readouterr().err
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()


def test_a_lora_is_in_the_recipe_and_asked_for_again(
    generate, model: Path, tmp_path: Path, capsys
) -> None:
    pipe = load(model, device="cpu")
    stages = {"unet": pipe.unet, "text": pipe.text}
    path = write_weights(tmp_path / "style.safetensors", loras.peft(stages, loras.pairs(stages)))
    args = ("red", "--steps", "2", "--seed", "4")
    assert generate(*args, "-o", "plain.png") == 0
    assert generate(*args, "-o", "a.png", "--lora", f"{path}:0.5") == 0
    assert Path("a.png").read_bytes() != Path("plain.png").read_bytes()
    (recipe,) = read_recipes(Path("a.png"))
    assert recipe.loras == (Addition("style.safetensors", file_sha256(path), 0.5),)
    assert "loras" not in read_recipes(Path("plain.png"))[0].as_dict()
    like = ("--like", "a.png", "-o", "b.png")
    assert generate(*like, "--lora", f"{path}:0.5", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    capsys.readouterr()
    for extra in ((), ("--lora", f"{path}")):
        assert generate(*like, *extra, device=()) == 2
        assert "these LoRAs: style.safetensors:0.5; pass --lora" in capsys.readouterr().err
    assert generate(*args, "-o", "c.png", "--lora", "nowhere.safetensors") == 2
    assert "no LoRA at nowhere.safetensors" in capsys.readouterr().err
