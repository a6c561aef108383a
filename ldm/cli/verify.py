"""`ldm verify`: official weights against the numbers that others published for them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ldm.cli import options

EXAMPLES = """examples:
  ldm verify sd-v1-4.ckpt
  ldm verify weights/sd-v1-5 --picture --json
  ldm verify mine.safetensors --as v1-2
"""
FAILED = 1


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser(
        "verify",
        help="do official weights give the numbers that others published?",
        description="A line per stage: measured, published, source, verdict; then what only the "
        "file can tell. What is printed is meant to be handed on. The exit code is 0 where every "
        "published number agrees, and 1 where one does not.",
        epilog=EXAMPLES,
    )
    p.add_argument("weights", type=Path, help="a file or a folder of Stable Diffusion v1's weights")
    p.add_argument(
        "--as",
        dest="version",
        metavar="VERSION",
        help="which it is, v1-1 to v1-5 (default: told by its hash, or by what agrees)",
    )
    p.add_argument(
        "--picture",
        action="store_true",
        help="draw the whole picture that was published, too: minutes on a CPU",
    )
    p.add_argument("--device", default="cpu", metavar="NAME", help="cuda, mps or cpu (%(default)s)")
    p.add_argument(
        "--ema",
        choices=options.EMA,
        default="auto",
        help="measure the running mean of the UNet's weights; auto: if it is there (%(default)s)",
    )
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 where all that was published agrees, else 1."""
    from ldm.evaluate.verify import verify

    found = verify(
        args.weights,
        version=args.version,
        picture=args.picture,
        device=args.device,
        ema=options.EMA[args.ema],
    )
    print(json.dumps(found.as_dict(), indent=2) if args.json else found.as_markdown())
    return 0 if found.proved else FAILED
