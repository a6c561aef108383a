"""`ldm explain`: a page that shows how one picture, or two, came out of noise."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.cli import options

COMPARE = {
    "steps": int,
    "sampler": str,
    "guidance_scale": float,
    "negative_prompt": str,
    "eta": float,
    "seed": int,
}


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser("explain", help="how a picture comes out of noise, as one HTML page")
    p.add_argument("prompt", help="what to draw")
    p.add_argument("-o", "--output", type=Path, help="HTML to write (default: from the prompt)")
    p.add_argument("--compare", metavar="PROMPT", help="watch a second run, of this prompt, too")
    options.add_run_options(p, seed_help="(default: drawn, and printed)")
    options.add_drawing_options(p)
    second = p.add_argument_group(
        "a second run", "to watch beside the first: of --compare's prompt, or the same, but with"
    )
    for name, kind in COMPARE.items():
        second.add_argument(f"--compare-{name.replace('_', '-')}", type=kind, metavar="OTHER")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from ldm.pipeline import TextToImage
    from ldm.viz.player import explain_runs, runs_asked

    sources, config = options.open_asked(args)
    device = options.asked_device(args)
    dtype = options.asked_dtype(args, device)
    other = {"prompt": args.compare, **{name: getattr(args, f"compare_{name}") for name in COMPARE}}
    runs = runs_asked(
        config,
        args.prompt,
        compare={name: value for name, value in other.items() if value is not None} or None,
        **options.asked_settings(args),
    )
    (path,) = options.output_paths(args.output, args.prompt, ".html")
    plans, tokenizer = options.plan_asked(sources, args.ema)
    pipe = TextToImage.from_plans(plans, tokenizer, device=device, dtype=dtype)
    if args.weights:
        print(f"weights {pipe.origin}", file=sys.stderr)
    if args.seed is None:
        print(f"seed {runs[0].seed}", file=sys.stderr)
    explain_runs(pipe, runs, path, progress=True)
    print(path)
    return 0
