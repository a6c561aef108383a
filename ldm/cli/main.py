"""The command `ldm`: draw pictures, see how one was made, handle files of weights, train Horizon.

What is wrong with the arguments is said in one line, with exit code 2, before any work starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import math
import re
import secrets
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

import ldm
from ldm.checkpoints.checkpoint import (
    Ema,
    config_from_json,
    find_file,
    joint_config,
    open_model,
    plan_stages,
)
from ldm.config import ModelConfig
from ldm.device import check_device, default_device, default_dtype
from ldm.checkpoints.download import require_tokenizer
from ldm.files import check_writable
from ldm.pipeline import SAMPLERS, TextToImage, check_prompts, check_settings
from ldm.presets import PRESETS
from ldm.recipe import Recipe, installed_versions, read_recipes, save_png, weights_sha256

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RECIPE_OPTIONS = (
    *("steps", "sampler", "guidance_scale", "negative_prompt", "eta", "seed"),
    *("num_images", "height", "width", "device", "dtype", "ema", "reproduce"),
)
EMA: dict[str, Ema] = {"auto": "auto", "yes": True, "no": False}
CONFIG_HELP = "a config.json like Horizon's, for weights of another size that bring none"
EMA_HELP = "take the running mean of the UNet's weights; auto: if it is there (%(default)s)"
STAGES = ("autoencoder", "clip", "diffusion")
COMPARE_OPTIONS = {
    "steps": int,
    "sampler": str,
    "guidance_scale": float,
    "negative_prompt": str,
    "eta": float,
    "seed": int,
}


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ldm: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a prompt may hold what a console cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_: f"ldm: {message}\n"  # for people, in one line
    try:
        code: int = args.run(args)
        return code
    except (ValueError, OSError) as error:
        print(f"ldm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ldm: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(prog="ldm", description="Latent diffusion, from scratch.")
    parser.add_argument("--version", action="version", version=f"ldm {ldm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    p = commands.add_parser("generate", help="draw pictures of a prompt")
    p.add_argument("prompts", nargs="*", metavar="prompt", help="what to draw; several are fine")
    p.add_argument("-o", "--output", type=Path, help="PNG to write (default: from the prompt)")
    add_run_options(p, seed_help="image i uses seed + i (default: drawn, and printed)")
    p.add_argument("--num-images", type=int, default=1, help="per prompt (%(default)s)")
    p.add_argument("--grid", action="store_true", help="several pictures as one grid")
    p.add_argument("--like", type=Path, metavar="PNG", help="make this picture again")
    p.add_argument(
        "--reproduce", default="", metavar="CODE", help="the seed's picture of compvis or diffusers"
    )
    p.set_defaults(run=generate, defaults={name: p.get_default(name) for name in RECIPE_OPTIONS})

    p = commands.add_parser("explain", help="how a picture comes out of noise, as one HTML page")
    p.add_argument("prompt", help="what to draw")
    p.add_argument("-o", "--output", type=Path, help="HTML to write (default: from the prompt)")
    p.add_argument("--compare", metavar="PROMPT", help="watch a second run, of this prompt, too")
    add_run_options(p, seed_help="(default: drawn, and printed)")
    second = p.add_argument_group(
        "a second run", "to watch beside the first: of --compare's prompt, or the same, but with"
    )
    for name, kind in COMPARE_OPTIONS.items():
        second.add_argument(f"--compare-{name.replace('_', '-')}", type=kind, metavar="OTHER")
    p.set_defaults(run=explain)

    p = commands.add_parser("show", help="print how a picture was made")
    p.add_argument("image", type=Path)
    p.set_defaults(run=show)

    p = commands.add_parser("inspect", help="what is in a file of weights, without loading it")
    p.add_argument("weights", type=Path, help="a file or a folder")
    p.add_argument("--sha256", action="store_true", help="hash it too: that reads all of it")
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=inspect)

    p = commands.add_parser("convert", help="write weights anew: one clean file, or a folder")
    p.add_argument("source", type=Path, help="a file or a folder of weights")
    p.add_argument("target", type=Path, help="NAME.safetensors, or a new diffusers folder")
    p.add_argument("--vae", type=Path, help="another file with the autoencoder")
    p.add_argument("--text", type=Path, help="another file with the text encoder")
    p.add_argument("--config", type=Path, help=CONFIG_HELP)
    p.add_argument("--ema", choices=EMA, default="auto", help=EMA_HELP)
    p.add_argument("--dtype", choices=DTYPES, help="(default: as they are stored)")
    p.set_defaults(run=convert)

    p = commands.add_parser("download", help="fetch official weights, and CLIP's vocabulary")
    p.add_argument("model", help="such as sd-v1-4 or sd-v1-5; a wrong name lists all")
    p.add_argument("--folder", type=Path, default=Path("weights"), help="(%(default)s)")
    p.set_defaults(run=download)

    p = commands.add_parser("train", help="train Horizon, or one of its stages, from nothing")
    p.add_argument("stage", choices=(*STAGES, "horizon"), help="horizon is all three, evaluated")
    p.add_argument("--out", type=Path, required=True, help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on from the folder's checkpoints")
    p.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    p.add_argument("--batch-size", type=int, help="(default: the recipe's)")
    p.add_argument("--learning-rate", type=float, help="(default: the recipe's)")
    p.add_argument("--seed", type=int, help="of weights, scenes and noise (default: 0)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the fastest there is)")
    p.set_defaults(run=train)

    p = commands.add_parser("evaluate", help="measure how well pictures follow their prompts")
    p.add_argument("--weights", type=Path, help="a Horizon checkpoint (default: the shipped one)")
    p.add_argument(
        "--per-value",
        type=int,
        default=100,
        help="prompts for every value of every attribute, at least (%(default)s)",
    )
    p.add_argument("--steps", type=int, default=50, help="sampler steps (%(default)s)")
    p.add_argument("--sampler", default="ddim", help=f"{' or '.join(SAMPLERS)} (%(default)s)")
    p.add_argument("--guidance-scale", type=float, default=7.5, help="(%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of prompts and noise (%(default)s)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the fastest there is)")
    p.add_argument(
        "--attention",
        action="store_true",
        help="draw nothing: do words look at what they name, in --per-value scenes of each object?",
    )
    p.add_argument("--json", action="store_true", help="for programs")
    drawing = {name: p.get_default(name) for name in ("steps", "sampler", "guidance_scale")}
    p.set_defaults(run=evaluate, drawing=drawing)
    return parser


def add_run_options(p: argparse.ArgumentParser, *, seed_help: str) -> None:
    """The settings of a run, and the model that draws it."""
    p.add_argument("--steps", type=int, default=50, help="sampler steps, 1 to 1000 (%(default)s)")
    p.add_argument("--sampler", default="ddim", help=f"{' or '.join(SAMPLERS)} (%(default)s)")
    p.add_argument(
        "--guidance-scale", type=float, default=7.5, help="how hard to follow it (%(default)s)"
    )
    p.add_argument("--negative-prompt", default="", help="what to move away from")
    p.add_argument("--eta", type=float, default=0.0, help="ddim's noise, 0 to 1 (%(default)s)")
    p.add_argument("--seed", type=int, help=seed_help)
    p.add_argument("--height", type=int, help="pixels (default: as the model was trained)")
    p.add_argument("--width", type=int, help="pixels (default: as the model was trained)")
    p.add_argument("--weights", type=Path, help="a file or folder (default: Horizon, shipped)")
    p.add_argument("--vae", type=Path, help="another file with the autoencoder")
    p.add_argument("--text", type=Path, help="another file with the text encoder")
    p.add_argument("--config", type=Path, help=CONFIG_HELP)
    p.add_argument("--ema", choices=EMA, default="auto", help=EMA_HELP)
    p.add_argument("--device", help="cuda, mps or cpu (default: the fastest there is)")
    p.add_argument("--dtype", choices=DTYPES, help="(default: float16 on a GPU, else float32)")


# --- generate, explain and show --------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """Draw one picture after the other, so that each depends on its seed alone and Ctrl-C loses
    only the one being drawn."""
    path = args.weights or ldm.shipped_weights()
    sources = open_model(path, asked_config(args), vae=args.vae, text=args.text)
    config = joint_config(sources)
    recipes = recipes_like(args, config) if args.like else recipes_asked(args, config)
    one_file = args.grid or bool(args.like)
    paths = output_paths(args.output, recipes[0].prompt, 1 if one_file else len(recipes))
    if args.like and paths[0].resolve() == args.like.resolve():
        raise ValueError(f"{args.like} would be overwritten: name another file with -o")
    files = {e.file.path for weights in sources.values() for e in weights.entries.values()}
    plans = plan_stages(sources, EMA[recipes[0].ema], require_tokenizer)
    recipes = sign(recipes, args, sorted(files))
    pipe = TextToImage.from_plans(
        plans, device=torch.device(recipes[0].device), dtype=DTYPES[recipes[0].dtype]
    )
    if args.weights:
        print(f"weights {pipe.origin}", file=sys.stderr)
    if args.seed is None and not args.like:
        print(f"seed {recipes[0].seed}", file=sys.stderr)

    images: list[Image] = []
    try:
        draw(pipe, recipes, images, paths)
    finally:
        if len(paths) < len(recipes) and images:
            finished = recipes[: len(images)]
            save_png(grid(images, grid_columns(finished)), paths[0], finished)
            print(paths[0])
    return 0


def asked_config(args: argparse.Namespace) -> ModelConfig | None:
    """The config in the file that `--config` names, or None."""
    if args.config is None:
        return None
    return config_from_json(args.config.read_text(encoding="utf-8"), args.config)


def recipes_asked(args: argparse.Namespace, config: ModelConfig) -> list[Recipe]:
    """One recipe per picture that the arguments ask for, not yet signed, or a ValueError."""
    if not args.prompts:
        raise ValueError("pass a prompt, or --like PNG")
    prompts = check_prompts(args.prompts, args.num_images)
    if args.reproduce and len(prompts) > 1:
        raise ValueError("--reproduce draws one picture: the noise of more depends on their number")
    device = default_device() if args.device is None else check_device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    recipes = [
        Recipe(
            prompt=prompt,
            negative_prompt=args.negative_prompt,
            seed=seed,
            index=index,
            sampler=args.sampler,
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            eta=args.eta,
            height=config.image_size if args.height is None else args.height,
            width=config.image_size if args.width is None else args.width,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            model=config.name,
            model_sha256="",
            versions={},
            ema=args.ema,
            reproduce=args.reproduce,
        )
        for index, prompt in enumerate(prompts)
    ]
    check_recipes(recipes, config)
    return recipes


def recipes_like(args: argparse.Namespace, config: ModelConfig) -> list[Recipe]:
    """The recipes of an existing picture, or a ValueError when they cannot be followed here."""
    if args.prompts:
        raise ValueError("--like takes the prompt from the picture: pass one or the other")
    for name in RECIPE_OPTIONS:
        if getattr(args, name) != args.defaults[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--like takes every setting from the picture: leave out {option}")
    recipes = read_recipes(args.like)
    shared = {(one.model_sha256, one.device, one.dtype, one.ema) for one in recipes}
    if len(shared) > 1 or recipes[0].dtype not in DTYPES or recipes[0].ema not in EMA:
        raise ValueError(f"the recipe in {args.like} is not one that ldm wrote")
    check_device(recipes[0].device)
    check_recipes(recipes, config)
    return recipes


def check_recipes(recipes: Sequence[Recipe], config: ModelConfig) -> None:
    """A ValueError for the first recipe that the model cannot follow."""
    for one in recipes:
        check_prompts(one.prompt, 1)
        check_settings(
            config,
            negative_prompt=one.negative_prompt,
            steps=one.steps,
            guidance_scale=one.guidance_scale,
            sampler=one.sampler,
            eta=one.eta,
            seed=one.seed,
            num_images=one.index + 1,
            height=one.height,
            width=one.width,
            like=one.reproduce or None,
        )


def sign(
    recipes: Sequence[Recipe], args: argparse.Namespace, files: Sequence[Path]
) -> list[Recipe]:
    """The recipes with the weights' hash and the versions that follow them here.

    Raises:
        ValueError: with --like, when the picture was made with other weights.
    """
    sha256, versions = weights_sha256(files), installed_versions()
    if args.like:
        theirs = recipes[0]
        if sha256 != theirs.model_sha256:
            raise ValueError(
                f"{args.like} was made with weights whose SHA-256 is {theirs.model_sha256}, "
                f"but that of {', '.join(map(str, files))} is {sha256}"
            )
        if versions != theirs.versions:
            print(
                f"ldm: made with {theirs.versions}, here are {versions}: the last bits may differ",
                file=sys.stderr,
            )
    return [dataclasses.replace(one, model_sha256=sha256, versions=versions) for one in recipes]


def output_paths(output: Path | None, prompt: str, count: int) -> list[Path]:
    """Where the pictures go: one file, or `name-0.png`, `name-1.png`, ...; without a name, one made
    of the prompt that is not taken yet.

    Raises:
        ValueError: a picture could not be written there.
    """
    if output is None:
        stems = (slug(prompt) + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
        candidates = (numbered(Path(stem + ".png"), count) for stem in stems)
        paths = next(c for c in candidates if not any(path.exists() for path in c))
    elif output.suffix.lower() != ".png":
        raise ValueError(f"the output must end in .png, not {output}")
    else:
        paths = numbered(output, count)
    for path in paths:
        check_writable(path)
    return paths


def numbered(path: Path, count: int) -> list[Path]:
    """A path for each of several pictures; one picture needs no number."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def slug(prompt: str) -> str:
    """A prompt as the name of a file: "green grass at night" -> "green-grass-at-night"."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


def draw(
    pipe: TextToImage, recipes: Sequence[Recipe], images: list[Image], paths: Sequence[Path]
) -> None:
    """Follow the recipes in order; `images` grows with each finished picture, and where every
    picture has its own path it is written at once."""
    from tqdm import tqdm

    total = pipe.config.schedule.num_train_timesteps
    grids = [PRESETS[one.reproduce or None].timesteps(one.steps, total) for one in recipes]
    with tqdm(total=sum(map(len, grids)), unit="step", file=sys.stderr) as bar:
        for recipe in recipes:
            run = pipe.denoise(
                recipe.prompt,
                steps=recipe.steps,
                guidance_scale=recipe.guidance_scale,
                negative_prompt=recipe.negative_prompt,
                sampler=recipe.sampler,
                eta=recipe.eta,
                seed=recipe.seed + recipe.index,
                height=recipe.height,
                width=recipe.width,
                like=recipe.reproduce or None,
            )
            for step in run:
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
    runs = [len(list(run)) for _, run in itertools.groupby(recipes, lambda one: one.prompt)]
    if len(runs) > 1 and runs[0] > 1:
        return runs[0]
    return math.ceil(math.sqrt(len(recipes)))


def explain(args: argparse.Namespace) -> int:
    """Write a page that shows how one picture, or two, came out of noise."""
    from ldm.viz import player

    sources = open_model(
        args.weights or ldm.shipped_weights(), asked_config(args), vae=args.vae, text=args.text
    )
    device = default_device() if args.device is None else check_device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    first = {
        **{name: getattr(args, name) for name in ("prompt", *COMPARE_OPTIONS, "height", "width")},
        "seed": seed,
    }
    other = {name: getattr(args, f"compare_{name}") for name in COMPARE_OPTIONS}
    different = {name: v for name, v in {"prompt": args.compare, **other}.items() if v is not None}
    for settings in (first, first | different):
        check_prompts(settings["prompt"], 1)
        check_settings(
            joint_config(sources),
            num_images=1,
            **{name: value for name, value in settings.items() if name != "prompt"},
        )
    if different and first | different == first:
        raise ValueError("the second run would be the first again: change something in it")
    path = page_path(args.output, args.prompt)
    plans = plan_stages(sources, EMA[args.ema], require_tokenizer)
    pipe = TextToImage.from_plans(plans, device=device, dtype=dtype)
    if args.weights:
        print(f"weights {pipe.origin}", file=sys.stderr)
    if args.seed is None:
        print(f"seed {seed}", file=sys.stderr)
    player.explain(pipe, path=path, compare=different or None, progress=True, **first)
    print(path)
    return 0


def page_path(output: Path | None, prompt: str) -> Path:
    """Where a page goes; without a name, one made of the prompt that is not taken yet.

    Raises:
        ValueError: it could not be written there.
    """
    if output is None:
        stems = (slug(prompt) + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
        output = next(p for p in (Path(f"{stem}.html") for stem in stems) if not p.exists())
    elif output.suffix.lower() != ".html":
        raise ValueError(f"the output must end in .html, not {output}")
    check_writable(output)
    return output


def show(args: argparse.Namespace) -> int:
    """Print a picture's recipe, a line per setting."""
    for recipe in read_recipes(args.image):
        for name, value in dataclasses.asdict(recipe).items():
            print(f"{name:>16}  {value}")
        print()
    return 0


