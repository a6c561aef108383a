"""Training: each loop learns, stops and goes on as if it had never stopped; files are safe."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.cli import main as cli
from ldm.cli import train as train_command
from ldm.config import HORIZON, PREDICTIONS, ModelConfig
from ldm.errors import UnreadableError
from ldm.evaluate import prompts as measure
from ldm.files import WriteError
from ldm.schedule import NoiseSchedule, pair_from
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.train import run
from ldm.train.autoencoder import AutoencoderSettings, measured_scaling_factor, train_autoencoder
from ldm.train.clip import (
    CLIPPair,
    CLIPSettings,
    captions_to_learn_from,
    equal_captions,
    load_pair,
    save_pair,
    train_clip,
)
from ldm.train.data import draw_scenes, rng_at
from ldm.train.diffusion import (
    DiffusionSettings,
    LatentSet,
    draw_caption,
    draw_timesteps,
    encode_set,
    min_snr_weight,
    train_diffusion,
)
from ldm.train.excess import MEASURED_AT, Ruler, measured
from ldm.train.state import Optimisation, Record, StageError, TrainState
from ldm.unet import UNet
from ldm.vae import AutoencoderKL
from ldm.worlds.batches import object_masks, pictures
from ldm.worlds.distribution import HELD_OUT
from ldm.worlds.floor import compare
from ldm.worlds.posterior import FiniteSet, perfect
from tests.disk import FULL, full_disk
from tests.helpers import tiny_config
from tests.places import ROOT

SHORT = Optimisation(steps=25, batch_size=4, learning_rate=2e-3, warmup=5)

# The kinds of layers that Horizon has, but as few and as narrow as they come.
TINY = tiny_config()
TEXT = dataclasses.replace(
    TINY.text, max_length=64, vocab_size=690, bos_token_id=688, eos_token_id=689
)
MODEL = dataclasses.replace(TINY, text=TEXT)
SIZE = MODEL.image_size
TOWER_SIZE = 32  # the image tower halves it to 4 x 4, with blocks in between


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(captions_to_learn_from(0, 300), TEXT.vocab_size)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(MODEL.vae).requires_grad_(False)


@pytest.fixture(scope="module")
def data(vae: AutoencoderKL) -> LatentSet:
    return encode_set(vae, DiffusionSettings(num_scenes=64, image_size=SIZE))


def loop(
    name: str, settings: Optimisation, tokenizer: Tokenizer, data: LatentSet
) -> tuple[TrainState, Iterator[Record]]:
    """A fresh state of a stage, and its loop."""
    torch.manual_seed(0)
    if name == "autoencoder":
        state = TrainState(AutoencoderKL(MODEL.vae), settings)
        recipe = AutoencoderSettings(optimisation=settings, image_size=SIZE)
        return state, train_autoencoder(state, recipe)
    if name == "clip":
        state = TrainState(CLIPPair(CLIPTextEncoder(TEXT, tokenizer), TOWER_SIZE), settings)
        return state, train_clip(state, CLIPSettings(optimisation=settings))
    state = TrainState(UNet(MODEL.unet), settings)
    text = CLIPTextEncoder(TEXT, tokenizer).requires_grad_(False)
    schedule = NoiseSchedule(MODEL.schedule)
    diffusion = DiffusionSettings(optimisation=settings)
    return state, train_diffusion(state, diffusion, data, text, schedule)


@pytest.mark.parametrize("name", ["autoencoder", "clip", "diffusion"])
def test_the_loss_falls(name: str, tokenizer: Tokenizer, data: LatentSet) -> None:
    _, records = loop(name, SHORT, tokenizer, data)
    losses = [record.figures["loss"] for record in records]
    assert len(losses) == SHORT.steps
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.9 * first, losses


@pytest.mark.parametrize("name", ["autoencoder", "clip", "diffusion"])
def test_a_resumed_run_equals_one_that_never_stopped(
    name: str, tokenizer: Tokenizer, data: LatentSet, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SHORT, steps=4)
    whole, records = loop(name, settings, tokenizer, data)
    last = list(records)[-1]

    stopped, records = loop(name, settings, tokenizer, data)
    list(islice(records, 2))
    stopped.save(tmp_path / "state.pt")
    resumed, records = loop(name, settings, tokenizer, data)
    resumed.load(tmp_path / "state.pt")
    rest = list(records)

    assert [record.step for record in rest] == [3, 4]
    assert rest[-1].figures == last.figures
    for model in ("model", "ema"):
        ours, theirs = getattr(whole, model).state_dict(), getattr(resumed, model).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_failed_checkpoint_leaves_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = TrainState(torch.nn.Linear(2, 2), SHORT)
    path = tmp_path / "state.pt"
    state.save(path)
    before = path.read_bytes()

    def fail(_: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        state.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    state = TrainState(torch.nn.Linear(2, 2), SHORT)
    path = tmp_path / "state.pt"
    state.save(path)
    longer = TrainState(torch.nn.Linear(2, 2), dataclasses.replace(SHORT, steps=99))
    with pytest.raises(StageError, match="go on with the same"):
        longer.load(path)
    with pytest.raises(StageError, match="not a checkpoint of this stage"):
        TrainState(torch.nn.Linear(2, 2, bias=False), SHORT).load(path)


# What a checkpoint's bytes may have become, and what may stand in it instead.
WEIGHT = torch.full((2,), 3.0).numpy().tobytes()
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "junk": lambda data: b"junk",
    "cut": lambda data: data[: len(data) // 2],
    "its end cut": lambda data: data[:-1],
    "a byte of a weight changed": lambda data: data.replace(WEIGHT, b"\0" * len(WEIGHT), 1),
}


def moments_without(name: str, state: dict[str, Any]) -> None:
    del state["optimizer"]["state"][1][name]


CONTENTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda state: [state],
    "no optimizer": lambda state: state.pop("optimizer"),
    "settings in a list": lambda state: state.update(settings=[1, 2]),
    "a setting too few": lambda state: state["settings"].pop("seed"),
    "a setting too many": lambda state: state["settings"].update(flavour=1),
    "a setting in words": lambda state: state["settings"].update(steps="many"),
    "a setting out of its range": lambda state: state["settings"].update(batch_size=0),
    "a step in words": lambda state: state.update(step="two"),
    "a step before the first": lambda state: state.update(step=-1),
    "a step after the last": lambda state: state.update(step=SHORT.steps + 1),
    "weights in a list": lambda state: state.update(model=[1, 2]),
    "numbers for weights": lambda state: state["model"].update(weight=1.0),
    "a weight less": lambda state: state["ema"].pop("bias"),
    "a weight of another shape": lambda state: state["model"].update(weight=torch.ones(3, 2)),
    "a weight of another type": lambda state: state["ema"].update(bias=torch.ones(2).char()),
    "an optimizer that is none": lambda state: state.update(optimizer=None),
    "moments in a list": lambda state: state["optimizer"].update(state=[1, 2]),
    "numbers for moments": lambda state: state["optimizer"]["state"].update({0: 1.0}),
    "a moment less": functools.partial(moments_without, "exp_avg_sq"),
    "a count less": functools.partial(moments_without, "step"),
    "moments of another shape": lambda state: state["optimizer"]["state"][0].update(
        exp_avg=torch.ones(3)
    ),
    "moments of another model": lambda state: state["optimizer"]["state"].update(
        {9: state["optimizer"]["state"][0]}
    ),
    "no moments": lambda state: state["optimizer"]["state"].clear(),
}


@pytest.mark.parametrize("damage", [*BYTES, *CONTENTS])
def test_a_damaged_checkpoint_is_one_line_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.pt"
    saved = TrainState(torch.nn.Linear(2, 2), SHORT)
    saved.update(saved.model(torch.ones(1, 2)).square().sum())
    with torch.no_grad():
        saved.model.bias.fill_(3.0)
    saved.save(path)
    if damage in BYTES:
        data = path.read_bytes()
        path.write_bytes(BYTES[damage](data))
        assert path.read_bytes() != data
    else:
        state = torch.load(path, weights_only=True)
        changed = CONTENTS[damage](state)
        torch.save(changed if damage == "a list" else state, path)

    fresh = TrainState(torch.nn.Linear(2, 2), SHORT)
    before = {name: value.clone() for name, value in fresh.model.state_dict().items()}
    with pytest.raises(StageError, match=r"state\.pt is (damaged|not a checkpoint)") as error:
        fresh.load(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400
    assert all(torch.equal(before[name], fresh.model.state_dict()[name]) for name in before)
    assert fresh.step == 0 and not fresh.optimizer.state_dict()["state"]


def test_a_checkpoint_that_no_disk_has_room_for_is_one_line(tmp_path: Path) -> None:
    state = TrainState(torch.nn.Linear(100, 100), SHORT)
    path = tmp_path / "state.pt"
    with full_disk(), pytest.raises(WriteError) as error:
        state.save(path)
    assert str(error.value) == f"{path} cannot be written: {FULL}"
    assert not list(tmp_path.iterdir())


# --- The log ---------------------------------------------------------------------------------


def counting(state: TrainState, stop_after: int | None = None) -> Iterator[Record]:
    """A loop that only counts; whatever stops it comes without a warning."""
    while state.step < state.settings.steps:
        state.step += 1
        yield Record(state.step, {"loss": 1 / state.step})
        if state.step == stop_after:
            raise KeyboardInterrupt


def logged_steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "stage.jsonl").read_text().splitlines()]


def test_the_log_repeats_no_step_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped between a checkpoint and its end, and in the middle of a line."""
    monkeypatch.setattr(run, "LOG_EVERY_STEPS", 1)
    monkeypatch.setattr(run, "SAVE_EVERY_SECONDS", 1e9)
    path, log = tmp_path / "stage.pt", tmp_path / "stage.jsonl"
    settings = dataclasses.replace(SHORT, steps=8)
    state = TrainState(torch.nn.Linear(2, 2), settings)
    state.save(path)  # before the first step, so that it has no moments
    with pytest.raises(KeyboardInterrupt):
        run.follow(counting(state, stop_after=5), state, tmp_path, "stage")
    with log.open("a") as file:
        file.write('{"step": 6, "los')  # as SIGKILL leaves it
    assert log.read_text().count("\n") == 5

    resumed = TrainState(torch.nn.Linear(2, 2), settings)
    resumed.load(path)
    run.follow(counting(resumed), resumed, tmp_path, "stage")
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    whole = log.read_bytes()
    run.follow(counting(resumed), resumed, tmp_path, "stage")  # already at its end
    assert log.read_bytes() == whole


