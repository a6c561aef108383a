"""`ldm download`: fetch official weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import options

EXAMPLES = """examples:
  ldm download sd-v1-5
  ldm generate "a lighthouse in a storm" --weights weights/sd-v1-5
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser(
        "download", help="fetch official weights, and CLIP's vocabulary", epilog=EXAMPLES
    )
    p.add_argument("model", help="such as sd-v1-4 or sd-v1-5; a wrong name lists all")
    p.add_argument(
        "--folder", type=Path, default=Path("weights"), metavar="FOLDER", help="(%(default)s)"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Say by what terms they come, and fetch them."""
    from ldm.checkpoints.download import download, known_file

    options.say(known_file(args.model).terms)
    options.tell(download(args.model, args.folder))
    return 0
