"""`ldm generate --image`: a picture to start from, what is recorded of it, and made again by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli import main as cli
from ldm.inputs import Held
from ldm.pipeline import load
from ldm.prompts import Reading
from ldm.recipe import read_recipes, save_png


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path) -> None:
    """in.png and other.png, 16x16, wide.png, 24x16, and mask.png, whose right half is white."""
    rng = np.random.default_rng(0)
    for name, width in (("in", 16), ("other", 16), ("wide", 24)):
        levels = rng.integers(0, 256, (16, width, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{name}.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(tmp_path / "mask.png")


RUN = ("a red house", "--steps", "4", "--seed", "5", "-o", "a.png")


def test_a_picture_is_drawn_from_and_recorded(generate, model: Path) -> None:
    assert generate(*RUN, "--image", "in.png", "--strength", "0.5") == 0
    (expected,) = load(model, device="cpu")(
        "a red house", steps=4, seed=5, image="in.png", strength=0.5
    )
    with Image.open("a.png") as drawn:
        assert drawn.tobytes() == expected.tobytes()
    (recipe,) = read_recipes(Path("a.png"))
    assert recipe.settings.strength == 0.5 and recipe.repeatable
    assert recipe.inputs.keys() == {"image"}
    assert recipe.inputs["image"] is not None and recipe.inputs["image"].shape == (16, 16, 3)


@pytest.mark.parametrize(
    "options",
    [
        ("--image", "in.png", "--strength", "0.5", "-n", "2", "--grid"),
        ("--image", "in.png", "--mask", "mask.png", "--paste-back"),
        ("--image", "wide.png", "--fit", "crop", "--sampler", "euler"),
    ],
)
def test_like_makes_it_again_of_the_same_pictures(generate, options: tuple[str, ...]) -> None:
    assert generate(*RUN, *options) == 0
    pictures = [
        one for pair in pairwise(options) if pair[0] in ("--image", "--mask") for one in pair
    ]
    assert generate("--like", "a.png", *pictures, "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_like_knows_a_picture_in_another_kind_of_file(generate) -> None:
    assert generate(*RUN, "--image", "in.png") == 0
    with Image.open("in.png") as image:
        image.save("in.bmp")
    assert generate("--like", "a.png", "--image", "in.bmp", "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "was drawn from a picture of 16x16 pixels: pass it with --image"),
        (("--image", "other.png"), "--image is not what a.png was drawn from: the SHA-256"),
        (("--image", "in.png", "--mask", "mask.png"), "leave out --mask"),
        (("--image", "in.png", "--strength", "0.5"), "leave out --strength"),
    ],
)
def test_like_refuses_other_pictures_before_any_work(
    generate,
    options: tuple[str, ...],
    line: str,
    no_work: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate(*RUN, "--image", "in.png") == 0
    no_work()
    capsys.readouterr()
    assert generate("--like", "a.png", *options, "-o", "b.png", device=()) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1
    assert not Path("b.png").exists()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"noise": None}, "was drawn with a function, noise, which no picture carries"),
        ({"latents": Held((1, 4, 8, 8), "0" * 64)}, "with latents of its own"),
    ],
)
def test_like_refuses_what_only_python_could_give(
    generate, given: dict[str, Held | None], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(*RUN) == 0
    (recipe,) = read_recipes(Path("a.png"))
    changed = dataclasses.replace(recipe, inputs=given)
    with Image.open("a.png") as image:
        save_png(image, Path("b.png"), [changed])
    assert read_recipes(Path("b.png")) == [changed]
    assert changed.repeatable == (None not in given.values())
    assert generate("--like", "b.png", "-o", "c.png", device=()) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--mask", "mask.png"), "mask says what of a picture is redrawn: pass image too"),
        (("--strength", "0.5"), "strength is of a picture to start from"),
        (("--image", "wide.png"), "image is 24x16, and the run draws 16x16"),
        (("--image", "nothing.png"), "no picture at 'nothing.png'"),
        (("--image", "in.png", "--strength", "0.1"), "leaves none: 0.25 is one"),
        (("--image", "in.png", "--paste-back"), "pass mask too"),
        (("--sampler", "euler", "--eta", "0.5"), "eta is a setting of ddim"),
        (("--image", "in.png", "-o", "in.png"), "in.png would be overwritten"),
        (("--variation-seed", "3"), "a variation needs both"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(
    generate,
    options: tuple[str, ...],
    line: str,
    no_work: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_work()
    assert generate(*RUN, *options) == 2
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) == 1


def test_variations_go_to_one_seed_after_the_other(generate, model: Path) -> None:
    more = ("-n", "2", "--variation-seed", "50", "--variation-strength", "0.3")
    assert generate(*RUN, *more) == 0
    (expected,) = load(model, device="cpu")(
        "a red house", steps=4, seed=6, variation_seed=51, variation_strength=0.3
    )
    with Image.open("a-1.png") as drawn:
        assert drawn.tobytes() == expected.tobytes()
    assert generate("--like", "a-1.png", "-o", "b.png", device=()) == 0
    assert Path("a-1.png").read_bytes() == Path("b.png").read_bytes()


def test_show_tells_the_picture(generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(*RUN, "--image", "in.png") == 0
    (recipe,) = read_recipes(Path("a.png"))
    assert recipe.inputs["image"] is not None
    capsys.readouterr()
    assert cli.main(["show", "a.png"]) == 0
    said = capsys.readouterr().out
    assert f"16x16 pixels, SHA-256 {recipe.inputs['image'].sha256}" in said
    assert f"{'strength':>16}  0.75" in said


def test_the_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    said = capsys.readouterr().out
    titles = ["the run:", "a picture to start from:", "the model:", "several pictures"]
    places = [said.index(f"\n{title}") for title in titles]
    assert places == sorted(places)


def test_explain_shows_a_run_from_a_picture(model: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["explain", "a red house", "--weights", str(model), "--device", "cpu"]
    more = ["--steps", "2", "--image", "in.png", "--strength", "0.5", "-o", "a.html", "-s", "1"]
    assert cli.main([*asked, *more]) == 0
    page = Path("a.html").read_text(encoding="utf-8")
    assert "from a picture at strength 0.5" in page
    assert "The run starts here: from a picture, noised." in page
    assert "strength=0.5, image=...)" in page


def test_like_repeats_guidance_on_an_interval_and_rescaled(generate) -> None:
    more = ("--guidance-interval", "200", "800", "--guidance-rescale", "0.7")
    assert generate(*RUN, *more) == 0
    (recipe,) = read_recipes(Path("a.png"))
    assert recipe.settings.guidance_interval == (200.0, 800.0)
    assert recipe.settings.guidance_rescale == 0.7
    assert generate("--like", "a.png", "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_like_repeats_how_the_prompts_were_read(generate) -> None:
    words = ("a (red:1.4) house" + " by the lake" * 9, "--negative-prompt", "[night]", *RUN[1:])
    assert generate(*words, "--weighting", "--clip-skip", "1", "--long-prompts") == 0
    (recipe,) = read_recipes(Path("a.png"))
    assert recipe.settings.reading == Reading(weighting=True, clip_skip=1, long_prompts=True)
    assert generate("--like", "a.png", "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
