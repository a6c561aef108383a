"""Every file that a user may have, loaded: a stage of it, or a whole model of one or several."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldm
import ldm.checkpoints.saving
import ldm.checkpoints.spellings
import ldm.errors
from ldm.checkpoints.diffusers.writing import save_folder
from ldm.checkpoints.keys import PREFIXES, computed_entries
from ldm.checkpoints.loading import load_stages, load_text_encoder, load_unet, load_vae
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.stages import build_stage
from ldm.checkpoints.tokenizer_files import write_tokenizer
from ldm.errors import (
    ConfigError,
    FamilyError,
    KeysError,
    MissingPartsError,
)
from ldm.tokenizer import Tokenizer
from tests.checkpoints.helpers import LOADERS, UNET_KEY, rewrite
from tests.helpers import (
    CONTAINERS,
    STAGES,
    Tensors,
    assert_filled,
    random_stage,
    tiny_config,
    tiny_model,
    tiny_tensors,
    tiny_tokenizer,
    with_ema,
    write_training_run,
    write_weights,
)

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
    write_tokenizer(tiny_tokenizer(), folder)
    found = load_text_encoder(path)
    assert found.tokenizer == tiny_tokenizer()
    assert found(["a red house"]).shape == (1, 12, 24)


def test_unknown_stage_is_refused(saved) -> None:
    with pytest.raises(ValueError, match="no stage 'clip'"):
        load_stages(saved[0], ("clip",))


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


def as_diffusers_attention(key: str) -> str:
    for official, other in {
        "q": "to_to_q",
        "k": "to_k",
        "v": "value",
        "proj_out": "to_out.0",
    }.items():
        key = key.replace(f".attn_1.{official}.", f".attn_1.{other}.")
    return key


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
    "other attention": lambda t: changed_keys(t, as_diffusers_attention),
    "data parallel": lambda t: changed_keys(t, lambda key: f"module.{key}"),
    "compiled": lambda t: changed_keys(t, lambda key: f"_orig_mod.{key}"),
    "a compiled UNet": lambda t: changed_keys(
        t, lambda key: key.replace("diffusion_model.", "diffusion_model._orig_mod.")
    ),
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
    expected = changed_keys(tensors, lambda key: ldm.checkpoints.spellings.official_name(key))
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


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_part_of_a_folder_is_said_to_be_one(tmp_path: Path, part: str) -> None:
    models = {stage: random_stage(stage, tiny_config()) for stage in STAGES}
    folder = tmp_path / "tiny"
    save_folder(folder, config=tiny_config(), tokenizer=tiny_tokenizer(), **models)
    with pytest.raises(MissingPartsError, match=f"one part of a diffusers folder; pass {folder}$"):
        ldm.load(folder / part)


# --- A whole model ---------------------------------------------------------------------------


def test_a_whole_model_from_three_places(tmp_path: Path) -> None:
    def part(name: str, seed: int, *stages: str) -> Path:
        prefixes = tuple(PREFIXES[stage] for stage in stages)
        tensors = {k: v for k, v in tiny_tensors(seed).items() if k.startswith(prefixes)}
        (tmp_path / name).mkdir()
        return write_weights(tmp_path / name / "part.ckpt", tensors, "torch zip pickle")

    unet, vae, text = part("a", 1, "unet"), part("b", 2, "vae", "unet"), part("c", 3, "text")
    write_tokenizer(tiny_tokenizer(), text.parent)  # the text encoder's tokenizer is the model's
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


def test_a_whole_model_without_a_tokenizer_says_how_to_get_one(saved) -> None:
    with pytest.raises(FileNotFoundError, match=r"put vocab.json and merges.txt beside it"):
        ldm.load(saved[0])


def test_a_tokenizer_is_taken_as_it_is_given_or_from_its_folder(saved, tmp_path) -> None:
    given = tiny_tokenizer()
    assert ldm.load(saved[0], device="cpu", tokenizer=given).text.tokenizer is given
    write_tokenizer(given, tmp_path)
    assert ldm.load(saved[0], device="cpu", tokenizer=tmp_path).text.tokenizer == given
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        ldm.load(saved[0], device="cpu", tokenizer=tmp_path / "nothing")


def test_without_a_tokenizer_ids_are_encoded_and_prompts_are_an_error(saved) -> None:
    pipe = ldm.load(saved[0], device="cpu", tokenizer=False)
    assert pipe.text.encode(torch.tensor([[0, 1]])).shape == (1, 2, tiny_config().text.hidden_size)
    with pytest.raises(ValueError, match="has no tokenizer"):
        pipe("a red house", steps=1)


def test_another_models_tokenizer_is_refused_before_weights_are_read(saved, monkeypatch) -> None:
    monkeypatch.setattr("ldm.pipeline.fill", lambda *_: pytest.fail("weights were read"))
    other = Tokenizer.train(["a red house"], 520)
    with pytest.raises(ValueError, match="size, start and end ids"):
        ldm.load(saved[0], device="cpu", tokenizer=other)


def test_a_file_that_does_not_fit_is_told_before_a_tokenizer_is_fetched(
    tmp_path, monkeypatch
) -> None:
    def fetch(*_) -> None:
        raise AssertionError("nothing is to be fetched for a file that cannot be loaded")

    monkeypatch.setattr("ldm.checkpoints.download.require_tokenizer", fetch)
    tensors = tiny_tensors()
    del tensors[UNET_KEY]
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    with pytest.raises(KeysError, match=f"missing: {UNET_KEY}"):
        ldm.load(path)


def test_every_error_of_a_file_is_a_checkpoint_error() -> None:
    named = vars(ldm.errors).items()
    errors = [error for name, error in named if name.endswith("Error")]
    errors.remove(ldm.errors.DivergedError)  # of a run, not of a file
    assert len(errors) > 10 and all(issubclass(e, ldm.CheckpointError) for e in errors)
    assert issubclass(ldm.CheckpointError, ValueError)
