"""The entry point: the parser of all commands, and what becomes of errors and signals.

What is wrong with the arguments is said in one line, with exit code 2, before any work starts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from ldm.cli import (
    convert,
    download,
    evaluate,
    explain,
    export,
    generate,
    inspect,
    options,
    show,
    train,
    verify,
    words,
)
from ldm.errors import did_you_mean, printable
from ldm.speed.waiting import choose_wait_policy
from ldm.version import ldm_version

COMMANDS = (
    generate,
    explain,
    show,
    words,
    inspect,
    convert,
    export,
    download,
    verify,
    train,
    evaluate,
)  # as in the help

EXAMPLES = """examples:
  ldm generate "a red house on green grass at night"
  ldm explain "a red house in the snow" --compare-sampler ddpm
  ldm generate --help

completion at Tab, in bash and zsh, with argcomplete installed:
  eval "$(register-python-argcomplete ldm)"
"""
NO_MEMORY = re.compile("out of memory|allocate memory")  # in torch's words


class Stopped(KeyboardInterrupt):
    """Somebody asks this process to end: it ends as by Ctrl-C, and keeps what is finished."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, and what may have been meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)  # for examples
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, printable(f"ldm: {message} (see {self.prog} --help)") + "\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing is left over: the parser of the command that was given it knows its options."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = did_you_mean(name, self._option_string_actions) if name[0] == "-" else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return known, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 where `verify` finds weights that
    differ, 2 for bad input, 130 after Ctrl-C, 143 after
    SIGTERM, 141 where nobody reads any more."""
    try:
        try:
            return answer(sys.argv[1:] if argv is None else argv)
        finally:
            for stream in consoles():
                stream.flush()
    except OSError as error:
        # The reader, `head -1` say, has left; or what we print goes to a disk that is full. What is
        # still to be flushed, by the interpreter too, goes nowhere.
        gone = isinstance(error, BrokenPipeError)
        if not gone:
            options.say(f"ldm: {error}")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in consoles():
            os.dup2(nowhere, stream.fileno())
        return 141 if gone else 2


def answer(argv: Sequence[str]) -> int:
    """Read the arguments and do what they ask for."""
    for stream in consoles():  # a prompt may hold what a console cannot show
        stream.reconfigure(errors="replace")
    args = parse(argv)
    choose_wait_policy()
    warnings.formatwarning = lambda message, *_: f"ldm: {printable(message)}\n"
    try:
        with stopped_by_signals():
            code: int = args.run(args)
            return code
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        options.say(f"ldm: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        options.say(f"ldm: there is not enough memory: {error}")
        return 2
    except KeyboardInterrupt as stop:
        options.say("ldm: stopped")
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command; where there is none, the help is what was asked for."""
    parser, names = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell, at Tab, asks what could stand here
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)
    if not argv:
        parser.print_help()
        parser.exit()
    if not argv[0].startswith("-") and argv[0] not in names:
        near = did_you_mean(argv[0], names)
        if " " in argv[0]:
            near = f'; did you mean ldm generate "{argv[0]}"?'
        parser.error(f"no command {argv[0]!r}: there are {', '.join(names)}{near}")
    return parser.parse_args(argv)


def build_parser() -> tuple[Parser, list[str]]:
    """All commands and their options, and the commands' names."""
    parser = Parser(prog="ldm", description="Latent diffusion, from scratch.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"ldm {ldm_version()}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser, list(commands.choices)


def consoles() -> list[io.TextIOWrapper]:
    """Where this process writes for people, unless somebody put an object of their own there."""
    return [one for one in (sys.stdout, sys.stderr) if isinstance(one, io.TextIOWrapper)]


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and the terminal's end are as Ctrl-C: what is half-written goes, what is
    finished stays. A signal that whoever started us has dealt with (`nohup`) stays theirs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        there = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        ours = [number for number in there if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
