"""Our folders, written, with diffusers and transformers as the judges."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints.diffusers.writing import config_files
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.checkpoints.tokenizer_files import read_tokenizer, write_tokenizer
from ldm.config import SD_V1, ModelConfig
from ldm.pipeline import TextToImage
from ldm.samplers import ddim, draw_noise
from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer
from tests.checkpoints.diffusers.helpers import (
    TEXT,
    UNET,
    VAE,
    Models,
    hashes,
    loaded,
    oracle,
    random_models,
    save,
    tokenizer_of,
)
from tests.helpers import (
    STAGES,
    randn,
    relative_error,
    rng,
    small_config,
    small_v2_config,
    text_in_fp64,
    tiny_config,
)
from tests.parity import assert_parity

# --- Read by diffusers -----------------------------------------------------------------------


def outputs(stage: str, model: nn.Module, config: ModelConfig, dtype: torch.dtype) -> list[Tensor]:
    """What a stage gives for some inputs, whichever library it is of."""
    ours = model.__module__.startswith("ldm.")
    if stage == "unet":
        x, t = randn(2, 4, 16, 16, seed=1).to(dtype), torch.tensor([999, 1])
        context = randn(2, 9, config.unet.context_dim, seed=2).to(dtype)
        return [model(x, t, context) if ours else model(x, t, context).sample]
    if stage == "vae":
        x, z = randn(1, 3, 32, 32, seed=3).to(dtype), randn(1, 4, 4, 4, seed=4).to(dtype)
        if ours:
            return [model.encode(x).mean, model.decode(z)]
        return [model.encode(x).latent_dist.mean, model.decode(z).sample]
    size, end = config.text.max_length, config.text.eos_token_id
    ids = torch.randint(0, end - 1, (2, size), generator=rng(5))
    ids[:, 0], ids[:, -3:] = end - 1, end
    return [model.encode(ids) if ours else model(input_ids=ids).last_hidden_state]


SMALL = [(small_config(), 1.0), (small_config(), 0.01), (small_v2_config(), 1.0)]


@pytest.fixture(scope="session", params=SMALL, ids=["unit", "small", "v2"])
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Models, Path, ModelConfig]:
    """A model with all of Stable Diffusion's levels, and its folder."""
    config, activation_std = request.param
    models = random_models(config, activation_std=activation_std)
    return models, save(tmp_path_factory.mktemp("small") / "model", models, config), config


@text_in_fp64
@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_diffusers_reads_our_folder_and_computes_the_same(
    diffusers: Any, stage: str, small: tuple[Models, Path, ModelConfig]
) -> None:
    models, folder, config = small
    assert dataclasses.replace(recognise(open_archive(folder)).config, name=config.name) == config
    exact = oracle(diffusers, stage, folder, torch.float64)
    theirs = oracle(diffusers, stage, folder, torch.float32)
    references = outputs(stage, exact, config, torch.float64)
    oracles = outputs(stage, theirs, config, torch.float32)
    mine = outputs(stage, models[stage], config, torch.float32)
    for ours, other, reference in zip(mine, oracles, references, strict=True):
        assert reference.dtype == torch.float64
        assert_parity(ours, other, reference, stage)


def test_the_pipeline_of_diffusers_draws_the_same_picture(pipe: Any, tiny_models: Models) -> None:
    config = tiny_config()
    mine = TextToImage(
        tiny_models["unet"],
        tiny_models["vae"],
        tiny_models["text"],
        NoiseSchedule(config.schedule),
        config,
    )
    settings = dict(guidance_scale=7.5, negative_prompt="the sea")
    (*_, last) = mine.denoise("a red house", steps=4, seed=3, **settings)
    (image,) = mine.decode(last.x_prev)

    noise = draw_noise([rng(3)], torch.empty(1, 4, 8, 8))
    settings |= dict(prompt="a red house", num_inference_steps=4, latents=noise)
    latents = pipe(**settings, output_type="latent").images
    (theirs,) = pipe(**settings).images

    assert relative_error(last.x_prev, latents) < 1e-4
    assert image.size == theirs.size == (16, 16)
    levels = np.stack([np.asarray(image), np.asarray(theirs)]).astype(float)
    assert np.abs(levels[0] - levels[1]).max() <= 1
    assert levels.std() > 10  # a picture, not one colour


PROMPTS = [
    "",
    "a red house",
    "  A  Red\tHOUSE's 3 doors, don't!  ",
    "naïve café ☕ 日本 e\u0301",
    "the end <|endoftext|> of it",
    "x" * 199,
]


def assert_equal_ids(ours: Tokenizer, theirs: Any, max_length: int) -> None:
    for prompt in PROMPTS:
        found = theirs(prompt, padding="max_length", truncation=True).input_ids
        assert found == ours.pad(ours.encode(prompt), max_length), prompt
        assert len(found) == max_length


def test_the_tokenizer_of_transformers_gives_the_same_ids(pipe: Any, tiny_models: Models) -> None:
    assert_equal_ids(tiny_models["text"].tokenizer, pipe.tokenizer, max_length=12)


def test_the_tokenizer_of_transformers_gives_clips_ids(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    ours = read_tokenizer(clip_folder)
    write_tokenizer(ours, tmp_path)
    for name, fields in config_files(SD_V1).items():
        if name.startswith("tokenizer/"):
            (tmp_path / Path(name).name).write_text(json.dumps(fields))
    assert_equal_ids(ours, CLIPTokenizer.from_pretrained(tmp_path), max_length=77)


def test_the_scheduler_of_diffusers_takes_our_steps(diffusers: Any, written: Path) -> None:
    """Alone, since the pipeline of diffusers corrects a scheduler that is set otherwise."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(str(written), subfolder="scheduler")
    scheduler.set_timesteps(5)
    schedule, x = NoiseSchedule(tiny_config().schedule), randn(1, 4, 8, 8)
    for step in ddim(lambda x, t: 0.1 * x, x, schedule.ddim_timesteps(5), schedule):
        t = scheduler.timesteps[step.index]
        assert t == step.t
        theirs = scheduler.step(step.eps, t, step.x)
        # Rounding alone: their tables are fp32, 1e-5 off; x0, far above 1, would show a clipping.
        assert relative_error(step.x_prev, theirs.prev_sample) < 1e-4
        assert relative_error(step.x0, theirs.pred_original_sample) < 1e-4
    assert step.index == 4


# --- Written ---------------------------------------------------------------------------------


def test_saved_loaded_and_saved_again_is_byte_identical(written: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(written / "tokenizer")
    again = save(tmp_path / "again", loaded(written), tiny_config(), tokenizer=tokenizer)
    assert hashes(again) == hashes(written)
    assert len(hashes(again)) == 12 and list(tmp_path.iterdir()) == [again]
    for name in (UNET, VAE, TEXT):  # one entry, which transformers 4 asks for
        with safe_open(again / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_folder_in_half_precision(
    diffusers: Any, dtype: torch.dtype, tiny_models: Models, tmp_path: Path
) -> None:
    half = save(tmp_path / "half", tiny_models, tiny_config(), dtype=dtype)
    archive = open_archive(half)
    assert {entry.dtype for entry in archive.entries.values()} == {dtype}
    assert tiny_models["unet"].conv_in.weight.dtype == torch.float32  # the model stays as it was
    theirs = diffusers.UNet2DConditionModel.from_pretrained(half / "unet", torch_dtype=dtype)
    expected = tiny_models["unet"].conv_in.weight.to(dtype)
    assert torch.equal(theirs.conv_in.weight, expected)


def test_nothing_is_written_over(tiny_models: Models, folder: Path, tmp_path: Path) -> None:
    before = hashes(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in (folder.name, "empty", "file", "link"):
        with pytest.raises(ValueError, match=rf"{name} exists already: .*"):
            save(tmp_path / name, tiny_models, tiny_config())
    assert hashes(folder) == before
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, "empty", "file", "link"}


def test_a_folder_that_cannot_be_is_a_line(tiny_models: Models, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written: No such file or directory$"):
        save(tmp_path / "no" / "folder", tiny_models, tiny_config())


def test_a_folder_appears_whole_or_not_at_all(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def full_disk(tensors: dict[str, Tensor], target: Path, **options: Any) -> None:
        seen.append(target.name)
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, target, **options)

    monkeypatch.setattr("ldm.checkpoints.diffusers.writing.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "model", tiny_models, tiny_config())
    assert len(seen) == 2 and list(tmp_path.iterdir()) == []


def test_stages_and_tokenizer_must_be_the_configs(tiny_models: Models, tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="the tokenizer is not the one of the model 'tiny'"):
        save(tmp_path / "x", tiny_models, config, tokenizer=tokenizer_of(small_config()))
    wrong = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=1.0))
    with pytest.raises(ValueError, match="not built from the config 'tiny'"):
        save(tmp_path / "x", tiny_models, wrong)
    assert list(tmp_path.iterdir()) == []