def test_a_log_ends_at_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    lines = [
        '{"step": 1}',
        "",
        "[1]",
        "nothing",
        '{"step": 2, "loss": 3}',
        '{"step": 2, "loss": 4}',
    ]
    log.write_text("\n".join([*lines, '{"step": 3}', '{"step": 1e999}', '{"st']))
    run.forget_after(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2, "loss": 4}\n'
    run.forget_after(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_logs_each_step_once(tmp_path: Path) -> None:
    """SIGKILL, between two checkpoints of a real stage."""
    program = (
        "import sys, pytest; from ldm.cli import main; from ldm.train import run; "
        "from tests.train.test_train import few_of_a_tiny_model as few; few(pytest.MonkeyPatch()); "
        "run.LOG_EVERY_STEPS = 1; run.SAVE_EVERY_SECONDS = 0.2; sys.exit(main.main(sys.argv[1:]))"
    )
    args = ["train", "autoencoder", "--out", str(tmp_path), "--device", "cpu"]
    command = [sys.executable, "-c", program, *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    log, deadline = tmp_path / "autoencoder.jsonl", time.monotonic() + 120
    short = ["--steps", "60", "--batch-size", "2"]
    with subprocess.Popen([*command, *short], env=env, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "autoencoder.pt").exists() or log.read_text().count("\n") < 12:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.kill()
    subprocess.run([*command, "--resume"], env=env, check=True, stderr=subprocess.DEVNULL)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 61))


