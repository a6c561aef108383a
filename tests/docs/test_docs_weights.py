"""docs/weights.md shows what the commands print: here they are run."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm import errors
from ldm.checkpoints.config_json import config_to_json
from ldm.checkpoints.convert import convert
from ldm.checkpoints.download import known_files
from ldm.checkpoints.keys import PREFIXES, key_map
from ldm.checkpoints.open_clip import joined
from ldm.checkpoints.spellings import ema_name
from ldm.checkpoints.stages import build_stage
from ldm.config import SD_V1, SD_V2, ModelConfig
from tests import loras
from tests.checkpoints import malicious as by_hand
from tests.docs.console import commands, rewrite, run, session, without_bars
from tests.helpers import (
    STAGES,
    random_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tensors,
    with_ema,
    write_weights,
)
from tests.places import ROOT

PAGE = ROOT / "docs" / "weights.md"
TEXT = PAGE.read_text(encoding="utf-8")
UNET, VAE, _ = PREFIXES.values()
Shapes = dict[str, tuple[int, ...]]


# --- The files of the page -------------------------------------------------------------------


def example_files(folder: Path) -> None:
    """All files that the page's commands read. Those of Stable Diffusion's size are holes: what
    tells of the weights is there, and where the weights would be nothing is on disk."""
    model = {stage: official_shapes(stage) for stage in STAGES}
    whole = model["unet"] | model["vae"] | model["text"]
    sparse_safetensors(folder / "my-finetune.safetensors", whole, "F16")
    sparse_safetensors(folder / "my-unet.safetensors", model["unet"], "F32")
    sparse_safetensors(folder / "my-vae.safetensors", model["vae"], "F32")
    (size,) = (known.bytes for known in known_files() if known.model == "sd-v1-5")
    sparse_safetensors(folder / "v1-5.safetensors", whole, "F32", size)
    means = {ema_name(key): shape for key, shape in model["unet"].items()}
    lightning = by_hand.name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    callbacks = pickle.EMPTY_DICT + pickle.MARK + lightning + by_hand.table() + pickle.SETITEMS
    sparse_pickle(folder / "training-run.ckpt", whole | means, callbacks=callbacks)
    sparse_pickle(folder / "evil.ckpt", whole, epoch=by_hand.by_os_system(Path("it-ran")))
    other_models(folder, whole)
    unreadable_files(folder, whole)
    small_files(folder)
    shutil.copytree(ldm.shipped_weights().parent, folder / "horizon")
    (folder / "out").mkdir()


def official_shapes(stage: str, config: ModelConfig = SD_V1) -> Shapes:
    """Key -> shape, as official files have them."""
    with torch.device("meta"):
        model = build_stage(stage, config)
        state = model.state_dict()
        tensors = {official: state[ours] for ours, official in key_map(model).items()}
        tensors = joined(tensors) if config.text.open_clip else tensors
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def sparse_safetensors(path: Path, shapes: Shapes, dtype: str, size: int | None = None) -> None:
    """A file of weights without the weights: its header, and a hole. The header may end in blanks,
    which make up the file's size."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * (2 if dtype == "F16" else 4)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode().ljust(0 if size is None else size - 8 - end)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


