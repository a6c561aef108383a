"""`ldm inspect`: what is in a file of weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ldm.cli import options

EXAMPLES = """examples:
  ldm inspect v1-5-pruned.ckpt
  ldm inspect model.safetensors --sha256 --json
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser(
        "inspect", help="what is in a file of weights, without loading it", epilog=EXAMPLES
    )
    p.add_argument("weights", type=Path, help="a file or a folder")
    p.add_argument("--sha256", action="store_true", help="hash it too: that reads all of it")
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what is there."""
    from ldm.checkpoints.inspection import inspect

    found = inspect(args.weights, sha256=args.sha256)
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0
