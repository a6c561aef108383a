"""Checkpoints: every file that a user may have, strict loading, saving."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ldm
import ldm.checkpoints.checkpoint
import ldm.errors
import ldm.checkpoints.recognise
from ldm.checkpoints.archive import open_archive
from ldm.checkpoints.checkpoint import (
    Unfilled,
    build_stage,
    config_from_json,
    config_to_json,
    load_stages,
    load_text_encoder,
    load_unet,
    load_vae,
    open_weights,
    save_checkpoint,
)
from ldm.config import HORIZON, SD_V1
from ldm.checkpoints.diffusers_layout import save_folder
from ldm.errors import (
    ConfigError,
    DtypeError,
    FamilyError,
    HalfOverflowError,
    KeysError,
    MissingPartsError,
    NonFiniteError,
    ShapeError,
    UnreadableError,
)
from ldm.checkpoints.keys import PREFIXES, computed_entries, key_map
from ldm.schedule import NoiseSchedule
from tests.helpers import (
    CONTAINERS,
    STAGES,
    Tensors,
    assert_filled,
    random_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tensors,
    tiny_tokenizer,
    with_ema,
    write_training_run,
    write_weights,
)

ROOT = Path(__file__).parents[2]
UNET_KEY = "model.diffusion_model.middle_block.0.in_layers.2.weight"
VAE_KEY = "first_stage_model.decoder.mid.attn_1.q.weight"
TEXT_KEY = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"
LOADERS = {"unet": load_unet, "vae": load_vae, "text": load_text_encoder}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, nn.Module]]:
    """A random tiny model in a file."""
    path = tmp_path / "model.safetensors"
    return path, random_checkpoint(path, tiny_config(), seed=2)


def rewrite(path: Path, change) -> None:
    """Change the tensors of a file, keep its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


# --- There and back --------------------------------------------------------------------------


def test_loading_gives_what_was_saved(saved, device: str) -> None:
    path, models = saved
    loaded = dict(zip(STAGES, load_stages(path, device=device), strict=True))
    for stage, model in models.items():
        expected = model.state_dict()
        found = loaded[stage].state_dict()
        assert found.keys() == expected.keys()
        for key in expected:
            assert torch.equal(found[key].cpu(), expected[key]), key
        assert not loaded[stage].training
        everything = [*loaded[stage].parameters(), *loaded[stage].buffers()]
        assert {tensor.device.type for tensor in everything} == {device}  # nothing left on meta


def test_saving_what_was_loaded_gives_the_same_bytes(saved, tmp_path: Path) -> None:
    path, _ = saved
    unet, vae, text = load_stages(path)
    save_checkpoint(
        tmp_path / "again", unet=unet, vae=vae, text=text, config=open_weights(path).config
    )
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_file_holds_parameters_and_computed_entries(saved) -> None:
    path, models = saved
    tensors = load_file(path)
    parameters = {name for model in models.values() for name in key_map(model).values()}
    assert tensors.keys() == parameters | computed_entries()
    positions = tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert positions.dtype == torch.int64 and positions.tolist() == [list(range(12))]
    assert torch.equal(tensors["betas"], NoiseSchedule().betas)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_converts_when_loading_and_when_saving(saved, tmp_path: Path, dtype) -> None:
    path, models = saved
    for stage, model in zip(STAGES, load_stages(path, dtype=dtype), strict=True):
        for key, parameter in model.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, models[stage].state_dict()[key].to(dtype))
    if dtype != torch.float64:
        other = tmp_path / "half.safetensors"
        save_checkpoint(other, config=tiny_config(), dtype=dtype, **models)
        tensors = load_file(other)
        assert tensors[UNET_KEY].dtype == dtype
        assert tensors["betas"].dtype == torch.float32  # the schedule keeps its precision
        assert torch.equal(tensors[UNET_KEY], load_file(path)[UNET_KEY].to(dtype))


def test_config_travels_in_the_metadata(saved) -> None:
    path, _ = saved
    assert open_weights(path).config == tiny_config()
    for config in (SD_V1, HORIZON):
        assert config_from_json(config_to_json(config), Path("a file")) == config