class Holes(io.FileIO):
    """A file in which zeros take no place on disk."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]
        if data != bytes(len(data)):
            return super().write(data)
        self.seek(len(data), io.SEEK_CUR)
        return len(data)


def sparse_pickle(path: Path, shapes: Shapes, **beside: bytes) -> None:
    """The same as a pickle of torch's, of float32, with other things beside the weights. torch's
    own would differ in length from one version to the next."""
    tensors, sizes = {}, {}
    for n, (key, shape) in enumerate(shapes.items()):
        sizes[f"data/{n}"] = math.prod(shape)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        tensors[key] = by_hand.tensor(
            by_hand.storage(key=str(n), numel=math.prod(shape)),
            shape=by_hand.group(*map(by_hand.number, shape)),
            stride=by_hand.group(*map(by_hand.number, strides)),
        )
    content = by_hand.table(state_dict=by_hand.table(**tensors), **beside)
    zeros = bytes(1 << 24)
    with Holes(path, "w") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", by_hand.pickle_of(content))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for name, numel in sizes.items():
            with archive.open(f"archive/{name}", "w") as record:
                for start in range(0, 4 * numel, len(zeros)):
                    record.write(zeros[: 4 * numel - start])


def other_models(folder: Path, sd_v1: Shapes) -> None:
    """What the page lists as refused: as much of each as tells it."""
    first, context = f"{UNET}input_blocks.0.0.weight", "1.transformer_blocks.0.attn2.to_k.weight"
    sd_v2 = {key: shape for stage in STAGES for key, shape in official_shapes(stage, SD_V2).items()}
    files: dict[str, Shapes] = {
        "sd-2.safetensors": sd_v2,
        "unclip.safetensors": {"noise_augmentor.betas": (1000,)},
        "sd-xl.safetensors": {f"{UNET}input_blocks.4.{context}": (640, 2048)},
        "sd-3.safetensors": {f"{UNET}joint_blocks.0.x_block.mlp.fc1.bias": (6144,)},
        "flux.safetensors": {"double_blocks.0.img_attn.qkv.bias": (9216,)},
        "depth.safetensors": sd_v1 | {first: (320, 5, 3, 3)},
        "inpainting.safetensors": sd_v1 | {first: (320, 9, 3, 3)},
        "pix2pix.safetensors": sd_v1 | {first: (320, 8, 3, 3)},
        "controlnet.safetensors": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
        "lora.safetensors": {"lora_unet_mid_block_proj_in.lora_down.weight": (8, 1280, 1, 1)},
        "word.safetensors": {"emb_params": (1, 768)},
        "part.safetensors": {"down_blocks.0.resnets.0.conv1.bias": (320,)},
    }
    for name, shapes in files.items():
        sparse_safetensors(folder / name, shapes, "F32")


def unreadable_files(folder: Path, sd_v1: Shapes) -> None:
    """Downloads that went wrong, and weights that only foreign code could make."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:fe4e\nsize 4265380512\n"
    (folder / "empty.safetensors").touch()
    (folder / "pointer.ckpt").write_text(pointer)
    (folder / "web-page.safetensors").write_text("<!DOCTYPE html>\n<title>Log in</title>")
    (folder / "notes.ckpt").write_text("where did I put the weights?\n" * 40)
    (folder / "nothing").mkdir()
    (folder / "several").mkdir()
    for name in ("a.safetensors", "b.ckpt"):
        (folder / "several" / name).touch()
    sparse_safetensors(folder / "cut.safetensors", sd_v1, "F16")
    os.truncate(folder / "cut.safetensors", 1_500_000_000)
    weights = by_hand.table(**{f"{UNET}out.2.bias": by_hand.tensor()})
    (folder / "cut.ckpt").write_bytes(by_hand.zip_file(weights)[:300])
    twisted = by_hand.call(by_hand.name("someone.code", "make_tensor"), by_hand.storage())
    (folder / "twisted.ckpt").write_bytes(by_hand.zip_file(by_hand.table(weight=twisted)))


def small_files(folder: Path) -> None:
    """Small models: one that is well, and what can be wrong with a tensor of it."""
    for name in ("small", "no-tokenizer"):
        (folder / name).mkdir()
    small, config, tensors = folder / "small", tiny_config(), tiny_tensors()
    tiny_model(small)
    key = f"{UNET}out.2.bias"
    bias = tensors[key]
    files = {
        "with-ema": with_ema(tensors),
        "half": {key: value.half() for key, value in tensors.items()},
        "nan": tensors | {key: torch.full_like(bias, math.nan)},
        "infinity": tensors | {key: torch.full_like(bias, math.inf)},
        "large": tensors | {key: torch.full_like(bias, 1e5)},
        "shape": tensors | {key: torch.zeros(5)},
        "quantised": tensors | {key: bias.char()},
        "key": {k: v for k, v in tensors.items() if k != key} | {f"{UNET}out.3.bias": bias},
        "stray": tensors | {"hypernetwork.bias": bias.clone()},
        "linear": tensors | {"betas": torch.linspace(1e-4, 2e-2, 1000)},
        "v": tensors | {"v_pred": torch.zeros(0)},
        "edm": tensors | {"edm_vpred.sigma_max": torch.ones(1)},
    }
    for name, content in files.items():
        write_weights(small / f"{name}.safetensors", content, config=config)
    write_weights(small / "no-config.safetensors", tensors)
    stages = {stage: build_stage(stage, config) for stage in ("unet", "text")}
    style = loras.kohya(stages, loras.pairs(stages))
    write_weights(small / "style.safetensors", style)
    renamed = {key.replace("_to_q.", "_to_query."): value for key, value in style.items()}
    write_weights(small / "other.safetensors", renamed)
    write_weights(small / "loha.safetensors", {"lora_unet_mid_block.hada_w1_a": bias.clone()})
    wrong = config_to_json(config).replace('"num_heads": 2', '"num_heads": 5')
    save_file(tensors, small / "heads.safetensors", metadata={"ldm": wrong})
    convert(small, folder / "no-vae")
    shutil.rmtree(folder / "no-vae" / "vae")
    # A vocabulary as large as CLIP's, which is asked for on the Hub where it is not found.
    clip = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    text = dataclasses.replace(config.text, **clip)
    config = dataclasses.replace(config, text=text)
    random_checkpoint(folder / "no-tokenizer" / "model.safetensors", config)


