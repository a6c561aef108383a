"""`ldm show`: how a picture was made, by the recipe that it carries."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import options


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser("show", help="print how a picture was made")
    p.add_argument("image", type=Path)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line per setting of the picture's run, then what it was drawn with; a grid has as
    many recipes as pictures."""
    from ldm.recipe import read_recipes

    for recipe in read_recipes(args.image):
        fields = recipe.as_dict()
        settings = fields.pop("settings")
        prompt = ", ".join(settings.pop("prompts"))
        for name, value in {"prompt": prompt, **settings, **fields}.items():
            print(f"{name:>16}  {value}")
        print()
    return 0
