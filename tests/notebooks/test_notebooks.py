"""The walk-through: stored with true outputs, and still true when it is run again.

Plain `pytest` reads them and tests the runner; `pytest -m notebooks` runs them (minutes).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from tests.notebooks import runner as notebooks

PATHS = sorted(notebooks.FOLDER.glob("*.ipynb"))
MISSING = [
    name for name in ("nbclient", "nbformat", "ipykernel") if importlib.util.find_spec(name) is None
]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}"),
    pytest.mark.skipif(not PATHS, reason="this copy of the source came without notebooks"),
]
can_plot = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed here"
)


def read(path: Path):
    import nbformat

    return nbformat.read(path, as_version=4)


def write(path: Path, *sources: str) -> Path:
    """A notebook of these code cells, not run."""
    import nbformat.v4 as v4

    cells = [v4.new_code_cell(source) for source in sources]
    path.write_text(notebooks.as_text(v4.new_notebook(cells=cells)))
    return path


# ------------------------------------------------------------------------------ the walk-through


def test_the_walk_through_has_fifteen_notebooks():
    assert [path.name[:3] for path in PATHS] == [f"{n:02}_" for n in range(1, 16)]


@can_plot
@pytest.mark.notebooks
@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_it_is_still_true(path, tmp_path):
    """Every cell runs, with its assertions, in a fresh kernel and an empty folder, which stays
    empty."""
    again = notebooks.executed(path, tmp_path)
    assert notebooks.problems(again) == []
    assert list(tmp_path.iterdir()) == []
    stored = [cell.source for cell in read(path).cells]
    assert [cell.source for cell in again.cells] == stored


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_it_is_stored_as_a_reader_wants_it(path):
    notebook = read(path)
    assert notebooks.problems(notebook) == []
    assert any(cell.get("outputs") for cell in notebook.cells), "it has no outputs at all"
    assert notebooks.as_text(notebooks.cleaned(notebook)) == path.read_text(encoding="utf-8"), (
        f"not as the runner stores it: python -m tests.notebooks {path.name[:2]}"
    )


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_it_asserts_what_it_claims(path):
    code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    assert sum(len(re.findall(r"^\s*assert ", source, re.MULTILINE)) for source in code) >= 5


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_it_ends_with_three_exercises_and_their_solutions(path):
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert prose.count("<details>") == prose.count("</details>") == 3
    assert prose.count("<summary>Solution</summary>") == 3


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_its_links_lead_somewhere(path):
    """To the neighbours, and to files of this repository."""
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    targets = [
        target.split("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", prose)
        if not target.startswith(("http", "#", "attachment:"))
    ]
    assert targets, "it links to no neighbour"
    for target in targets:
        assert (path.parent / target).exists(), target


# ------------------------------------------------------------------------------------ the runner


def test_a_run_keeps_outputs_and_nothing_that_changes(tmp_path):
    path = write(
        tmp_path / "01_a.ipynb",
        "from IPython.display import display\nfrom PIL import Image\nimport ldm\nobject()",
        "for word in ('one', 'two'):\n    print(word, flush=True)\ndisplay(Image.new('L', (4, 4)))",
    )
    notebooks.run(path)
    first, notebook = path.read_bytes(), read(path)
    assert notebooks.problems(notebook) == []
    assert [cell.id for cell in notebook.cells] == ["cell-01", "cell-02"]
    assert all(cell.metadata == {} for cell in notebook.cells)
    shown, *_ = notebook.cells[0].outputs
    assert shown.data["text/plain"].startswith("<object")
    assert "0x" not in shown.data["text/plain"]  # no address
    printed, picture = notebook.cells[1].outputs
    assert printed.text == "one\ntwo\n"
    assert set(picture.data) == {"text/plain", "image/png"}  # and no JPEG beside it
    notebooks.run(path)
    assert path.read_bytes() == first


def test_a_failing_cell_is_named_and_the_file_stays(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "01_a.ipynb", "x = 1", "assert x == 2, 'x is one'", "x = 3")
    before = path.read_bytes()
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    assert notebooks.main(["01"]) == 1
    told = capsys.readouterr().err
    assert "01_a.ipynb, cell 2: AssertionError: x is one" in told
    assert "assert x == 2" in told and "\x1b" not in told
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["01_a.ipynb"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from pathlib import Path\nPath('left.txt').touch()", "leaves a file behind: left.txt"),
        ("import warnings\nwarnings.warn('old')", "cell 1 writes to stderr"),
        ("import os\nprint(os.getcwd())", "a place on this machine"),
        # In lines: nbclient searches each with an expression that is quadratic in its length.
        ("print(('x' * 99 + '\\n') * 10_000)", "are too many"),
    ],
)
def test_what_is_not_fit_to_be_kept_is_not_kept(tmp_path, source, problem):
    path = write(tmp_path / "01_a.ipynb", source)
    before = path.read_bytes()
    with pytest.raises(notebooks.NotebookError, match=problem):
        notebooks.run(path)
    assert path.read_bytes() == before


def test_cells_that_were_not_run_in_order_are_a_problem(tmp_path):
    notebook = read(write(tmp_path / "01_a.ipynb", "1", "2"))
    assert notebooks.problems(notebook) != []
    notebook.cells[0].execution_count, notebook.cells[1].execution_count = 2, 1
    assert notebooks.problems(notebook) != []
    notebook.cells[0].execution_count, notebook.cells[1].execution_count = 1, 2
    assert notebooks.problems(notebook) == []


def test_names_are_numbers_names_or_paths(tmp_path):
    for name in ("01_a.ipynb", "02_b.ipynb", "02_c.ipynb"):
        shutil.copy(write(tmp_path / "x", "1"), tmp_path / name)
    first, second, _ = every = [tmp_path / n for n in ("01_a.ipynb", "02_b.ipynb", "02_c.ipynb")]
    assert notebooks.find([], tmp_path) == every
    assert notebooks.find(["02_b", "01"], tmp_path) == [second, first]
    assert notebooks.find(["notebooks/01_a.ipynb"], tmp_path) == [first]
    for wrong in ("02", "03"):
        with pytest.raises(notebooks.NotebookError, match=f"'{wrong}' is not the start of one"):
            notebooks.find([wrong], tmp_path)
    with pytest.raises(notebooks.NotebookError, match="no notebooks"):
        notebooks.find([], tmp_path / "nowhere")
