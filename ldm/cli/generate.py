"""`ldm generate`: draw pictures of prompts, or a picture again by the recipe that it carries."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import options

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.config import ModelConfig
    from ldm.pipeline import TextToImage
    from ldm.recipe import Recipe

IN_THE_RECIPE = (
    *options.RUN,
    *("seed", "num_images", "reproduce", "device", "dtype", "ema"),
)


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser("generate", help="draw pictures of a prompt")
    p.add_argument("prompts", nargs="*", metavar="prompt", help="what to draw; several are fine")
    p.add_argument("-o", "--output", type=Path, help="PNG to write (default: from the prompt)")
    options.add_run_options(p, seed_help="image i uses seed + i (default: drawn, and printed)")
    options.add_drawing_options(p)
    p.add_argument("--num-images", type=int, default=1, help="per prompt (%(default)s)")
    p.add_argument("--grid", action="store_true", help="several pictures as one grid")
    p.add_argument("--like", type=Path, metavar="PNG", help="make this picture again")
    p.add_argument(
        "--reproduce", metavar="CODE", help=f"the seed's picture of {' or '.join(options.LIKE)}"
    )
    p.set_defaults(run=run, defaults={name: p.get_default(name) for name in IN_THE_RECIPE})


def run(args: argparse.Namespace) -> int:
    """Draw one picture after the other, so that each depends on its seed alone and Ctrl-C loses
    only the one being drawn."""
    check_arguments(args)
    from ldm.device import check_device
    from ldm.pipeline import TextToImage
    from ldm.recipe import save_png

    sources, config = options.open_asked(args)
    recipes = recipes_like(args.like, config) if args.like else recipes_asked(args, config)
    one_file = args.grid or bool(args.like)
    count = 1 if one_file else len(recipes)
    paths = options.output_paths(args.output, recipes[0].settings.prompt, ".png", count)
    if args.like and paths[0].resolve() == args.like.resolve():
        raise ValueError(f"{args.like} would be overwritten: name another file with -o")
    plans, tokenizer = options.plan_asked(sources, recipes[0].ema)
    recipes = sign(recipes, args.like, options.files_of(sources))
    pipe = TextToImage.from_plans(
        plans,
        tokenizer,
        device=check_device(recipes[0].device),
        dtype=options.named_dtype(recipes[0].dtype),
    )
    if args.weights:
        print(f"weights {pipe.origin}", file=sys.stderr)
    if args.seed is None and not args.like:
        print(f"seed {recipes[0].settings.seed}", file=sys.stderr)

    images: list[Image] = []
    try:
        draw(pipe, recipes, images, paths)
    finally:
        if len(paths) < len(recipes) and images:
            finished = recipes[: len(images)]
            save_png(grid(images, grid_columns(finished)), paths[0], finished)
            print(paths[0])
    return 0


# --- What to draw ----------------------------------------------------------------------------


def check_arguments(args: argparse.Namespace) -> None:
    """A ValueError for arguments that do not go together, whatever the model."""
    if not args.prompts and not args.like:
        raise ValueError("pass a prompt, or --like PNG")
    if args.reproduce and len(args.prompts) * args.num_images > 1:
        raise ValueError("--reproduce draws one picture: the noise of more depends on their number")
    if not args.like:
        return
    if args.prompts:
        raise ValueError("--like takes the prompt from the picture: pass one or the other")
    for name in IN_THE_RECIPE:
        if getattr(args, name) != args.defaults[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--like takes every setting from the picture: leave out {option}")


def recipes_asked(args: argparse.Namespace, config: ModelConfig) -> list[Recipe]:
    """One recipe per picture that the arguments ask for, not yet signed, or a ValueError."""
    from ldm.recipe import Recipe
    from ldm.settings import Settings

    settings = Settings.of(
        config,
        args.prompts,
        num_images=args.num_images,
        like=args.reproduce,
        **options.asked_settings(args),
    )
    device = options.asked_device(args)
    unsigned = Recipe(
        settings=settings,
        model=config.name,
        model_sha256="",
        ema=args.ema,
        device=str(device),
        dtype=str(options.asked_dtype(args, device)).removeprefix("torch."),
        versions={},
    )
    pictures = range(settings.num_images)
    return [dataclasses.replace(unsigned, settings=settings.alone(i)) for i in pictures]


def recipes_like(path: Path, config: ModelConfig) -> list[Recipe]:
    """The recipes of an existing picture, or a ValueError when they cannot be followed here."""
    from ldm.device import check_device
    from ldm.recipe import read_recipes

    recipes = read_recipes(path)
    first = recipes[0]
    alike = len({(one.model_sha256, one.device, one.dtype, one.ema) for one in recipes}) == 1
    alone = all(one.settings.num_images == 1 for one in recipes)
    if not (alike and alone and first.dtype in options.DTYPES and first.ema in options.EMA):
        raise ValueError(f"the recipe in {path} is not one that ldm wrote")
    check_device(first.device)
    for one in recipes:
        one.settings.check(config)
    return recipes


def sign(recipes: Sequence[Recipe], like: Path | None, files: Sequence[Path]) -> list[Recipe]:
    """The recipes with the weights' hash and the versions that follow them here.

    Raises:
        ValueError: they are those of the picture `like`, which was made with other weights.
    """
    from ldm.files import weights_sha256
    from ldm.recipe import installed_versions

    sha256, versions = weights_sha256(files), installed_versions()
    if like:
        theirs = recipes[0]
        if sha256 != theirs.model_sha256:
            raise ValueError(
                f"{like} was made with weights whose SHA-256 is {theirs.model_sha256}, "
                f"but that of {', '.join(map(str, files))} is {sha256}"
            )
        if versions != theirs.versions:
            print(
                f"ldm: made with {theirs.versions}, here are {versions}: the last bits may differ",
                file=sys.stderr,
            )
    return [dataclasses.replace(one, model_sha256=sha256, versions=versions) for one in recipes]


# --- Drawing ---------------------------------------------------------------------------------


def draw(
    pipe: TextToImage, recipes: Sequence[Recipe], images: list[Image], paths: Sequence[Path]
) -> None:
    """Follow the recipes in order; `images` grows with each finished picture, and where every
    picture has its own path it is written at once."""
    from tqdm import tqdm

    from ldm.recipe import save_png

    work = sum(len(recipe.settings.grid(pipe.config)) for recipe in recipes)
    with tqdm(total=work, unit="step", file=sys.stderr) as bar:
        for recipe in recipes:
            for step in pipe.run(recipe.settings):
                latents = step.x_prev
                bar.update()
            images += pipe.decode(latents)
            if len(paths) == len(recipes):
                path = paths[len(images) - 1]
                save_png(images[-1], path, [recipe])
                bar.write(str(path), file=sys.stdout)


def grid(images: Sequence[Image], columns: int, gap: int = 4) -> Image:
    """Pictures of one size side by side, row by row."""
    from PIL import Image as PILImage

    rows = -(-len(images) // columns)
    width, height = images[0].size
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = PILImage.new("RGB", size, "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def grid_columns(recipes: Sequence[Recipe]) -> int:
    """A row per prompt where each has several pictures; else as near to a square as it gets."""
    prompts = [recipe.settings.prompt for recipe in recipes]
    runs = [len(list(run)) for _, run in itertools.groupby(prompts)]
    if len(runs) > 1 and runs[0] > 1:
        return runs[0]
    return math.ceil(math.sqrt(len(recipes)))