# --- The page --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    example_files(folder)
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """The page as the commands make it."""
    with session(folder):
        return rewrite(TEXT, run)


def test_every_output_on_the_page_is_the_commands_own(folder: Path, printed: str) -> None:
    assert printed == TEXT  # else: python -m tests.docs.console docs/weights.md
    # What the page says of these files beside what the commands print.
    assert not (folder / "it-ran").exists()
    converted, original = folder / "out" / "again.safetensors", folder / "horizon"
    assert converted.read_bytes() == (original / "model.safetensors").read_bytes()


ROWS = re.findall(r"^\| `(\S+?)/?` \| .* \| `(.*)` \| (?:`(\w+)`)? ?\|$", TEXT, re.MULTILINE)
LOADED = [(name, seen) for name, seen, error in ROWS if not error]
REFUSED = [row for row in ROWS if row[2]]


@pytest.mark.parametrize(("name", "seen"), LOADED)
def test_rows_of_what_is_loaded(folder: Path, printed: str, name: str, seen: str) -> None:
    with session(folder):
        assert seen in f"weights {ldm.load(name, device='cpu').origin}"


@pytest.mark.parametrize(("name", "seen", "error"), REFUSED)
def test_rows_of_what_is_refused(folder: Path, name: str, seen: str, error: str) -> None:
    with session(folder), pytest.raises((ldm.CheckpointError, FileNotFoundError)) as raised:
        ldm.load(name, device="cpu", dtype=torch.float16)
    assert raised.type.__name__ == error
    assert seen in str(raised.value)


def test_every_error_and_every_file_is_on_the_page(folder: Path) -> None:
    kinds = {kind for kind in vars(errors).values() if inspect.isclass(kind)}
    defined = {kind.__name__ for kind in kinds if issubclass(kind, ldm.CheckpointError)}
    assert {error for _, _, error in REFUSED} == defined - {"CheckpointError"} | {
        "FileNotFoundError"
    }
    shown = "\n".join(commands(TEXT))
    assert [path.name for path in folder.iterdir() if path.name not in shown] == []
    assert LOADED and [name for name, _, _ in ROWS if name not in shown] == []


def test_what_is_wrong_is_told_in_one_line_at_the_end() -> None:
    outputs = re.split(r"^\$ .*\n|^```.*\n", TEXT, flags=re.MULTILINE)
    told = [output.splitlines() for output in outputs if re.search("^ldm: ", output, re.MULTILINE)]
    assert len(told) > len(REFUSED)
    for lines in told:
        assert [line.startswith("ldm: ") for line in lines] == [False] * (len(lines) - 1) + [True]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_the_python_on_the_page_fits_the_library(
    block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins that load nothing (it would be gigabytes), but have the arguments of the
    library's own functions."""
    functions = [name for name in ldm.__all__ if inspect.isfunction(getattr(ldm, name))]
    stand_ins = {name: create_autospec(getattr(ldm, name)) for name in functions}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(ldm, name, stand_in)
    pipe = stand_ins["load"].return_value = create_autospec(ldm.TextToImage, instance=True)
    monkeypatch.setattr("ldm.checkpoints.convert.convert", converted := create_autospec(convert))
    exec(block, {"ldm": ldm, "torch": torch, "pipe": pipe})
    assert any(called.called for called in (*stand_ins.values(), converted))


# --- The parser ------------------------------------------------------------------------------


def test_only_console_blocks_are_rewritten_and_only_below_their_commands() -> None:
    page = "$ ldm a\n```console\n$ ldm b c\nold\nlines\n$ ldm d\n```\n```python\n$ ldm e\n```\n"
    assert commands(page) == ["ldm b c", "ldm d"]
    new = rewrite(page, lambda command: f"<{command}>\n")
    assert new == page.replace("old\nlines\n", "<ldm b c>\n").replace("d\n```", "d\n<ldm d>\n```")


def test_bars_leave_nothing_behind() -> None:
    bars = "\r  0%|     | 0/2 [00:00<?, ?step/s]\r 50%|##   | 1/2 [00:01<00:01,  1.0step/s]"
    last = "\r100%|#####| 2/2 [00:02<00:00,  1.0step/s]"
    printed = f"before\n{bars}\r        \ra.png\n{last}\nafter\n"
    assert without_bars(printed) == "before\na.png\nafter\n"
