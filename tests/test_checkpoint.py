"""Checkpoints: the key map, strict loading, saving."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ldm.checkpoint
from ldm.checkpoint import (
    CheckpointError,
    KeysError,
    UnreadableError,
    build_stage,
    computed_entries,
    config_from_json,
    config_to_json,
    key_map,
    load_config,
    load_stages,
    load_text_encoder,
    load_unet,
    load_vae,
    save_checkpoint,
    schedule_entries,
)
from ldm.config import HORIZON, SD_V1, ModelConfig, ScheduleConfig
from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer
from tests.helpers import STAGES, random_checkpoint, tiny_config

OFFICIAL_KEYS = Path(__file__).parents[2] / "shared" / "sd_v1" / "keys.json"
# sha256 of the official checkpoint's 1130 parameters, as sorted lines "key [shape]".
OFFICIAL_DIGEST = "bcf4603c65ebe128ddff3a53973ab8eac10a5560f7a17846af3c3026837b5295"
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


# --- The key map -----------------------------------------------------------------------------


def official_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Official key -> shape of every parameter, by our map."""
    shapes: dict[str, list[int]] = {}
    for stage in STAGES:
        with torch.device("meta"):
            model = build_stage(stage, config)
        names = key_map(model)
        assert names.keys() == model.state_dict().keys() == dict(model.named_parameters()).keys()
        assert len(set(names.values())) == len(names)  # a bijection
        assert not shapes.keys() & set(names.values())
        shapes |= {names[key]: list(value.shape) for key, value in model.state_dict().items()}
    return shapes


def digest(shapes: dict[str, list[int]]) -> str:
    lines = sorted(f"{key} {list(shape)}\n" for key, shape in shapes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_sd_v1_maps_onto_the_official_keys_and_shapes() -> None:
    shapes = official_shapes(SD_V1)
    counts = {stage: sum(k.startswith(p) for k in shapes) for stage, p in PREFIXES.items()}
    assert counts == {"unet": 686, "vae": 248, "text": 196}
    assert digest(shapes) == OFFICIAL_DIGEST


PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
}


@pytest.mark.skipif(
    not OFFICIAL_KEYS.is_file(), reason=f"the list of official keys is not here: {OFFICIAL_KEYS}"
)
def test_map_and_computed_entries_are_the_official_list() -> None:
    official = json.loads(OFFICIAL_KEYS.read_text())
    computed = {key: official[key] for key in computed_entries()}
    parameters = {k: shape for k, shape in official.items() if k not in computed}
    assert len(official) == 1143 and len(parameters) == 1130
    assert official_shapes(SD_V1) == parameters
    assert digest(parameters) == OFFICIAL_DIGEST
    tables = {key: list(table.shape) for key, table in schedule_entries(ScheduleConfig()).items()}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert computed == tables | {positions: [1, 77]}


@pytest.mark.parametrize("config", [HORIZON, tiny_config()], ids=lambda c: c.name)
def test_every_key_of_another_config_maps_into_the_official_layout(config: ModelConfig) -> None:
    shapes = official_shapes(config)
    assert all(key.startswith(tuple(PREFIXES.values())) for key in shapes)
    assert all(key.endswith((".weight", ".bias")) for key in shapes)


@pytest.mark.parametrize(
    "stage, ours, official",
    [
        ("unet", "time_embedding.linear2.bias", "time_embed.2.bias"),
        ("unet", "conv_in.weight", "input_blocks.0.0.weight"),
        ("unet", "down.1.blocks.0.res.skip.weight", "input_blocks.4.0.skip_connection.weight"),
        ("unet", "down.0.downsample.conv.weight", "input_blocks.3.0.op.weight"),
        (
            "unet",
            "down.1.blocks.0.transformer.cross_attention.to_k.weight",
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        ("unet", "mid.res2.time_proj.bias", "middle_block.2.emb_layers.1.bias"),
        ("unet", "up.3.upsample.conv.weight", "output_blocks.2.1.conv.weight"),
        ("unet", "up.1.upsample.conv.weight", "output_blocks.8.2.conv.weight"),
        ("unet", "up.0.blocks.2.res.norm1.weight", "output_blocks.11.0.in_layers.0.weight"),
        ("unet", "conv_out.bias", "out.2.bias"),
        ("vae", "encoder.down.0.downsample.conv.bias", "encoder.down.0.downsample.conv.bias"),
        ("vae", "decoder.up.3.blocks.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("vae", "decoder.mid.attention.to_out.weight", "decoder.mid.attn_1.proj_out.weight"),
        ("text", "transformer.final_layer_norm.bias", "final_layer_norm.bias"),
    ],
)
def test_keys_of_sd_v1_written_out(stage: str, ours: str, official: str) -> None:
    with torch.device("meta"):
        model = build_stage(stage, SD_V1)
    assert key_map(model)[ours] == PREFIXES[stage] + official


def test_no_map_for_another_module() -> None:
    with pytest.raises(TypeError, match="Linear"):
        key_map(nn.Linear(1, 1))


def test_computed_entries_follow_from_the_betas() -> None:
    entries = schedule_entries(ScheduleConfig())
    assert len(entries) == 12 and len(computed_entries()) == 13
    assert all(v.shape == (1000,) and v.dtype == torch.float32 for v in entries.values())
    b = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - b, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])

    def close(name: str, expected: Tensor) -> None:
        # Computed in float64 and cast once: half a unit in the last place of float32, 2^-24, and
        # float64's own roundings.
        found = entries.pop(name).double()
        torch.testing.assert_close(found, expected, rtol=2**-24 + 1e-10, atol=0, msg=name)

    close("betas", b)
    close("alphas_cumprod", a)
    close("alphas_cumprod_prev", previous)
    close("sqrt_alphas_cumprod", a.sqrt())
    close("sqrt_one_minus_alphas_cumprod", (1 - a).sqrt())
    close("log_one_minus_alphas_cumprod", (1 - a).log())
    close("sqrt_recip_alphas_cumprod", a.rsqrt())
    close("sqrt_recipm1_alphas_cumprod", (1 / a - 1).sqrt())
    variance = b * (1 - previous) / (1 - a)
    close("posterior_variance", variance)
    close("posterior_log_variance_clipped", variance.clamp(min=1e-20).log())
    close("posterior_mean_coef1", b * previous.sqrt() / (1 - a))
    close("posterior_mean_coef2", (1 - b).sqrt() * (1 - previous) / (1 - a))
    assert not entries  # these are all


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
    save_checkpoint(tmp_path / "again", unet=unet, vae=vae, text=text, config=load_config(path))
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
    assert load_config(path) == tiny_config()
    for config in (SD_V1, HORIZON):
        assert config_from_json(config_to_json(config)) == config