# --- Learning --------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_then_falls() -> None:
    state = TrainState(torch.nn.Linear(2, 2), SHORT)
    rates = []
    for state.step in range(SHORT.steps + 1):
        rates.append(state.learning_rate())
    assert rates[0] == pytest.approx(SHORT.learning_rate / SHORT.warmup)
    assert max(rates) == pytest.approx(SHORT.learning_rate)
    assert rates[SHORT.warmup :] == sorted(rates[SHORT.warmup :], reverse=True)
    assert rates[-1] == pytest.approx(0.05 * SHORT.learning_rate)


def test_the_running_mean_follows_the_weights() -> None:
    settings = dataclasses.replace(SHORT, ema_decay=0.5)
    state = TrainState(torch.nn.Linear(1, 1, bias=False), settings)
    expected = state.model.weight.detach().clone()
    for step in range(1, 6):
        state.update((state.model.weight - 3.0).square().sum())
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * state.model.weight.detach()
    assert torch.allclose(state.ema.weight, expected)


def test_training_scenes_hold_no_held_out_combination() -> None:
    for scene in draw_scenes(rng_at(0, 0), 2000):
        for combination in HELD_OUT:
            assert any(scene.attributes[name] != value for name, value in combination.items())


def test_pictures_and_masks_fit_each_other() -> None:
    scenes = draw_scenes(rng_at(0, 1), 16)
    x, masks = pictures(scenes, 32), object_masks(scenes, 32)
    assert x.shape == (16, 3, 32, 32) and masks.shape == (16, 1, 32, 32)
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.1
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    has_house = torch.tensor([scene.attributes["house"] != "none" for scene in scenes])
    assert (masks.flatten(1).sum(dim=1)[has_house] > 0).all()


