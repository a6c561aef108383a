"""`ldm train`: Horizon from nothing, or one of its stages."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import options

STAGES = ("autoencoder", "clip", "diffusion")  # ldm.train.run.STAGES
EXAMPLES = """examples:
  ldm train horizon --out runs/mine
  ldm train diffusion --out runs/mine --resume
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser(
        "train", help="train Horizon, or one of its stages, from nothing", epilog=EXAMPLES
    )
    p.add_argument("stage", choices=(*STAGES, "horizon"), help="horizon is all three, evaluated")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on from the folder's checkpoints")
    p.add_argument("--steps", type=int, metavar="N", help="training steps (default: the recipe's)")
    p.add_argument("--batch-size", type=int, metavar="N", help="(default: the recipe's)")
    p.add_argument("--learning-rate", type=float, metavar="RATE", help="(default: the recipe's)")
    p.add_argument(
        "--seed", type=int, metavar="N", help="of weights, scenes and noise (default: 0)"
    )
    options.add_device_option(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run one training stage, or all three and the evaluation."""
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

    from ldm.train.run import stage

    device = str(options.asked_device(args))
    for name in STAGES if args.stage == "horizon" else (args.stage,):
        resume = args.resume and (args.stage != "horizon" or (args.out / f"{name}.pt").exists())
        stage(name, args.out, resume=resume, device=device, **changes)
    if args.stage == "horizon":
        print(report(args.out))
    return 0


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