def test_file_without_a_config_is_taken_for_sd_v1(saved) -> None:
    path, _ = saved
    save_file(load_file(path), path)
    assert load_config(path) == SD_V1
    with pytest.raises(KeysError):
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
    tokenizer = Tokenizer.train(["a red house on green grass"] * 5, tiny_config().text.vocab_size)
    # Too little text to fill the vocabulary: fill it, so that the ids are where the config says.
    spare = (f"spare{i}" for i in range(1000))
    names = list(tokenizer.vocab)
    while len(names) < tiny_config().text.vocab_size:
        names.insert(-2, next(spare))
    folder = path.parent / place
    folder.mkdir(exist_ok=True)
    Tokenizer({name: i for i, name in enumerate(names)}, tokenizer.merges).save(folder)
    found = load_text_encoder(path)
    assert found.tokenizer is not None
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
    with pytest.raises(KeysError, match="missing"):
        load_stages(path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_alone_does_not_mind_what_else_is_in_the_file(saved, stage: str) -> None:
    path, _ = saved
    rewrite(path, lambda tensors: tensors.update(model_ema_decay=torch.ones(1)))
    assert type(LOADERS[stage](path)) is type(build_stage(stage, tiny_config()))
    with pytest.raises(KeysError, match="unexpected: model_ema_decay"):
        load_stages(path)


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
    for what, key in zip(BREAKS, (UNET_KEY, VAE_KEY, TEXT_KEY), strict=True):
        rewrite(path, BREAKS[what](key))
    with pytest.raises(KeysError) as caught:
        load_stages(path)
    told = str(caught.value)
    assert f"missing: {UNET_KEY}" in told
    assert f"unexpected: {VAE_KEY}_more" in told
    assert f"wrongly shaped: {TEXT_KEY}" in told


def test_many_wrong_keys_are_counted(saved) -> None:
    path, models = saved

    def drop_vae(tensors: dict[str, Tensor]) -> None:
        for key in key_map(models["vae"]).values():
            del tensors[key]

    rewrite(path, drop_vae)
    with pytest.raises(KeysError, match=f"and {len(models['vae'].state_dict()) - 8} more"):
        load_stages(path)


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no weights at"):
            load_unet(path)


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


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"unet": {"colour": 3}}', "3"])
def test_metadata_that_is_no_config_is_unreadable(saved, text: str) -> None:
    path, _ = saved
    save_file(load_file(path), path, metadata={"ldm": text})
    with pytest.raises(UnreadableError, match="not a config"):
        load_unet(path)


def test_every_error_of_a_file_is_a_checkpoint_error() -> None:
    assert issubclass(KeysError, CheckpointError) and issubclass(UnreadableError, CheckpointError)
    assert issubclass(CheckpointError, ValueError)


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

    monkeypatch.setattr(ldm.checkpoint, "save_file", half_a_file)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(target, config=tiny_config(), **models)
    assert [p.name for p in folder.iterdir()] == (["model.safetensors"] if existing else [])
    if existing:
        assert target.read_bytes() == b"what was there"


def test_saving_replaces_an_existing_file(saved) -> None:
    path, models = saved
    before = path.read_bytes()
    path.write_bytes(b"something else")
    save_checkpoint(path, config=tiny_config(), **models)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