def test_equal_captions_share_their_target() -> None:
    same = equal_captions(["a", "b", "a"])
    assert same.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_the_scaling_factor_makes_latents_of_unit_std(vae: AutoencoderKL, data: LatentSet) -> None:
    factor = measured_scaling_factor(vae, SIZE, count=256)
    scaled = data.latents * factor / MODEL.vae.scaling_factor
    # Other scenes, and latents in bfloat16: 64 scenes give the std to a few per cent.
    assert scaled.std().item() == pytest.approx(1.0, abs=0.1)


def few_of_a_tiny_model(patch: pytest.MonkeyPatch) -> None:
    """Let the stages train the tiny model, on few scenes and captions: all else is as it is."""
    recipes = {
        "autoencoder": functools.partial(AutoencoderSettings, image_size=SIZE),
        "clip": CLIPSettings,
        "diffusion": functools.partial(DiffusionSettings, image_size=SIZE, num_scenes=8),
    }
    for name, recipe in recipes.items():
        patch.setitem(run.STAGES, name, (run.STAGES[name][0], recipe))
    patch.setattr(run, "HORIZON", MODEL)
    few_captions = functools.partial(captions_to_learn_from, count=3000)
    patch.setattr(run, "captions_to_learn_from", few_captions)
    few_scenes = functools.partial(measured_scaling_factor, count=32)
    patch.setattr(run, "measured_scaling_factor", few_scenes)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    few_of_a_tiny_model(monkeypatch)


