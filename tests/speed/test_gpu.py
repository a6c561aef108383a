"""What `pipe.optimize()` does on a GPU, as far as that shows without one (`tests.pretend_cuda`).

When the graph is replayed, when it is captured anew, when the plain UNet runs, and that the numbers
are the plain UNet's. The graphs are the stand-in's, which keep what a real one keeps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ldm
from ldm.speed import gpu as speed
from ldm.speed.gpu import FastUNet, in_float32, twin_of
from ldm.unet import UNet
from tests.helpers import randn, random_stage, relative_error, tiny_config, tiny_model
from tests.pretend_cuda import Gpu, pretended_cuda

PROMPT = "a red house"
CONFIG = tiny_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    with pretended_cuda() as gpu:
        yield gpu


@pytest.fixture
def unet(gpu: Gpu) -> UNet:
    return random_stage("unet", CONFIG).to("cuda").requires_grad_(False)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets a 1 for every graph that is captured."""
    made: list[int] = []

    def counted(call):
        made.append(1)
        return capture(call)

    capture = speed.capture
    monkeypatch.setattr(speed, "capture", counted)
    return made


def inputs(seed: int = 0, batch: int = 2, t: float = 501) -> tuple[Tensor, Tensor, Tensor]:
    x, context = randn(batch, 4, 8, 8, seed=seed), randn(batch, 12, 24, seed=seed + 50)
    return x.cuda(), torch.full((batch,), t, device="cuda"), context.cuda()


@torch.no_grad()
def error(fast: FastUNet, *call: Tensor) -> float:
    return relative_error(fast(*call), fast.unet(*call))


def test_the_graph_follows_its_inputs(unet: UNet, captures: list[int]) -> None:
    fast = FastUNet(unet, compiled=False)
    x, t, context = inputs()
    for t_now in (t, t - 494, t.float() - 0.5):
        for x_now in (x, 2 * x):
            assert error(fast, x_now, t_now, context) < 1e-5
    assert len(captures) == 2  # one for whole timesteps, one for others


def test_an_output_is_not_written_to_by_the_next_call(unet: UNet) -> None:
    fast = FastUNet(unet, compiled=False)
    x, t, context = inputs()
    with torch.no_grad():
        first = fast(x, t, context)
        kept = first.cpu().clone()
        fast(2 * x, t, context)
    assert torch.equal(first.cpu(), kept)
    assert first.is_contiguous()  # as what the plain UNet says of such an x


def test_a_prompt_has_its_keys_and_values_computed_once(unet: UNet, gpu: Gpu) -> None:
    fast = FastUNet(unet, compiled=False)
    x, t, context = inputs()
    asked: list[str] = []
    with torch.no_grad():
        fast(x, t, context)
        assert fast.twin is not None
        for part in fast.twin.prompted:
            part.to_k.register_forward_hook(lambda *_: asked.append("k"))
        fast(2 * x, t, context)
        assert not asked
    other = inputs(seed=1)[2]
    assert error(fast, x, t, other) < 1e-5 and len(asked) == len(fast.twin.prompted)
    assert error(fast, x, t, context) < 1e-5  # and back
    context.mul_(0.5)  # the same tensor, another prompt
    assert error(fast, x, t, context) < 1e-5


def test_weights_that_change_are_seen(unet: UNet, captures: list[int]) -> None:
    fast = FastUNet(unet, compiled=False)
    call = inputs()
    assert error(fast, *call) < 1e-5
    attention = unet.mid.transformer
    for weight in (
        attention.self_attention.to_k.weight,  # joined with others
        attention.cross_attention.to_v.weight,  # of which the prompt's v was made
        unet.conv_in.weight,
    ):
        before = unet(*call)
        weight.mul_(3.0)
        assert relative_error(unet(*call), before) > 1e-3
        assert error(fast, *call) < 1e-5
    assert len(captures) == 1
    unet.mid.res1.conv1 = random_stage("unet", CONFIG, seed=9).mid.res1.conv1.to("cuda")
    assert error(fast, *call) < 1e-5
    unet.requires_grad_(False).to(torch.float16)
    x, t, context = call
    with torch.no_grad():
        assert fast(x.half(), t, context.half()).dtype == torch.float16
    assert len(captures) == 3


@pytest.mark.slow
def test_another_shape_is_another_graph_and_few_are_kept(unet: UNet, captures: list[int]) -> None:
    fast = FastUNet(unet, compiled=False)
    for batch in (1, 2, 3, 4, 5, 5, 4):
        assert error(fast, *inputs(batch=batch)) < 1e-5
    assert len(captures) == 5 and len(fast.graphs) == speed.MOST


def test_the_plain_unet_runs_while_anyone_watches(unet: UNet, captures: list[int]) -> None:
    fast = FastUNet(unet, compiled=False)
    call = inputs()
    with torch.no_grad():
        plain = fast(*call)
        with ldm.record(unet, "*.cross_attention.weights") as maps:
            assert torch.equal(fast(*call).cpu(), unet(*call).cpu())
        assert all(len(values) == 2 for values in maps.values())
        with ldm.edit(unet, "mid", by=lambda name, value: 0.0 * value):
            assert relative_error(fast(*call), plain) > 0.1
        assert torch.equal(fast(*call).cpu(), plain.cpu())
    assert len(captures) == 1


