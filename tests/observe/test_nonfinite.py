"""No silent black picture: NaN, infinity and absurd numbers are named by what made them."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from torch import nn

import ldm
from ldm.errors import DivergedError
from ldm.observe.nonfinite import first_to_fail
from ldm.pipeline import TextToImage
from tests.helpers import randn, tiny_config, tiny_model, tiny_tensors, write_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(folder: Path, device: str) -> TextToImage:
    return ldm.load(folder, device=device, dtype=torch.float32)


def spoil(model: nn.Module, part: str, value: float = torch.nan) -> None:
    with torch.no_grad():
        model.get_submodule(part).weight.view(-1)[-1] = value


def hooks_of(pipe: TextToImage) -> int:
    stages = (pipe.unet, pipe.vae, pipe.text)
    return sum(len(part._forward_hooks) for stage in stages for part in stage.modules())


# --- Runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, said, part",
    [
        ("unet", "the unet", "time_embedding.linear1"),
        ("unet", "the unet", "down.1.blocks.0.transformer.cross_attention.to_v"),
        ("unet", "the unet", "up.0.blocks.1.res.norm2"),
        ("unet", "the unet", "conv_out"),
        ("text", "the text encoder", "transformer.encoder.layers.1.mlp.fc1"),
        ("text", "the text encoder", "transformer.final_layer_norm"),
    ],
)
def test_nan_in_a_weight_is_named_by_step_stage_dtype_and_part(
    pipe: TextToImage, stage: str, said: str, part: str
) -> None:
    spoil(getattr(pipe, stage), part)
    ways = (pipe, lambda *a, **s: list(pipe.denoise(*a, **s)), functools.partial(ldm.trace, pipe))
    for run in ways:
        with pytest.raises(DivergedError) as error:
            run("a red house", steps=3)
        assert str(error.value) == (
            "the latents hold NaN after step 1 of 3 (t = 667); "
            f"in {said} (float32) it begins with {part}, whose weight holds NaN"
        )
    assert hooks_of(pipe) == 0


def test_weights_that_were_not_checked_draw_no_black_picture(folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tensors = tiny_tensors()
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = torch.full_like(tensors[key], torch.nan)
    path = write_weights(tmp_path / "m.safetensors", tensors, config=tiny_config())
    pipe = ldm.load(path, device="cpu", check=False)
    with pytest.raises(DivergedError, match="it begins with conv_in, whose weight holds NaN"):
        pipe("a red house", steps=2)


def test_an_absurd_guidance_scale_is_named(pipe: TextToImage) -> None:
    with pytest.raises(DivergedError) as error:
        pipe("a red house", steps=3, guidance_scale=1e30)
    assert error.match(r"the latents hold numbers as large as \S+ after step 1 of 3 \(t = 667\); ")
    assert error.match(r"the model says there is finite: is guidance_scale=1e\+30 what you mean\?$")


def test_a_unet_that_overflows_in_half_precision_is_told_from_a_damaged_one(
    folder: Path, device: str
) -> None:
    pipe = ldm.load(folder, device=device, dtype=torch.float16)
    with torch.no_grad():
        pipe.unet.mid.res1.norm1.weight.mul_(1e3)
        pipe.unet.mid.res1.conv1.weight.mul_(1e3)
    with pytest.raises(DivergedError) as error:
        pipe("a red house", steps=2)
    assert str(error.value).endswith(
        "; in the unet (float16) it begins with mid.res1.conv1; float16 ends at 65504, bfloat16 "
        "does not"
    )


def test_what_a_caller_sends_is_watched_too(pipe: TextToImage) -> None:
    run = pipe.denoise("a red house", steps=3)
    step = next(run)
    with pytest.raises(DivergedError, match="the latents hold NaN after step 1 of 3"):
        run.send(step.x_prev * torch.nan)
        list(run)


def test_a_run_goes_on_as_a_sampler_does(pipe: TextToImage) -> None:
    """Sent latents arrive, and a run that is left early ends."""
    run = pipe.denoise("a red house", steps=3)
    sent = 2 * next(run).x_prev
    assert torch.equal(run.send(sent).x, sent)
    run.close()
    assert list(run) == []


# --- Which part ------------------------------------------------------------------------------


class Overflowing(nn.Module):
    """Two parts, and a product between them that no float32 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) * 1e30 * 1e30)


