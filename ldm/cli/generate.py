"""`ldm generate`: draw pictures of prompts, or a picture again by the recipe that it carries."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import options

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.config import ModelConfig
    from ldm.inputs import Inputs
    from ldm.pipeline import TextToImage
    from ldm.recipe import Recipe

IN_THE_RECIPE = (
    *options.RUN,
    *("seed", "num_images", "reproduce", "device", "dtype", "ema", "scale", "captions"),
)
MOST_ON_A_SHEET = 4096
EXAMPLES = """examples:
  ldm generate "a red house on green grass at night"
  ldm generate "a red house" "a blue house" -n 4 --grid -o houses.png
  ldm generate "calm sea at sunset" -s 7 -k 30 --scale 4
  ldm generate "a blue house" --image red-house.png --strength 0.6
  ldm generate --like houses.png -o again.png
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser("generate", help="draw pictures of a prompt", epilog=EXAMPLES)
    p.add_argument("prompts", nargs="*", metavar="prompt", help="what to draw; several are fine")
    p.add_argument(
        *("-o", "--output"),
        type=Path,
        metavar="PNG",
        help="where to write (default: a name from the prompt)",
    )
    p.add_argument("--like", type=Path, metavar="PNG", help="make this picture again")
    p.add_argument(
        "--reproduce", metavar="CODE", help=f"the seed's picture of {' or '.join(options.LIKE)}"
    )
    options.add_run_options(p, seed_help="image i uses seed + i (default: drawn, and printed)")
    options.add_drawing_options(p)
    options.add_lora_option(p, "draw with this LoRA")
    add_sheet_options(p)
    p.set_defaults(run=run, defaults={name: p.get_default(name) for name in IN_THE_RECIPE})


