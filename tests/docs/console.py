"""Pages that show commands with what they print: run, compared, and written anew.

A page's `console` blocks are a session in one folder, from the first block to the last:

    ```console
    $ ldm inspect model.safetensors
        path  model.safetensors
        ...
    ```

`python -m tests.docs.console docs/weights.md` runs them all and puts what they printed into the
page. The folder is filled by `example_files` in the page's test, here
`tests/docs/test_docs_weights.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldm.cli import main as cli

PROMPT = "$ ldm "
BLOCK = re.compile(r"(?<=```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
BAR = re.compile(r"^.*\d+%\|.*\n?", re.MULTILINE)  # of tqdm


def commands(page: str) -> list[str]:
    """What is typed on a page, in order."""
    return [command for block in BLOCK.findall(page) for command in typed(block)]


def typed(block: str) -> list[str]:
    """The commands of one block, without the prompt."""
    lines = [line for line in block.splitlines() if line.startswith(PROMPT)]
    return [line.removeprefix("$ ") for line in lines]


def rewrite(page: str, run: Callable[[str], str]) -> str:
    """The page with the output of `run(command)` below each command."""

    def block(match: re.Match[str]) -> str:
        return "".join(f"$ {command}\n{run(command)}" for command in typed(match[0]))

    return BLOCK.sub(block, page)


def run(command: str) -> str:
    """What a command prints, on either stream, as a terminal shows it when all is over."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        contextlib.suppress(SystemExit),  # by which argparse leaves, where arguments are wrong
    ):
        cli.main(shlex.split(command)[1:])
    return without_bars(printed.getvalue())


def without_bars(printed: str) -> str:
    """Text without progress bars: they tell the time, which is another on every run.

    A bar goes back to the start of its line, and what comes then is written over it.
    """
    return BAR.sub("", re.sub(r"^[^\n]*\r", "", printed, flags=re.MULTILINE))


@contextlib.contextmanager
def session(folder: Path) -> Iterator[None]:
    """Commands run in `folder`, without the network and without what this machine has fetched."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.chdir(folder)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        yield


def main(path: str) -> None:
    page = Path(path).resolve()  # the session is in another folder
    example_files = importlib.import_module(f"tests.docs.test_docs_{page.stem}").example_files
    with tempfile.TemporaryDirectory() as folder:
        example_files(Path(folder))
        with session(Path(folder)):
            text = rewrite(page.read_text(encoding="utf-8"), run)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
