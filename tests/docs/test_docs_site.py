"""The documentation names code and tests: all of it is there, and every link leads somewhere.
(`make docs` builds the site itself; where it has been built, this looks at the pages too.)"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import tomllib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

import ldm
from tests.places import ROOT

DOCS = ROOT / "docs"
SITE = DOCS / "_build" / "html"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("stages/*.md")])
STAGES = sorted(DOCS.glob("stages/*.md"))
OWN = [page for page in PAGES if page.stem not in ("weights", "tokenizer", "other-code")]


def test_there_are_pages() -> None:
    assert len(STAGES) == 11 and DOCS / "glossary.md" in PAGES and DOCS / "where.md" in PAGES


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


@cache
def handed_on(package: str) -> dict[str, str]:
    """What the front of a package takes from its files for others, name -> full name: of a room by
    the imports that its `__all__` lists, of `ldm` itself by `ldm.HOME`."""
    if package == "ldm":
        return {name: f"ldm.{home}.{name}" for name, home in ldm.HOME.items()}
    file = module_file(package)
    if file is None or file.name != "__init__.py":
        return {}
    offered = definitions(file).get("__all__")
    names = ast.literal_eval(offered.value) if isinstance(offered, ast.Assign) else []
    return {
        alias.name: f"{node.module}.{alias.name}"
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
        if alias.asname is None and alias.name in names
    }


def is_defined(name: str) -> bool:
    """Whether a full dotted name is a module of ours, or something that one defines, or that the
    front of a room hands on."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        package, inside = ".".join(parts[:cut]), parts[cut:]
        if file := module_file(package):
            if not inside or ".".join(inside) in definitions(file):
                return True
            home = handed_on(package).get(inside[0])
            return home is not None and is_defined(".".join([home, *inside[1:]]))
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
    assert is_defined("ldm.samplers.loop.Step.x0") and is_defined("ldm.train.clip")
    assert not is_defined("ldm.samplers.loop.Step.z0") and not is_defined("ldm.train.flip")
    # Handed on by the front of a room, or of the house.
    assert is_defined("ldm.samplers.Step.x0") and is_defined("ldm.samplers.ddim")
    assert is_defined("ldm.Step.x0") and is_defined("ldm.load") and is_defined("ldm.viz.strip")
    assert not is_defined("ldm.samplers.Step.z0") and not is_defined("ldm.samplers.ddim_rule")
    assert not is_defined("ldm.lod") and not is_defined("ldm.ddim")
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
    for page in [*OWN, ROOT / "README.md", ROOT / "weights" / "horizon" / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:ldm|tests|docs|weights)/[\w/.-]+)`", text):
            assert (ROOT / path).exists(), (page, path)


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


# --- The rooms -------------------------------------------------------------------------------


@cache
def floors() -> list[set[str]]:
    """The floors of the house, from the top, by the first contract in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    assert contract["type"] == "layers" and contract["exhaustive"]  # so that no file is left out
    return [set(layer.split(" | ")) for layer in contract["layers"]]


def test_the_page_of_the_architecture_names_the_rooms_of_the_contracts() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    named: dict[int, set[str]] = {}
    for number, cell in re.findall(r"^\| (\d+) \| (.*?) \|", text, flags=re.MULTILINE):
        paths = re.findall(r"`([\w/.]+)`", cell)
        assert paths and all((ROOT / "ldm" / path).exists() for path in paths), cell
        rooms = {path.rstrip("/").removesuffix(".py").replace("/", ".") for path in paths}
        assert not named.get(int(number), set()) & rooms, cell
        named.setdefault(int(number), set()).update(rooms)
    assert list(named) == list(reversed(range(len(named))))  # 0 is the lowest
    assert list(named.values()) == floors()


def test_the_picture_of_the_architecture_shows_the_rooms_of_the_contracts() -> None:
    """A box stands on its floor by its height; `on a, b, on c` in its small text are two floors
    more, one below the other."""
    picture = (DOCS / "_static" / "rooms.svg.html").read_text(encoding="utf-8")
    box = r'<a href="(.*?)"><rect x="\d+" y="(\d+)".*?/><text[^>]*>(.*?)</text>'
    drawn: dict[int, list[list[set[str]]]] = {}
    for link, y, title, small in re.findall(rf"{box}<text[^>]*>(.*?)</text></a>", picture):
        assert is_defined(link.removeprefix("_api/").removesuffix(".html")), link
        below = small.removeprefix("on ").split(", on ") if small.startswith("on ") else []
        drawn.setdefault(int(y), []).append([set(names.split(", ")) for names in [title, *below]])
    shown: list[set[str]] = []
    for _, boxes in sorted(drawn.items()):
        depth = max(map(len, boxes))
        shown += [set().union(*(one[i] for one in boxes if i < len(one))) for i in range(depth)]
    assert shown == floors()


def test_the_picture_of_the_architecture_is_told_as_well() -> None:
    """In words, for who does not see it: every room, from the top."""
    picture = (DOCS / "_static" / "rooms.svg.html").read_text(encoding="utf-8")
    (told,) = re.findall(r"<title[^>]*>(.*?)</title>", picture)
    words = re.findall(r"[\w.]*\w", told.partition("From the top: ")[2])
    order = [number for word in words for number, floor in enumerate(floors()) if word in floor]
    assert order == sorted(order)
    assert set().union(*floors()) <= set(words)


def test_every_step_from_a_path_to_a_model_has_the_types_that_the_page_says() -> None:
    """The table of functions: what each takes and returns is what its signature says."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \{py:\w+\}`~?([\w.]+)` \| (.*?) \| (.*?) \|", text, flags=re.MULTILINE)
    assert len(rows) >= 5
    for name, takes, returns in rows:
        module, _, function = name.rpartition(".")
        file = module_file(module)
        if file is None:  # a method
            module, _, owner = module.rpartition(".")
            file, function = module_file(module), f"{owner}.{function}"
        assert file is not None, name
        node = definitions(file)[function]
        assert isinstance(node, ast.FunctionDef) and node.returns is not None
        given = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
        assert set(re.findall(r"`(\w+)`", takes)) <= given, (name, takes)
        (type_,) = re.findall(r"`([^`]+)`", returns)
        assert type_ == ast.unparse(node.returns), (name, returns)


# --- Links -----------------------------------------------------------------------------------

NOT_SITE = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "weights" / "horizon" / "README.md"]


def anchors(text: str) -> set[str]:
    """What the headings of a page may be called in a link, as GitHub and MyST make it."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", outside, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*NOT_SITE, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="(.*?)"', prose)
    if page.name == "README.md" and page.parent == ROOT:
        assert len(links) > 40
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path) if path else page
        if page.parent == DOCS and path.startswith("notebooks/"):
            target = ROOT / path  # where the site's copies come from
        assert target.exists(), link
        if heading:
            assert heading in anchors(target.read_text(encoding="utf-8")), link


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


def built(path: str) -> str:
    """A page of the site, where that has been built."""
    page = SITE / path
    if not page.is_file():
        pytest.skip(f"the site is not built: run `make docs` ({SITE.relative_to(ROOT)})")
    return page.read_text(encoding="utf-8")


def test_every_reference_on_a_built_page_is_a_link() -> None:
    """A name without a page of its own would be shown as plain code."""
    found = 0
    for page in PAGES:
        text = built(page.relative_to(DOCS).with_suffix(".html").as_posix())
        for link in re.findall(r'(<a [^>]*>)?<code class="xref py[^>]*>(.*?)</code>', text):
            assert link[0], (page.name, link)
            found += 1
    assert found > 60


def test_the_built_page_of_the_front_door_shows_its_functions_with_their_arguments() -> None:
    text = built("_api/ldm.html")
    for name in ldm.__all__:
        value = getattr(ldm, name)
        if inspect.isfunction(value):
            shown = text.partition(f'id="ldm.{name}"')[2].partition("</dt>")[0]
            told = set(re.findall(r'<span class="n"><span class="pre">(\w+)</span></span>', shown))
            assert set(inspect.signature(value).parameters) <= told, name
        else:
            assert f".{name}" in text, name
