"""The documentation names code and tests: all of it is there. (`make docs` builds the site itself;
where it has been built, this looks at the pages too.)"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = DOCS / "_build" / "html"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("stages/*.md")])
STAGES = sorted(DOCS.glob("stages/*.md"))
OWN = [page for page in PAGES if page.stem not in ("weights", "tokenizer", "other-code")]


def test_there_are_pages() -> None:
    assert len(STAGES) == 10 and DOCS / "glossary.md" in PAGES and DOCS / "where.md" in PAGES


# --- Names in our code -----------------------------------------------------------------------


@cache
def definitions(path: Path) -> dict[str, ast.AST]:
    """Every class, function and assigned name of a file, by its dotted name inside of the file."""
    found: dict[str, ast.AST] = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[prefix + node.target.id] = node
            elif isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name)]
                found.update({prefix + name: node for name in names})

    walk(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


@cache
def module_file(name: str) -> Path | None:
    """`ldm.train.clip` -> its file, or None where there is no such module."""
    path = ROOT.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def is_defined(name: str) -> bool:
    """Whether a full dotted name is a module of ours, or something that one defines."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if file := module_file(".".join(parts[:cut])):
            return cut == len(parts) or ".".join(parts[cut:]) in definitions(file)
    return False


@cache
def identifiers() -> set[str]:
    """Every name that our code gives to anything: functions, classes, arguments, fields, modules
    and variables; and with its class, what a class defines."""
    names: set[str] = set()
    for path in ROOT.glob("ldm/**/*.py"):
        names |= definitions(path).keys()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def test_names_are_found_and_others_are_not() -> None:
    assert is_defined("ldm.samplers.Step.x0") and is_defined("ldm.train.clip")
    assert not is_defined("ldm.samplers.Step.z0") and not is_defined("ldm.train.flip")
    assert {"alpha_bar", "cross_attention", "Step.x0"} <= identifiers()
    assert not {"alphas_cumprod", "Step.z0"} & identifiers()


# --- Excerpts --------------------------------------------------------------------------------

EXCERPT = re.compile(r"```\{literalinclude\} (?P<path>\S+)\n(?P<options>(?::.*\n)*)```")


def excerpts() -> list[tuple[Path, Path, dict[str, str]]]:
    """(page, file, options) of every excerpt."""
    found = []
    for page in PAGES:
        for match in EXCERPT.finditer(page.read_text(encoding="utf-8")):
            lines = match["options"].splitlines()
            options = {
                key: value.strip().strip('"')
                for key, _, value in (line[1:].partition(":") for line in lines)
            }
            found.append((page, (page.parent / match["path"]).resolve(), options))
    return found


def shown(path: Path, options: dict[str, str]) -> list[str]:
    """The lines that an excerpt shows, read without Sphinx."""
    lines = path.read_text(encoding="utf-8").splitlines()
    node = definitions(path)[options["pyobject"]]
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = lines[first - 1 : node.end_lineno]
    if start := options.get("start-at"):
        lines = lines[next(i for i, line in enumerate(lines) if start in line) :]
    if stop := options.get("end-at"):
        lines = lines[: next(i for i, line in enumerate(lines) if stop in line) + 1]
    if stop := options.get("end-before"):
        lines = lines[: next(i for i, line in enumerate(lines) if stop in line)]
    return lines


@pytest.mark.parametrize("page", STAGES, ids=lambda page: page.stem)
def test_what_a_stage_page_shows_is_there(page: Path) -> None:
    ours = [(path, options) for of, path, options in excerpts() if of == page]
    for path, options in ours:
        assert path.is_file(), path
        assert options["pyobject"] in definitions(path), options
        assert 1 <= len(shown(path, options)) <= 80, options
        assert str(path.relative_to(ROOT)) in options["caption"]
    kinds = {path.relative_to(ROOT).parts[0] for path, _ in ours}
    assert kinds == {"ldm", "tests"}  # the code, and what checks it


def test_every_test_that_is_shown_is_one() -> None:
    tests = [options["pyobject"] for _, path, options in excerpts() if "tests" in path.parts]
    assert len(tests) > 30
    assert all(name.startswith("test_") for name in tests)