def test_a_copy_follows_the_copied_weights(unet: UNet) -> None:
    fast = FastUNet(unet, compiled=False)
    call = inputs()
    assert error(fast, *call) < 1e-5
    other = copy.deepcopy(fast)
    other.unet.conv_in.weight.mul_(3.0)
    assert error(other, *call) < 1e-5 and error(fast, *call) < 1e-5
    with torch.no_grad():
        assert relative_error(other(*call), fast(*call)) > 1e-3


def test_with_gradients_the_plain_unet_runs(unet: UNet, captures: list[int]) -> None:
    fast = FastUNet(unet.requires_grad_(True), compiled=False)
    assert fast(*inputs()).requires_grad
    with torch.no_grad(), pytest.raises(ValueError, match=r"context must be \(2, M, 24\)"):
        x, t, context = inputs()
        fast(x, t, context[:1])
    assert not captures


def test_the_twin_shares_every_weight_and_has_names_of_no_other(unet: UNet) -> None:
    twin = twin_of(unet).unet
    pairs = list(zip(unet.named_parameters(), twin.named_parameters(), strict=True))
    assert all(a is b and name == other for (name, a), (other, b) in pairs)
    assert twin.state_dict().keys() == unet.state_dict().keys()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="guided"),
        pytest.param(dict(guidance_scale=1.0), id="unguided", marks=pytest.mark.slow),
        pytest.param(dict(sampler="heun"), id="heun", marks=pytest.mark.slow),
    ],
)
def test_an_optimized_pipeline_draws_the_same_without_waiting(
    folder: Path, gpu: Gpu, captures: list[int], settings: dict
) -> None:
    pipe = ldm.load(folder, device="cuda", dtype=torch.float32)
    settings = dict(steps=3, seed=1, num_images=2) | settings
    *_, plain = pipe.denoise(PROMPT, **settings)
    names = list(pipe.unet.state_dict())
    assert pipe.optimize() is pipe
    run = pipe.denoise(PROMPT, **settings)
    next(run)  # captures
    with gpu.without_waiting():
        next(run)
    *_, fast = run
    assert relative_error(fast.x_prev, plain.x_prev.cpu()) < 1e-4
    assert len(captures) == 1 and list(pipe.unet.state_dict()) == names
    assert len(pipe(PROMPT, **settings)) == 2
    assert len(captures) == 1  # another run of the same shape


def test_low_memory_has_one_stage_on_the_device_at_a_time(folder: Path, gpu: Gpu) -> None:
    pipe = ldm.load(folder, device="cuda", dtype=torch.float32)
    *_, plain = pipe.denoise(PROMPT, steps=2)
    pipe.optimize(low_memory=True)

    def there() -> list[str]:
        stages = {name: getattr(pipe, name) for name in ("text", "unet", "vae")}
        return [name for name, one in stages.items() if next(one.parameters()).is_cuda]

    assert pipe.device.type == "cuda" and there() == []
    run = pipe.denoise(PROMPT, steps=2)
    assert there() == []  # the text encoder has been there, and gone
    for step in run:
        assert there() == ["unet"] and step.x.is_cuda
    assert relative_error(step.x_prev, plain.x_prev.cpu()) < 1e-4
    seen: list[list[str]] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: seen.append(there()))
    (image,) = pipe.decode(step.x_prev)
    assert seen == [["vae"]] and there() == []
    assert pipe.encode(image).is_cuda and there() == []
    pipe.optimize()
    assert there() == ["text", "unet", "vae"]
    pipe.optimize(low_memory=True).to("cpu")
    assert pipe.device.type == "cpu" and len(pipe(PROMPT, steps=1)) == 1


def test_float32_means_float32_unless_optimized(folder: Path, gpu: Gpu) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    seen: list[tuple[bool, bool]] = []

    def look(*_: object) -> None:
        seen.append((cudnn.allow_tf32, matmul.allow_tf32))

    pipe = ldm.load(folder, device="cuda", dtype=torch.float32)
    for stage in (pipe.text, pipe.unet.conv_in, pipe.vae.decoder):
        stage.register_forward_pre_hook(look)
    before, cudnn.allow_tf32 = cudnn.allow_tf32, True  # as it is in PyTorch
    try:
        pipe(PROMPT, steps=1, guidance_scale=1.0)
        assert seen == [(False, False)] * 4  # the text encoder is asked for two prompts
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, False)
        seen.clear()
        pipe.optimize()(PROMPT, steps=1, guidance_scale=1.0)
        assert seen == [(True, True)] * 4
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, False)
    finally:
        cudnn.allow_tf32 = before


def test_a_precision_that_the_user_chose_by_the_newer_name_stays() -> None:
    class Newer:
        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("a mix of the legacy and new APIs")

    with (
        pytest.MonkeyPatch.context() as patch,
        in_float32(torch.device("cuda"), tf32=True),
    ):
        patch.setattr(torch.backends.cuda, "matmul", Newer())
        with in_float32(torch.device("cuda"), tf32=False):
            assert torch.backends.cudnn.allow_tf32
