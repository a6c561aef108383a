"""Every writer of the library says in one line that a disk is full, and leaves nothing behind."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import ldm
from ldm.checkpoints.convert import convert
from ldm.checkpoints.tokenizer_files import write_tokenizer
from ldm.cli.main import main as cli
from ldm.files import WriteError
from ldm.observe.traces import trace
from ldm.pipeline import TextToImage
from ldm.recipe import save_png
from ldm.tokenizer import Tokenizer
from ldm.train.clip import CLIPPair, save_pair
from ldm.viz.animations import animation
from tests.disk import FULL, full_disk
from tests.helpers import tiny_config, tiny_model
from tests.places import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> TextToImage:
    return ldm.load(folder, device="cpu")


NOISE = Image.effect_noise((200, 200), 50)

# What is written, under which name a caller asks for it, and how many bytes there is room for: of a
# model the tokenizer comes first.
WRITERS: dict[str, tuple[str, int, Callable[[TextToImage, Path], object]]] = {
    "model": ("a.safetensors", 20_000, lambda pipe, path: pipe.save(path)),
    "trace": ("a.safetensors", 1000, lambda pipe, path: trace(pipe, "a house", steps=1).save(path)),
    "pair": ("a.safetensors", 1000, lambda pipe, path: save_pair(path, CLIPPair(pipe.text, 32))),
    "picture": ("a.png", 1000, lambda pipe, path: save_png(NOISE, path, [])),
    "animation": ("a.webp", 1000, lambda pipe, path: animation([NOISE, NOISE]).save(path)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_that_names_the_file(
    pipe: TextToImage, tmp_path: Path, kind: str
) -> None:
    name, room, write = WRITERS[kind]
    with full_disk(room), pytest.raises(WriteError) as error:
        write(pipe, tmp_path / name)
    assert str(error.value) == f"{tmp_path / name} cannot be written: {FULL}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["new/a.safetensors", "new/folder"])
def test_a_conversion_without_room_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    (tmp_path / "new").mkdir()
    with full_disk(20_000):
        code = cli(["convert", str(folder), str(tmp_path / target)])
    assert code == 2
    assert capsys.readouterr().err == f"ldm: {tmp_path / target} cannot be written: {FULL}\n"
    assert not list((tmp_path / "new").iterdir())
    convert(folder, tmp_path / target)
    assert ldm.load(tmp_path / target, device="cpu").unet.config == tiny_config().unet


def test_a_tokenizer_is_written_with_both_its_files_or_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a red house on green grass"] * 5, vocab_size=530)
    with full_disk(1000), pytest.raises(WriteError, match=r"vocab\.json cannot be written"):
        write_tokenizer(tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "merges.txt").mkdir()
    with pytest.raises(WriteError, match=r"merges\.txt cannot be written: it is a folder"):
        write_tokenizer(tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["merges.txt"]


# --- One way to write --------------------------------------------------------------------------

SAFE = {"written_whole", "folder_written_whole", "writing"}
PATHS_OWN = {"write_bytes", "write_text", "touch"}  # methods of a path


def called(node: ast.AST) -> tuple[str, str]:
    """What is called, such as ("torch", "save"); of a plain name ("", "open")."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)):
            return owner, name
        case ast.Call(func=ast.Attribute(attr=name)):
            return "...", name
        case ast.Call(func=ast.Name(id=name)):
            return "", name
    return "", ""


def writes(node: ast.AST) -> bool:
    """Whether this call writes a file. A picture's own `save` is not told from that of a figure."""
    owner, name = called(node)
    if not isinstance(node, ast.Call):
        return False
    if name == "open":
        words = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [word.value for word in words if isinstance(word, ast.Constant)]
        return any(re.fullmatch(r"[rbt+]*[wax+][bt+]*", str(mode)) for mode in modes)
    is_torchs = (owner, name) == ("torch", "save")
    return is_torchs or name == "save_file" or (owner != "" and name in PATHS_OWN)


def unsafe_writes(node: ast.AST) -> list[int]:
    """The lines that write a file, but in no block that writes it whole, or at least names it."""
    if isinstance(node, ast.With) and any(called(i.context_expr)[1] in SAFE for i in node.items):
        return []
    inside = [line for child in ast.iter_child_nodes(node) for line in unsafe_writes(child)]
    return [node.lineno, *inside] if isinstance(node, ast.Call) and writes(node) else inside


def test_nothing_in_the_library_writes_a_file_in_another_way() -> None:
    found = {}
    for path in sorted((ROOT / "ldm").rglob("*.py")):
        if lines := unsafe_writes(ast.parse(path.read_text(encoding="utf-8"))):
            found[str(path.relative_to(ROOT))] = lines
    assert found == {}


def test_what_writes_in_another_way_would_be_found() -> None:
    program = """
        from ldm.files import written_whole, write_text
        write_text(path, "fine")
        path.open("rb")
        with written_whole(path) as temporary:
            torch.save(state, temporary)
            temporary.open("wb").write(b"fine")
        torch.save(state, path)
        path.open("w")
        open(path, mode="ab")
        path.write_text("bad")
        save_file(tensors, path)
        """
    lines = unsafe_writes(ast.parse("\n".join(line[8:] for line in program.splitlines())))
    assert lines == [8, 9, 10, 11, 12]