def test_file_without_a_config_is_taken_for_sd_v1_if_it_is_as_wide(tmp_path: Path) -> None:
    path = tmp_path / "model"
    unet = {"model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3)}
    assert open_weights(write_weights(path, unet)).config == SD_V1
    with pytest.raises(KeysError, match="too few for the unet of sd-v1"):
        load_unet(path)
    write_weights(path, tiny_tensors())
    with pytest.raises(ConfigError, match=r"not as wide as Stable Diffusion v1.*: pass its config"):
        load_unet(path)
    assert load_unet(path, config=tiny_config()).config == tiny_config().unet


def test_asked_config_comes_before_the_files_own(saved) -> None:
    path, _ = saved
    other = dataclasses.replace(
        tiny_config(), unet=dataclasses.replace(tiny_config().unet, num_heads=4)
    )
    assert load_unet(path, config=other).config.num_heads == 4


def test_folder_means_the_file_in_it(saved) -> None:
    path, models = saved
    loaded = load_vae(path.parent).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in models["vae"].state_dict().items())


@pytest.mark.parametrize("place", [".", "tokenizer"])
def test_tokenizer_beside_the_file_is_found(saved, place: str) -> None:
    path, _ = saved
    assert load_text_encoder(path).tokenizer is None
    folder = path.parent / place
    folder.mkdir(exist_ok=True)
    tiny_tokenizer().save(folder)
    found = load_text_encoder(path)
    assert found.tokenizer == tiny_tokenizer()
    assert found(["a red house"]).shape == (1, 12, 24)


