"""Settings of the documentation: `sphinx-build -W -b html docs docs/_build/html`."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import ldm

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "ldm"
author = "the authors of ldm"
html_title = "ldm: latent diffusion from scratch"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_templates", "measured", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]

# --- Pages and notebooks -----------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs; `make notebooks` runs them
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # they would come from a network


def copy_notebooks() -> None:
    """Sphinx reads what lies under docs/: bring the notebooks there, their links with them."""
    target = DOCS / "notebooks"
    target.mkdir(exist_ok=True)
    notebooks = {path.name: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    for old in target.glob("*.ipynb"):
        if old.name not in notebooks:
            old.unlink()
    for name, path in notebooks.items():
        text = path.read_text(encoding="utf-8").replace("](../docs/", "](docs/")
        text = text.replace("](../weights/horizon/README.md)", "](docs/horizon.md)")
        text = text.replace("](../", "](../../").replace("](docs/", "](../")
        copy = target / name
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            copy.write_text(text, encoding="utf-8")
    none = target / "none.md"
    if notebooks:
        none.unlink(missing_ok=True)
    else:
        none.write_text("# None are here\n\nThis copy of the source came without notebooks.\n")


copy_notebooks()

# --- Docstrings --------------------------------------------------------------------------------

default_role = "code"  # `x` is code, as in Markdown
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = True
# The front door hands on what its rooms define, by name: functions are shown there too, and what
# else there is leads to its room.
autosummary_context = {
    "front_functions": [name for name in ldm.HOME if inspect.isfunction(getattr(ldm, name))],
    "front_others": [
        f"{getattr(getattr(ldm, name), '__module__', f'ldm.{home}')}.{name}"
        for name, home in ldm.HOME.items()
        if not inspect.isfunction(getattr(ldm, name))
    ],
}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# What starts a block in reStructuredText by itself: a field, a directive, a list.
BLOCK = re.compile(r"\s*(:\w|\.\. |[-*+] |\d+\. )")

# A bar or a star that marks nothing up: |x - y|, (B, C, *size).
BARE = re.compile(r"\|(?=\S)|(?<![\w*])\*(?=\w[^*]*$)")

# The end of code that a letter follows: several `Step`s.
ENDED = re.compile(r"(?<=[^\s(`]`)(?=\w)")


def plain(line: str) -> str:
    """Escape, outside of code, what reStructuredText would take for its own."""
    outside = line.split("`")[::2]
    inside = line.split("`")[1::2]
    escaped = [BARE.sub(r"\\\g<0>", part) for part in outside]
    whole = "`".join(a for pair in zip_longest(escaped, inside) for a in pair if a is not None)
    return ENDED.sub(r"\\ ", whole)


# Attributes that share what is said of them: Sphinx would take the first for the type of the last.
SHARED = re.compile(r":ivar (\w+(?:, \w+)+):(.*)")


def attributes_stand_alone(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """`device, dtype: where, and as what` for each of the two, as napoleon does with arguments."""
    alone: list[str] = []
    field: list[str] = []  # the lines of a shared one
    names: list[str] = []
    for line in [*lines, ""]:
        if field and line.startswith(" "):
            field.append(line)
            continue
        alone += [text for one in names for text in (f":ivar {one}:{field[0]}", *field[1:])]
        field, names = [], []
        if shared := SHARED.match(line):
            names, field = shared[1].split(", "), [shared[2]]
        else:
            alone.append(line)
    lines[:] = alone[:-1]


def blocks_are_literal(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """In our docstrings an indented block is code, a drawing or an equation in plain text, and
    rows between bars are a table: show both as they stand in the source."""
    shown: list[str] = []
    above = ""  # the last line that was not empty
    literal = False
    for line in lines:
        starts = not literal and (not shown or not shown[-1].strip()) and bool(above)
        indent = len(line) - len(line.lstrip())
        deeper = indent >= 4 and not BLOCK.match(above) and above == above.lstrip()
        if starts and line.strip() and (deeper or line.startswith("| ")):
            shown += ["::", ""]
            literal = True
        elif literal and line.strip() and indent == 0 and not line.startswith("|"):
            literal = False
        if literal:
            shown.append(f"    {line}" if line.startswith("|") else line)
        else:
            shown.append(plain(line))
        above = line if line.strip() else above
    lines[:] = shown


# --- Mathematics -------------------------------------------------------------------------------

html_math_renderer = "mathml"  # browsers draw it themselves: no script, no network
latex_to_mathml = LatexToMathML()


def mathml(node: nodes.Element, *, block: bool) -> str:
    try:
        text = node.astext().strip()
        return latex_to_mathml.convert_with_local_state(text, displaystyle=block)
    except LatexError as error:
        logging.getLogger(__name__).warning("not LaTeX: %s", error, location=node)
        return "<code>?</code>"


def inline_math(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def block_math(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append(f'<div class="equation-line">{mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


# --- The look ----------------------------------------------------------------------------------

(font,) = (f for f in files("ziamath") or [] if f.name == "STIXTwoMath-Regular.ttf")

html_theme = "furo"
html_static_path = ["_static", str(font.locate())]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

# --- Runs of `ldm explain` ---------------------------------------------------------------------

# `make runs` writes them. The pages say so where they are not there.
RUNS = DOCS / "_build" / "runs"
html_extra_path = [str(RUNS)] if RUNS.is_dir() else []


def setup(app: Sphinx) -> None:
    if any(RUNS.glob("*.html")):
        app.tags.add("runs")
    app.connect("autodoc-process-docstring", attributes_stand_alone, priority=800)
    app.connect("autodoc-process-docstring", blocks_are_literal, priority=900)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
