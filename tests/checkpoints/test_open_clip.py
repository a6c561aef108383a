"""Stable Diffusion 2: its text encoder under OpenCLIP's names, and what its files are told by."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ldm
from ldm.checkpoints import noise
from ldm.checkpoints.convert import convert
from ldm.checkpoints.keys import PREFIXES
from ldm.checkpoints.loading import load_stages, load_text_encoder, load_unet, load_vae
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.checkpoints.saving import save_checkpoint
from ldm.checkpoints.stages import empty_stage
from ldm.checkpoints.tokenizer_files import write_tokenizer
from ldm.config import SD_V1, SD_V2, SD_V2_768, ModelConfig
from ldm.errors import FamilyError, KeysError
from ldm.files import file_sha256
from ldm.text import CLIPTextEncoder
from tests.helpers import (
    randn,
    random_checkpoint,
    small_v2_config,
    tiny_config,
    tiny_tokenizer,
    write_weights,
)

BLOCKS = "cond_stage_model.model.transformer.resblocks."


def tiny_v2() -> ModelConfig:
    config = tiny_config()
    unet = dataclasses.replace(config.unet, num_heads=8, head_width=8, linear_projections=True)
    text = dataclasses.replace(config.text, open_clip=True)
    return dataclasses.replace(config, unet=unet, text=text, prediction="v")


@pytest.fixture
def v2(tmp_path: Path) -> tuple[Path, dict[str, nn.Module]]:
    """A random tiny Stable Diffusion 2 in a file of ours."""
    path = tmp_path / "v2.safetensors"
    return path, random_checkpoint(path, tiny_v2(), seed=4)


def official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as an official file: with the block that is not run, and what is behind it."""
    last = {key: value for key, value in tensors.items() if key.startswith(f"{BLOCKS}1.")}
    unused = {
        key.replace(f"{BLOCKS}1.", f"{BLOCKS}2."): torch.ones_like(v) for key, v in last.items()
    }
    behind = {"text_projection": torch.ones(24, 24), "logit_scale": torch.tensor(4.6)}
    return tensors | unused | {f"cond_stage_model.model.{k}": v for k, v in behind.items()}


def test_a_file_has_open_clips_names_and_one_matrix_for_queries_keys_and_values(v2) -> None:
    path, models = v2
    tensors = load_file(path)
    assert not any(key.startswith(PREFIXES["text"]) for key in tensors)
    state = models["text"].state_dict()
    layer = "transformer.encoder.layers.1.self_attn"
    for kind in ("weight", "bias"):
        parts = [state[f"{layer}.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(tensors[f"{BLOCKS}1.attn.in_proj_{kind}"], torch.cat(parts))
    assert torch.equal(
        tensors["cond_stage_model.model.positional_embedding"],
        state["transformer.embeddings.position_embedding.weight"],
    )
    shape = tensors["model.diffusion_model.middle_block.1.proj_in.weight"].shape
    assert shape == (32, 32)  # a matrix, not a convolution of 1x1


def test_what_is_loaded_is_what_was_saved_and_saves_the_same_bytes(v2, tmp_path: Path) -> None:
    path, models = v2
    unet, vae, text = load_stages(path)
    for loaded, saved in zip((unet, vae, text), models.values(), strict=True):
        for key, value in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    config = recognise(open_archive(path)).config
    assert config == tiny_v2()
    save_checkpoint(tmp_path / "again", unet=unet, vae=vae, text=text, config=config)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("container", ["safetensors", "torch zip pickle", "torch legacy pickle"])
def test_an_official_file_loads_without_its_last_block(v2, tmp_path: Path, container: str) -> None:
    path, models = v2
    file = write_weights(tmp_path / "official", official(load_file(path)), container)
    text = load_text_encoder(file, config=tiny_v2())
    for key, value in models["text"].state_dict().items():
        assert torch.equal(text.state_dict()[key], value), key
    ids = torch.randint(0, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(text.encode(ids), models["text"].encode(ids))  # type: ignore[operator]


def test_a_fused_matrix_of_another_shape_is_a_line(v2, tmp_path: Path) -> None:
    tensors = load_file(v2[0])
    for rows, told in (
        (70, "missing: .*k_proj.*unexpected: .*in_proj_weight"),
        (69, "wrongly shaped"),
    ):
        changed = tensors | {f"{BLOCKS}0.attn.in_proj_weight": torch.ones(rows, 24)}
        file = write_weights(tmp_path / f"{rows}", changed, config=tiny_v2())
        with pytest.raises(KeysError, match=told):
            load_text_encoder(file)


def test_places_behind_the_end_are_filled_with_token_0(tmp_path: Path) -> None:

    text = CLIPTextEncoder(tiny_v2().text, tiny_tokenizer())
    (row,) = text.tokenize(["red"]).tolist()
    end = row.index(529)
    assert row[0] == 528 and set(row[end + 1 :]) == {0} and end < 11


def test_a_whole_model_draws_is_traced_and_converts_there_and_back(v2, tmp_path: Path) -> None:
    path, _ = v2
    write_tokenizer(tiny_tokenizer(), tmp_path)
    pipe = ldm.load(path, device="cpu")
    assert pipe.config.prediction == "v"
    found = ldm.trace(pipe, "a red house", steps=2)
    assert [word.text for word in found.words[1:-1]] == ["a", "red", "house"]
    assert found.words[-1].text == "<|endoftext|>" and found.heads == 1
    assert found.tokens[found.words[-1].tokens[0] + 1] == "!"
    convert(path, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    again = ldm.load(tmp_path / "again.safetensors", device="cpu")
    assert dataclasses.replace(again.config, name="tiny") == tiny_v2()
    settings = {"steps": 2, "seed": 3}
    ours, theirs = pipe("red", **settings), again("red", **settings)
    assert ours[0].tobytes() == theirs[0].tobytes()


# --- Told by its keys and shapes ---------------------------------------------------------------


def header_only(path: Path, config: ModelConfig, **beside: Tensor) -> Path:
    """A file with the keys and shapes of an official model, of which nothing is on disk."""
    from tests.docs.test_docs_weights import official_shapes, sparse_safetensors

    shapes = {
        k: s for stage in ("unet", "vae", "text") for k, s in official_shapes(stage, config).items()
    }
    sparse_safetensors(path, shapes | {k: tuple(v.shape) for k, v in beside.items()}, "F16")
    return path


def test_an_official_file_is_recognised_and_must_say_what_it_predicts(tmp_path: Path) -> None:
    path = header_only(tmp_path / "v2.safetensors", SD_V2)
    with pytest.raises(
        FamilyError, match=r"does not say whether it predicts eps.* or v.*; pass prediction="
    ):
        load_unet(path)
    assert ldm.inspect(path).family == "Stable Diffusion 2"
    assert ldm.inspect(path).prediction == "does not say whether it predicts eps or v"
    assert load_vae(path, check=False).config == SD_V1.vae  # needs not be told
    assert recognise(open_archive(path), prediction="eps").config == SD_V2
    assert recognise(open_archive(path), prediction="v").config == SD_V2_768


def test_a_file_that_says_it_predicts_v_is_the_model_for_768(tmp_path: Path) -> None:
    path = header_only(tmp_path / "v2.safetensors", SD_V2)
    path.with_suffix(".yaml").write_text('parameterization: "v"\n')
    assert recognise(open_archive(path)).config == SD_V2_768
    assert ldm.inspect(path).loads


def test_a_published_file_is_known_by_its_hash(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "v2.safetensors"
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: randn(320, 1024)}, path)
    assert recognise(open_archive(path)).predictions == noise.UNSAID
    monkeypatch.setattr(noise, "PUBLISHED_SIZES", range(10**7))
    assert recognise(open_archive(path)).predictions == noise.UNSAID
    monkeypatch.setitem(noise.PUBLISHED, file_sha256(path), "v")
    assert recognise(open_archive(path)).config == SD_V2_768


@pytest.mark.parametrize("key", ["noise_augmentor.betas", "embedder.model.visual.proj"])
def test_unclip_is_refused_by_name(v2, tmp_path: Path, key: str) -> None:
    file = write_weights(tmp_path / "file", load_file(v2[0]) | {key: torch.ones(1)})
    with pytest.raises(FamilyError, match=r"is Stable Diffusion 2\.1 unCLIP"):
        load_unet(file, config=small_v2_config())


def test_the_official_configs_have_the_published_numbers_of_parameters() -> None:
    """Of the UNet as of `stabilityai/stable-diffusion-2-1`, of ViT-H/14's text tower without its
    last block and projection."""
    counts = {
        stage: sum(p.numel() for p in empty_stage(stage, SD_V2).parameters())
        for stage in ("unet", "text")
    }
    assert counts == {"unet": 865_910_724, "text": 340_387_840}