def test_every_beginning_and_end_of_an_excerpt_is_its_only_one() -> None:
    """A line that is there twice could begin another excerpt after a change."""
    for page, path, options in excerpts():
        whole = shown(path, {"pyobject": options["pyobject"]})
        if start := options.get("start-at"):
            assert sum(start in line for line in whole) == 1, (page.name, start)


def test_paths_in_the_text_are_there() -> None:
    for page in OWN:
        for path in re.findall(r"`((?:ldm|tests|docs|weights)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)


# --- References and the glossary ---------------------------------------------------------------


def test_every_reference_to_our_code_is_defined() -> None:
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\{py:\w+\}`~?([\w.]+)`", page.read_text(encoding="utf-8")):
            assert is_defined(target), (page.name, target)
            checked += 1
    assert checked > 60


def test_every_module_has_a_page_of_its_interface() -> None:
    listed = set(re.findall(r"^   (ldm[\w.]*)$", (DOCS / "api.md").read_text(), flags=re.M))
    there = set()
    for path in ROOT.glob("ldm/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        there.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert listed == there


def glossary() -> list[dict[str, list[str]]]:
    """The rows of the glossary's tables of names: {column: its names}."""
    rows = []
    header: list[str] = []
    for line in (DOCS / "glossary.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if "here" in cells:
            header = cells
        elif not cells:
            header = []
        elif header and not set("".join(cells)) <= set("-: "):
            assert len(cells) == len(header), line
            pairs = zip(header, cells, strict=True)
            rows.append({column: re.findall(r"`([^`]+)`", cell) for column, cell in pairs})
    return rows


def test_every_name_of_ours_in_the_glossary_exists() -> None:
    names = [name for row in glossary() for name in row["here"]]
    assert len(names) > 45 and all(row["here"] for row in glossary())
    assert [name for name in names if name not in identifiers()] == []


def test_every_name_of_diffusers_in_the_glossary_exists() -> None:
    spec = importlib.util.find_spec("diffusers")  # imports nothing
    if spec is None or spec.origin is None:
        pytest.skip("diffusers is not installed")
    folder = Path(spec.origin).parent
    files = [
        "schedulers/scheduling_ddim.py",
        "schedulers/scheduling_ddpm.py",
        "pipelines/stable_diffusion/pipeline_stable_diffusion.py",
        "models/unets/unet_2d_condition.py",
        "models/autoencoders/autoencoder_kl.py",
        "models/autoencoders/vae.py",
        "models/transformers/transformer_2d.py",
        "models/attention_processor.py",
        "models/attention.py",
        "models/activations.py",
        "models/embeddings.py",
        "models/resnet.py",
        "models/downsampling.py",
        "models/upsampling.py",
        "training_utils.py",
    ]
    code = "\n".join((folder / file).read_text(encoding="utf-8") for file in files)
    words = set(re.findall(r"\w+", code))
    names = [name for row in glossary() for name in row["diffusers"]]
    assert len(names) > 40
    assert [name for name in names if name not in words] == []


# --- The pages speak of the project alone ------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_needs_a_network_to_be_seen(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|srcset|data)\s*=\s*["']?(?:https?:)?//""", text)
    assert not re.search(r"!\[[^]]*\]\(https?:", text)


# --- The site, where it has been built ---------------------------------------------------------


class Loads(HTMLParser):
    """Collects what a page loads by itself: not the links that a reader may follow."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.mathml = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.mathml += tag == "math"
        self.urls += [values[name] or "" for name in ("src", "srcset", "data") if name in values]
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.urls.append(values["href"] or "")


def test_the_built_site_loads_nothing_from_a_network() -> None:
    pages = sorted(SITE.glob("**/*.html"))
    if not pages:
        pytest.skip(f"the site is not built: run `make docs` ({SITE.relative_to(ROOT)})")
    mathml = 0
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        mathml += loads.mathml
        for url in loads.urls:
            assert not re.match(r"(?:https?:)?//", url), (page.name, url)
    assert mathml > 100
    for sheet in SITE.glob("_static/**/*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet
