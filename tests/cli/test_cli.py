"""The command: what it writes, what it prints, and what it refuses before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm
from ldm.cli import main as cli
from ldm.recipe import read_recipes, save_png
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def generate(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `ldm generate` in an empty folder, with the tiny model on the CPU."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, device: tuple[str, ...] = ("--device", "cpu")) -> int:
        return cli.main(["generate", "--weights", str(model), *device, *args])

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_picture_is_written_where_asked_and_equals_the_librarys(
    generate, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("a red house", "-o", "red.png", "--steps", "3", "--seed", "5") == 0
    assert capsys.readouterr().out == "red.png\n"
    assert names(tmp_path) == ["red.png"]
    (expected,) = ldm.load(model, device="cpu")("a red house", steps=3, seed=5)
    with Image.open("red.png") as image:
        assert image.tobytes() == expected.tobytes()
    (recipe,) = read_recipes(Path("red.png"))
    assert (recipe.prompt, recipe.seed, recipe.index, recipe.steps) == ("a red house", 5, 0, 3)
    assert (recipe.height, recipe.width, recipe.dtype) == (16, 16, "float32")
    assert recipe.versions["torch"] == torch.__version__


def test_without_output_the_picture_is_named_after_its_prompt(generate, tmp_path: Path) -> None:
    assert generate("Green grass, at night!", "--steps", "1") == 0
    assert names(tmp_path) == ["green-grass-at-night.png"]


def test_without_output_no_earlier_picture_is_overwritten(generate, tmp_path: Path) -> None:
    for _ in range(2):
        assert generate("red", "--steps", "1") == 0
    assert generate("red", "blue", "--steps", "1") == 0
    assert names(tmp_path) == ["red-0.png", "red-1.png", "red-2.png", "red.png"]


def test_several_prompts_and_images_become_numbered_files(generate, tmp_path: Path) -> None:
    args = ("red", "blue", "--num-images", "2", "-o", "x.png", "--steps", "2", "--seed", "9")
    assert generate(*args) == 0
    assert names(tmp_path) == ["x-0.png", "x-1.png", "x-2.png", "x-3.png"]
    recipes = [read_recipes(tmp_path / name)[0] for name in names(tmp_path)]
    assert [r.prompt for r in recipes] == ["red", "red", "blue", "blue"]
    assert [(r.seed, r.index) for r in recipes] == [(9, 0), (9, 1), (9, 2), (9, 3)]


def test_a_grid_is_one_file_with_every_recipe(generate, tmp_path: Path) -> None:
    args = ("red", "blue", "sea", "--grid", "-o", "g.png", "--steps", "1", "--seed", "0")
    assert generate(*args) == 0
    with Image.open("g.png") as image:
        assert image.size == (2 * 16 + 4, 2 * 16 + 4)
    assert [r.prompt for r in read_recipes(Path("g.png"))] == ["red", "blue", "sea"]


def test_without_a_seed_one_is_drawn_and_printed(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = set()
    for _ in range(2):
        assert generate("red", "-o", "a.png", "--steps", "1") == 0
        seed = read_recipes(Path("a.png"))[0].seed
        assert f"seed {seed}\n" in capsys.readouterr().err
        seeds.add(seed)
    assert len(seeds) == 2


@pytest.mark.parametrize("extra", [(), ("--grid", "--num-images", "3")])
def test_like_makes_the_same_picture_again_bit_for_bit(
    generate, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    args = ("a red house", "-o", "a.png", "--steps", "3", "--eta", "0.5", "--seed", "4")
    assert generate(*args, "--width", "24", *extra) == 0
    assert generate("--like", "a.png", "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_like_makes_one_image_of_a_batch_again(generate, tmp_path: Path) -> None:
    assert generate("red", "-o", "a.png", "--num-images", "2", "--steps", "2", "--seed", "4") == 0
    assert generate("--like", "a-1.png", "-o", "b.png", device=()) == 0
    assert Path("a-1.png").read_bytes() == Path("b.png").read_bytes()


def test_a_grid_has_a_row_per_prompt_and_can_be_made_again_when_it_was_cut_short(
    generate, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("red", "blue", "--num-images", "3", "--grid", "--steps", "1", "--seed", "0")
    assert generate(*args, "-o", "whole.png") == 0
    with Image.open("whole.png") as image:
        assert image.size == (3 * 20 - 4, 2 * 20 - 4)

    decode, left = ldm.TextToImage.decode, iter(range(4))

    def interrupted(self, latents):  # type: ignore[no-untyped-def]
        if next(left, None) is None:
            raise KeyboardInterrupt
        return decode(self, latents)

    with monkeypatch.context() as patch:
        patch.setattr(ldm.TextToImage, "decode", interrupted)
        assert generate(*args, "-o", "cut.png") == 130
    assert [r.prompt for r in read_recipes(Path("cut.png"))] == ["red"] * 3 + ["blue"]
    assert generate("--like", "cut.png", "-o", "again.png", device=()) == 0
    assert Path("cut.png").read_bytes() == Path("again.png").read_bytes()


def test_like_never_overwrites_its_own_picture(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("red", "-o", "a.png", "--steps", "1") == 0
    before = Path("a.png").read_bytes()
    assert generate("--like", "a.png", "-o", "./a.png", device=()) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert Path("a.png").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 5000},
        {"steps": "x"},
        {"prompt": 5},
        {"device": "cuda:99"},
        {"dtype": "float64"},
        {"height": 15},
        {"eta": 3.0},
        {"versions": 1},
    ],
)
def test_like_checks_a_recipe_before_any_work(
    generate, change: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("red", "-o", "a.png", "--steps", "1") == 0
    (recipe,) = read_recipes(Path("a.png"))
    save_png(Image.open("a.png"), Path("b.png"), [dataclasses.replace(recipe, **change)])
    capsys.readouterr()
    monkeypatch.setattr(ldm, "load", lambda *_, **__: pytest.fail("work started"))
    assert generate("--like", "b.png", "-o", "c.png", device=()) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not Path("c.png").exists()


def test_like_refuses_other_weights_and_names_both(
    generate, tmp_path: Path, tmp_path_factory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("red", "-o", "a.png", "--steps", "1") == 0
    other = tiny_model(tmp_path_factory.mktemp("other"), seed=99)
    assert cli.main(["generate", "--weights", str(other), "--like", "a.png", "-o", "b.png"]) == 2
    error = capsys.readouterr().err
    ours = ldm.recipe.file_sha256(other / "model.safetensors")
    assert ours in error and read_recipes(Path("a.png"))[0].model_sha256 in error
    assert names(tmp_path) == ["a.png"]


def test_show_prints_every_setting(generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a red house", "-o", "a.png", "--steps", "1", "--seed", "3") == 0
    capsys.readouterr()
    assert cli.main(["show", "a.png"]) == 0
    out = capsys.readouterr().out
    (recipe,) = read_recipes(Path("a.png"))
    for name, value in dataclasses.asdict(recipe).items():
        assert f"{name}  {value}" in out


BAD = {
    "unknown weights": (["red", "--weights", "nothing.safetensors"], "no weights at"),
    "unreadable weights": (["red", "--weights", "junk.safetensors"], "is not a file of weights"),
    "size": (["red", "--height", "15"], "height must be a positive multiple of 2, not 15"),
    "no steps": (["red", "--steps", "0"], "steps must be between 1 and 1000, not 0"),
    "too many steps": (["red", "--steps", "1001"], "steps must be between 1 and 1000, not 1001"),
    "sampler": (["red", "--sampler", "magic"], "unknown sampler 'magic'"),
    "empty prompt": (["  "], "the prompt is empty"),
    "no prompt": ([], "pass a prompt"),
    "no folder": (["red", "-o", "nowhere/a.png"], "there is no folder nowhere"),
    "one of several a folder": (
        ["red", "-o", "several.png", "--num-images", "2"],
        "cannot be written",
    ),
    "a folder": (["red", "-o", "folder.png"], "cannot be written"),
    "not a png": (["red", "-o", "a.jpg"], "must end in .png"),
    "device": (["red", "--device", "cuda:99"], "no device 'cuda:99'"),
    "seed": (["red", "--seed", "-1"], "the seed must be between"),
    "like and prompt": (["red", "--like", "a.png"], "pass one or the other"),
    "like and steps": (["--like", "a.png", "--steps", "3"], "leave out --steps"),
    "like nothing": (["--like", "a.png"], "no picture at a.png"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(
    args: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ldm, "load", lambda *_, **__: pytest.fail("work started"))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for folder in ("folder.png", "several-1.png"):
        (tmp_path / folder).mkdir()
    before = names(tmp_path)
    weights = [] if "--weights" in args else ["--weights", str(model)]
    assert cli.main(["generate", *weights, *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1 and captured.out == ""
    assert names(tmp_path) == before


@pytest.mark.parametrize("args", [["--dtype", "float8"], ["--steps", "many"], ["--magic"]])
def test_an_argument_of_the_wrong_kind_is_one_line_and_exit_code_2(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "red", *args])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("broken", ["[1, 2]", "{", '{"a": 1}'])
def test_a_broken_tokenizer_is_one_line(
    broken: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "vocab.json").write_text(broken)
    output = str(tmp_path / "a.png")
    assert cli.main(["generate", "red", "--weights", str(folder), "-o", output]) == 2
    error = capsys.readouterr().err
    assert "tokenizer" in error and len(error.splitlines()) == 1
    assert not Path(output).exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--per-value", "0"], "--per-value must be 1 or more"),
        (["--steps", "0"], "steps must be between"),
        (["--sampler", "euler"], "unknown sampler"),
        (["--guidance-scale", "nan"], "guidance_scale must be a finite number"),
        (["--seed", "-1"], "the seed must be between"),
        (["--weights", "nothing"], "no weights at"),
    ],
)
def test_evaluate_refuses_bad_input_before_any_work(
    args: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "--weights", str(model), *args]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is a POSIX signal")
def test_ctrl_c_keeps_finished_pictures_and_leaves_no_half_file(
    model: Path, tmp_path: Path
) -> None:
    program = "import sys, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from ldm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    args = ["generate", "red", "--num-images", "50", "--steps", "200", "-o", "a.png"]
    args += ["--weights", str(model), "--device", "cpu", "--seed", "0"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *args],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "a-1.png").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in error and "Traceback" not in error
    kept = names(tmp_path)
    assert 2 <= len(kept) < 50
    assert kept == sorted(f"a-{i}.png" for i in range(len(kept)))
    for name in kept:
        with Image.open(tmp_path / name) as image:
            image.load()  # whole
        assert read_recipes(tmp_path / name)


def test_evaluate_prints_a_table_and_json(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [
        "evaluate",
        "--weights",
        str(model),
        "--per-value",
        "1",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    with pytest.warns(UserWarning, match="too long"):  # the tiny model reads a few tokens
        assert cli.main(args) == 0
    assert "| sky |" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="too long"):
        assert cli.main([*args, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["autoencoder"]["sky"]["total"] == 3
    sky = results["prompts"]["sky"]
    assert 0 <= sky["right"] <= sky["total"] >= 3  # each of its values is asked for at least once


# --- Files of weights ------------------------------------------------------------------------


def test_inspect_tells_people_and_programs_what_is_there(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(model)]) == 0
    told = capsys.readouterr().out
    assert "safetensors" in told and "unet" in told and "tiny" in told
    assert cli.main(["inspect", str(model / "model.safetensors"), "--json", "--sha256"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["container"] == "safetensors" and found["stages"].keys() == {"unet", "vae", "text"}
    expected = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert expected in json.dumps(found)


def test_convert_writes_a_folder_and_a_file_that_draw_the_same_picture(
    generate, model: Path, tmp_path: Path
) -> None:
    assert cli.main(["convert", str(model), "folder"]) == 0
    (tmp_path / "half").mkdir()
    to = ["folder", "half/model.safetensors", "--dtype", "float16"]
    assert cli.main(["convert", *to]) == 0
    assert ldm.inspect("half").dtypes.keys() == {"float16"}
    args = ["--device", "cpu", "--steps", "2", "--seed", "3"]
    for weights, name in ((model, "a.png"), ("folder", "b.png")):
        command = ["generate", "a red house", "--weights", str(weights), "-o", name, *args]
        assert cli.main(command) == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert a.tobytes() == b.tobytes()


def test_stages_may_come_from_other_files_and_the_hash_covers_them(
    generate, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tiny_model(other, seed=7)
    args = ("red", "--steps", "1", "--seed", "0")
    assert generate(*args, "-o", "a.png") == 0
    assert generate(*args, "-o", "b.png", "--vae", str(other)) == 0
    assert str(other) in capsys.readouterr().err  # where each stage came from
    (a,), (b,) = read_recipes(Path("a.png")), read_recipes(Path("b.png"))
    assert a.model_sha256 != b.model_sha256
    with Image.open("a.png") as one, Image.open("b.png") as two:
        assert one.tobytes() != two.tobytes()
    assert generate("--like", "b.png", "-o", "c.png", device=()) == 2
    assert "was made with weights" in capsys.readouterr().err
    assert generate("--like", "b.png", "-o", "c.png", "--vae", str(other), device=()) == 0
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()


def test_reproduce_draws_the_other_codes_picture_and_like_makes_it_again(
    generate, model: Path, tmp_path: Path
) -> None:
    args = ("red", "--steps", "3", "--seed", "2", "--eta", "0.5", "--reproduce", "diffusers")
    assert generate(*args, "-o", "a.png") == 0
    pipe = ldm.load(model, device="cpu")
    (expected,) = pipe("red", steps=3, seed=2, eta=0.5, like="diffusers")
    with Image.open("a.png") as image:
        assert image.tobytes() == expected.tobytes()
    assert generate("--like", "a.png", "-o", "b.png", device=()) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["red", "--reproduce", "midjourney"], "unknown like='midjourney'"),
        (["red", "--reproduce", "diffusers", "--num-images", "2"], "--reproduce draws one picture"),
        (["red", "--ema", "yes"], "0 of 208 EMA weights"),
        (["red", "--vae", "nothing"], "nothing"),
    ],
)
def test_bad_sources_are_refused_in_one_line(
    generate, args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(*args) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not names(tmp_path)


def test_download_of_an_unknown_model_lists_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["download", "sd-v9"]) == 2
    assert "sd-v1-4" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_weights_that_are_not_there_are_told_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["x.safetensors"] if command == "convert" else []
    assert cli.main([command, str(tmp_path / "none"), *target]) == 2
    error = capsys.readouterr().err.strip()
    assert "none" in error and len(error.splitlines()) == 1