# --- Files of weights ------------------------------------------------------------------------


def inspect(args: argparse.Namespace) -> int:
    """Print what is in a file of weights."""
    found = ldm.inspect(args.weights, sha256=args.sha256)
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0


def convert(args: argparse.Namespace) -> int:
    """Write weights anew."""
    from ldm.checkpoints.convert import convert

    convert(
        args.source,
        args.target,
        ema=EMA[args.ema],
        dtype=DTYPES[args.dtype] if args.dtype else None,
        config=asked_config(args),
        vae=args.vae,
        text=args.text,
    )
    print(args.target)
    return 0


def download(args: argparse.Namespace) -> int:
    """Fetch official weights."""
    from ldm.checkpoints.download import download, known_file

    print(known_file(args.model).terms, file=sys.stderr)
    print(download(args.model, args.folder))
    return 0


# --- train and evaluate ----------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Run one training stage, or all three and the evaluation."""
    from ldm.train import run

    device = default_device() if args.device is None else check_device(args.device)
    asked = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }
    changes = {name: value for name, value in asked.items() if value is not None}
    if args.stage == "horizon" and changes.keys() - {"seed"}:
        raise ValueError("--steps, --batch-size and --learning-rate are for a single stage")
    if args.resume and not args.out.is_dir():
        raise ValueError(f"nothing to resume: there is no folder {args.out}")
    if args.stage == "horizon" and not args.resume and args.out.exists():
        raise ValueError(f"{args.out} exists: pass --resume to go on there, or another --out")
    for name in STAGES if args.stage == "horizon" else (args.stage,):
        resume = args.resume and (args.stage != "horizon" or (args.out / f"{name}.pt").exists())
        run.stage(name, args.out, resume=resume, device=str(device), **changes)
    if args.stage == "horizon":
        print(run.report(args.out))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Print how well a model's pictures follow their prompts, or where its words look."""
    from ldm.evaluate import prompts as measure
    from ldm.evaluate.attention import AttentionResults, evaluate_attention
    from ldm.train.clip import PAIR_FILE, load_pair

    if args.per_value < 1:
        raise ValueError(f"--per-value must be 1 or more, not {args.per_value}")
    for name, default in args.drawing.items() if args.attention else ():
        if getattr(args, name) != default:
            raise ValueError(f"--attention draws nothing: leave out --{name.replace('_', '-')}")
    weights = find_file(args.weights or ldm.shipped_weights())
    config = joint_config(open_model(weights))
    settings = {
        "steps": args.steps,
        "sampler": args.sampler,
        "guidance_scale": args.guidance_scale,
        "seed": args.seed,
    }
    check_settings(
        config,
        negative_prompt="",
        eta=0.0,
        num_images=1,
        height=None,
        width=None,
        **settings,
    )
    pipe = ldm.load(weights, device=args.device, dtype=torch.float32)
    results: measure.Results | AttentionResults
    if args.attention:
        results = evaluate_attention(pipe, per_value=args.per_value, seed=args.seed)
    else:
        pair_file = weights.parent / PAIR_FILE
        pair = load_pair(pair_file, pipe.text) if pair_file.is_file() else None
        results = measure.evaluate(pipe, pair, per_value=args.per_value, **settings)
    print(json.dumps(results.as_dict(), indent=2) if args.json else results.as_markdown())
    return 0
