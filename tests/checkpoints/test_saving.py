"""A whole model in one file, written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ldm
import ldm.checkpoints.saving
import ldm.checkpoints.spellings
import ldm.errors
from ldm.checkpoints.keys import computed_entries, key_map
from ldm.checkpoints.loading import load_stages, load_unet
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.checkpoints.saving import save_checkpoint
from ldm.schedule import NoiseSchedule
from tests.checkpoints.helpers import UNET_KEY
from tests.helpers import (
    STAGES,
    assert_filled,
    tiny_config,
    tiny_model,
    tiny_tensors,
)

# --- What it holds ---------------------------------------------------------------------------


def test_saving_what_was_loaded_gives_the_same_bytes(saved, tmp_path: Path) -> None:
    path, _ = saved
    unet, vae, text = load_stages(path)
    save_checkpoint(
        tmp_path / "again",
        unet=unet,
        vae=vae,
        text=text,
        config=recognise(open_archive(path)).config,
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
        state = models[stage].state_dict()
        for key, parameter in model.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, state[key].to(dtype))
    if dtype != torch.float64:
        other = tmp_path / "half.safetensors"
        save_checkpoint(other, config=tiny_config(), dtype=dtype, **models)
        tensors = load_file(other)
        assert tensors[UNET_KEY].dtype == dtype
        assert tensors["betas"].dtype == torch.float32  # the schedule keeps its precision
        assert torch.equal(tensors[UNET_KEY], load_file(path)[UNET_KEY].to(dtype))


# --- What was there --------------------------------------------------------------------------


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

    monkeypatch.setattr(ldm.checkpoints.saving, "save_file", half_a_file)
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
