"""`ldm words`: the words that a model was trained on."""

from __future__ import annotations

import argparse

from ldm.cli import options
from ldm.errors import printable

EXAMPLES = """examples:
  ldm words
  ldm words --weights runs/mine
"""


def add_parser(commands: options.Commands) -> None:
    p = commands.add_parser("words", help="list the words that a model knows", epilog=EXAMPLES)
    options.add_weights_option(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a word per line. A ValueError where nobody wrote them down, as for Stable Diffusion."""
    from ldm.checkpoints.shipped import shipped_weights
    from ldm.checkpoints.tokenizer_files import read_tokenizer, tokenizer_beside

    weights = args.weights or shipped_weights()
    folder = tokenizer_beside(weights)
    words = None if folder is None else read_tokenizer(folder).words
    if words is None:
        raise ValueError(f"{weights} does not say which words its model was trained on")
    for word in sorted(words):
        print(printable(word))
    return 0
