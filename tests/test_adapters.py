"""LoRAs on a model: what they compute, beside the weights and merged into them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ldm
from ldm.checkpoints.convert import convert
from ldm.checkpoints.lora import read_lora
from ldm.errors import CheckpointError, FamilyError, KeysError, NonFiniteError, ShapeError
from ldm.pipeline import TextToImage
from ldm.speed import cpu
from tests import loras
from tests.helpers import CONTAINERS, randn, tiny_model, write_weights


@pytest.fixture
def pipe(tmp_path: Path) -> TextToImage:
    return ldm.load(tiny_model(tmp_path), device="cpu")


def stages(pipe: TextToImage) -> dict[str, nn.Module]:
    return {"unet": pipe.unet, "text": pipe.text}


@torch.no_grad()
def outputs(pipe: TextToImage) -> tuple[torch.Tensor, torch.Tensor]:
    """What the text encoder and the UNet give, (1, L, D) and (2, 4, 8, 8)."""
    ids = torch.tensor([[528, 300, 301, 302, *[529] * 8]])
    context = pipe.text.encode(ids)
    x = randn(2, 4, 8, 8, seed=3).to(pipe.dtype)
    eps = pipe.unet(x, torch.tensor([999, 1]), context.expand(2, -1, -1))
    return context, eps


@torch.no_grad()
def merged_by_hand(pipe: TextToImage, found: loras.Pairs, factor: float) -> TextToImage:
    """W + factor * up @ down, in float64, written into a copy."""
    other = copy.deepcopy(pipe)
    for (stage, name), (down, up) in found.items():
        weight = stages(other)[stage].get_submodule(name).weight
        delta = torch.einsum("or,r...->o...", up.double(), down.double())
        weight.copy_((weight.double() + factor * delta).float())
    return other


FORMATS = {
    "kohya": (loras.kohya, 0.8 * 1.5 / 3),
    "PEFT": (loras.peft, 0.8),
    "diffusers": (loras.diffusers, 0.8),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_fast", [False, True], ids=["plain", "fast"])
def test_a_lora_computes_what_the_merged_weights_do(
    pipe: TextToImage, tmp_path: Path, name: str, is_fast: bool
) -> None:
    write, factor = FORMATS[name]
    found = loras.pairs(stages(pipe))
    save_file(write(stages(pipe), found), tmp_path / "lora.safetensors")
    expected = outputs(merged_by_hand(pipe, found, factor))
    before = outputs(pipe)
    if is_fast:
        for stage in stages(pipe).values():
            cpu.optimize(stage)
    lora = pipe.load_lora(tmp_path / "lora.safetensors", 0.8)
    assert lora.layers == len(found) == 13
    for ours, wanted, plain in zip(outputs(pipe), expected, before, strict=True):
        assert (ours - wanted).abs().max() < 2e-5 * wanted.std()
        assert (plain - wanted).abs().max() > 1e-2 * wanted.std()  # it does something


def test_the_processors_of_early_diffusers_are_read(pipe: TextToImage, tmp_path: Path) -> None:
    found = {k: v for k, v in loras.pairs(stages(pipe)).items() if "attention" in k[1]}
    for start in ("", "unet."):
        tensors = {start + k: v for k, v in loras.processors(stages(pipe), found).items()}
        save_file(tensors, tmp_path / "lora.safetensors")
        read = read_lora(tmp_path / "lora.safetensors", stages(pipe))
        assert read.keys() == found.keys()
        for layer, (down, up) in found.items():
            assert torch.equal(read[layer].down, down) and torch.equal(read[layer].up, up)


def test_names_are_those_that_diffusers_makes_of_kohyas(pipe: TextToImage, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    found = loras.pairs(stages(pipe))
    tensors = loras.kohya(stages(pipe), found)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    assert len(alphas) == len(found)
    save_file({k: v.contiguous() for k, v in converted.items()}, tmp_path / "lora.safetensors")
    read = read_lora(tmp_path / "lora.safetensors", stages(pipe))
    assert read.keys() == found.keys()
    for layer, (down, up) in found.items():
        assert torch.equal(read[layer].down, down) and torch.equal(read[layer].up, up)


def test_removal_gives_what_was_there_bit_for_bit(pipe: TextToImage, tmp_path: Path) -> None:
    save_file(loras.kohya(stages(pipe), loras.pairs(stages(pipe))), tmp_path / "a.safetensors")
    before = outputs(pipe)
    lora = pipe.load_lora(tmp_path / "a.safetensors")
    second = pipe.load_lora(tmp_path / "a.safetensors", scale=-1)
    assert pipe.loras == (lora, second)
    for ours, plain in zip(outputs(pipe), before, strict=True):  # they cancel, but for rounding
        assert (ours - plain).abs().max() < 2e-5 * plain.std()
    second.remove()
    lora.scale = 0
    assert all(map(torch.equal, outputs(pipe), before))
    lora.scale = 1
    assert not any(map(torch.equal, outputs(pipe), before))
    lora.remove()
    lora.remove()
    assert all(map(torch.equal, outputs(pipe), before))
    assert "removed" in repr(lora) and not list(pipe.unet.buffers())


def test_a_model_with_loras_moves_and_saves_its_own_weights(
    pipe: TextToImage, tmp_path: Path
) -> None:
    save_file(loras.peft(stages(pipe), loras.pairs(stages(pipe))), tmp_path / "a.safetensors")
    pipe.load_lora(tmp_path / "a.safetensors")
    single = outputs(pipe)
    (tmp_path / "saved").mkdir()
    pipe.save(tmp_path / "saved" / "again.safetensors")
    saved = (tmp_path / "saved" / "again.safetensors").read_bytes()
    assert saved == (tmp_path / "model.safetensors").read_bytes()
    pipe.to(dtype=torch.float64)
    double = outputs(pipe)
    assert double[1].dtype == torch.float64
    assert (double[1] - single[1]).abs().max() < 1e-4 * single[1].std()


def test_fusing_writes_the_merged_weights(pipe: TextToImage, tmp_path: Path) -> None:
    found = loras.pairs(stages(pipe))
    save_file(loras.kohya(stages(pipe), found, alpha=3), tmp_path / "a.safetensors")
    expected = merged_by_hand(pipe, found, 0.5 + 0.25)
    for scale in (0.5, 0.25):
        pipe.load_lora(tmp_path / "a.safetensors", scale)
    assert pipe.fuse_lora() is pipe and pipe.loras == ()
    for stage, model in stages(pipe).items():
        state = stages(expected)[stage].state_dict()
        for key, value in model.state_dict().items():
            assert torch.allclose(value, state[key], rtol=1e-6, atol=1e-7), key
    convert(
        tmp_path / "model.safetensors",
        tmp_path / "baked.safetensors",
        loras=[(tmp_path / "a.safetensors", 0.5), (tmp_path / "a.safetensors", 0.25)],
    )
    pipe.save(tmp_path / "fused.safetensors")
    assert (tmp_path / "fused.safetensors").read_bytes() == (
        tmp_path / "baked.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_read(pipe: TextToImage, tmp_path: Path, container: str) -> None:
    tensors = loras.kohya(stages(pipe), loras.pairs(stages(pipe)))
    assert pipe.load_lora(write_weights(tmp_path / "file", tensors, container)).layers == 13


def test_recordings_see_what_a_lora_adds(pipe: TextToImage, tmp_path: Path) -> None:
    save_file(loras.peft(stages(pipe), loras.pairs(stages(pipe))), tmp_path / "a.safetensors")
    name = "mid.transformer.cross_attention.to_out"
    with ldm.record(pipe.unet, name) as before:
        outputs(pipe)
    with ldm.record(pipe.unet, name) as after:
        pipe.load_lora(tmp_path / "a.safetensors")
        outputs(pipe)
    assert not torch.equal(before[name][0], after[name][0])


UNET = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
REFUSED = {
    "a LoHa": ({f"{UNET}.hada_w1_a": torch.ones(2, 2)}, FamilyError, "is a LoHa"),
    "a LoKr": ({f"{UNET}.lokr_w1": torch.ones(2, 2)}, FamilyError, "is a LoKr"),
    "a DoRA": ({f"{UNET}.dora_scale": torch.ones(2)}, FamilyError, "is a DoRA"),
    "an OFT": ({"oft_unet_mid_block.oft_blocks": torch.ones(2, 2)}, FamilyError, "is an OFT"),
    "of XL": ({"lora_te2_x.lora_down.weight": torch.ones(2, 2)}, FamilyError, "Diffusion XL"),
    "of SD 2": (
        {f"{UNET}.lora_down.weight": torch.ones(2, 1024)},
        FamilyError,
        r"is a LoRA of Stable Diffusion 2 \(text states of width 1024\), the model reads 24",
    ),
    "a third factor": ({f"{UNET}.lora_mid.weight": torch.ones(2)}, FamilyError, "third factor"),
    "differences": ({f"{UNET}.diff": torch.ones(2)}, FamilyError, "full differences"),
    "an embedding": ({"emb_params": torch.ones(2, 768)}, FamilyError, "a textual inversion"),
    "a model": ({"conv_in.weight": torch.ones(2)}, FamilyError, "is not a LoRA"),
    "another layer": (
        {f"{UNET.replace('to_k', 'to_kk')}.lora_down.weight": torch.ones(2, 24)},
        KeysError,
        f"to_kk.lora_down.weight means no layer of this model; did you mean .*{UNET}",
    ),
    "half of a pair": (
        {f"{UNET}.lora_down.weight": torch.ones(2, 24)},
        KeysError,
        "there is no up",
    ),
    "a shape": (
        {
            f"{UNET}.lora_down.weight": torch.ones(2, 25),
            f"{UNET}.lora_up.weight": torch.ones(32, 2),
        },
        ShapeError,
        r"down is \[2, 25\], expected \[2, 24\]",
    ),
    "NaN": (
        {
            f"{UNET}.lora_down.weight": torch.full((2, 24), torch.nan),
            f"{UNET}.lora_up.weight": torch.ones(32, 2),
        },
        NonFiniteError,
        "holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    pipe: TextToImage, tmp_path: Path, name: str
) -> None:
    tensors, error, told = REFUSED[name]
    save_file(tensors, tmp_path / "file.safetensors")
    before = outputs(pipe)
    with pytest.raises(error, match=told) as caught:
        pipe.load_lora(tmp_path / "file.safetensors")
    assert isinstance(caught.value, CheckpointError) and "\n" not in str(caught.value)
    assert pipe.loras == () and all(map(torch.equal, outputs(pipe), before))


@pytest.mark.parametrize("scale", [float("nan"), 1e9, "1"])
def test_a_scale_that_is_none_is_a_line(pipe: TextToImage, tmp_path: Path, scale: object) -> None:
    save_file(loras.peft(stages(pipe), loras.pairs(stages(pipe))), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="scale must be between -1000 and 1000"):
        pipe.load_lora(tmp_path / "a.safetensors", scale)  # type: ignore[arg-type]
    lora = pipe.load_lora(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="scale must be between"):
        lora.scale = scale  # type: ignore[assignment]


def test_alpha_in_diffusers_metadata_counts(pipe: TextToImage, tmp_path: Path) -> None:
    tensors = loras.peft(stages(pipe), loras.pairs(stages(pipe)))
    told = {"lora_adapter_metadata": '{"unet.lora_alpha": 6, "text_encoder.lora_alpha": 1.5}'}
    save_file(tensors, tmp_path / "a.safetensors", metadata=told)
    read = read_lora(tmp_path / "a.safetensors", stages(pipe))
    assert {layer[0]: found.factor for layer, found in read.items()} == {"unet": 2, "text": 0.5}
    assert load_file(tmp_path / "a.safetensors").keys() == tensors.keys()
