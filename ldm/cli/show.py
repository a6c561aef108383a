"""`ldm show`: how a picture was made, by the recipe that it carries."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import options
from ldm.errors import printable

if TYPE_CHECKING:
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
    settings = fields.pop("settings")
    prompt = ", ".join(settings.pop("prompts"))
    return {"prompt": prompt, **settings, **fields}


def differing(recipes: Sequence[Recipe]) -> list[str]:
    """The names of the facts in which recipes differ."""
    first, *others = map(facts, recipes)
    different = set()
    for other in others:
        different |= {name for name in first if other[name] != first[name]}
    return [name for name in first if name in different]


def told(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Some facts of a recipe, each in a few words; a prompt speaks for itself."""
    all_facts = facts(recipe)
    return [
        str(all_facts[name]) if name == "prompt" else f"{name.replace('_', ' ')} {all_facts[name]}"
        for name in names
    ]