# --- One stage alone -------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_loads_where_the_others_are_absent(saved, stage: str) -> None:
    path, models = saved

    def keep_only(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if not k.startswith(PREFIXES[stage])]:
            del tensors[key]

    rewrite(path, keep_only)
    loaded = LOADERS[stage](path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in models[stage].state_dict().items())
    with pytest.raises(MissingPartsError, match=f"holds {stage} only: there is no"):
        load_stages(path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_alone_does_not_mind_what_else_is_in_the_file(saved, stage: str) -> None:
    path, _ = saved
    rewrite(path, lambda tensors: tensors.update(model_ema_decay=torch.ones(1)))
    assert type(LOADERS[stage](path)) is type(build_stage(stage, tiny_config()))
    with pytest.raises(KeysError, match="unexpected: model_ema_decay"):
        load_stages(path)


# --- What is normal in the wild --------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_read_and_its_name_says_nothing(tmp_path: Path, container: str) -> None:
    tensors = tiny_tensors()
    path = write_weights(tmp_path / "weights.gguf", tensors, container)
    before = path.read_bytes()
    assert open_archive(path).container == container
    for stage in load_stages(path, config=tiny_config()):
        assert_filled(stage, tensors)
    assert path.read_bytes() == before  # a file is only read


@pytest.mark.parametrize("container", CONTAINERS[1:])
@pytest.mark.parametrize("wrapped", [0, 1, 2])
def test_training_run_is_read_however_often_it_is_wrapped(tmp_path, container, wrapped) -> None:
    tensors = tiny_tensors()
    path = write_training_run(tmp_path / "last.ckpt", tensors, container, wrapped)
    for stage in load_stages(path, config=tiny_config()):
        assert_filled(stage, tensors)


def changed_keys(tensors: Tensors, change) -> Tensors:
    return {change(key): value for key, value in tensors.items()}


def positions_as(dtype: torch.dtype):
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return lambda tensors: tensors | {key: tensors[key].to(dtype)}


def mixed_dtypes(tensors: Tensors) -> Tensors:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {key: value.to(dtypes[n % 4]) for n, (key, value) in enumerate(sorted(tensors.items()))}


def linear_attention(tensors: Tensors) -> Tensors:
    linear = {k: v[..., 0, 0] for k, v in tensors.items() if ".attn_1." in k and v.ndim == 4}
    assert len(linear) == 8 and all(value.ndim == 2 for value in linear.values())
    return tensors | linear


# Nothing of this changes a weight, but for its precision.
WILD = {
    "float16": lambda tensors: {k: v.half() for k, v in tensors.items()},  # the schedule, too
    "bfloat16": lambda tensors: {k: v.bfloat16() for k, v in tensors.items()},
    "mixed": mixed_dtypes,
    "8-bit floats": lambda tensors: {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()},
    "no buffers": lambda t: {k: v for k, v in t.items() if k not in computed_entries()},
    "zeroed schedule": lambda t: t | {k: t[k] * 0 for k in computed_entries()},
    "float positions": positions_as(torch.float16),
    "int32 positions": positions_as(torch.int32),
    "no text_model.": lambda t: changed_keys(t, lambda key: key.replace("text_model.", "")),
    "linear attention": linear_attention,
    "EMA, not asked for": with_ema,
    "of training": lambda t: (
        t
        | {
            "loss.logvar": torch.zeros(()),
            "loss.perceptual_loss.net.slice1.0.weight": torch.full((2,), torch.nan),  # LPIPS
            "first_stage_model.loss.discriminator.main.0.weight": torch.ones(2),
            "lvlb_weights": torch.ones(3),
            "cond_stage_model.logit_scale": torch.ones(()),
            "cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2),
        }
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("variant", WILD)
def test_what_is_normal_in_the_wild_loads(tmp_path: Path, variant: str, container: str) -> None:
    tensors = WILD[variant](tiny_tensors())
    path = write_weights(tmp_path / "wild", tensors, container)
    expected = changed_keys(tensors, lambda key: ldm.checkpoints.recognise.official_name(key))
    for stage in load_stages(path, config=tiny_config(), ema=False):
        assert_filled(stage, expected)


ALONE = {
    "unet as in a whole file": ("unet", ""),
    "unet, shorter": ("unet", "model."),
    "unet, bare": ("unet", "model.diffusion_model."),
    "vae as in a whole file": ("vae", ""),
    "vae, bare": ("vae", "first_stage_model."),
    "text as in a whole file": ("text", ""),
    "text of transformers 4": ("text", "cond_stage_model.transformer."),
    "text of transformers 5": ("text", "cond_stage_model.transformer.text_model."),
}


@pytest.mark.parametrize("stage, prefix", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_stage_in_a_file_of_its_own(tmp_path: Path, stage, prefix, container) -> None:
    tensors = {k: v for k, v in tiny_tensors().items() if k.startswith(PREFIXES[stage])}
    bare = changed_keys(tensors, lambda key: key.removeprefix(prefix))
    path = write_weights(tmp_path / "alone", bare, container)
    assert_filled(LOADERS[stage](path, config=tiny_config()), tensors)
    others = [other for other in STAGES if other != stage]
    with pytest.raises(MissingPartsError) as caught:
        ldm.load(path, config=tiny_config())
    told = str(caught.value)
    assert f"holds {stage} only: there is no {' and no '.join(others)} in it" in told
    if stage == "unet":
        assert "pass vae= and text=: a file" in told
    else:
        assert "load a file with a unet, and pass this one beside it" in told


def test_a_whole_model_from_three_places(tmp_path: Path) -> None:
    def part(name: str, seed: int, *stages: str) -> Path:
        prefixes = tuple(PREFIXES[stage] for stage in stages)
        tensors = {k: v for k, v in tiny_tensors(seed).items() if k.startswith(prefixes)}
        (tmp_path / name).mkdir()
        return write_weights(tmp_path / name / "part.ckpt", tensors, "torch zip pickle")

    unet, vae, text = part("a", 1, "unet"), part("b", 2, "vae", "unet"), part("c", 3, "text")
    tiny_tokenizer().save(text.parent)  # the text encoder's tokenizer is the model's
    pipe = ldm.load(unet, config=tiny_config(), vae=vae, text=text, device="cpu")
    for stage, seed in (("unet", 1), ("vae", 2), ("text", 3)):
        assert_filled(getattr(pipe, stage), tiny_tensors(seed))
    assert pipe.origin.paths == {"unet": unet, "vae": vae, "text": text}
    assert f"vae from {vae}" in str(pipe.origin) and f"text from {text}" in str(pipe.origin)
    with pytest.raises(MissingPartsError, match="there is no text in it; pass text=: a file"):
        ldm.load(vae, config=tiny_config())
    with pytest.raises(MissingPartsError, match="holds text only: there is no vae in it"):
        ldm.load(unet, config=tiny_config(), vae=text, text=text)


def test_each_file_brings_the_config_of_its_own_stage(tmp_path: Path) -> None:
    config = tiny_config()
    scaled = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=0.5))
    wide = dataclasses.replace(config, text=dataclasses.replace(config.text, hidden_size=32))
    main = tiny_model(tmp_path) / "model.safetensors"
    other = write_weights(tmp_path / "other", tiny_tensors(5), config=scaled)
    pipe = ldm.load(main, vae=other)
    assert pipe.config == scaled and pipe.vae.config.scaling_factor == 0.5
    assert ldm.load(main, vae=other, config=config).config == config  # what is asked comes first
    bare = write_weights(tmp_path / "bare", tiny_tensors(5))
    assert ldm.load(main, vae=bare).config == config
    write_weights(other, tiny_tensors(5), config=wide)
    with pytest.raises(ConfigError, match=r"makes text states of width 32, .* reads 24"):
        ldm.load(main, text=other)
    more = dataclasses.replace(config, vae=dataclasses.replace(config.vae, latent_channels=8))
    write_weights(other, tiny_tensors(5), config=more)
    with pytest.raises(ConfigError, match=r"makes latents of 8 channels, .* reads 4"):
        ldm.load(main, vae=other)


def test_a_diffusers_folder_comes_through_the_same_door(saved, tmp_path: Path) -> None:
    path, models = saved
    folder = tmp_path / "tiny"
    save_folder(folder, config=tiny_config(), tokenizer=tiny_tokenizer(), **models)
    pipe = ldm.load(folder, device="cpu")
    tensors = load_file(path)
    for stage in STAGES:
        assert_filled(getattr(pipe, stage), tensors)
    assert pipe.config == tiny_config() and pipe.origin.container == "diffusers folder"
    assert_filled(load_vae(folder / "vae"), tensors)
    with pytest.raises(FamilyError, match=r"a part of a diffusers folder .pass the folder"):
        load_unet(folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"colour": torch.ones(1)}, weights)
    for load in (ldm.load, load_vae):
        with pytest.raises(KeysError, match="unexpected: vae/colour"):
            load(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(MissingPartsError, match="there is no vae in it; pass vae="):
        ldm.load(folder)


# --- EMA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("ema, taken", [("auto", True), (True, True), (False, False)])
def test_ema_weights_are_taken_as_asked_and_it_is_told(tmp_path, container, ema, taken) -> None:
    tensors = tiny_tensors()
    path = write_weights(tiny_model(tmp_path) / "model.safetensors", with_ema(tensors), container)
    pipe = ldm.load(path, config=tiny_config(), ema=ema)
    assert pipe.origin.ema == taken and ("EMA weights" in str(pipe.origin)) == taken
    halved = {k: v * 0.5 for k, v in tensors.items()}  # what the helper makes a mean of
    assert_filled(pipe.unet, halved if taken else tensors)
    assert_filled(pipe.vae, tensors)
    assert_filled(load_unet(path, config=tiny_config(), ema=ema), halved if taken else tensors)


def test_file_without_ema_weights(saved) -> None:
    path, _ = saved
    tensors = load_file(path)
    for ema in ("auto", False):
        assert_filled(load_unet(path, ema=ema), tensors)
    with pytest.raises(MissingPartsError, match=r"has 0 of .* EMA weights: leave ema at 'auto'"):
        load_unet(path, ema=True)


def test_half_a_set_of_ema_weights_is_not_taken(tmp_path: Path) -> None:
    tensors = with_ema(tiny_tensors())
    del tensors["model_ema.diffusion_modelout2bias"]
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    assert_filled(load_unet(path), tensors)
    with pytest.raises(MissingPartsError, match="leave ema at 'auto'") as caught:
        load_unet(path, ema=True)
    count = len(key_map(load_unet(path)))
    assert f"has {count - 1} of {count} EMA" in str(caught.value)


@pytest.mark.parametrize("ema", ["yes", 1, None])
def test_ema_is_one_of_three(saved, ema) -> None:
    with pytest.raises(ValueError, match="ema must be 'auto', True or False, not"):
        load_unet(saved[0], ema=ema)


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    tensors = with_ema(tiny_tensors()) | {"loss.logvar": torch.zeros(())}
    means = sum(key.startswith("model_ema.") for key in tensors)
    path = write_training_run(folder / "model.safetensors", tensors, "torch zip pickle")
    origin = ldm.load(path, config=tiny_config(), ema=False).origin
    assert origin.ignored == {"model_ema": means, "loss": 1, "optimizer_states": 9, "callbacks": 1}
    assert origin.stubs == ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
    for word in ("torch zip pickle", "9 of optimizer_states", "ModelCheckpoint"):
        assert word in str(origin)
    assert ldm.load(path, config=tiny_config()).origin.ignored["model_ema"] == 2  # its counters


# --- The tokenizer of a whole model ----------------------------------------------------------


def test_a_whole_model_without_a_tokenizer_says_how_to_get_one(saved) -> None:
    with pytest.raises(FileNotFoundError, match=r"put vocab.json and merges.txt beside it"):
        ldm.load(saved[0])


def test_a_file_that_does_not_fit_is_told_before_a_tokenizer_is_fetched(
    tmp_path, monkeypatch
) -> None:
    def fetch(*_) -> None:
        raise AssertionError("nothing is to be fetched for a file that cannot be loaded")

    monkeypatch.setattr(ldm, "require_tokenizer", fetch)
    tensors = tiny_tensors()
    del tensors[UNET_KEY]
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    with pytest.raises(KeysError, match=f"missing: {UNET_KEY}"):
        ldm.load(path)


# --- Other models are refused by name --------------------------------------------------------

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CROSS = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "inpainting": lambda t: t | {FIRST: torch.ones(16, 9, 3, 3)},
    "instruct-pix2pix": lambda t: t | {FIRST: torch.ones(16, 8, 3, 3)},
    "Stable Diffusion 2": lambda t: t | {CROSS: torch.ones(32, 1024)},
    "Stable Diffusion XL": lambda t: t | {CROSS: torch.ones(32, 2048)},
    "ControlNet": lambda t: t | {"control_model.time_embed.0.weight": torch.ones(1)},
    "LoRA": lambda t: {"lora_unet_mid_block_attentions_0.lora_up.weight": torch.ones(2, 2)},
    "textual inversion": lambda t: {"string_to_param.*": torch.ones(1, 768)},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused_by_name(tmp_path: Path, name: str, container: str) -> None:
    path = write_weights(tmp_path / "other", OTHERS[name](tiny_tensors()), container)
    for load in (load_unet, ldm.load):
        with pytest.raises(FamilyError, match=f"is .*{name}.*; ldm loads Stable Diffusion v1"):
            load(path, config=tiny_config())


def test_no_stage_of_a_model(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "other", {"fc.weight": torch.ones(3, 3)})
    with pytest.raises(MissingPartsError, match="holds no stage of a model that ldm knows"):
        load_unet(path)


# --- Numbers that are none -------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("value, kind", [(torch.nan, "NaN"), (-torch.inf, "infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_number_that_is_none_is_found_and_named(tmp_path, container, value, kind, dtype) -> None:
    tensors = tiny_tensors()
    broken = tensors[UNET_KEY].clone()
    broken.view(-1)[-1] = value
    path = write_weights(tmp_path / "file", tensors | {UNET_KEY: broken}, container)
    with pytest.raises(NonFiniteError, match=f"{UNET_KEY} holds {kind}: the file is damaged"):
        load_unet(path, config=tiny_config(), dtype=dtype)
    assert_filled(load_vae(path, config=tiny_config()), tensors)  # which holds none of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_the_check_no_number_is_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = tiny_tensors()
    tensors[UNET_KEY] = torch.full_like(tensors[UNET_KEY], torch.nan)
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    unet = load_unet(path, dtype=dtype, check=False)
    assert sum(bool(weight.isnan().all()) for weight in unet.parameters()) == 1


def test_weights_that_need_not_change_stay_on_the_mapped_file(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file", tiny_tensors(), config=tiny_config())
    before = path.read_bytes()
    unet = load_unet(path)
    spans = sorted((w.data_ptr(), w.data_ptr() + w.nbytes) for w in unet.parameters())
    # All of them within the length of one file, each on its own.
    assert spans[-1][1] - spans[0][0] <= len(before)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    with torch.no_grad():
        for weight in unet.parameters():
            weight.zero_()  # as training does
    assert path.read_bytes() == before


OVERFLOWS = [
    (torch.float32, 1e5, torch.float16, "100000, too large for float16: load it as float32"),
    (torch.float64, 1e39, torch.float32, "1e.39, too large for float32: load it as float64"),
    (torch.float32, 3.4e38, torch.bfloat16, "3.4e.38, too large for bfloat16: load it as float32"),
]


@pytest.mark.parametrize("stored, value, asked, told", OVERFLOWS)
def test_a_number_too_large_for_the_asked_type_is_said_to_be_that(
    tmp_path: Path, stored, value, asked, told
) -> None:
    tensors = {key: tensor.to(stored) for key, tensor in tiny_tensors().items()}
    tensors[VAE_KEY] = tensors[VAE_KEY].clone()
    tensors[VAE_KEY].view(-1)[5] = value
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    assert_filled(load_vae(path, dtype=stored), tensors, stored)
    with pytest.raises(HalfOverflowError, match=f"{VAE_KEY} holds {told}"):
        load_vae(path, dtype=asked)


def test_large_numbers_whose_sum_alone_overflows_are_no_error(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors[VAE_KEY] = torch.full_like(tensors[VAE_KEY], 3e38)
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    assert_filled(load_vae(path), tensors)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors[UNET_KEY] = (tensors[UNET_KEY] * 100).to(torch.int8)
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    with pytest.raises(DtypeError, match=rf"not floating-point numbers: {UNET_KEY} \(int8\)"):
        load_unet(path)


def test_only_the_very_shape_is_taken(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    for wrong in (tensors[UNET_KEY].flatten(), tensors[UNET_KEY][None], tensors[UNET_KEY][1:]):
        changed = tensors | {UNET_KEY: wrong}
        path = write_weights(tmp_path / "file", changed, config=tiny_config())
        with pytest.raises(ShapeError, match=f"wrongly shaped: {UNET_KEY}"):
            load_unet(path)


def test_two_spellings_of_one_key_are_not_guessed_between(tmp_path: Path) -> None:
    tensors = tiny_tensors() | {VAE_KEY.removeprefix("first_stage_model."): torch.ones(1)}
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    with pytest.raises(KeysError, match=f"{VAE_KEY} under two names"):
        load_vae(path)


# --- Memory ----------------------------------------------------------------------------------

# A UNet alone, which needs no transformers: 77 million numbers, 310 MB in fp32.
LARGE = dataclasses.replace(
    SD_V1,
    name="large",
    unet=dataclasses.replace(SD_V1.unet, model_channels=96, context_dim=288),
)
MEASURE = """
import sys, torch, ldm
def resident(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name))
    return int(line.split()[1]) * 1024
torch.ones(1 << 20).half().sum()  # what torch sets up for its first work
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
unet = ldm.load_unet(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(resident("VmHWM") - before, sum(p.numel() for p in unet.parameters()))
assert "transformers" not in sys.modules
"""


def peak_over_fp32(path: Path, dtype: str) -> float:
    """The peak of resident memory, mapped pages included, that loading the UNet of a file adds in a
    fresh process, as a multiple of its bytes in fp32."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), dtype],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peak, numel = map(int, run.stdout.split())
    return peak / (4 * numel)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    with torch.device("meta"):
        model = build_stage("unet", LARGE)
    shapes = {official: model.state_dict()[ours].shape for ours, official in key_map(model).items()}
    numel = sum(shape.numel() for shape in shapes.values())
    assert 70e6 < numel < 90e6
    numbers = torch.randn(numel).split([shape.numel() for shape in shapes.values()])
    tensors = {k: v.view(shapes[k]) for k, v in zip(shapes, numbers, strict=True)}
    folder = tmp_path_factory.mktemp("large")
    return write_weights(folder / "unet.safetensors", tensors, config=LARGE), tensors


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc"
)


# What stays on the mapped file is looked at, tensor by tensor, and given back until it is used; the
# largest tensor and what Python imports are some hundredths.
ON_THE_FILE = 0.3


@linux
@pytest.mark.parametrize("dtype, bound", [("float32", ON_THE_FILE), ("float16", 0.6)])
def test_loading_takes_the_memory_of_what_is_copied(large, dtype: str, bound: float) -> None:
    assert peak_over_fp32(large[0], dtype) <= bound


@linux
def test_what_is_not_loaded_costs_no_memory(large, tmp_path: Path) -> None:
    tensors = with_ema(large[1])
    path = write_weights(tmp_path / "unet.safetensors", tensors, config=LARGE)
    states = {f"optimizer_states.{n}": value + 1 for n, value in enumerate(large[1].values())}
    write_weights(path, tensors | states, config=LARGE)
    assert path.stat().st_size > 2.9 * large[0].stat().st_size
    assert peak_over_fp32(path, "float32") <= ON_THE_FILE
    path.unlink()


@linux
def test_half_precision_in_the_file_costs_no_more(large, tmp_path: Path) -> None:
    halves = {key: value.half() for key, value in large[1].items()}
    path = write_weights(tmp_path / "unet.safetensors", halves, config=LARGE)
    assert peak_over_fp32(path, "float32") <= 1.05
    assert peak_over_fp32(path, "float16") <= 0.6
    path.unlink()


# --- What is wrong is named ------------------------------------------------------------------

BREAKS = {
    "missing": lambda key: lambda tensors: tensors.pop(key),
    "unexpected": lambda key: lambda tensors: tensors.update({key + "_more": torch.ones(1)}),
    "wrongly shaped": lambda key: lambda tensors: tensors.update({key: torch.ones(3, 5)}),
}


@pytest.mark.parametrize("key", [UNET_KEY, VAE_KEY, TEXT_KEY], ids=STAGES)
@pytest.mark.parametrize("what", BREAKS)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "whole"])
def test_wrong_keys_are_named(saved, key: str, what: str, alone: bool) -> None:
    path, _ = saved
    rewrite(path, BREAKS[what](key))
    stage = next(s for s in STAGES if key.startswith(PREFIXES[s]))
    with pytest.raises(KeysError) as caught:
        LOADERS[stage](path) if alone else load_stages(path)
    told = str(caught.value)
    named = key + "_more" if what == "unexpected" else key
    assert f"{what}: {named}" in told and str(path) in told and "\n" not in told
    if what == "wrongly shaped":
        assert "found [3, 5], expected [" in told
    assert not any(f"{other}:" in told for other in BREAKS if other != what)


def test_all_kinds_of_wrong_keys_are_told_at_once(saved) -> None:
    path, _ = saved
    other = UNET_KEY.replace("in_layers", "out_layers").replace("2.weight", "3.weight")
    rewrite(path, BREAKS["missing"](UNET_KEY))
    rewrite(path, BREAKS["unexpected"](UNET_KEY))
    rewrite(path, BREAKS["wrongly shaped"](other))
    with pytest.raises(KeysError) as caught:
        load_stages(path)
    told = str(caught.value)
    assert f"missing: {UNET_KEY}" in told
    assert f"unexpected: {UNET_KEY}_more" in told
    assert f"wrongly shaped: {other}" in told


def test_many_wrong_keys_are_counted(saved) -> None:
    path, models = saved

    def drop_vae(tensors: dict[str, Tensor]) -> None:
        for key in list(key_map(models["vae"]).values())[1:]:
            del tensors[key]

    rewrite(path, drop_vae)
    with pytest.raises(KeysError, match=f"and {len(models['vae'].state_dict()) - 9} more"):
        load_stages(path)


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_unet(tmp_path / "none.safetensors")


def test_folder_without_weights_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(MissingPartsError, match=r"holds no weights: .*unet/, vae/, text_encoder/"):
        load_unet(tmp_path)


def test_folder_with_several_files_names_them(tmp_path: Path) -> None:
    for name in ("b.ckpt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingPartsError, match=r"pass one of a\.safetensors, b\.ckpt"):
        load_unet(tmp_path)


@pytest.mark.parametrize("content", ["empty", "garbage", "text", "header", "data"])
def test_broken_file_is_unreadable(saved, content: str) -> None:
    path, _ = saved
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "garbage": torch.arange(256, dtype=torch.uint8).numpy().tobytes() * 10,
            "text": b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 10,
            "header": whole[:100],  # cut in the middle of the header
            "data": whole[:-100],  # cut in the middle of the last tensor
        }[content]
    )
    with pytest.raises(UnreadableError, match=path.name):
        load_unet(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"unet": {"colour": 3}}', "3", "[" * 99999, '"' + "9" * 9999 + '"']
)
def test_metadata_that_is_no_config_is_unreadable(saved, text: str) -> None:
    path, _ = saved
    save_file(load_file(path), path, metadata={"ldm": text})
    with pytest.raises(UnreadableError, match="not a config"):
        load_unet(path)


WRONG_CONFIGS = {
    "a float for a whole number": ("unet", "norm_groups", 4.0),
    "a truth value for a whole number": ("unet", "num_heads", True),
    "a negative number": ("vae", "norm_groups", -4),
    "a huge number": ("unet", "model_channels", 10**12),
    "infinity": ("vae", "scaling_factor", float("inf")),
    "a number for a list": ("unet", "channel_mult", 1),
    "a list in a list": ("unet", "channel_mult", [1, [2]]),
    "a field too many": ("text", "colour", 1),
}


@pytest.mark.parametrize("part, name, value", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_metadata_with_impossible_values_is_unreadable(saved, part: str, name: str, value) -> None:
    path, _ = saved
    config = json.loads(config_to_json(tiny_config()))
    config[part][name] = value
    save_file(load_file(path), path, metadata={"ldm": json.dumps(config)})
    with pytest.raises(UnreadableError, match="not a config"):
        load_unet(path)


IMPOSSIBLE = {
    "more blocks than tensors": ("unet", "num_res_blocks", 99999, KeysError),
    "more levels than tensors": ("vae", "channel_mult", [1] * 9999, KeysError),
    "more layers than tensors": ("text", "num_layers", 999999, KeysError),
    "no levels": ("unet", "channel_mult", [], ConfigError),
    "groups that do not divide": ("unet", "norm_groups", 7, ConfigError),
    "no heads": ("unet", "num_heads", 0, ConfigError),
    "no text heads": ("text", "num_heads", 0, ConfigError),
    "no tokens": ("text", "max_length", 0, KeysError),
}


@pytest.mark.parametrize("stage, name, value, error", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_config_that_makes_no_model_is_told_at_once(saved, stage, name, value, error) -> None:
    path, _ = saved
    config = json.loads(config_to_json(tiny_config()))
    config[stage][name] = value
    save_file(load_file(path), path, metadata={"ldm": json.dumps(config)})
    with pytest.raises(error, match=str(path)) as caught:
        LOADERS[stage](path)
    assert "\n" not in str(caught.value)


def test_every_error_of_a_file_is_a_checkpoint_error() -> None:
    named = vars(ldm.errors).items()
    errors = [error for name, error in named if name.endswith("Error")]
    assert len(errors) > 10 and all(issubclass(e, ldm.CheckpointError) for e in errors)
    assert issubclass(ldm.CheckpointError, ValueError)


def test_unknown_stage_is_refused(saved) -> None:
    with pytest.raises(ValueError, match="no stage 'clip'"):
        load_stages(saved[0], ("clip",))


# --- A save that fails -----------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
def test_failed_save_leaves_what_was_there(
    saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    models = saved[1]
    folder = tmp_path / "save"
    folder.mkdir()
    target = folder / "model.safetensors"
    if existing:
        target.write_bytes(b"what was there")

    def half_a_file(tensors, filename, metadata=None) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(ldm.checkpoints.checkpoint, "save_file", half_a_file)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(target, config=tiny_config(), **models)
    assert [p.name for p in folder.iterdir()] == (["model.safetensors"] if existing else [])
    if existing:
        assert target.read_bytes() == b"what was there"


def test_the_very_file_that_was_loaded_can_be_saved_over(tmp_path: Path) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    before = path.read_bytes()
    pipe = ldm.load(path)
    pipe.save(path)
    assert path.read_bytes() == before
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(3)
    pipe.save(path)
    assert torch.equal(load_unet(path).conv_out.bias, pipe.unet.conv_out.bias)
    assert_filled(pipe.vae, tiny_tensors())  # nothing of the model was on the file


def test_saving_replaces_an_existing_file(saved) -> None:
    path, models = saved
    before = path.read_bytes()
    path.write_bytes(b"something else")
    save_checkpoint(path, config=tiny_config(), **models)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_layers_of_a_file_draw_no_initial_weights() -> None:
    seven = torch.full((3, 2), 7.0)
    initialisers = (
        nn.init.uniform_,
        nn.init.normal_,
        nn.init.kaiming_uniform_,
    )  # of PyTorch's layers
    with Unfilled():
        for initialise in initialisers:
            assert initialise(seven) is seven and (seven == 7.0).all()
    assert (nn.init.uniform_(seven) < 7.0).all()