def test_arithmetic_between_parts_is_named_by_the_part_around_them() -> None:
    model = nn.Sequential(OrderedDict(inner=Overflowing(), outer=nn.Identity()))
    x = torch.ones(1, 2)
    assert first_to_fail("it", model, lambda: model(x)) == "in it (float32) it begins with inner"
    assert first_to_fail("it", model.double(), lambda: model(x.double())) is None
    assert not any(part._forward_hooks for part in model.modules())


def test_what_was_given_is_told_from_what_was_made() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.full((1, 2), torch.inf)
    found = first_to_fail("it", model, lambda: model(x))
    assert found == "in it (float32) it begins with what goes into it"


def test_a_search_in_one_thread_leaves_another_thread_alone() -> None:
    model = nn.Linear(2, 2)
    bad, started, searched = torch.full((1, 2), torch.nan), Event(), Event()

    def run() -> None:
        started.set()
        assert searched.wait(10)

    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(first_to_fail, "it", model, run)
        assert started.wait(10)
        assert model(bad).isnan().all()
        searched.set()
        assert search.result() is None


# --- Decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factor, kind",
    [(torch.nan, "NaN"), (torch.inf, "infinity"), (1e30, "numbers as large as 3.*e")],
)
def test_latents_that_are_none_are_not_decoded(pipe: TextToImage, factor: float, kind: str) -> None:
    latents = torch.ones(3, 4, 8, 8, device=pipe.device)
    latents[1] = 3.2 * factor
    with pytest.raises(DivergedError, match=f"latents cannot be decoded: they hold {kind}"):
        pipe.decode(latents)


def test_latents_of_another_shape_are_refused_and_none_are_no_pictures(pipe: TextToImage) -> None:
    for shape in ((4, 8, 8), (1, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"latents must be \(B, 4, h, w\), not"):
            pipe.decode(torch.zeros(shape))
    assert pipe.decode(torch.zeros(0, 4, 8, 8)) == []


def test_nan_in_the_decoders_weights_is_named(pipe: TextToImage) -> None:
    spoil(pipe.vae, "decoder.up.0.blocks.1.conv2")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe.to(dtype=dtype)
        name = "bfloat16" if dtype == torch.bfloat16 else "float32"  # float16 is tried in float32
        with pytest.raises(DivergedError) as error:
            pipe.decode(randn(1, 4, 8, 8))
        assert str(error.value) == (
            f"the picture holds NaN; in the decoder ({name}) it begins with "
            "decoder.up.0.blocks.1.conv2, whose weight holds NaN"
        )
    assert hooks_of(pipe) == 0


def test_a_decoder_that_overflows_in_float16_is_asked_again_in_float32(
    pipe: TextToImage, device: str
) -> None:
    with torch.no_grad():  # float16 holds the weights, and not what they make
        pipe.vae.decoder.conv_in.weight.mul_(5e4)
    latents = randn(3, 4, 8, 8)
    pipe.to(dtype=torch.float16)
    with pytest.warns(UserWarning, match="overflowed in float16: .* once more, in float32") as said:
        images = pipe.decode(latents)
    assert len(said) == 1 and said[0].filename == __file__  # once for all three, and here
    weights = {weight.dtype for weight in pipe.vae.parameters()}
    assert weights == {torch.float16}  # the pipeline stays what it was
    expected = pipe.to(dtype=torch.float32).decode(latents)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert all(np.asarray(image).std() > 5 for image in images)


def test_a_decoder_that_does_not_overflow_is_asked_once(folder: Path, device: str) -> None:
    pipe = ldm.load(folder, device=device, dtype=torch.float16)
    with warnings.catch_warnings(), ldm.record(pipe.vae, "decoder.conv_out") as calls:
        warnings.simplefilter("error")
        pipe.decode(randn(2, 4, 8, 8))
    assert [value.dtype for value in calls["decoder.conv_out"]] == [torch.float16] * 2
