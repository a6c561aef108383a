"""Diffusers folders of all kinds, read exactly."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoints.diffusers.names import (
    OLD_VAE_ATTENTION,
    PART_OF,
    VAE_ATTENTION,
    diffusers_vae_names,
    official_keys,
)
from ldm.checkpoints.folders import PARTS, is_diffusers_folder
from ldm.checkpoints.keys import POSITION_IDS
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.errors import CheckpointError, FamilyError, MissingPartsError, UnreadableError
from tests.checkpoints.diffusers.helpers import (
    TEXT,
    UNET,
    VAE,
    Models,
    assert_equal_weights,
    change_weights,
    loaded,
    oracle,
)
from tests.helpers import (
    STAGES,
    randn,
    relative_error,
    tiny_config,
)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_that_diffusers_wrote_is_read_exactly(
    pipe: Any, safe: bool, tiny_models: Models, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    assert (tmp_path / "theirs" / UNET).exists() == safe
    archive = open_archive(tmp_path / "theirs")
    assert archive.container == "diffusers folder" and archive.path == tmp_path / "theirs"
    assert recognise(archive).config == dataclasses.replace(tiny_config(), name="theirs")
    assert_equal_weights(loaded(tmp_path / "theirs"), tiny_models)


def test_pickled_weights_are_read_exactly(tiny_models: Models, folder: Path) -> None:
    for stage in STAGES:
        safe, pickled = (folder / PART_OF[stage] / name for name in PARTS[PART_OF[stage]])
        torch.save({"settings": argparse.Namespace(stage=stage)} | load_file(safe), pickled)
        safe.unlink()
    archive = open_archive(folder)
    assert archive.stubs == ("argparse.Namespace",)  # dropped and listed, once for all parts
    assert archive.parts["text_encoder"] == "text_encoder/pytorch_model.bin"
    assert_equal_weights(loaded(folder), tiny_models)


@pytest.mark.parametrize("as_matrix", [True, False], ids=["linear", "convolution"])
@torch.no_grad()
def test_the_old_names_of_the_autoencoders_attention_are_read(
    diffusers: Any, as_matrix: bool, tiny_models: Models, folder: Path
) -> None:
    names = diffusers_vae_names(tiny_config().vae, VAE_ATTENTION)
    old = diffusers_vae_names(tiny_config().vae, OLD_VAE_ATTENTION)
    renamed = {names[ours]: old[ours] for ours in names}

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        for key, value in tensors.items():
            layer, kind = key.rsplit(".", 1)
            convolved = not as_matrix and value.ndim == 2
            changed[f"{renamed[layer]}.{kind}"] = value[..., None, None] if convolved else value
        assert changed.keys() != tensors.keys()
        return changed

    change_weights(folder / VAE, change)
    found = loaded(folder)
    assert_equal_weights(found, tiny_models)
    if as_matrix:  # the names are right: diffusers still knows them
        theirs = oracle(diffusers, "vae", folder, torch.float32)
        z = randn(1, 4, 4, 4)
        assert relative_error(found["vae"].decode(z), theirs.decode(z).sample) < 1e-4


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("dtype", [None, torch.int64, torch.float32], ids=str)
def test_text_keys_come_in_several_kinds(
    prefix: str, dtype: torch.dtype | None, tiny_models: Models, folder: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {prefix + k.removeprefix("text_model."): v for k, v in tensors.items()}
        if dtype is not None:
            tensors[f"{prefix}embeddings.position_ids"] = torch.arange(12, dtype=dtype)[None]
        return tensors

    change_weights(folder / TEXT, change)
    weights = recognise(open_archive(folder))
    assert (POSITION_IDS in weights.entries) == (dtype is not None)
    assert_equal_weights(loaded(folder), tiny_models)


def test_a_sharded_model_is_read(pipe: Any, tiny_models: Models, folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    archive = open_archive(folder)
    assert archive.parts["unet"] == f"{UNET}.index.json"
    assert_equal_weights(loaded(folder), tiny_models)


@pytest.mark.parametrize("kind", ["single", "sharded", "sharded, old name"])
def test_the_fp16_variant_is_read_where_there_is_no_other(
    pipe: Any, kind: str, tiny_models: Models, folder: Path
) -> None:
    size = "10GB" if kind == "single" else "200KB"
    pipe.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size=size)
    if "old" in kind:
        (folder / f"{UNET}.index.fp16.json").rename(folder / f"{UNET}.fp16.index.json")
    fp16 = [path for path in (folder / "unet").iterdir() if "fp16" in path.name]
    for path in fp16:
        if path.suffix == ".safetensors":
            change_weights(path, lambda tensors: {k: v.half() for k, v in tensors.items()})

    plain = open_archive(folder)
    assert plain.parts["unet"] == UNET
    assert {e.dtype for e in plain.entries.values()} == {torch.float32}

    (folder / UNET).unlink()
    archive = open_archive(folder)
    assert "fp16" in archive.parts["unet"]
    assert torch.float16 in {e.dtype for e in archive.entries.values()}
    halved = {key: value.half().float() for key, value in tiny_models["unet"].state_dict().items()}
    for key, value in loaded(folder)["unet"].state_dict().items():
        assert torch.equal(value, halved[key])


def test_keys_that_nobody_knows_keep_their_names(folder: Path) -> None:
    change_weights(folder / UNET, lambda tensors: tensors | {"strange.weight": torch.ones(1)})
    change_weights(
        folder / VAE,
        lambda tensors: tensors | {"encoder.mid_block.attentions.0.query.bias": torch.ones(32)},
    )
    before = official_keys("vae", tiny_config()).values()
    weights = recognise(open_archive(folder))
    strangers = {key for key in weights.entries if "/" in key}
    assert "unet/strange.weight" in strangers
    # Of a parameter that is there under its old name and its new one, one of them is too many.
    assert len(strangers) == 2 and sum(s.startswith("vae/encoder.mid_block") for s in strangers)
    assert "first_stage_model.encoder.mid.attn_1.q.bias" in before


@pytest.mark.parametrize("stage", STAGES)
def test_one_part_is_enough(stage: str, tiny_models: Models, folder: Path) -> None:
    expected = {stage: tiny_models[stage]}
    # The part itself,
    archive = open_archive(folder / PART_OF[stage])
    config = recognise(archive).config
    assert archive.parts == {"": PARTS[PART_OF[stage]][0]}
    assert config.name == PART_OF[stage]
    assert getattr(config, stage) == getattr(tiny_config(), stage)
    assert_equal_weights(loaded(folder / PART_OF[stage], [stage]), expected)
    # and a folder in which it is alone.
    for other in set(STAGES) - {stage}:
        shutil.rmtree(folder / PART_OF[other])
    archive = open_archive(folder)
    config = recognise(archive).config
    assert archive.parts.keys() == {PART_OF[stage]}
    assert getattr(config, stage) == getattr(tiny_config(), stage)
    assert_equal_weights(loaded(folder, [stage]), expected)


def test_a_folder_without_the_parts_says_what_it_looked_for(folder: Path) -> None:
    for part in PART_OF.values():
        shutil.rmtree(folder / part)
    with pytest.raises(MissingPartsError) as caught:
        recognise(open_archive(folder))
    assert all(name in str(caught.value) for name in (UNET, VAE, TEXT))
    assert "\n" not in str(caught.value)


def test_what_is_a_diffusers_folder(folder: Path, tmp_path: Path) -> None:
    assert is_diffusers_folder(folder)
    assert all(is_diffusers_folder(folder / name) for name in PART_OF.values())
    for name in ("model_index.json", "vae", "text_encoder", UNET):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert is_diffusers_folder(folder), "a part without its weights"

    other = tmp_path / "other"
    (other / "vae").mkdir(parents=True)  # a user's own folder of autoencoders, beside other files
    (other / "model.safetensors").touch()
    (other / "config.json").write_text(json.dumps({"name": "horizon"}))
    assert not is_diffusers_folder(other)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def sharded(where: Any) -> Callable[[Path], None]:
    """The UNet's weights as the two shards a and b, with an index that says `where`."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / UNET)
        (folder / UNET).unlink()
        keys = sorted(tensors)
        save_file({k: tensors[k] for k in keys[:9]}, folder / "unet" / "a.safetensors")
        save_file({k: tensors[k] for k in keys[8:]}, folder / "unet" / "b.safetensors")
        found = where(keys) if callable(where) else where
        (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": found}))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], type[CheckpointError], str]] = {
    "no-config": (remove("unet/config.json"), MissingPartsError, "unet/config.json is missing"),
    "no-json": (write("vae/config.json", "{"), UnreadableError, "vae/config.json is not readable"),
    "deep-json": (write("vae/config.json", "[" * 10**5), UnreadableError, "is not readable JSON"),
    "huge-json": (
        write("vae/config.json", json.dumps({"a": [0] * 10**6})),
        UnreadableError,
        "has more than 2,000,000 bytes",
    ),
    "list": (write("unet/config.json", "[]"), UnreadableError, "it holds no JSON object"),
    "binary": (write("unet/config.json", "\x00"), UnreadableError, "is not readable JSON"),
    "empty-weights": (write(UNET, ""), CheckpointError, "is empty"),
    "flux": (
        write("model_index.json", json.dumps({"_class_name": "FluxPipeline"})),
        FamilyError,
        "this is diffusers' 'FluxPipeline'",
    ),
    "controlnet": (
        write("config.json", json.dumps({"_class_name": "ControlNetModel"})),
        FamilyError,
        "this is diffusers' 'ControlNetModel'",
    ),
    "no-map": (sharded(None), UnreadableError, "weight_map must be"),
    "empty-map": (sharded({}), UnreadableError, "weight_map must be"),
    "way-out": (
        sharded({"a": "../vae/diffusion_pytorch_model.safetensors"}),
        UnreadableError,
        "weight_map must be",
    ),
    "no-shard": (
        sharded({"a": "a.safetensors", "c": "c.safetensors"}),
        MissingPartsError,
        "c.safetensors is missing",
    ),
    "twice": (
        sharded(lambda keys: {k: "ab"[n > 8] + ".safetensors" for n, k in enumerate(keys)}),
        UnreadableError,
        "do not agree about the key",
    ),
    "not-in-it": (
        sharded(lambda keys: dict.fromkeys([*keys[8:], "strange"], "b.safetensors")),
        UnreadableError,
        "do not agree about the key 'strange'",
    ),
}


@pytest.mark.parametrize("damage, error, told", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(
    damage: Callable[[Path], None], error: type[CheckpointError], told: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(error) as caught:
        recognise(open_archive(folder))
    assert told in str(caught.value), caught.value
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
