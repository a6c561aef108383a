"""`ldm evaluate`: how well a model's pictures follow their prompts, or where its words look."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import options

if TYPE_CHECKING:
    from ldm.evaluate.attention_tables import AttentionResults
    from ldm.evaluate.prompts import Results

DRAWING = ("steps", "sampler", "guidance_scale")
EXAMPLES = """examples:
  ldm evaluate --per-value 20
  ldm evaluate --attention --json
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser(
        "evaluate", help="measure how well pictures follow their prompts", epilog=EXAMPLES
    )
    p.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="a Horizon checkpoint (default: the shipped one)",
    )
    p.add_argument(
        "--per-value",
        type=int,
        default=100,
        metavar="N",
        help="prompts for every value of every attribute, at least (%(default)s)",
    )
    options.add_sampler_options(p)
    p.add_argument(
        *("-s", "--seed"),
        type=int,
        default=0,
        metavar="N",
        help="of prompts and noise (%(default)s)",
    )
    options.add_device_option(p)
    p.add_argument(
        "--attention",
        action="store_true",
        help="draw nothing: do words look at what they name, in --per-value scenes of each object?",
    )
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table, or JSON."""
    if args.per_value < 1:
        raise ValueError(f"--per-value must be 1 or more, not {args.per_value}")
    for name in DRAWING if args.attention else ():
        if getattr(args, name) is not None:
            raise ValueError(f"--attention draws nothing: leave out --{name.replace('_', '-')}")
    results = measure(args)
    print(json.dumps(results.as_dict(), indent=2) if args.json else results.as_markdown())
    return 0


def measure(args: argparse.Namespace) -> Results | AttentionResults:
    """What the arguments ask for, in full precision."""
    import torch

    from ldm.checkpoints.folders import find_file
    from ldm.checkpoints.loading import joint_config, open_model
    from ldm.checkpoints.shipped import shipped_weights
    from ldm.evaluate.attention import evaluate_attention
    from ldm.evaluate.prompts import evaluate
    from ldm.pipeline import load
    from ldm.settings import Settings
    from ldm.train.clip import PAIR_FILE, load_pair

    weights = find_file(args.weights or shipped_weights())
    settings = Settings.of(
        joint_config(open_model(weights)),
        "what the scenes say",
        steps=args.steps,
        sampler=args.sampler,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
    )
    pipe = load(weights, device=args.device, dtype=torch.float32)
    if args.attention:
        return evaluate_attention(pipe, per_value=args.per_value, seed=args.seed)
    pair_file = weights.parent / PAIR_FILE
    pair = load_pair(pair_file, pipe.text) if pair_file.is_file() else None
    drawing = {name: getattr(settings, name) for name in DRAWING}
    return evaluate(pipe, pair, per_value=args.per_value, seed=args.seed, **drawing)
