"""The entry point: the parser of all commands, and what becomes of an error.

What is wrong with the arguments is said in one line, with exit code 2, before any work starts.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from ldm.cli import convert, download, evaluate, explain, generate, inspect, show, train
from ldm.version import ldm_version

COMMANDS = (generate, explain, show, inspect, convert, download, train, evaluate)  # as in the help


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ldm: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    # Threads that spin while they wait for one another take the processor from the very threads
    # that they wait for, where other programs run too. OpenMP reads this once, as torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):  # a prompt may hold what a console cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_: f"ldm: {message}\n"  # for people, in one line
    try:
        code: int = args.run(args)
        return code
    except (ValueError, OSError) as error:
        print(f"ldm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ldm: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(prog="ldm", description="Latent diffusion, from scratch.")
    parser.add_argument("--version", action="version", version=f"ldm {ldm_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
