"""`ldm show PNG`: what a picture says of itself, and what a sheet's pictures differ in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli import main as cli
from ldm.errors import LINE
from ldm.recipe import Recipe, read_recipes, save_png
from tests.test_recipe import RECIPE


def shown(recipes: list[Recipe], path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that are printed of a picture with these recipes."""
    save_png(Image.new("RGB", (16, 16)), path, recipes)
    assert cli.main(["show", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


def of(prompt: str, seed: int) -> Recipe:
    settings = dataclasses.replace(RECIPE.settings, prompts=(prompt,), seed=seed)
    return dataclasses.replace(RECIPE, settings=settings)


def test_every_setting_is_printed(generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a red house", "-o", "a.png", "--steps", "1", "--seed", "3") == 0
    capsys.readouterr()
    assert cli.main(["show", "a.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (recipe,) = read_recipes(Path("a.png"))
    settings = recipe.settings.as_dict()
    assert settings.pop("prompts") == ["a red house"]
    rest = {
        name: value
        for name, value in recipe.as_dict().items()
        if name not in ("settings", "inputs")
    }
    expected = {"prompt": "a red house", **settings, **rest}
    assert lines == [f"{name:>16}  {value}" for name, value in expected.items()] + [""]


def test_of_a_sheet_it_says_what_is_shared_and_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown([of("red", 7), of("blue", 8)], tmp_path / "a.png", capsys)
    shared, differ = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert f"{'steps':>16}  7" in shared and not [one for one in shared if " seed " in one]
    assert differ == [
        f"{'pictures':>16}  2, which differ in prompt, seed",
        f"{1:>16}  red; seed 7",
        f"{2:>16}  blue; seed 8",
        "",
    ]
    assert f"{'pictures':>16}  2, all alike" in shown([RECIPE] * 2, tmp_path / "b.png", capsys)


@pytest.mark.parametrize("word", ["\x1b]0;owned\x07", "\x1b[2J\n     prompt  forged", "x" * 10**5])
def test_what_a_stranger_wrote_is_shown_and_never_obeyed(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(RECIPE.settings, negative_prompt=word, sampler=word)
    strange = dataclasses.replace(
        RECIPE, settings=settings, model=word, device=word, versions={word: word}
    )
    plain = shown([RECIPE], tmp_path / "plain.png", capsys)
    for recipes in ([strange], [strange, of(word, 1)]):
        lines = shown(recipes, tmp_path / "a.png", capsys)
        assert all(line.isprintable() and len(line) <= LINE for line in lines)
    assert len(shown([strange], tmp_path / "a.png", capsys)) == len(plain)