@pytest.fixture(params=["tiny", pytest.param("horizon", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """The model that the stages train: a tiny one, or Horizon itself on few scenes."""
    if request.param == "tiny":
        few_of_a_tiny_model(monkeypatch)
        return MODEL
    few = functools.partial(DiffusionSettings, num_scenes=32)
    monkeypatch.setitem(run.STAGES, "diffusion", (run.diffusion, few))
    return HORIZON


def test_the_commands_make_a_model_that_loads(trained: ModelConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    short = ["--out", str(out), "--steps", "3", "--batch-size", "4", "--device", "cpu"]
    for stage in ("autoencoder", "clip", "diffusion"):
        assert cli.main(["train", stage, *short]) == 0
    assert {path.name for path in out.iterdir()} == {
        *("autoencoder.pt", "autoencoder.jsonl", "clip.pt", "clip.jsonl"),
        *("diffusion.pt", "diffusion.jsonl", "vocab.json", "merges.txt", "words.txt"),
        *("model.safetensors", "config.json", "clip.safetensors"),
    }
    last = json.loads((out / "diffusion.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and last["loss"] > 0
    pipe = ldm.load(out, device="cpu")
    assert pipe("a red house", steps=2)[0].size == (trained.image_size, trained.image_size)
    ema = torch.load(out / "diffusion.pt", weights_only=True)["ema"]["conv_in.weight"]
    assert torch.equal(pipe.unet.conv_in.weight, ema.half().float())  # what ships is the mean
    pair = load_pair(out / "clip.safetensors", pipe.text)
    mean = torch.load(out / "clip.pt", weights_only=True)["ema"]
    assert torch.equal(pair.image.project.weight, mean["image.project.weight"].half().float())
    grey = torch.zeros(1, 3, pair.image_size, pair.image_size)
    assert pair.embed_images(grey).shape == (1, trained.text.hidden_size)


@pytest.mark.parametrize("content", ["nothing", "garbage", "no metadata", "another width"])
def test_a_file_that_is_no_clip_pair_is_told_in_one_line(
    tmp_path: Path, tokenizer: Tokenizer, content: str
) -> None:
    text, path = CLIPTextEncoder(TEXT, tokenizer), tmp_path / "clip.safetensors"
    if content == "garbage":
        path.write_bytes(b"garbage")
    elif content == "no metadata":
        save_file({"a": torch.ones(1)}, path)
    elif content == "another width":
        narrow = dataclasses.replace(TEXT, hidden_size=16)
        save_pair(path, CLIPPair(CLIPTextEncoder(narrow), 64))
    with pytest.raises(UnreadableError, match="is not a CLIP pair for this model") as error:
        load_pair(path, text)
    assert len(str(error.value).splitlines()) == 1


def test_bad_training_arguments_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cases = [
        (["autoencoder", "--resume"], "nothing to resume"),
        (["horizon", "--resume"], "nothing to resume"),
        (["diffusion"], "run `ldm train autoencoder"),
        (["autoencoder", "--steps", "0"], "must be 1 or more"),
        (["autoencoder", "--learning-rate", "-1"], "learning_rate must be above 0"),
        (["horizon", "--steps", "3"], "are for a single stage"),
        (["autoencoder", "--device", "cuda:99"], "no device"),
    ]
    for args, message in cases:
        assert cli.main(["train", *args, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
        assert not out.exists()
    out.mkdir()
    (out / "autoencoder.pt").write_bytes(b"precious")
    assert cli.main(["train", "autoencoder", "--out", str(out)]) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert cli.main(["train", "autoencoder", "--resume", "--out", str(out)]) == 2
    assert "not a checkpoint" in capsys.readouterr().err
    assert cli.main(["train", "horizon", "--out", str(out)]) == 2
    assert (out / "autoencoder.pt").read_bytes() == b"precious"


def test_the_command_names_the_stages_that_there_are() -> None:
    assert tuple(run.STAGES) == train_command.STAGES


def test_resume_goes_on_with_the_settings_of_the_start(tiny: None, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    start = ["train", "clip", "--out", out, "--device", "cpu"]
    assert cli.main([*start, "--steps", "2", "--batch-size", "4", "--seed", "5"]) == 0
    words = (tmp_path / "out" / "vocab.json").read_text()
    assert cli.main([*start, "--resume"]) == 0  # already at its end: nothing is changed
    assert (tmp_path / "out" / "vocab.json").read_text() == words
    assert cli.main([*start, "--resume", "--steps", "9"]) == 2


def test_a_stage_refuses_an_unfinished_one_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = TrainState(torch.nn.Linear(2, 2), SHORT)
    state.save(tmp_path / "autoencoder.pt")
    assert cli.main(["train", "diffusion", "--out", str(tmp_path)]) == 2
    assert "is not finished" in capsys.readouterr().err


@pytest.mark.slow
def test_train_horizon_runs_the_three_stages_evaluates_and_can_be_resumed(
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    two_steps = Optimisation(steps=2, batch_size=4, learning_rate=1e-3)
    for name, (function, recipe) in run.STAGES.items():
        short = functools.partial(recipe, optimisation=two_steps)
        monkeypatch.setitem(run.STAGES, name, (function, short))
    quick = functools.partial(measure.evaluate, per_value=1, steps=1)
    monkeypatch.setattr(measure, "evaluate", quick)

    out = tmp_path / "out"
    assert cli.main(["train", "horizon", "--out", str(out), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "| sky |" in table
    assert (out / "evaluation.md").read_text() == table
    weights = (out / "model.safetensors").read_bytes()
    assert cli.main(["train", "horizon", "--out", str(out)]) == 2  # it would start over
    (out / "model.safetensors").unlink()
    assert cli.main(["train", "horizon", "--out", str(out), "--resume", "--device", "cpu"]) == 0
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_error_of_any_prediction_counts_as_the_error_of_x0_that_it_makes(
    prediction: str,
) -> None:
    levels = [0.99, 0.5, 0.01] if prediction == "eps" else [0.99, 0.5, 0.01, 0.0]
    alpha_bar = torch.tensor(levels, dtype=torch.float64)
    x, output = torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)
    error = pair_from(prediction, output, x, alpha_bar)[0].square()  # of x0, for one of 1
    snr = alpha_bar / (1 - alpha_bar)
    expected = error * (snr.clamp(max=5.0) + (prediction != "eps"))
    torch.testing.assert_close(min_snr_weight(prediction, alpha_bar, 5.0), expected)


def test_half_of_a_batch_is_drawn_where_it_is_decided_what_there_is() -> None:
    rng = rng_at(0, 0)
    drawn = torch.stack([draw_timesteps(rng, 20, 1000, DiffusionSettings()) for _ in range(200)])
    noisy, any_of_all = drawn[:, :10], drawn[:, 10:]
    assert (noisy.min(), noisy.max()) == (600, 999)
    assert any_of_all.min() < 10 and any_of_all.max() > 990
    # One in each of ten equal parts, and everywhere within it.
    assert torch.equal(any_of_all // 100, torch.arange(10).expand(200, 10))
    assert (any_of_all % 100).float().mean().sub(49.5).abs() < 4 * 29 / 2000**0.5


def test_open_captions_are_drawn_oftener_without_moving_what_they_mean() -> None:
    """The scenes of a caption stay those of the world: a caption is kept for its words alone."""
    rng, settings = rng_at(1, 0), DiffusionSettings(caption_dropout=0.1, detailed_kept=0.2)
    scenes = draw_scenes(rng, 400)
    told = [draw_caption(rng, scenes, settings) for _ in range(3000)]
    assert abs(sum(caption == "" for _, caption in told) / 3000 - 0.1) < 4 * (0.09 / 3000) ** 0.5
    kept_all = DiffusionSettings(caption_dropout=0.0, detailed_kept=1.0)
    plain = [scenes[i].describe(rng)[0] for i, _ in told]
    few = sum(len(c) < 15 for c in plain) / 3000
    assert few < sum(0 < len(c) < 15 for _, c in told) / sum(c != "" for _, c in told) / 2
    assert all(draw_caption(rng, scenes, kept_all)[1] for _ in range(100))


def test_a_run_tells_how_far_it_is_above_what_can_be_reached(
    tokenizer: Tokenizer, vae: AutoencoderKL, data: LatentSet
) -> None:
    state, records = loop("diffusion", dataclasses.replace(SHORT, steps=5), tokenizer, data)
    settings = DiffusionSettings(
        optimisation=state.settings, image_size=SIZE, validation=12, measure_every=2
    )
    text = CLIPTextEncoder(TEXT, tokenizer).requires_grad_(False)
    ruler = Ruler.of(vae, data, text, NoiseSchedule(MODEL.schedule), "eps", settings)
    told = {r.step: r for r in measured(records, state, ruler, settings)}
    assert [step for step, record in told.items() if record.told] == [2, 4, 5]
    names = {f"excess at {round(999 * share)}" for share in MEASURED_AT}
    for step in (2, 4, 5):
        assert told[step].figures.keys() == {"loss", "mse"} | names
        assert all(value > 0.5 for name, value in told[step].figures.items() if name in names)
        assert "undertrained" in told[step].told and told[step].told.isprintable()
    # A perfect model of the scenes that are known has nothing above it.
    best = perfect(FiniteSet(torch.cat([ruler.validation, data.latents])), ruler.schedule)
    for one in compare(best, ruler.floors, ruler.validation, ruler.schedule):
        assert one.excess <= 1e-4


def test_validation_scenes_are_no_scenes_of_the_training_set(
    tokenizer: Tokenizer, vae: AutoencoderKL, data: LatentSet
) -> None:
    settings = DiffusionSettings(image_size=SIZE, num_scenes=64, validation=12)
    text = CLIPTextEncoder(TEXT, tokenizer).requires_grad_(False)
    ruler = Ruler.of(vae, data, text, NoiseSchedule(MODEL.schedule), "eps", settings)
    distances = torch.cdist(ruler.validation.flatten(1), data.latents.flatten(1))
    assert distances.min() > 0
    again = Ruler.of(vae, data, text, NoiseSchedule(MODEL.schedule), "eps", settings)
    assert torch.equal(again.validation, ruler.validation)
