"""What a GPU would be asked to do, without one: see `tests.pretend_cuda`.

Tensors stay on the device, no step of a run waits for it, and the numbers are those of the CPU,
which here computes both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ldm
from ldm.pipeline import TextToImage
from ldm.samplers import SAMPLERS, Steps
from ldm.train.data import draw_scenes, rng_at
from ldm.train.diffusion import DiffusionSettings, LatentSet, train_diffusion
from ldm.train.run import prepare
from ldm.train.state import Optimisation, Record, TrainState
from ldm.unet import UNet
from tests.helpers import randn, random_stage, relative_error, tiny_config, tiny_model
from tests.pretend_cuda import CUDA, Gpu, pretended_cuda

PROMPT = "a red house"
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def machine() -> Iterator[Gpu]:
    with pretended_cuda() as gpu:
        yield gpu


@pytest.fixture
def gpu(machine: Gpu) -> Gpu:
    machine.waits.clear()
    return machine


@pytest.fixture(scope="module")
def pipe(folder: Path, machine: Gpu) -> TextToImage:
    """In float32, to be left as it is."""
    return ldm.load(folder, device="cuda", dtype=torch.float32)


@pytest.fixture(scope="module")
def half(folder: Path, machine: Gpu) -> TextToImage:
    """In the precision that a GPU has by default, to be left as it is."""
    return ldm.load(folder, device="cuda")


def last_of(run: Steps) -> Tensor:
    for step in run:
        latents = step.x_prev
    return latents


def steps_without_waiting(gpu: Gpu, run: Steps, count: int) -> None:
    with gpu.without_waiting():
        for _ in range(count):
            step = next(run)
            assert {step.x.device, step.eps.device, step.x0.device, step.x_prev.device} == {CUDA}
    assert list(run) == []  # here it waits, to look at what came out


# --- The stand-in itself


def test_a_wait_is_told_with_its_line(gpu: Gpu) -> None:
    x = torch.ones(3, device="cuda")
    assert x.device == CUDA and not gpu.waits
    assert x.sum().item() == 3.0 and torch.ones(3).to("cuda").cpu().tolist() == [1.0] * 3
    assert sorted(what.split(" (")[0] for what, _ in gpu.waits) == [
        "a copy from the device",
        "a copy to the device",
        "a look",
    ]
    assert all(where.startswith("tests/test_on_a_gpu.py:") for _, where in gpu.waits)
    with gpu.without_waiting():
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        with pytest.raises(RuntimeError, match=r"test_on_a_gpu\.py:\d+: a copy to the device"):
            torch.ones(3).to("cuda", non_blocking=True)  # not from pinned memory: it waits
        with pytest.raises(RuntimeError, match="a mask as an index"):
            x[x > 0]


def test_operands_on_two_devices_are_refused(gpu: Gpu) -> None:
    x = torch.ones(3, device="cuda")
    assert (x * torch.tensor(2.0)).cpu().tolist() == [2.0] * 3  # a single number may come along
    with pytest.raises(RuntimeError, match="operands on cuda:0 and on cpu"):
        x + torch.ones(3)


def test_a_graph_computes_again_with_the_numbers_it_was_captured_with(gpu: Gpu) -> None:
    x, factor = torch.ones(2, device="cuda"), 3.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x.view(2) * factor).add_(1.0)
    x.fill_(2.0)
    factor = 5.0
    graph.replay()
    assert y.cpu().tolist() == [7.0, 7.0]


# --- Drawing


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_picture_is_drawn_on_the_device(folder: Path, gpu: Gpu, dtype: torch.dtype) -> None:
    pipe = ldm.load(folder, device="cuda", dtype=dtype)
    assert (pipe.device, pipe.dtype, pipe.text.device) == (CUDA, dtype, CUDA)
    settings = dict(steps=3, seed=1, eta=1.0)
    latents = last_of(pipe.denoise(PROMPT, **settings)).cpu()
    plain = last_of(ldm.load(folder, device="cpu", dtype=dtype).denoise(PROMPT, **settings))
    assert relative_error(latents, plain) < (1e-4 if dtype == torch.float32 else 0.5)
    (image,) = pipe(PROMPT, **settings)
    assert image.size == (16, 16)
    assert pipe.encode(image).device == CUDA


@pytest.mark.parametrize(
    "sampler",
    [
        name if name in ("ddim", "dpmpp_2m_sde") else pytest.param(name, marks=pytest.mark.slow)
        for name in SAMPLERS
    ],
)
def test_no_step_of_a_sampler_waits(pipe: TextToImage, gpu: Gpu, sampler: str) -> None:
    steps_without_waiting(gpu, pipe.denoise(PROMPT, steps=3, sampler=sampler), 3)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(dict(like="compvis", eta=0.5), id="compvis"),
        pytest.param(dict(like="diffusers", eta=0.5), id="diffusers", marks=pytest.mark.slow),
        pytest.param(dict(num_images=3, eta=1.0), id="batch"),
        pytest.param(dict(negative_prompt="the blue sea"), id="negative", marks=pytest.mark.slow),
        pytest.param(dict(guidance_scale=1.0), id="unguided", marks=pytest.mark.slow),
    ],
)
def test_no_step_of_a_run_waits(half: TextToImage, gpu: Gpu, settings: dict) -> None:
    assert half.dtype == torch.float16
    with gpu.without_waiting():  # nor what comes before the first step
        run = half.denoise(PROMPT, steps=2, **settings)
    steps_without_waiting(gpu, run, 2)


def test_a_trace_waits_at_its_end_alone(pipe: TextToImage, gpu: Gpu) -> None:
    def waits(steps: int) -> int:
        gpu.waits.clear()
        trace = ldm.trace(pipe, PROMPT, steps=steps)
        tensors = [trace.x, trace.x0, trace.latents, *trace.maps.values()]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert {maps.dtype for maps in trace.maps.values()} == {torch.float16}
        return gpu.waits.total()

    assert waits(steps=4) == waits(steps=2)


# --- Training


def steps_of_training(pipe: TextToImage) -> tuple[TrainState, Iterator[Record]]:
    """Three steps of stage 3 on random latents, where the pipeline is."""
    settings = Optimisation(steps=3, batch_size=2, learning_rate=1e-3)
    state = TrainState(random_stage("unet", pipe.config).to(pipe.device), settings)
    latents = randn(4, 4, 8, 8).to(pipe.device)
    objects = torch.zeros(4, 1, 8, 8, device=pipe.device)
    data = LatentSet(draw_scenes(rng_at(0, 0), 4), latents, objects)
    of_stage = DiffusionSettings(optimisation=settings)
    return state, train_diffusion(state, of_stage, data, pipe.text, pipe.schedule)


@pytest.mark.filterwarnings("ignore:the prompt is")  # captions are long for so small a model
def test_a_training_step_does_not_wait(
    folder: Path, pipe: TextToImage, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd knows no stand-in: the gradients are made up, and all else is a step's own."""
    state, steps = steps_of_training(pipe)

    def backward(loss: Tensor) -> None:
        for weight in state.model.parameters():
            weight.grad = torch.full_like(weight, 1e-3)

    monkeypatch.setattr(Tensor, "backward", backward)
    first = next(steps).figures  # in which the optimizer makes its state
    mean = state.ema.conv_in.weight.detach().cpu().clone()
    with gpu.without_waiting():
        second = next(steps)
    assert second.values["loss"].device == CUDA  # until someone looks
    assert not torch.equal(state.ema.conv_in.weight.detach().cpu(), mean)
    monkeypatch.undo()
    _, steps = steps_of_training(ldm.load(folder, device="cpu"))
    expected = next(steps).figures["loss"]
    assert abs(first["loss"] - expected) < 0.05 * expected  # bfloat16 on a GPU, and maybe here


def test_a_stage_leaves_the_gpus_generator_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    settings = Optimisation(steps=1, batch_size=1, learning_rate=1e-3)
    before = torch.get_rng_state()
    states = [
        prepare(lambda: UNet(tiny_config().unet), settings, tmp_path / str(i), "unet", False, "cpu")
        for i in range(2)
    ]
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (list(state.model.parameters()) for state in states)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
