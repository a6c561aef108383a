"""Which tensor becomes which parameter: what is missing, too many or wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import ldm
import ldm.checkpoints.saving
import ldm.checkpoints.spellings
import ldm.errors
from ldm.checkpoints import planning
from ldm.checkpoints.config_json import config_to_json
from ldm.checkpoints.keys import PREFIXES, key_map
from ldm.checkpoints.loading import load_stages, load_unet
from ldm.checkpoints.stages import Unfilled
from ldm.errors import (
    DtypeError,
    KeysError,
    MissingPartsError,
    ShapeError,
)
from ldm.layers import ResBlock
from tests.checkpoints.helpers import LOADERS, TEXT_KEY, UNET_KEY, VAE_KEY, rewrite
from tests.helpers import (
    CONTAINERS,
    STAGES,
    assert_filled,
    tiny_config,
    tiny_model,
    tiny_tensors,
    with_ema,
    write_weights,
)

# --- Running means ---------------------------------------------------------------------------


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
    with pytest.raises(MissingPartsError, match=r"has 0 of .* EMA weights: leave ema at 'auto'$"):
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
    assert str(caught.value).endswith("missing: model_ema.diffusion_modelout2bias")


@pytest.mark.parametrize("ema", ["yes", 1, None])
def test_ema_is_one_of_three(saved, ema) -> None:
    with pytest.raises(ValueError, match="ema must be 'auto', True or False, not"):
        load_unet(saved[0], ema=ema)


# --- What does not fit -----------------------------------------------------------------------


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
    biases = [key for key in key_map(models["vae"]).values() if key.endswith(".bias")]

    def drop_biases(tensors: dict[str, Tensor]) -> None:
        for key in biases:
            del tensors[key]

    rewrite(path, drop_biases)
    with pytest.raises(KeysError, match=f"and {len(biases) - 8} more"):
        load_stages(path)


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


# --- Configs of models that are not there ----------------------------------------------------

LARGER = {
    "unet": {"channel_mult": [1] * 16, "num_res_blocks": 16, "attention_levels": [*range(16)]},
    "vae": {"channel_mult": [1] * 16, "num_res_blocks": 16},
    "text": {"num_layers": 64},
}


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_built_of_blocks_that_a_file_does_not_have(
    saved, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved
    config = json.loads(config_to_json(tiny_config()))
    config[stage] |= LARGER[stage]
    save_file(load_file(path), path, metadata={"ldm": json.dumps(config)})
    monkeypatch.setattr(planning, "empty_stage", None)  # to call it is a TypeError
    told = rf"{path} holds \d+ of the \d+ blocks that the {stage} of tiny has; missing: .* more$"
    with pytest.raises(KeysError, match=told):
        LOADERS[stage](path)


@pytest.mark.parametrize("stage", STAGES)
def test_every_block_has_the_weight_that_it_is_told_by(saved, stage: str) -> None:
    _, models = saved
    keys = planning.block_keys(stage, tiny_config())
    there = key_map(models[stage]).values()
    assert set(keys) <= set(there)
    blocks = {"unet": ResBlock, "vae": ResBlock, "text": CLIPEncoderLayer}
    found = [m for m in models[stage].modules() if isinstance(m, blocks[stage])]
    assert len(keys) == len(set(keys)) == len(found) > 1


def test_the_blocks_of_a_running_mean_are_blocks(tmp_path: Path) -> None:
    """Of a file that was stripped of the weights behind their running means."""
    tensors = with_ema(tiny_tensors())
    halved = {k: v * 0.5 for k, v in tensors.items()}
    for key in planning.block_keys("unet", tiny_config()):
        del tensors[key]
    path = write_weights(tmp_path / "file", tensors, config=tiny_config())
    assert_filled(load_unet(path), halved)


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
