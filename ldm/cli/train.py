"""`ldm train`: Horizon from nothing, or one of its stages; and what a finished model is taught."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import options

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage
    from ldm.train.teach import WordAsked

STAGES = ("autoencoder", "clip", "diffusion")  # ldm.train.run.STAGES
TAUGHT = {
    "lora": ("rank", "alpha", "convolutions"),
    "embedding": ("word", "start", "vectors"),
}
"""What a finished model can be taught, and the options of that alone."""
TEACHING = ("pictures", "caption", "weights", "vae", "text", "config", "ema", "prediction")
"""The options that both have."""
EXAMPLES = """examples:
  ldm train horizon --out runs/mine
  ldm train diffusion --out runs/mine --resume
  ldm train lora --pictures mills --caption "a windmill" --out runs/mill
  ldm train embedding --pictures mills --word windmill --start house --out runs/word
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser(
        "train",
        help="train Horizon, or one of its stages, from nothing; or teach a model one thing more",
        epilog=EXAMPLES,
    )
    p.add_argument(
        "stage",
        choices=(*STAGES, "horizon", *TAUGHT),
        help="horizon is the first three, evaluated; lora and embedding learn from --pictures",
    )
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on from the folder's checkpoints")
    p.add_argument("--steps", type=int, metavar="N", help="training steps (default: the recipe's)")
    p.add_argument("--batch-size", type=int, metavar="N", help="(default: the recipe's)")
    p.add_argument("--learning-rate", type=float, metavar="RATE", help="(default: the recipe's)")
    p.add_argument(
        "--seed", type=int, metavar="N", help="of weights, scenes and noise (default: 0)"
    )
    options.add_device_option(p)
    add_teaching_options(p)
    p.set_defaults(run=run)


def add_teaching_options(parser: argparse.ArgumentParser) -> None:
    """What a model is taught, and which."""
    p = parser.add_argument_group("to teach a model one thing more: lora, embedding")
    p.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="pictures, and beside each its caption: mill.png, mill.txt",
    )
    p.add_argument(
        "--caption",
        metavar="TEXT",
        help="of pictures without one; {word} in it is the word (embedding: a photo of {word})",
    )
    p.add_argument("--rank", type=int, metavar="N", help="lora: how much it can learn (4)")
    p.add_argument("--alpha", type=float, metavar="A", help="lora: it counts A / rank (the rank)")
    p.add_argument(
        "--convolutions",
        action="store_true",
        default=None,
        help="lora: correct the ResBlocks as well as attention",
    )
    p.add_argument("--word", metavar="NAME", help="embedding: the word that is new")
    p.add_argument("--start", metavar="WORD", help="embedding: a known word to begin from")
    p.add_argument("--vectors", type=int, metavar="N", help="embedding: tokens of the word (1)")
    options.add_weights_option(p)
    options.add_model_options(p)


def run(args: argparse.Namespace) -> int:
    """Run one training stage, or all three and the evaluation."""
    asked = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }
    changes = {name: value for name, value in asked.items() if value is not None}
    check_options(args)
    if args.stage == "horizon" and changes.keys() - {"seed"}:
        raise ValueError("--steps, --batch-size and --learning-rate are for a single stage")
    if args.resume and not args.out.is_dir():
        raise ValueError(f"nothing to resume: there is no folder {args.out}")
    if args.stage == "horizon" and not args.resume and args.out.exists():
        raise ValueError(f"{args.out} exists: pass --resume to go on there, or another --out")

    if args.stage in TAUGHT:
        options.tell(teach(args, changes))
        return 0

    from ldm.train.run import stage

    device = str(options.asked_device(args))
    for name in STAGES if args.stage == "horizon" else (args.stage,):
        resume = args.resume and (args.stage != "horizon" or (args.out / f"{name}.pt").exists())
        stage(name, args.out, resume=resume, device=device, **changes)
    if args.stage == "horizon":
        print(report(args.out))
    return 0


def check_options(args: argparse.Namespace) -> None:
    """A ValueError for an option of another stage, or one that is missing."""
    for one, own in TAUGHT.items():
        foreign = [f"--{name}" for name in own if getattr(args, name) is not None]
        if foreign and args.stage != one:
            raise ValueError(f"{foreign[0]} is for ldm train {one}")
    # Where nobody says it, --ema is "auto", and every other option is None.
    given = [f"--{name}" for name in TEACHING if getattr(args, name) not in (None, "auto")]
    if given and args.stage not in TAUGHT:
        raise ValueError(f"{given[0]} is for ldm train {' and '.join(TAUGHT)}")
    needed = {"lora": ("pictures",), "embedding": ("pictures", "word", "start")}
    for name in needed.get(args.stage, ()):
        if getattr(args, name) is None:
            raise ValueError(f"ldm train {args.stage} needs --{name}")


def teach(args: argparse.Namespace, changes: dict[str, float]) -> Path:
    """Train a LoRA or a word, and return its file. All that can be wrong is said before the model's
    weights are read."""
    from ldm.train import teach
    from ldm.train.lessons import read_folder

    caption, out = args.caption, args.out
    if args.stage == "embedding":
        caption = (caption or "a photo of {word}").replace("{word}", args.word)
    told = read_folder(args.pictures, caption)
    if args.stage == "lora":
        own = (args.rank, args.alpha, bool(args.convolutions))
        lora = teach.lora_settings(out, *own, changes, args.resume)
        return teach.teach_lora(asked_model(args), told, out, lora, resume=args.resume)
    settings = teach.embedding_settings(out, args.vectors, changes, args.resume)
    asked = teach.WordAsked(told, args.word, args.start)
    pipe = asked_model(args, asked)
    return teach.teach_embedding(pipe, asked, out, settings, resume=args.resume)


def asked_model(args: argparse.Namespace, word: WordAsked | None = None) -> TextToImage:
    """The model to teach, in float32, read once it is clear that it can be taught."""
    import torch

    from ldm.pipeline import TextToImage
    from ldm.train.teach import check_model

    device = options.asked_device(args)
    sources, config = options.open_asked(args)
    check_model(config)
    plans, tokenizer = options.plan_asked(sources, args.ema)
    if word is not None:
        word.check(tokenizer, config)
    return TextToImage.from_plans(plans, tokenizer, device=device, dtype=torch.float32)


def report(out: Path) -> str:
    """Evaluate the finished model of a run, write `evaluation.md` beside it, and return it."""
    import torch

    from ldm.evaluate.prompts import evaluate
    from ldm.files import write_text
    from ldm.pipeline import load
    from ldm.train.clip import PAIR_FILE, load_pair

    pipe = load(out, dtype=torch.float32)
    text = evaluate(pipe, load_pair(out / PAIR_FILE, pipe.text)).as_markdown()
    write_text(out / "evaluation.md", text + "\n")
    return text
