"""Exported graphs say what the model says; their inputs do what `ldm.observe.edits` does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ldm
from ldm.observe.edits import CROSS_ATTENTION, strike, weigh
from ldm.pictures import to_levels
from ldm.pipeline import TextToImage
from ldm.samplers import ddim, draw_noise, guide
from tests.helpers import pipe_that_reads, randn

pytest.importorskip("onnx", reason="onnx is not installed here")
pytest.importorskip("onnxscript", reason="onnxscript is not installed here")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed here")

from ldm.export import export_onnx
from ldm.export.int8 import error_of, to_int8
from ldm.export.steering import SteeredUNet
from tests.export.runtime import Graphs

PROMPT = "a red house and the blue sea"


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    """A random model with attention at two sizes."""
    return pipe_that_reads(channel_mult=(1, 2), max_length=16)


def asked(pipe: TextToImage) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, context of a guided call."""
    channels = pipe.config.unet.in_channels
    side = pipe.config.image_size // pipe.config.vae.factor
    x = randn(1, channels, side, side).expand(2, -1, -1, -1).contiguous()
    return x, torch.tensor([500, 500]), pipe.context(["", PROMPT])


# --- A tensor in bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_no_number_moves_by_more_than_half_a_scale(axis: int) -> None:
    weights = randn(6, 8, 3, 3).numpy()
    q, scale = to_int8(weights, axis)
    assert q.dtype == np.int8 and scale.shape == ((6, 1, 1, 1) if axis == 0 else (1, 8, 1, 1))
    assert (np.abs(q * scale - weights) <= 0.5001 * scale).all()
    assert np.abs(q).max(axis=tuple(i for i in range(4) if i != axis)).min() == 127


def test_zeros_stay_zeros_and_the_error_is_relative() -> None:
    q, scale = to_int8(np.zeros((2, 3), np.float32), 0)
    assert not (q * scale).any() and np.isfinite(scale).all()
    weights = randn(64, 64).numpy()
    assert error_of(weights, 0) == pytest.approx(error_of(1000 * weights, 0), rel=1e-3)
    assert 0.001 < error_of(weights, 0) < 0.01


# --- The UNet that is steered --------------------------------------------------------------------


@torch.no_grad()
def test_a_steered_unet_says_what_the_plain_one_says_and_shows_its_maps(pipe: TextToImage) -> None:
    unet = SteeredUNet(pipe.unet)
    x, t, context = asked(pipe)
    neutral = (torch.zeros(2, 16), torch.ones(2, 16), torch.ones(len(unet.blocks)))
    with ldm.record(pipe.unet, CROSS_ATTENTION) as maps:
        expected = pipe.unet(x, t, context)
    output, *more = unet(x, t, context, *neutral)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert len(more) == len(unet.layers) + len(unet.blocks)
    for name, shown in zip(unet.layers, more, strict=False):
        (recorded,) = maps[f"{name}.weights"]
        torch.testing.assert_close(shown, recorded.mean(dim=1), rtol=1e-4, atol=1e-6)
    assert unet.blocks[0] == "down.0.blocks.0" and unet.blocks[-1].startswith("up.0.blocks.")
    assert not any("Steered" in type(one).__name__ for one in pipe.unet.modules())


