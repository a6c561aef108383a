"""`ldm evaluate`: how well a model's pictures follow their prompts, how near they are to the law of
their world, where its words look, or how well it edits; and what small networks learn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ldm.cli import options

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = (
    "attention",
    "distribution",
    "budget",
    "samplers",
    "edits",
    "memorise",
)  # without one of these: prompts
DRAWING = ("steps", "sampler", "guidance_scale")
EXAMPLES = """examples:
  ldm evaluate --per-value 20
  ldm evaluate --attention --json
  ldm evaluate --distribution --per-kind 50 --out drawn.jsonl
  ldm evaluate --budget --guidance-scale 3
  ldm evaluate --edits --steps 20
  ldm evaluate --memorise --out memorise.jsonl
"""


class Measured(Protocol):
    """Results, for programs and for people."""

    def as_dict(self) -> dict[str, Any]: ...

    def as_markdown(self) -> str: ...


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
        metavar="N",
        help="prompts for every value of every attribute, at least (100)",
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
    p.add_argument(
        "--distribution",
        action="store_true",
        help="many pictures of each of a few prompts: two trees? each sky as often as it should?",
    )
    p.add_argument(
        "--budget",
        action="store_true",
        help="where what is wrong comes from: autoencoder, steps, UNet or guidance",
    )
    p.add_argument(
        "--samplers",
        action="store_true",
        help="how good every sampler's pictures are, by the number of calls of the UNet",
    )
    p.add_argument(
        "--edits",
        action="store_true",
        help="how near every way to edit a picture comes to the right answer, which is known",
    )
    p.add_argument(
        "--memorise",
        action="store_true",
        help="train small networks on 2 to 8,192 pictures: which learn their world, and which the "
        "pictures by heart?",
    )
    p.add_argument(
        "--per-kind",
        type=int,
        metavar="N",
        help="pictures of each prompt, for --distribution (200) and --budget (96 at each link), or "
        "of each attribute, for --edits (24)",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON lines of what --distribution sees, or of the curves of --memorise, with a plot "
        "beside it; asked again, only what is missing is drawn or trained",
    )
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table, or JSON."""
    asked = [f"--{name}" for name in MEASURES if getattr(args, name)]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} are two measurements: ask for one")
    for name, wanted in (
        ("per_value", args.attention or not asked),
        ("per_kind", args.distribution or args.budget or args.edits),
        ("out", args.distribution or args.memorise),
    ):
        option, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None and not wanted:
            raise ValueError(f"{option} does not go with what is measured: leave it out")
        if name != "out" and value is not None and value < 1:
            raise ValueError(f"{option} must be 1 or more, not {value}")
    fixed = {
        "--attention": DRAWING,
        "--samplers": ("steps", "sampler"),
        "--memorise": (*DRAWING, "weights", "device"),
    }
    for name in fixed.get(asked[0], ()) if asked else ():
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"leave out --{option}: {asked[0]} has its own, or none")
    results = memorise(args) if args.memorise else measure(args)
    print(json.dumps(results.as_dict(), indent=2) if args.json else results.as_markdown())
    return 0


def memorise(args: argparse.Namespace) -> Measured:
    """The curves; where `--out` says, they are kept, and drawn beside it."""
    from ldm import viz
    from ldm.evaluate.memorise import evaluate_memorise
    from ldm.files import check_writable, written_whole

    if args.out is None:
        return evaluate_memorise(seed=args.seed)
    plot = args.out.with_suffix(".png")
    if plot == args.out:
        raise ValueError(f"--out is for JSON lines, {plot} for the plot: give another name")
    check_writable(plot)
    viz.curves({"a plot": {0: 0}})  # an ImportError before anything is trained, not after
    found = evaluate_memorise(seed=args.seed, out=args.out)
    lines = (found.over_time("from_set"), found.over_time("from_truth"), found.by_scenes())
    with written_whole(plot) as temporary:
        cast("Figure", viz.memorising(*lines).figure).savefig(temporary, format="png", dpi=110)
    return found


def measure(args: argparse.Namespace) -> Measured:
    """What the arguments ask for, in full precision."""
    import torch

    from ldm.checkpoints.folders import find_file
    from ldm.checkpoints.loading import joint_config, open_model
    from ldm.checkpoints.shipped import shipped_weights
    from ldm.evaluate.attention import evaluate_attention
    from ldm.evaluate.budget import evaluate_budget
    from ldm.evaluate.distribution import evaluate_distribution
    from ldm.evaluate.edits import evaluate_edits
    from ldm.evaluate.prompts import evaluate
    from ldm.evaluate.samplers import evaluate_samplers
    from ldm.files import check_writable, file_sha256
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
    if args.out is not None:
        check_writable(args.out)
    pipe = load(weights, device=args.device, dtype=torch.float32)
    per_value = args.per_value or 100
    if args.attention:
        return evaluate_attention(pipe, per_value=per_value, seed=args.seed)
    if args.samplers:
        scale = settings.guidance_scale
        return evaluate_samplers(pipe, guidance_scale=scale, seed=args.seed)
    drawing = {name: getattr(settings, name) for name in DRAWING}
    if args.budget:
        return evaluate_budget(pipe, per_kind=args.per_kind or 96, seed=args.seed, **drawing)
    if args.edits:
        return evaluate_edits(pipe, per_kind=args.per_kind or 24, seed=args.seed, **drawing)
    if args.distribution:
        return evaluate_distribution(
            pipe,
            per_kind=args.per_kind or 200,
            seed=args.seed,
            out=args.out,
            weights=file_sha256(weights),
            **drawing,
        )
    pair_file = weights.parent / PAIR_FILE
    pair = load_pair(pair_file, pipe.text) if pair_file.is_file() else None
    return evaluate(pipe, pair, per_value=per_value, seed=args.seed, **drawing)
