"""From a training loop to files: progress bar, log, checkpoints, and the finished model's folder.

Everything of one run lives in one folder. A stage `NAME` keeps its state in `NAME.pt` and a line of
JSON per logged step in `NAME.jsonl`; a later stage reads the earlier ones' finished states there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoints.config_json import config_to_json
from ldm.checkpoints.saving import save_checkpoint
from ldm.checkpoints.tokenizer_files import read_tokenizer, write_tokenizer
from ldm.config import HORIZON
from ldm.files import append_text, write_text
from ldm.schedule import NoiseSchedule
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.train.autoencoder import (
    AutoencoderSettings,
    measured_scaling_factor,
    train_autoencoder,
)
from ldm.train.clip import (
    PAIR_FILE,
    CLIPPair,
    CLIPSettings,
    captions_to_learn_from,
    save_pair,
    train_clip,
)
from ldm.train.diffusion import DiffusionSettings, encode_set, train_diffusion
from ldm.train.excess import Ruler, measured
from ldm.train.state import (
    Optimisation,
    Record,
    StageError,
    TrainState,
    check_weights,
    read_state,
)
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

SAVE_EVERY_SECONDS = 60.0
LOG_EVERY_STEPS = 20


def autoencoder(
    out: Path,
    *,
    resume: bool = False,
    settings: AutoencoderSettings = AutoencoderSettings(),
    device: str = "cpu",
) -> None:
    """Stage 1: `autoencoder.pt`."""

    def fresh() -> AutoencoderKL:
        return AutoencoderKL(HORIZON.vae)

    state = prepare(fresh, settings.optimisation, out, "autoencoder", resume, device)
    follow(train_autoencoder(state, settings), state, out, "autoencoder")


def clip(
    out: Path,
    *,
    resume: bool = False,
    settings: CLIPSettings = CLIPSettings(),
    device: str = "cpu",
) -> None:
    """Stage 2: the tokenizer, learnt from captions, and `clip.pt`."""

    def fresh() -> CLIPPair:
        if resume:
            tokenizer = read_tokenizer(out)
        else:
            captions = captions_to_learn_from(settings.optimisation.seed)
            tokenizer = Tokenizer.train(captions, HORIZON.text.vocab_size).knowing(captions)
        return CLIPPair(CLIPTextEncoder(HORIZON.text, tokenizer), settings.image_size)

    state = prepare(fresh, settings.optimisation, out, "clip", resume, device)
    write_tokenizer(cast(CLIPPair, state.model).text.require_tokenizer(), out)
    follow(train_clip(state, settings), state, out, "clip")


def diffusion(
    out: Path,
    *,
    resume: bool = False,
    settings: DiffusionSettings = DiffusionSettings(),
    device: str = "cpu",
) -> None:
    """Stage 3: `diffusion.pt`, and the finished model: `model.safetensors` in half precision, with
    `config.json` beside it, and `clip.safetensors`, the rest of the CLIP pair."""

    def fresh() -> UNet:
        return UNet(HORIZON.unet)

    vae = AutoencoderKL(HORIZON.vae)
    vae.load_state_dict(averaged(out, "autoencoder", vae))
    text = CLIPTextEncoder(HORIZON.text, read_tokenizer(out))
    pair = CLIPPair(text, CLIPSettings().image_size)
    pair.load_state_dict(averaged(out, "clip", pair))
    for frozen in (vae, pair):
        frozen.to(device).eval().requires_grad_(False)
    state = prepare(fresh, settings.optimisation, out, "diffusion", resume, device)

    size = settings.image_size
    vae.config = replace(HORIZON.vae, scaling_factor=measured_scaling_factor(vae, size))
    data = encode_set(vae, settings)
    schedule = NoiseSchedule(HORIZON.schedule)
    loop = train_diffusion(state, settings, data, text, schedule, HORIZON.prediction)
    ruler = Ruler.of(vae, data, text, schedule, HORIZON.prediction, settings)
    follow(measured(loop, state, ruler, settings), state, out, "diffusion")

    config = replace(HORIZON, image_size=size, vae=vae.config)
    unet = cast(UNet, state.ema)
    save_checkpoint(
        out / "model.safetensors", unet=unet, vae=vae, text=text, config=config, dtype=torch.float16
    )
    write_text(out / "config.json", config_to_json(config, indent=2) + "\n")
    save_pair(out / PAIR_FILE, pair)


STAGES: dict[str, tuple[Callable[..., None], Callable[[], Any]]] = {
    "autoencoder": (autoencoder, AutoencoderSettings),
    "clip": (clip, CLIPSettings),
    "diffusion": (diffusion, DiffusionSettings),
}


def stage(
    name: str, out: Path, *, resume: bool = False, device: str = "cpu", **changes: float
) -> None:
    """Run one stage by its name: by its recipe but for the `changes` to its `Optimisation`, or with
    `resume` by the settings that it was started with.

    Raises:
        StageError: an earlier stage is missing, or the folder does not fit `resume`.
        ValueError: a setting is out of its range.
    """
    run, recipe = STAGES[name]
    settings = recipe()
    path = out / f"{name}.pt"
    started_with = read_state(path).settings if resume else settings.optimisation
    settings = replace(settings, optimisation=replace(started_with, **changes))
    run(out, resume=resume, settings=settings, device=device)


def prepare(
    fresh: Callable[[], nn.Module],
    settings: Optimisation,
    out: Path,
    name: str,
    resume: bool,
    device: str,
) -> TrainState:
    """A fresh state, or with `resume` the one that the folder holds.

    Raises:
        StageError: `resume` without a checkpoint that fits, or a checkpoint without `resume`.
    """
    path = out / f"{name}.pt"
    check_start(path, resume)
    out.mkdir(parents=True, exist_ok=True)
    # Modules draw their first weights from the CPU's global generator: seed it here, it alone (a
    # GPU has another, which is nobody's business here), and put it back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        state = TrainState(fresh().to(device), settings)
    if resume:
        state.load(path)
    return state


def check_start(path: Path, resume: bool) -> None:
    """A StageError where a run would begin over its own checkpoint."""
    if not resume and path.exists():
        raise StageError(f"{path} exists: pass --resume to go on from it, or another --out")


def follow(loop: Iterator[Record], state: TrainState, out: Path, name: str) -> None:
    """Run a loop to its end with a progress bar, a log, and a checkpoint every minute and at the
    end. Ctrl-C may come in the middle of a step, so nothing is saved then: it costs the time since
    the last checkpoint, no more.

    Raises:
        WriteError: a checkpoint or the log cannot be written, or the disk is full.
    """
    path, log = out / f"{name}.pt", out / f"{name}.jsonl"
    forget_after(log, state.step)
    started = saved = time.monotonic()
    total = state.settings.steps
    # None: a bar on a terminal only; the log has it all.
    bar = tqdm(total=total, initial=state.step, desc=name, unit="step", disable=None)
    with bar:
        for record in loop:
            bar.update()
            if record.told:
                bar.write(f"step {record.step}: {record.told}", file=sys.stderr)
            if record.step % LOG_EVERY_STEPS == 0 or record.step == total or record.told:
                figures = record.figures  # here a GPU is waited for
                bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()})
                seconds = round(time.monotonic() - started, 1)
                entry = {"step": record.step, "seconds": seconds, **figures}
                append_text(log, json.dumps(entry) + "\n")
            if time.monotonic() - saved > SAVE_EVERY_SECONDS or record.step == total:
                state.save(path)
                saved = time.monotonic()


def forget_after(log: Path, step: int) -> None:
    """Let a log end at `step`, the checkpoint's: whatever stopped the run, the steps after it are
    taken again, and logged again. A line that was cut off goes too, and an older one of a step that
    is there twice."""
    old = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines: dict[int, str] = {}
    for line in old.splitlines():
        with contextlib.suppress(ValueError, LookupError, TypeError, OverflowError, RecursionError):
            lines[int(json.loads(line)["step"])] = line
    new = "".join(f"{line}\n" for number, line in lines.items() if number <= step)
    if new != old:
        write_text(log, new)


def averaged(out: Path, name: str, model: nn.Module) -> dict[str, Tensor]:
    """The averaged weights that an earlier stage ended with, for such a model.

    Raises:
        StageError: that stage has not been run here, or not to its end, or its file is damaged.
    """
    path = out / f"{name}.pt"
    if not path.is_file():
        raise StageError(f"{path} is not there: run `ldm train {name} --out {out}` first")
    saved = read_state(path)
    if saved.step < saved.settings.steps:
        raise StageError(f"{path} is not finished: run `ldm train {name} --out {out} --resume`")
    check_weights(path, saved.ema, model)
    return saved.ema
