"""`ldm download`: fetch official weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm.cli import options


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser("download", help="fetch official weights, and CLIP's vocabulary")
    p.add_argument("model", help="such as sd-v1-4 or sd-v1-5; a wrong name lists all")
    p.add_argument("--folder", type=Path, default=Path("weights"), help="(%(default)s)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Say by what terms they come, and fetch them."""
    from ldm.checkpoints.download import download, known_file

    print(known_file(args.model).terms, file=sys.stderr)
    print(download(args.model, args.folder))
    return 0
