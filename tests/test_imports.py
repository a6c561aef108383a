"""Imports run one way: the contracts in pyproject.toml are kept, and would be missed if broken."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

pytest.importorskip("importlinter", reason="import-linter is not installed here")

LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
FILES = sorted((ROOT / "ldm").rglob("*.py"))
BELOW_CLI = [
    path for path in FILES if "cli" not in path.parts and path != ROOT / "ldm" / "__init__.py"
]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` in a folder with a pyproject.toml and an `ldm`."""
    command = [sys.executable, "-c", LINT, "--no-cache"]
    env = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_contracts_are_kept() -> None:
    run = lint(ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


TURNED_ROUND = [
    ("schedule", "unet"),
    ("unet", "files"),
    ("samplers.loop", "layers"),
    ("worlds.reader", "vae"),
    ("checkpoints.keys", "pipeline"),
    ("settings", "pipeline"),
    ("observe.hooks", "observe.traces"),
    ("observe.traces", "viz.runs"),
    ("train.data", "evaluate.prompts"),
    ("files", "errors"),
]


@pytest.mark.parametrize(
    ("importer", "imported"), TURNED_ROUND, ids=[f"{a} imports {b}" for a, b in TURNED_ROUND]
)
def test_a_contract_breaks_where_an_import_is_turned_round(
    importer: str, imported: str, tmp_path: Path
) -> None:
    run = lint(with_import(importer, f"import ldm.{imported}", tmp_path))
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.search(rf"- +ldm\.{importer} -> ldm\.{imported} \(l\.", run.stdout), run.stdout


def test_an_import_for_types_counts(tmp_path: Path) -> None:
    line = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ldm.unet import UNet"
    run = lint(with_import("schedule", line, tmp_path))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "- ldm.schedule -> ldm.unet (l." in run.stdout


def test_a_contract_breaks_where_two_files_of_a_room_import_each_other(tmp_path: Path) -> None:
    run = lint(with_import("worlds.distribution", "import ldm.worlds.scenes", tmp_path))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "No cycles are allowed in ldm.worlds." in run.stdout


def with_import(importer: str, line: str, folder: Path) -> Path:
    """A copy of the library in which one file ends with this import; returns the folder."""
    shutil.copytree(ROOT / "ldm", folder / "ldm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    with (folder / "ldm" / f"{importer.replace('.', '/')}.py").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    return folder


def test_there_is_no_circle_of_files() -> None:
    """Anywhere, the fronts of rooms and what is imported for types or late included."""
    import grimp

    graph = grimp.build_graph("ldm", exclude_type_checking_imports=False, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert {"ldm", "ldm.observe", "ldm.cli.main"} <= imports.keys()
    graphlib.TopologicalSorter(imports).prepare()  # a CycleError names the circle


@pytest.mark.parametrize(
    "path", BELOW_CLI, ids=[path.relative_to(ROOT).as_posix() for path in BELOW_CLI]
)
def test_nothing_below_the_commands_imports_the_whole_package(path: Path) -> None:
    """`import ldm` and `from ldm import ...` would load the front door, and all behind it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                found = [name.name for name in names if name.name.split(".")[0] == "ldm"]
                assert not found, f"line {node.lineno}: from {found[0]} import ... instead"
            case ast.ImportFrom(module=module, level=level):
                assert level == 0, f"line {node.lineno} is relative: write where it leads"
                assert module != "ldm", f"line {node.lineno} imports from the front door"
