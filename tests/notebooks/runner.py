"""Run the notebooks, and keep them with their outputs: `python -m tests.notebooks [NAMES...]`.

A name is a notebook's number ("01"), the start of its name or its path; without names, all are run.
Each runs in a fresh kernel and an empty temporary folder. Where every cell runs, the notebook is
stored with its outputs, less all that would differ the next time; where one fails, its error is
told and the file stays as it was.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.places import ROOT

FOLDER = ROOT / "notebooks"
MAX_BYTES = 1_000_000  # of a stored notebook: code hosts show no larger ones
CELL_SECONDS = 600

ANSI = re.compile(r"\x1b\[[0-9;]*m")
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
PICTURE = re.compile(r"[A-Za-z0-9+/]{200,}")  # in base64, where any letters may stand


class NotebookError(Exception):
    """A cell that fails, or outputs that are not fit to be kept."""


def find(names: Sequence[str], folder: Path) -> list[Path]:
    """The notebooks of these names in a folder, or all.

    Raises:
        NotebookError: no notebook, or more than one, has such a name.
    """
    every = sorted(folder.glob("*.ipynb"))
    if not every:
        raise NotebookError(f"there are no notebooks in {folder}")
    found = []
    for name in names:
        fits = [path for path in every if path.name.startswith(Path(name).name)]
        if len(fits) != 1:
            known = ", ".join(path.stem for path in fits or every)
            raise NotebookError(f"{name!r} is not the start of one notebook's name: {known}")
        found += fits
    return found or every


def executed(path: Path, folder: Path) -> Any:
    """The notebook at `path` with fresh outputs, `cleaned`; its kernel works in `folder`. The file
    is only read.

    Raises:
        NotebookError: a cell fails: the notebook, the cell, its error and where it came from.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        startup_timeout=CELL_SECONDS,  # a busy machine needs more than the minute it would have
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    # The library of this checkout, wherever the kernel starts, and nothing from a network.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Two threads that wait for each other stand still when another program takes a core: a notebook
    # of a minute then takes ten. And none spins while it waits.
    env = {
        **{"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},  # unless the user says otherwise
        **os.environ,
        **{"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
    }
    try:
        client.execute(env=env)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(f"{path.name}, {failure(notebook, error)}") from None
    return cleaned(notebook)


def failure(notebook: Any, error: Exception) -> str:
    """The number of the cell that failed, its error, and the end of its traceback."""
    for number, cell in enumerate(notebook.cells, 1):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                lines = ANSI.sub("", "\n".join(output.traceback)).splitlines()
                where = "\n".join(lines[-25:])
                return f"cell {number}: {output.ename}: {output.evalue}\n{where}"
    return f"{type(error).__name__}: {ANSI.sub('', str(error))}"  # its time ran out, or it died


def cleaned(notebook: Any) -> Any:
    """A copy without what differs from run to run, or is there twice: the cells' ids and metadata,
    addresses of objects, the versions of the kernel, a JPEG beside its PNG."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number:02}"
        # Which cells a page hides is the author's word; the rest is when and where it was run.
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data.pop("image/jpeg", None)
            if "text/plain" in data:
                data["text/plain"] = ADDRESS.sub("", data["text/plain"])
            if "metadata" in output:
                output.metadata = {}
    return notebook


def problems(notebook: Any) -> list[str]:
    """What makes a notebook unfit to be kept, a line each: outputs that are missing, out of order,
    errors or warnings, that name a folder of this machine, or that are too large."""
    found = []
    code = [(n, cell) for n, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code"]
    if [cell.execution_count for _, cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run once each, from the first to the last")
    for number, cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} ended with {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                first = output.text.strip().splitlines()[0] if output.text.strip() else ""
                found.append(f"cell {number} writes to stderr (a warning?): {first}")
    text = PICTURE.sub("", as_text(notebook))
    for place in sorted({str(ROOT), str(Path.home()), tempfile.gettempdir(), "site-packages"}):
        if place != "/" and re.search(rf"{re.escape(place)}(?![\w-])", text):
            found.append(f"it names a place on this machine: {place}")
    size = len(as_text(notebook).encode())
    if size >= MAX_BYTES:
        found.append(f"it has {size:,} bytes; {MAX_BYTES:,} are too many")
    return found


def as_text(notebook: Any) -> str:
    """As it is stored."""
    import nbformat

    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def run(path: Path) -> None:
    """Execute the notebook at `path`, and store it with its outputs.

    Raises:
        NotebookError: a cell fails, or what came out is not fit to be kept; the file stays as it
            was.
    """
    from ldm.files import write_text

    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(path, Path(folder))
        left = sorted(child.name for child in Path(folder).iterdir())
    wrong = problems(notebook) + [f"it leaves a file behind: {name}" for name in left]
    if wrong:
        raise NotebookError("\n".join(f"{path.name}: {line}" for line in wrong))
    write_text(path, as_text(notebook))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks that are asked for; 1 if any fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 01 (default: all)")
    names = parser.parse_args(arguments).names
    failed = 0
    try:
        for path in find(names, FOLDER):
            started = time.monotonic()
            try:
                run(path)
                print(f"{path.stem}: {time.monotonic() - started:.0f} s", flush=True)
            except NotebookError as error:
                failed += 1
                print(f"FAILED {error}", file=sys.stderr, flush=True)
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0