def add_sheet_options(parser: argparse.ArgumentParser) -> None:
    """How many pictures, and how they are shown."""
    p = parser.add_argument_group("several pictures, and how large")
    p.add_argument(
        *("-n", "--num-images"), type=int, default=1, metavar="N", help="per prompt (%(default)s)"
    )
    p.add_argument("--grid", action="store_true", help="several pictures on one sheet")
    p.add_argument(
        "--captions",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="say under each picture of a --grid what differs",
    )
    p.add_argument(
        "--scale",
        type=int,
        default=1,
        metavar="N",
        help="show every picture N times as wide and high (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw one picture after the other, so that each depends on its seed alone, the first is there
    at once, however many follow, and Ctrl-C loses only the one being drawn."""
    check_arguments(args)
    prompts = meant(args.prompts)
    from ldm.device import check_device
    from ldm.pipeline import TextToImage

    sources, config = options.open_asked(args)
    if args.like:
        order = order_like(args.like, config, options.asked_pictures(args))
    else:
        order = order_asked(args, prompts, config)
    first = order.recipes[0]
    check_sheet(order)
    count = 1 if order.grid else len(order)
    paths = options.outputs(args.output, first.settings.prompt, ".png", count)
    for source in filter(None, (args.like, args.image, args.mask)):
        if any(path.resolve() == source.resolve() for path in paths.taken()):
            raise ValueError(f"{source} would be overwritten: name another file with -o")
    plans, tokenizer = options.plan_asked(sources, first.ema)
    loras = options.asked_loras(args)
    order = sign(order, args.like, options.files_of(sources), loras)
    pipe = TextToImage.from_plans(
        plans,
        tokenizer,
        device=check_device(first.device),
        dtype=options.named_dtype(first.dtype),
    )
    for path, scale in loras:
        pipe.load_lora(path, scale)
    if args.weights:
        options.say(f"weights {pipe.origin}")
    if args.seed is None and not args.like:
        options.say(f"seed {first.settings.seed}")
    if order.grid:
        draw_sheet(pipe, order, paths.path)
    else:
        draw_files(pipe, order, paths)
    return 0


# --- What to draw ----------------------------------------------------------------------------


def check_arguments(args: argparse.Namespace) -> None:
    """A ValueError for arguments that do not go together, whatever the model."""
    if not args.prompts and not args.like:
        raise ValueError('pass a prompt, in quotes: ldm generate "a red house"; or --like PNG')
    if args.num_images < 1:
        raise ValueError(f"--num-images must be 1 or more, not {args.num_images}")
    if not 1 <= args.scale <= options.MAX_SCALE:
        raise ValueError(f"--scale must be between 1 and {options.MAX_SCALE}, not {args.scale}")
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


def meant(prompts: Sequence[str]) -> list[str]:
    """The prompts; but where all are single words, which is how one looks without its quotes, ask
    for what is meant, or at least say what is being done."""
    if len(prompts) < 2 or any(" " in prompt for prompt in prompts):
        return list(prompts)
    one = " ".join(prompts)
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty()):
        options.say(
            f"ldm: {len(prompts)} prompts, each of one word; for one picture of all, "
            f'put them in quotes: "{one}"'
        )
        return list(prompts)
    options.say(f'ldm: one picture, of "{one}"? Or {len(prompts)}, one of each word?')
    while True:
        sys.stderr.write(f"[1]/{len(prompts)}: ")
        sys.stderr.flush()
        answer = sys.stdin.readline()
        if not answer:  # the end of the input, Ctrl-D
            raise KeyboardInterrupt
        if answer.strip() in ("", "1"):
            return [one]
        if answer.strip() == str(len(prompts)):
            return list(prompts)


@dataclass(frozen=True)
class Order:
    """What is to be drawn: so many pictures by each recipe, of one seed after the other.

    Attributes:
        recipes: of the first picture of each.
        inputs: what all of them are given.
        each: how many pictures.
        grid: whether all go onto one sheet.
    """

    recipes: Sequence[Recipe]
    inputs: Inputs
    each: int
    grid: bool

    def __len__(self) -> int:
        return len(self.recipes) * self.each

    def __iter__(self) -> Iterator[Recipe]:
        """The recipe of each picture alone, made when its turn comes: there may be a million."""
        for recipe in self.recipes:
            for i in range(self.each):
                yield dataclasses.replace(recipe, settings=recipe.settings.later(i))


def order_asked(args: argparse.Namespace, prompts: Sequence[str], config: ModelConfig) -> Order:
    """What the arguments ask for, not yet signed, or a ValueError."""
    from ldm.inputs import asked
    from ldm.recipe import Recipe

    run = options.asked_run(args)
    device = options.asked_device(args)
    dtype = str(options.asked_dtype(args, device)).removeprefix("torch.")
    recipes = []
    for i, prompt in enumerate(prompts):
        settings, inputs = asked(config, prompt, {**run, "like": args.reproduce})
        settings = settings.later(i * args.num_images)
        for one in (settings, settings.later(args.num_images - 1)):
            one.check(config)
        recipes.append(
            Recipe(
                settings=settings,
                model=config.name,
                model_sha256="",
                ema=args.ema,
                device=str(device),
                dtype=dtype,
                versions={},
                scale=args.scale,
                captions=args.grid and args.captions,
                inputs=inputs.held(),
            )
        )
    return Order(recipes, inputs, args.num_images, grid=args.grid)


def order_like(
    path: Path, config: ModelConfig, pictures: Mapping[str, Image] | None = None
) -> Order:
    """An existing picture's, made from these pictures, by the names of their options; or a
    ValueError when its recipes cannot be followed here."""
    from ldm.device import check_device
    from ldm.inputs import Inputs
    from ldm.recipe import read_recipes

    recipes = read_recipes(path)
    first = recipes[0]
    alike = all(
        dataclasses.replace(one, settings=first.settings, versions=first.versions) == first
        for one in recipes
    )
    sizes = {(one.settings.height, one.settings.width) for one in recipes}
    alone = all(one.settings.num_images == 1 for one in recipes)
    known = first.dtype in options.DTYPES and first.ema in options.EMA
    if not (known and alone and alike and len(sizes) == 1):
        raise ValueError(f"the recipe in {path} is not one that ldm wrote")
    check_device(first.device)
    inputs = Inputs.of(**pictures or {})
    check_given(path, first, inputs)
    for one in recipes:
        one.settings.check(config)
        inputs.check(one.settings, config)
    return Order(recipes, inputs, 1, grid=True)


def check_given(path: Path, recipe: Recipe, inputs: Inputs) -> None:
    """A ValueError unless the pictures are those that the recipe's picture was drawn from."""
    held = inputs.held()
    for name, theirs in recipe.inputs.items():
        if theirs is None:
            raise ValueError(f"{path} was drawn with a function, {name}, which no picture carries")
        if name not in options.PICTURES:
            raise ValueError(
                f"{path} was drawn with {name} of its own, which Python alone can give"
            )
        height, width = theirs.shape[:2]
        if (ours := held.get(name)) is None:
            raise ValueError(
                f"{path} was drawn from a picture of {width}x{height} pixels: pass it with --{name}"
            )
        if ours != theirs:
            raise ValueError(
                f"--{name} is not what {path} was drawn from: the SHA-256 of its pixels is "
                f"{ours.sha256}, and was {theirs.sha256}"
            )
    for name in held.keys() - recipe.inputs.keys():
        raise ValueError(f"{path} was drawn without a picture to start from: leave out --{name}")


def check_sheet(order: Order) -> None:
    """A ValueError in one line if what is to be on one sheet would not fit in memory, or its
    recipes in one picture."""
    from ldm.settings import check_bytes

    first = order.recipes[0]
    width, height = first.settings.width * first.scale, first.settings.height * first.scale
    count = len(order) if order.grid else 1
    what = f"a sheet of {count} pictures of" if order.grid else "a picture of"
    check_bytes(f"{what} {width}x{height} pixels", 2 * 3 * count * width * height)
    if count > MOST_ON_A_SHEET:
        raise ValueError(f"a sheet holds {MOST_ON_A_SHEET:,} pictures at most, not {count:,}")


def sign(
    order: Order,
    like: Path | None,
    files: Sequence[Path],
    loras: Sequence[tuple[Path, float]] = (),
) -> Order:
    """The order with the hashes of the weights and of the LoRAs in its recipes, and the versions
    that follow them here.

    Raises:
        FileNotFoundError: a LoRA is not there.
        ValueError: they are those of the picture `like`, which was made with other weights.
    """
    from ldm.files import file_sha256, weights_sha256
    from ldm.recipe import Addition, installed_versions

    if lost := [path for path, _ in loras if not path.is_file()]:
        raise FileNotFoundError(f"no LoRA at {lost[0]}")
    sha256, versions = weights_sha256(files), installed_versions()
    used = tuple(Addition(path.name, file_sha256(path), scale) for path, scale in loras)
    if like:
        theirs = order.recipes[0]
        if sha256 != theirs.model_sha256:
            raise ValueError(
                f"{like} was made with weights whose SHA-256 is {theirs.model_sha256}, "
                f"but that of {', '.join(map(str, files))} is {sha256}"
            )
        if [(one.sha256, one.scale) for one in used] != [
            (one.sha256, one.scale) for one in theirs.loras
        ]:
            told = ", ".join(f"{one.file}:{one.scale:g}" for one in theirs.loras) or "none"
            raise ValueError(f"{like} was made with these LoRAs: {told}; pass --lora for each")
        if versions != theirs.versions:
            options.say(
                f"ldm: made with {theirs.versions}, here are {versions}: the last bits may differ"
            )
    signed = [
        dataclasses.replace(one, model_sha256=sha256, versions=versions, loras=used)
        for one in order.recipes
    ]
    return dataclasses.replace(order, recipes=signed)


# --- Drawing ---------------------------------------------------------------------------------


def draw(pipe: TextToImage, order: Order) -> Iterator[tuple[Recipe, Image]]:
    """Follow the recipes in order: each picture, when it is finished, with its own."""
    from tqdm import tqdm

    steps = sum(len(one.settings.grid(pipe.schedule)) for one in order.recipes)
    # No bar where nobody watches: in a log it would be a line a step.
    with tqdm(total=steps * order.each, unit="step", file=sys.stderr, disable=None) as bar:
        for recipe in order:
            for step in pipe.run(recipe.settings, order.inputs):
                latents = step.x_prev
                bar.update()
            (image,) = pipe.pictures(latents, recipe.settings, order.inputs)
            with bar.external_write_mode():
                yield recipe, enlarged(image, recipe.scale)


def draw_files(pipe: TextToImage, order: Order, paths: Iterable[Path]) -> None:
    """A file for each picture, written and told as soon as it is drawn."""
    from ldm.recipe import save_png

    for path, (recipe, image) in zip(paths, draw(pipe, order), strict=True):
        save_png(image, path, [recipe])
        options.tell(path)


def draw_sheet(pipe: TextToImage, order: Order, path: Path) -> None:
    """All pictures on one sheet; after Ctrl-C those that were finished."""
    from ldm.cli.sheet import sheet
    from ldm.recipe import save_png

    recipes: list[Recipe] = []
    images: list[Image] = []
    try:
        for recipe, image in draw(pipe, order):
            recipes.append(recipe)
            images.append(image)
    finally:
        if images:
            save_png(sheet(images, recipes), path, recipes)
            options.tell(path)


def enlarged(image: Image, scale: int) -> Image:
    """A picture as many times as wide and high, without squares (Lanczos); by 1, itself."""
    from PIL.Image import Resampling

    size = (image.width * scale, image.height * scale)
    return image if scale == 1 else image.resize(size, Resampling.LANCZOS)
