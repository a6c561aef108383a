"""What a file says of its noise: the schedule, and what the UNet predicts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoints.config_json import config_to_json
from ldm.checkpoints.convert import convert
from ldm.checkpoints.diffusers.writing import save_folder
from ldm.checkpoints.keys import schedule_entries
from ldm.checkpoints.loading import load_unet, load_vae
from ldm.checkpoints.noise import read_yaml
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import Weights, recognise
from ldm.config import ScheduleConfig
from ldm.errors import ConfigError, FamilyError
from ldm.schedule import NoiseSchedule, x0_from_v
from tests.helpers import (
    CONTAINERS,
    STAGES,
    random_stage,
    tiny_config,
    tiny_model,
    tiny_tensors,
    tiny_tokenizer,
    write_weights,
)

# --- The schedule ----------------------------------------------------------------------------

LINEAR = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - LINEAR, 0)
NAMES = ("betas", "alphas_cumprod")


def recognised(path: Path, tensors: dict[str, torch.Tensor], container="safetensors") -> Weights:
    return recognise(open_archive(write_weights(path, tensors, container)), tiny_config())


COPIES = {
    "float16": lambda table: table.half(),
    "bfloat16": lambda table: table.bfloat16(),
    "float8": lambda table: table.to(torch.float8_e4m3fn),
    "float64": lambda table: table.double(),
    "bfloat16, and back": lambda table: table.bfloat16().float(),
    "float16, and back": lambda table: table.half().float(),
}


@pytest.mark.parametrize("rounded", COPIES.values(), ids=COPIES)
def test_rounded_copies_are_the_configs_schedule(tmp_path: Path, rounded) -> None:
    tensors = {k: rounded(v) if k in NAMES else v for k, v in tiny_tensors().items()}
    for names in (NAMES, NAMES[:1], NAMES[1:], ()):
        chosen = {k: v for k, v in tensors.items() if k not in NAMES or k in names}
        weights = recognised(tmp_path / "file", chosen)
        assert weights.config.schedule == ScheduleConfig() and weights.schedule == ""


OWN = {
    "both": {"betas": LINEAR, "alphas_cumprod": ALPHA_BAR},
    "betas alone": {"betas": LINEAR},
    "alphas_cumprod alone": {"alphas_cumprod": ALPHA_BAR},
    "both in half precision": {"betas": LINEAR.half(), "alphas_cumprod": ALPHA_BAR.half()},
    "betas in bfloat16": {"betas": LINEAR.bfloat16()},
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("others", ["beside official ones", "alone"])
@pytest.mark.parametrize("tables", OWN.values(), ids=OWN)
def test_a_schedule_of_its_own_is_used(tmp_path: Path, tables, others: str, container: str) -> None:
    rest = tiny_tensors()
    if others == "alone":
        rest = {k: v for k, v in rest.items() if k not in NAMES}
    single = {k: v.float() if v.dtype == torch.float64 else v for k, v in tables.items()}
    weights = recognised(tmp_path / "file", rest | single, container)
    schedule = NoiseSchedule(weights.config.schedule)
    error = (schedule.alpha_bar.double() / ALPHA_BAR - 1).abs().max()
    assert error < (1e-4 if torch.float32 in {v.dtype for v in single.values()} else 5e-2)
    assert weights.schedule == "its own noise schedule: 1000 betas from 0.0001 to 0.02"


def test_where_both_tables_differ_the_samplers_table_counts(tmp_path: Path) -> None:
    tables = {"betas": torch.full((1000,), 0.01), "alphas_cumprod": ALPHA_BAR.float()}
    schedule = NoiseSchedule(recognised(tmp_path / "file", tiny_tensors() | tables).config.schedule)
    torch.testing.assert_close(schedule.alpha_bar, ALPHA_BAR.float())


def test_alpha_bar_in_half_precision_alone_is_used_as_well_as_it_can_be(tmp_path: Path) -> None:
    tensors = {k: v for k, v in tiny_tensors().items() if k != "betas"}
    tensors["alphas_cumprod"] = ALPHA_BAR.half()  # begins with ones: no noise at all
    schedule = NoiseSchedule(recognised(tmp_path / "file", tensors).config.schedule)
    assert (schedule.alpha_bar - ALPHA_BAR).abs().max() < 1e-3 and schedule.alpha_bar[0] < 1


def test_a_table_of_another_length_is_a_schedule_of_so_many_timesteps(tmp_path: Path) -> None:
    tensors = {k: v for k, v in tiny_tensors().items() if k not in NAMES}
    config = recognised(tmp_path / "file", tensors | {"betas": torch.full((50,), 0.1)}).config
    assert config.schedule.num_train_timesteps == 50
    assert len(NoiseSchedule(config.schedule).betas) == 50


NO_SCHEDULE = {
    "zeros": torch.zeros(1000),  # of programs that merge models
    "NaN": torch.full((1000,), torch.nan),
    "below zero": -LINEAR.float(),
    "a matrix": torch.full((10, 100), 0.1),
    "nothing": torch.zeros(0),
    "whole numbers": torch.ones(1000, dtype=torch.int64),
    "too long": torch.full((70_000,), 1e-5),
    "no picture is left": torch.full((1000,), 0.9),
}


@pytest.mark.parametrize("table", NO_SCHEDULE.values(), ids=NO_SCHEDULE)
def test_tables_that_hold_no_schedule_do_not_count_and_are_told(tmp_path: Path, table) -> None:
    weights = recognised(tmp_path / "file", tiny_tensors() | {"betas": table})
    assert weights.config.schedule == ScheduleConfig()
    assert weights.schedule == "its tables hold no noise schedule: the config's is used"


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """A model with the linear schedule, in a file beside its tokenizer."""
    path = tiny_model(tmp_path) / "model.safetensors"
    tables = schedule_entries(ScheduleConfig(1000, 1e-4, 2e-2, tuple(LINEAR.tolist())))
    save_file(load_file(path) | tables, path, metadata={"ldm": config_to_json(tiny_config())})
    return path


def test_pictures_are_drawn_by_it_and_the_origin_says_so(linear: Path) -> None:
    pipe = ldm.load(linear)
    torch.testing.assert_close(pipe.schedule.alpha_bar, ALPHA_BAR.float())
    assert pipe.config.schedule.betas is not None
    assert "(safetensors; its own noise schedule: 1000 betas from 0.0001 to 0.02" in str(
        pipe.origin
    )
    steps = list(pipe.denoise("a house", steps=2))
    plain = ldm.load(linear.parent)
    plain.schedule = NoiseSchedule()
    others = list(plain.denoise("a house", steps=2))
    assert not torch.equal(steps[-1].x_prev, others[-1].x_prev)


def test_saving_and_converting_keep_it(linear: Path, tmp_path: Path) -> None:
    pipe = ldm.load(linear)
    again = tmp_path / "again.safetensors"
    pipe.save(again)
    for name, table in schedule_entries(pipe.config.schedule).items():
        assert torch.equal(load_file(again)[name], table)
    assert ldm.load(again).config == pipe.config
    convert(again, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    schedule = recognise(open_archive(tmp_path / "back.safetensors")).config.schedule
    assert schedule == pipe.config.schedule
    ldm.load(again).save(tmp_path / "third.safetensors")
    assert (tmp_path / "third.safetensors").read_bytes() == again.read_bytes()


# --- What the UNet predicts ------------------------------------------------------------------

YAML = """model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    {line}
    linear_start: 0.00085