@torch.no_grad()
def test_words_are_struck_and_weighed_as_by_hand(pipe: TextToImage) -> None:
    unet = SteeredUNet(pipe.unet, insides=False)
    x, t, context = asked(pipe)
    bias, weight, gates = torch.zeros(2, 16), torch.ones(2, 16), torch.ones(len(unet.blocks))
    bias[1, 2] = -1e4
    with strike(pipe.unet, [2]):
        struck = pipe.unet(x, t, context)
    torch.testing.assert_close(
        unet(x, t, context, bias, weight, gates)[0], struck, rtol=1e-4, atol=1e-5
    )
    weight[1, 3] = 2.5
    with weigh(pipe.unet, [3], 2.5):
        weighed = pipe.unet(x, t, context)
    found = unet(x, t, context, torch.zeros(2, 16), weight, gates)[0]
    torch.testing.assert_close(found, weighed, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_block_whose_gate_is_shut_adds_nothing(pipe: TextToImage) -> None:
    unet = SteeredUNet(pipe.unet)
    x, t, context = asked(pipe)
    gates = torch.ones(len(unet.blocks))
    middle = unet.blocks.index("mid")
    gates[middle] = 0.0
    blocks = unet(x, t, context, torch.zeros(2, 16), torch.ones(2, 16), gates)[
        1 + len(unet.layers) :
    ]
    torch.testing.assert_close(blocks[middle], blocks[middle - 1])  # both at the lowest level


# --- The graphs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs(pipe: TextToImage, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    folder = tmp_path_factory.mktemp("export") / "exact"
    export_onnx(pipe, folder, int8=False)
    return Graphs(folder)


@pytest.mark.slow
@torch.no_grad()
def test_graphs_say_what_the_stages_say(pipe: TextToImage, graphs: Graphs) -> None:
    ids = pipe.text.tokenize(["", PROMPT])
    x, t, context = asked(pipe)
    torch.testing.assert_close(graphs.context(ids), pipe.text.encode(ids), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        graphs.image(x[:1]),
        pipe.vae.decode(x[:1] / pipe.vae.config.scaling_factor),
        rtol=1e-3,
        atol=1e-4,
    )
    expected = pipe.unet(x, t, context)
    torch.testing.assert_close(graphs.model()(x, t, context), expected, rtol=1e-3, atol=1e-4)
    one = graphs.model()(x[:1], t[:1], context[:1])  # a batch of any size
    torch.testing.assert_close(one, expected[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_the_graph_with_insides_shows_them(pipe: TextToImage, graphs: Graphs) -> None:
    x, t, context = asked(pipe)
    outputs = graphs.ask(graphs.insides, x, t, context)
    with ldm.record(pipe.unet, CROSS_ATTENTION) as maps:
        expected = pipe.unet(x, t, context)
    torch.testing.assert_close(outputs["prediction"], expected, rtol=1e-3, atol=1e-4)
    shown = [name for name in outputs if name.startswith("map:")]
    assert len(shown) == len(maps)
    for name in shown:
        (recorded,) = maps[f"{name.removeprefix('map:')}.weights"]
        torch.testing.assert_close(outputs[name], recorded.mean(dim=1), rtol=1e-3, atol=1e-5)
    assert outputs["block:mid"].shape[0] == 2


@pytest.mark.slow
def test_the_folder_says_what_must_be_known(pipe: TextToImage, tmp_path: Path) -> None:
    export_onnx(pipe, tmp_path / "small")
    about = json.loads((tmp_path / "small" / "model.json").read_text(encoding="utf-8"))
    assert about["config"]["prediction"] == "eps"
    assert about["alpha_bar"] == pipe.schedule.alpha_bar.tolist()
    assert about["blocks"][0] == "down.0.blocks.0"
    vocab = json.loads((tmp_path / "small" / "vocab.json").read_text(encoding="utf-8"))
    assert vocab == pipe.text.require_tokenizer().vocab
    with pytest.raises(ValueError, match="exists already"):
        export_onnx(pipe, tmp_path / "small")


@pytest.mark.slow
def test_horizons_pictures_in_int8_are_within_two_grey_levels(tmp_path: Path) -> None:
    pipe = ldm.load(device="cpu")
    export_onnx(pipe, tmp_path / "int8")
    graphs = Graphs(tmp_path / "int8")
    prompts = (
        "a red house on green grass at night",
        "calm sea at sunset",
        "a blue house in the snow with a tree on the left",
    )
    for seed, prompt in enumerate(prompts):
        context = graphs.context(pipe.text.tokenize([prompt, ""]))
        side = pipe.config.image_size // pipe.config.vae.factor
        like = torch.empty(1, pipe.config.unet.in_channels, side, side)
        x = draw_noise([torch.Generator().manual_seed(seed)], like)
        eps_fn = guide(graphs.model(), context[:1], context[1:], 7.5)
        grid = pipe.schedule.ddim_timesteps(12)
        *_, last = ddim(eps_fn, x, grid, pipe.schedule, prediction=pipe.config.prediction)
        drawn = to_levels(graphs.image(last.x_prev))[0].numpy().astype(int)
        (picture,) = pipe(prompt, steps=12, seed=seed, guidance_scale=7.5)
        apart = np.abs(drawn - np.asarray(picture).astype(int))
        assert np.percentile(apart, 99) <= 2, prompt
