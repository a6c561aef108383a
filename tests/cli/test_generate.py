"""`ldm generate`: what it writes, what it prints, and what it refuses before any work."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints.config_json import config_to_json
from ldm.cli import generate as command
from ldm.cli import main as cli
from ldm.cli import options, sheet
from ldm.config import DefaultsConfig
from ldm.pipeline import TextToImage, load
from ldm.recipe import read_recipes
from tests.helpers import tiny_config, tiny_model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- What it draws ---------------------------------------------------------------------------


def test_one_picture_is_written_where_asked_and_equals_the_librarys(
    generate, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("a red house", "-o", "red.png", "--steps", "3", "--seed", "5") == 0
    assert capsys.readouterr().out == "red.png\n"
    assert names(tmp_path) == ["red.png"]
    (expected,) = load(model, device="cpu")("a red house", steps=3, seed=5)
    with Image.open("red.png") as image:
        assert image.tobytes() == expected.tobytes()
    (recipe,) = read_recipes(Path("red.png"))
    settings = recipe.settings
    assert (settings.prompt, settings.seed, settings.steps) == ("a red house", 5, 3)
    assert (settings.height, settings.width, recipe.dtype) == (16, 16, "float32")
    assert recipe.versions["torch"] == torch.__version__


@pytest.mark.parametrize("asked", [{}, {"steps": 3}, {"sampler": "ddim"}, {"guidance_scale": 4.0}])
def test_what_nobody_asks_for_is_the_models_own_default(
    generate, tmp_path: Path, asked: dict[str, object]
) -> None:
    defaults = {"sampler": "ddpm", "steps": 2, "guidance_scale": 1.5}
    config = dataclasses.replace(tiny_config(), defaults=DefaultsConfig(**defaults))
    Path("config.json").write_text(config_to_json(config))
    args = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    assert generate("red", "--config", "config.json", "-o", "a.png", *args) == 0
    settings = read_recipes(Path("a.png"))[0].settings
    assert {name: getattr(settings, name) for name in defaults} == defaults | asked


def test_without_output_the_picture_is_named_after_its_prompt(generate, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="too long"):  # the tiny model reads a few tokens
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
    runs = [read_recipes(tmp_path / name)[0].settings for name in names(tmp_path)]
    assert [one.prompt for one in runs] == ["red", "red", "blue", "blue"]
    assert [one.seed for one in runs] == [9, 10, 11, 12]  # of each picture, alone


def test_a_grid_is_one_file_with_every_recipe(generate, tmp_path: Path) -> None:
    args = ("red", "blue", "sea", "--grid", "-o", "g.png", "--steps", "1", "--seed", "0")
    assert generate(*args) == 0
    with Image.open("g.png") as image:
        captioned = image.size
    assert generate(*args, "--no-captions", "-o", "plain.png") == 0
    with Image.open("plain.png") as image:
        assert image.size == (2 * 16 + 4, 2 * 16 + 4)
    assert captioned[0] > 36 and captioned[1] > 36
    recipes = read_recipes(Path("g.png"))
    assert [one.settings.prompt for one in recipes] == ["red", "blue", "sea"]


def test_without_a_seed_one_is_drawn_and_printed(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = set()
    for _ in range(2):
        assert generate("red", "-o", "a.png", "--steps", "1") == 0
        seed = read_recipes(Path("a.png"))[0].settings.seed
        assert f"seed {seed}\n" in capsys.readouterr().err
        seeds.add(seed)
    assert len(seeds) == 2


def test_stages_may_come_from_other_files_and_the_hash_covers_them(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is a POSIX signal")
def test_ctrl_c_keeps_finished_pictures_and_leaves_no_half_file(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    def press() -> None:
        """Once there are two pictures, at whatever the command is about then."""
        while not over.wait(0.01):
            if (tmp_path / "a-1.png").exists():
                return os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    user = threading.Thread(target=press)
    user.start()
    try:
        code = generate("red", "--num-images", "50", "--steps", "20", "-o", "a.png", "--seed", "0")
    finally:
        over.set()
        user.join()
        signal.signal(signal.SIGINT, before)
    assert code == 130
    error = capsys.readouterr().err
    assert error.endswith("ldm: stopped\n") and "Traceback" not in error
    kept = names(tmp_path)
    assert 2 <= len(kept) < 50
    assert set(kept) == {f"a-{i}.png" for i in range(len(kept))}
    for name in kept:
        with Image.open(tmp_path / name) as image:
            image.load()  # whole
        assert read_recipes(tmp_path / name)


def test_sigterm_keeps_a_sheet_of_what_is_finished(
    generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode, calls = TextToImage.decode, iter(range(9))

    def interrupted(self, latents):  # type: ignore[no-untyped-def]
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, latents)

    monkeypatch.setattr(TextToImage, "decode", interrupted)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    args = ("red", "--num-images", "9", "--grid", "--steps", "1", "--seed", "0")
    assert generate(*args, "-o", "a.png") == 143
    assert capsys.readouterr().err.endswith("ldm: stopped\n")
    assert names(tmp_path) == ["a.png"]  # and no temporary file
    assert [one.settings.seed for one in read_recipes(Path("a.png"))] == [0, 1]


@pytest.mark.parametrize("output", [(), ("-o", "a.png")])
def test_of_a_million_pictures_the_first_is_there_at_once(
    generate, tmp_path: Path, output: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = TextToImage.decode, iter(range(3))

    def interrupted(self, latents):  # type: ignore[no-untyped-def]
        if next(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(TextToImage, "decode", interrupted)
    Path("a-999999.txt").touch()
    started = time.process_time()
    assert generate("a", "-n", "1000000", "-k", "1", "-s", "5", *output) == 130
    assert time.process_time() - started < 20
    assert names(tmp_path) == ["a-0.png", "a-1.png", "a-999999.txt"]
    assert [read_recipes(Path(f"a-{i}.png"))[0].settings.seed for i in (0, 1)] == [5, 6]


def test_no_earlier_picture_of_a_million_is_overwritten(generate, tmp_path: Path) -> None:
    Path("a-999999.png").touch()
    paths = options.outputs(None, "a", ".png", 1_000_000)
    assert next(iter(paths)) == Path("a-2-0.png")
    assert options.outputs(None, "a", ".png", 999_999).path == Path("a.png")


def test_scale_shows_the_same_picture_larger(generate, tmp_path: Path) -> None:
    args = ("red", "--steps", "1", "--seed", "3")
    assert generate(*args, "-o", "small.png") == 0
    assert generate(*args, "--scale", "4", "-o", "large.png") == 0
    with Image.open("small.png") as small, Image.open("large.png") as large:
        assert large.size == (64, 64)
        back = large.resize(small.size, Image.Resampling.BOX)
        difference = np.abs(np.asarray(back, float) - np.asarray(small, float))
        assert difference.mean() < 12  # of 255, for a picture of noise
    assert read_recipes(Path("large.png"))[0].scale == 4


def test_captions_say_what_differs_and_are_drawn_below(generate, tmp_path: Path) -> None:
    of = read_recipes
    assert generate("a b", "c d", "-n", "2", "--grid", "-o", "a.png", "-k", "1", "-s", "1") == 0
    assert sheet.captions(of(Path("a.png"))) == [
        *("a b\nseed 1", "a b\nseed 2"),
        *("c d\nseed 3", "c d\nseed 4"),
    ]
    assert generate("a b", "c d", "--grid", "-o", "b.png", "-k", "1", "-s", "1") == 0
    assert sheet.captions(of(Path("b.png"))) == ["a b", "c d"]
    assert generate("a b", "-n", "2", "--grid", "-o", "c.png", "-k", "1", "-s", "1") == 0
    assert sheet.captions(of(Path("c.png"))) == ["seed 1", "seed 2"]
    with Image.open("c.png") as image:
        below = np.asarray(image.convert("L"))[10 + 16 :]  # the margin, and a picture
        assert below.min() < 100  # letters


@pytest.mark.parametrize("watched", [True, False])
def test_a_bar_is_for_somebody_who_watches(
    watched: bool, generate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: watched)
    assert generate("red", "-o", "a.png", "--steps", "2") == 0
    told = capsys.readouterr()
    assert ("step" in told.err) == watched and "a.png" in told.out


# --- What is meant ---------------------------------------------------------------------------


def test_a_prompt_without_quotes_is_drawn_word_by_word_and_said_to_be(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("a", "red", "house", "-o", "x.png", "--steps", "1") == 0
    assert 'put them in quotes: "a red house"' in capsys.readouterr().err
    assert names(tmp_path) == ["x-0.png", "x-1.png", "x-2.png"]
    for quoted in (["a red house"], ["a red house", "blue"]):
        assert generate(*quoted, "-o", "y.png", "--steps", "1") == 0
        assert "quotes" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        ("\n", ["a red house"]),
        ("1\n", ["a red house"]),
        ("what\n3\n", ["a", "red", "house"]),
        ("", None),
    ],
)
def test_on_a_terminal_it_asks_what_is_meant(
    typed: str, prompts: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyboard, screen = io.StringIO(typed), io.StringIO()
    for stream in (keyboard, screen):
        stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr(sys, "stderr", screen)
    if prompts is None:
        with pytest.raises(KeyboardInterrupt):
            command.meant(["a", "red", "house"])
    else:
        assert command.meant(["a", "red", "house"]) == prompts
    assert 'one picture, of "a red house"?' in screen.getvalue()


# --- What it refuses -------------------------------------------------------------------------

BAD = {
    "unknown weights": (["red", "--weights", "nothing.safetensors"], "no weights at"),
    "unreadable weights": (["red", "--weights", "junk.safetensors"], "is not a file of weights"),
    "size": (["red", "--height", "15"], "height must be a positive multiple of 2, not 15"),
    "no steps": (["red", "--steps", "0"], "steps must be between 1 and 1000, not 0"),
    "too many steps": (["red", "--steps", "1001"], "steps must be between 1 and 1000, not 1001"),
    "sampler": (["red", "--sampler", "magic"], "unknown sampler 'magic'"),
    "empty prompt": (["  "], "the prompt is empty"),
    "no prompt": ([], "pass a prompt"),
    "no picture": (["red", "--num-images", "0"], "--num-images must be 1 or more, not 0"),
    "too many for a sheet": (["a b", "-n", "100000000", "--grid"], "bytes at once"),
    "too many for one picture": (["a b", "-n", "5000", "--grid"], "4,096 pictures at most"),
    "too large": (["red", "--height", "10000000", "--width", "10000000"], "bytes at once"),
    "too long": (["red", "--height", "1000000000000"], "bytes at once"),
    "too large a scale": (["red", "--scale", "65"], "--scale must be between 1 and 64, not 65"),
    "too large by scale": (
        ["red", "--height", "2048", "--width", "2048", "--scale", "64"],
        "a picture of 131072x131072 pixels: that takes 103,079,215,104 bytes",
    ),
    "no scale": (["red", "--scale", "0"], "--scale must be between 1 and 64, not 0"),
    "seeds": (["red", "-n", "2", "--seed", str(2**63 - 1)], "the seed must be between"),
    "sampler, nearly": (["red", "--sampler", "dddim"], "did you mean ddim?"),
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
    "like and the default": (["--like", "a.png", "--steps", "50"], "leave out --steps"),
    "like nothing": (["--like", "a.png"], "no picture at a.png"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(
    args: list[str],
    message: str,
    model: Path,
    tmp_path: Path,
    no_work: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    no_work()
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
