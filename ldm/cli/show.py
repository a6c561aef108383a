"""`ldm show`: how a picture was made, by the recipe that it carries."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import options
from ldm.errors import printable

if TYPE_CHECKING:
    from ldm.inputs import Held
    from ldm.recipe import Recipe

EXAMPLES = """examples:
  ldm show a-red-house.png
  ldm generate --like a-red-house.png -o again.png
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser("show", help="print how a picture was made", epilog=EXAMPLES)
    p.add_argument("image", type=Path, metavar="PNG", help="a picture that ldm drew")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line per setting of the picture's run, then what it was drawn with; of a sheet what
    all its pictures share, and then, for each of them, what differs."""
    from ldm.recipe import read_recipes

    recipes = read_recipes(args.image)
    names = differing(recipes)
    for name, value in facts(recipes[0]).items():
        if name not in names:
            print(printable(f"{name:>16}  {value}"))
    if len(recipes) > 1:
        said = ", which differ in " + ", ".join(names) if names else ", all alike"
        print(f"\n{'pictures':>16}  {len(recipes)}{said}")
        for number, recipe in enumerate(recipes if names else [], 1):
            print(printable(f"{number:>16}  {'; '.join(told(recipe, names))}"))
    print()
    return 0


def facts(recipe: Recipe) -> dict[str, Any]:
    """All that a recipe says, by name, in the order in which it is told."""
    fields = recipe.as_dict()
    settings, inputs = fields.pop("settings"), fields.pop("inputs")
    prompt = ", ".join(settings.pop("prompts"))
    given = {name: held_words(name, recipe.inputs[name]) for name in inputs}
    return {"prompt": prompt, **settings, **given, **fields}


def held_words(name: str, held: Held | None) -> str:
    """What a run was given, in words."""
    if held is None:
        return "a function: the picture cannot be made again from this"
    sizes = "x".join(map(str, held.shape))
    if name in options.PICTURES:
        height, width = held.shape[:2]
        sizes = f"{width}x{height} pixels"
    return f"{sizes}, SHA-256 {held.sha256}"


def differing(recipes: Sequence[Recipe]) -> list[str]:
    """The names of the facts in which recipes differ."""
    first, *others = map(facts, recipes)
    names = dict.fromkeys(name for one in (first, *others) for name in one)
    return [name for name in names if any(one.get(name) != first.get(name) for one in others)]


def told(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Some facts of a recipe, each in a few words; a prompt speaks for itself."""
    said = facts(recipe)
    return [
        str(said[name]) if name == "prompt" else f"{name.replace('_', ' ')} {said.get(name)}"
        for name in names
    ]
