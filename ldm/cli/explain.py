"""`ldm explain`: a page that shows how one picture, or two, came out of noise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import options

if TYPE_CHECKING:
    from ldm.checkpoints.recognise import Weights
    from ldm.config import ModelConfig
    from ldm.settings import Settings

COMPARE = {
    "steps": int,
    "sampler": str,
    "guidance_scale": float,
    "negative_prompt": str,
    "eta": float,
    "seed": int,
}
EXAMPLES = """examples:
  ldm explain "a red house in the snow"
  ldm explain "a red house in the snow" --compare "a blue house in the snow" -o two.html
  ldm explain "calm sea at sunset" -s 1 --compare-sampler ddpm
  ldm explain "a red house in the snow" --live -o live.html
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser(
        "explain", help="how a picture comes out of noise, as one HTML page", epilog=EXAMPLES
    )
    p.add_argument("prompt", nargs="+", help="what to draw: all words are one prompt")
    p.add_argument(
        *("-o", "--output"),
        type=Path,
        metavar="HTML",
        help="where to write (default: a name from the prompt)",
    )
    p.add_argument("--compare", metavar="PROMPT", help="watch a second run, of this prompt, too")
    p.add_argument("--live", action="store_true", help="a page that holds the model, and draws")
    p.add_argument(
        "--runtime",
        type=Path,
        metavar="DIR",
        help="where npm's onnxruntime-web is unpacked, for --live (default: fetched once)",
    )
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

    prompt = " ".join(args.prompt)
    sources, config = options.open_asked(args)
    device = options.asked_device(args)
    dtype = options.asked_dtype(args, device)
    other = {"prompt": args.compare, **{name: getattr(args, f"compare_{name}") for name in COMPARE}}
    runs = runs_asked(
        config,
        prompt,
        compare={name: value for name, value in other.items() if value is not None} or None,
        **options.asked_run(args),
    )
    path = options.outputs(args.output, prompt, ".html").path
    if args.live:
        if any(inputs.held() for _, inputs in runs):
            raise ValueError("a live page draws from noise: leave out --image")
        return run_live(args, config, [settings for settings, _ in runs], sources, path)
    if args.runtime:
        raise ValueError("--runtime is of --live")
    plans, tokenizer = options.plan_asked(sources, args.ema)
    pipe = TextToImage.from_plans(plans, tokenizer, device=device, dtype=dtype)
    if args.weights:
        options.say(f"weights {pipe.origin}")
    if args.seed is None:
        options.say(f"seed {runs[0][0].seed}")
    explain_runs(pipe, runs, path, progress=sys.stderr.isatty())
    options.tell(path)
    return 0


def run_live(
    args: argparse.Namespace,
    config: ModelConfig,
    runs: Sequence[Settings],
    sources: Mapping[str, Weights],
    path: Path,
) -> int:
    """Write the page that holds the model."""
    import torch

    from ldm.pipeline import TextToImage
    from ldm.viz.player.live import check_live, explain_live
    from ldm.viz.player.runtime import runtime_files

    if len(runs) > 1:
        raise ValueError("a live page has nothing to compare: it draws what it is asked for")
    check_live(config, runs[0], path)
    runtime = runtime_files(args.runtime)
    plans, tokenizer = options.plan_asked(sources, args.ema)
    pipe = TextToImage.from_plans(plans, tokenizer, device=torch.device("cpu"), dtype=torch.float32)
    if args.weights:
        options.say(f"weights {pipe.origin}")
    if args.seed is None:
        options.say(f"seed {runs[0].seed}")
    explain_live(pipe, runs[0], path, runtime)
    options.tell(path)
    return 0