"""


def marked(path: Path, name: str) -> Path:
    """A model that predicts v and says so in one way."""
    tensors, metadata = tiny_tensors(), {"ldm": config_to_json(tiny_config())}
    if name in ("v_pred", "ztsnr"):
        tensors |= {name: torch.zeros(0)}
    elif name == "its metadata":
        metadata["modelspec.prediction_type"] = "v"
    elif name == "kohya":
        metadata["ss_v_parameterization"] = "True"
    elif name == "its noise schedule":
        tensors["alphas_cumprod"] = torch.cat([ALPHA_BAR[:-1].float(), torch.zeros(1)])
    else:
        path.with_suffix(name).write_text(YAML.format(line='parameterization: "v"'))
    save_file(tensors, path, metadata=metadata)
    return path


WAYS = ["v_pred", "ztsnr", "its metadata", "kohya", "its noise schedule", ".yaml", ".yml"]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_predicts_v_is_drawn_by_v(tmp_path: Path, way: str) -> None:
    path = marked(tiny_model(tmp_path) / "model.safetensors", way)
    pipe = ldm.load(path, device="cpu")
    assert pipe.config.prediction == "v"
    assert "predicts v, as " in str(pipe.origin)
    found = ldm.inspect(path)
    assert found.loads and found.prediction.startswith("predicts v, as ")
    step = next(pipe.denoise("a house", steps=2, guidance_scale=1.0))
    with torch.no_grad():
        v = pipe.unet(step.x, torch.tensor([step.t]), pipe.context(["a house"]))
    torch.testing.assert_close(step.x0, x0_from_v(step.x, v, step.alpha_bar))
    # A new file says it in its config, whatever said it in the old one.
    pipe.save(tmp_path / "again.safetensors")
    again = ldm.load(tmp_path / "again.safetensors", device="cpu")
    torch.testing.assert_close(again.schedule.alpha_bar, pipe.schedule.alpha_bar)
    assert again.origin is not None and again.origin.predictions == {"its config": "v"}


def test_ztsnr_rescales_the_schedule(tmp_path: Path) -> None:
    path = marked(tiny_model(tmp_path) / "model.safetensors", "ztsnr")
    weights = recognise(open_archive(path))
    assert weights.config.schedule == dataclasses.replace(
        tiny_config().schedule, zero_terminal_snr=True
    )
    assert weights.schedule == "it ends in pure noise, as the tensor ztsnr says"
    pipe = ldm.load(path, device="cpu")
    (step,) = pipe.denoise("a house", steps=1)
    assert (step.t, step.alpha_bar) == (999, 0.0) and step.x_prev.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_the_caller_knows_better(tmp_path: Path, way: str) -> None:
    path = marked(tiny_model(tmp_path) / "model.safetensors", way)
    assert ldm.load(path, prediction="x0").config.prediction == "x0"
    if way in ("ztsnr", "its noise schedule"):
        with pytest.raises(ConfigError, match=r"v, x0 or flow: the noise schedule ends in pure"):
            ldm.load(path, prediction="eps")
    else:
        assert ldm.load(path, prediction="eps").config == tiny_config()


def test_the_argument_says_it_for_a_file_that_does_not(tmp_path: Path) -> None:
    path = tiny_model(tmp_path) / "model.safetensors"
    pipe = ldm.load(path, prediction="v")
    assert pipe.config.prediction == "v" and "predicts v, as prediction= says" in str(pipe.origin)
    convert(path, tmp_path / "v.safetensors", prediction="v")
    assert ldm.load(tmp_path / "v.safetensors").config.prediction == "v"
    with pytest.raises(ValueError, match="prediction must be one of eps, v, x0, flow, not 'w'"):
        ldm.load(path, prediction="w")


@pytest.mark.parametrize("what", ["rectified flow", "flow", "score", "a\nb"])
def test_what_ldm_cannot_draw_by_is_refused_by_name(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"ldm": config_to_json(tiny_config()), "modelspec.prediction_type": what}
    save_file(tiny_tensors(), path, metadata=metadata)
    for load in (ldm.load, load_unet, lambda path: convert(path, tmp_path / "out.safetensors")):
        with pytest.raises(FamilyError, match=r"is a model that predicts .*, as its metadata says"):
            load(path)
    found = ldm.inspect(path)
    assert not found.loads and "is a model that predicts" in found.refused
    load_vae(path)  # which predicts nothing


def test_two_who_say_two_things_are_both_named(tmp_path: Path) -> None:
    path = marked(tiny_model(tmp_path) / "model.safetensors", "v_pred")
    path.with_suffix(".yaml").write_text(YAML.format(line='parameterization: "eps"'))
    told = "predicts v, as the tensor v_pred says and predicts eps, as model.yaml says; pass predic"
    with pytest.raises(FamilyError, match=told):
        ldm.load(path)
    assert ldm.load(path, prediction="eps").config.prediction == "eps"


LINES = {
    'parameterization: "v"': "v",
    "parameterization : 'v'  # as Stable Diffusion 2": "v",
    '"parameterization": "v",': "v",
    "{parameterization: v}": "v",
    "parameterization: x0": "x0",
    'parameterization: "eps"': "eps",
    "# parameterization: v": None,
    "other: 1  # parameterization: v": None,
    "conditioning_key: crossattn": None,
    "my_parameterization: v": None,
}


@pytest.mark.parametrize("line, what", LINES.items())
def test_yaml_of_the_training_code(tmp_path: Path, line: str, what: str | None) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(YAML.format(line=line))
    assert read_yaml(path) == what


def test_a_file_that_says_eps_loads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.with_suffix(".yaml").write_bytes(b"\xff" + YAML.format(line="").encode())
    for what in ("epsilon", "eps", " Epsilon ", ""):
        metadata = {"ldm": config_to_json(tiny_config()), "modelspec.prediction_type": what}
        save_file(tiny_tensors(), path, metadata=metadata)
        assert load_unet(path).config == tiny_config().unet


def test_one_part_of_a_folder_is_of_the_folders_noise(tmp_path: Path) -> None:
    models = {stage: random_stage(stage, tiny_config()) for stage in STAGES}
    folder = tmp_path / "tiny"
    save_folder(folder, config=tiny_config(), tokenizer=tiny_tokenizer(), **models)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    fields = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(fields | {"beta_end": 0.02}))
    assert recognise(open_archive(folder / "unet")).config.schedule.beta_end == 0.02
    v = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(fields | v))
    for path in (folder, folder / "unet"):
        config = recognise(open_archive(path)).config
        assert config.prediction == "v" and config.schedule.zero_terminal_snr
        load_unet(path)
    assert next(ldm.load(folder, device="cpu").denoise("a house", steps=2)).alpha_bar == 0.0
