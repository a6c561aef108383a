"""The fast layers: the plain layers' numbers, and nothing else of the model changed."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ldm
from ldm.attention import AttentionWeights, Pointwise
from ldm.checkpoints.loading import load_stages
from ldm.layers import Upsample
from ldm.speed import workplace
from ldm.speed.cpu import (
    BLOCK,
    FAST,
    FastAttentionWeights,
    FastConv2d,
    FastLinear,
    attend_in_blocks,
    has_onednn,
    optimize,
    rest,
)
from tests.helpers import (
    randn,
    random_stage,
    randomise,
    relative_error,
    rng,
    small_config,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this PyTorch is without oneDNN")

# fp32 rounding, of the same sums in another order, through some dozen layers: the bound of the
# parity tests.
CLOSE = 1e-4
TINY = tiny_config().unet


def inputs(size: tuple[int, int] = (8, 8), width: int = TINY.context_dim) -> tuple[Tensor, ...]:
    return randn(2, 4, *size), torch.tensor([999, 1]), randn(2, 6, width, seed=1)


def both(stage: str = "unet") -> tuple[nn.Module, nn.Module]:
    """A plain model and its optimised copy."""
    plain = random_stage(stage, tiny_config())
    fast = copy.deepcopy(plain)
    optimize(fast)
    return plain, fast


def counted(monkeypatch: pytest.MonkeyPatch, name: str = "linear") -> list[int]:
    """Grows with every product that oneDNN makes for us."""
    calls: list[int] = []
    real = getattr(ldm.speed.cpu, name)
    monkeypatch.setattr(ldm.speed.cpu, name, lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (2, 3), (1, 1)], ids=str)
@torch.no_grad()
def test_the_unet_gives_the_plain_ones_numbers(size: tuple[int, int]) -> None:
    plain, fast = both()
    assert relative_error(fast(*inputs(size)), plain(*inputs(size))) < CLOSE


@torch.no_grad()
def test_a_unet_of_four_levels_gives_the_plain_ones_numbers_at_odd_sizes() -> None:
    plain = random_stage("unet", small_config())
    fast = copy.deepcopy(plain)
    optimize(fast)
    args = inputs((33, 19), width=64)  # 627 places: enough for attention on blocks
    assert relative_error(fast(*args), plain(*args)) < CLOSE


@torch.no_grad()
def test_the_autoencoder_gives_the_plain_ones_numbers() -> None:
    plain, fast = both("vae")
    x, z = randn(2, 3, 20, 28), randn(2, 4, 17, 19)
    assert relative_error(fast.decode(z), plain.decode(z)) < CLOSE
    assert relative_error(fast.encode(x).mean, plain.encode(x).mean) < CLOSE
    assert relative_error(fast.encode(x).logvar, plain.encode(x).logvar) < CLOSE


@torch.no_grad()
def test_the_text_encoder_gives_the_plain_ones_numbers() -> None:
    plain, fast = both("text")
    ids = torch.randint(0, 520, (3, 12), generator=torch.Generator().manual_seed(0))
    assert relative_error(fast.encode(ids), plain.encode(ids)) < CLOSE


def test_every_plain_layer_gets_its_fast_one_and_keeps_its_name() -> None:
    plain, fast = both()
    kinds = {name: type(part) for name, part in plain.named_modules()}
    assert {name: type(part) for name, part in fast.named_modules()} == {
        name: FAST.get(kind, kind) for name, kind in kinds.items()
    }
    assert set(FAST) - {Pointwise} <= set(kinds.values())  # which Stable Diffusion 2 has


@torch.no_grad()
def test_a_linear_layer_at_each_place_gives_the_plain_ones_numbers() -> None:
    plain = randomise(Pointwise(48, 96), rng())
    fast = copy.deepcopy(plain)
    optimize(fast)
    assert type(fast) is FAST[Pointwise]
    x = randn(2, 48, 9, 7)
    assert relative_error(fast(x), plain(x)) < CLOSE


@torch.no_grad()
def test_products_are_onednns(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = both()
    calls = counted(monkeypatch)
    monkeypatch.setattr(F, "linear", lambda *a: pytest.fail("a product went elsewhere"))
    monkeypatch.setattr(F, "conv2d", lambda *a: pytest.fail("a convolution went elsewhere"))
    fast(*inputs())
    assert len(calls) == sum(isinstance(part, FastLinear) for part in fast.modules())


def test_optimising_twice_changes_nothing() -> None:
    plain, fast = both()
    kinds = [type(part) for part in fast.modules()]
    with torch.no_grad():
        before = fast(*inputs())
        optimize(fast)
        assert torch.equal(fast(*inputs()), before)
    assert [type(part) for part in fast.modules()] == kinds
    assert [*fast.state_dict()] == [*plain.state_dict()]


@torch.no_grad()
def test_the_state_is_the_plain_ones_before_and_after_a_run() -> None:
    plain, fast = both()
    fast(*inputs())
    state = fast.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name
    again = random_stage("unet", tiny_config(), seed=5)
    again.load_state_dict(state)
    assert relative_error(again(*inputs()), fast(*inputs())) < CLOSE


def test_gradients_are_the_plain_ones() -> None:
    plain, fast = both()
    for model in (plain, fast):
        model(*inputs()).square().sum().backward()
    gradients = dict(plain.named_parameters())
    for name, weight in fast.named_parameters():
        assert weight.grad is not None and torch.equal(weight.grad, gradients[name].grad), name


@torch.no_grad()
def test_copies_and_pickles_work_alone() -> None:
    _, fast = both()
    expected = fast(*inputs())
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    copies = (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    )
    for one in copies:
        assert torch.equal(one(*inputs()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_other_types_are_computed_as_before(dtype: torch.dtype) -> None:
    plain, fast = (model.to(dtype) for model in both())
    x, t, context = inputs()
    args = x.to(dtype), t, context.to(dtype)
    assert relative_error(fast(*args), plain(*args)) < 1e-12 + 10 * torch.finfo(dtype).eps


@torch.no_grad()
def test_autocast_is_obeyed() -> None:
    plain, fast = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(*inputs()), plain(*inputs())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative_error(ours, theirs) < 0.05


@torch.no_grad()
def test_inference_mode_works_with_weights_made_in_it_or_before() -> None:
    plain, fast = both()
    expected = plain(*inputs())
    with torch.inference_mode():
        assert relative_error(fast(*inputs()), expected) < CLOSE
        inside = random_stage("unet", tiny_config())
        optimize(inside)
        assert relative_error(inside(*inputs()), expected) < CLOSE


@torch.no_grad()
def test_inputs_stay_as_they_are() -> None:
    _, fast = both()
    args, copies = inputs(), inputs()
    fast(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))


NAMES = [
    "*.norm1",
    "*.conv1",
    "*.norm2",
    "*.conv2",
    "*.skip",
    "*.weights",
    "*.proj_in",
    "*.res",
    "*.upsample.conv",
]


@pytest.mark.parametrize("glob", NAMES)
@torch.no_grad()
def test_every_value_is_recorded_as_the_plain_model_has_it(glob: str) -> None:
    seen = []
    for model in both():
        with ldm.record(model, glob) as values:
            model(*inputs())
        seen.append(values)
    plain, fast = seen
    assert list(plain) == list(fast)
    for name, (value,) in plain.items():
        assert relative_error(fast[name][0], value) < CLOSE, name


@torch.no_grad()
def test_what_a_hook_keeps_is_not_overwritten() -> None:
    _, fast = both()
    kept: list[tuple[Tensor, Tensor]] = []
    for part in fast.modules():
        part.register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
    fast(*inputs())
    assert len(kept) > 50 and all(torch.equal(now, then) for now, then in kept)


@torch.no_grad()
def test_an_edit_replaces_values_and_its_tensor_is_not_overwritten() -> None:
    plain, fast = both()
    ones: dict[str, Tensor] = {}

    def one(name: str, value: Tensor) -> Tensor:
        return ones.setdefault(name, torch.ones_like(value))

    outputs = []
    for model in (plain, fast):
        with ldm.edit(model, "*.norm1", "*.conv1", "*.conv2", by=one):
            outputs.append(model(*inputs()))
    assert relative_error(outputs[1], outputs[0]) < CLOSE
    assert ones and all(torch.equal(value, torch.ones_like(value)) for value in ones.values())


@pytest.mark.parametrize("few", [0, 1024])
@pytest.mark.parametrize("size", [(1, 1), (5, 4), (2, 9)], ids=str)
@torch.no_grad()
def test_upsampling_by_four_small_kernels_is_upsampling(
    size: tuple[int, int], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldm.speed.cpu, "FEW", few)
    merges = counted(monkeypatch, "merged")
    plain = randomise(Upsample(8), rng(3))
    model = nn.ModuleList([copy.deepcopy(plain)])
    optimize(model)
    (fast,) = model
    x = randn(2, 8, *size)
    for asked in ((2 * size[0], 2 * size[1]), (2 * size[0] - 1, 2 * size[1])):
        expected = plain.double()(x.double(), asked)
        # fp32 rounding, of sums of 72 products.
        assert relative_error(fast(x, asked), expected) < 1e-5
    assert len(merges) == (few == 0)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@torch.no_grad()
def test_group_norm_is_exact_over_large_maps(offset: float) -> None:
    plain = randomise(nn.GroupNorm(4, 8, eps=1e-6), rng(3))
    model = nn.ModuleList([copy.deepcopy(plain)])
    optimize(model)
    (fast,) = model
    x = (randn(2, 8, 300, 200) + offset).contiguous(memory_format=torch.channels_last)
    expected = copy.deepcopy(plain).double()(x.double())
    # fp32 rounding of what is subtracted and divided; PyTorch's kernel is off by 1e-5.
    assert relative_error(fast(x), expected) < 2e-6
    assert torch.equal(fast(x[:, :, :, :1].contiguous()), plain(x[:, :, :, :1].contiguous()))


@pytest.mark.parametrize("places, tokens", [(60, 60), (90, 7), (7, 90)])
@torch.no_grad()
def test_attention_in_blocks_is_attention(
    places: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = randn(2, 3, places, 20), randn(2, 3, tokens, 20, seed=1), randn(2, 3, tokens, 20)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for block in (BLOCK, 30 * tokens, 7 * tokens, 1):  # whole, even, uneven, row by row
        monkeypatch.setattr(ldm.speed.cpu, "BLOCK", block)
        assert relative_error(attend_in_blocks(q, k, v), exact) < 1e-5


@torch.no_grad()
def test_only_large_attention_goes_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastAttentionWeights()
    calls = counted(monkeypatch, "attend_in_blocks")
    for places, expected in ((255, 0), (256, 1)):
        q = randn(1, 2, places, 8)
        torch.testing.assert_close(fast.attend(q, q, q), AttentionWeights().attend(q, q, q))
        assert len(calls) == expected


@torch.no_grad()
def test_without_onednn_a_model_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain, fast = both()
    assert [type(part) for part in fast.modules()] == [type(part) for part in plain.modules()]


@torch.no_grad()
def test_a_model_that_rested_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path)
    trims = counted(monkeypatch, "trim")
    (unet,) = load_stages(folder, ["unet"])
    optimize(unet)
    before = unet(*inputs())
    rest(unet)
    assert trims
    assert torch.equal(unet(*inputs()), before)


def test_an_optimised_pipeline_draws_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(tmp_path)
    monkeypatch.setattr(workplace, "LARGE", 1)
    rests = counted(monkeypatch, "trim")
    plain, fast, lean = (ldm.load(folder, device="cpu") for _ in range(3))
    assert fast.optimize() is fast and not fast.workplace.low_memory
    assert lean.optimize(low_memory=True).workplace.low_memory
    settings = {"steps": 4, "seed": 3, "num_images": 2, "height": 18, "width": 34}
    expected = [step.x_prev for step in plain.denoise("a red house", **settings)][-1]
    pictures = [np.asarray(image, dtype=int) for image in plain.decode(expected)]
    for pipe in (fast, lean):
        for _ in range(2):  # the second finds what the first left
            latents = [step.x_prev for step in pipe.denoise("a red house", **settings)][-1]
            assert relative_error(latents, expected) < CLOSE
            for ours, theirs in zip(pipe.decode(latents), pictures, strict=True):
                assert np.abs(np.asarray(ours, dtype=int) - theirs).max() <= 1
            assert isinstance(pipe.unet.conv_in, FastConv2d)
        pipe.save(tmp_path / "saved.safetensors")
        saved, original = (tmp_path / "saved.safetensors", folder / "model.safetensors")
        assert saved.read_bytes() == original.read_bytes()
        assert len(rests) == (
            0 if pipe is fast else 2 * 4
        )  # twice: with prompt, without, UNet, decoder


def test_low_memory_can_be_taken_back(tmp_path: Path) -> None:
    pipe = ldm.load(tiny_model(tmp_path), device="cpu").optimize(low_memory=True)
    assert not pipe.optimize().workplace.low_memory


def test_small_models_stay_plain() -> None:
    pipe = ldm.load(device="cpu")
    kinds = [type(part) for part in pipe.unet.modules()]
    assert [type(part) for part in pipe.optimize().unet.modules()] == kinds


@pytest.mark.parametrize("size", [3, 1], ids=["3x3", "1x1"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("few", [0, 1024])
@pytest.mark.parametrize("channels", [5, 64, 150])
@torch.no_grad()
def test_both_convolutions_are_convolution(
    size: int, stride: int, few: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldm.speed.cpu, "FEW", few)
    monkeypatch.setattr(ldm.speed.cpu, "HEAVY", 1)
    products = counted(monkeypatch)
    plain = randomise(nn.Conv2d(channels, 7, size, stride, padding=size // 2), rng(3))
    model = nn.ModuleList([copy.deepcopy(plain)])
    optimize(model)
    (fast,) = model
    x = randn(2, channels, 9, 6)
    expected = plain.double()(x.double())
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        # fp32 rounding, of sums of 1350 products at most.
        assert relative_error(fast(given), expected) < 1e-5
    assert len(products) == (2 if few and size > 1 else 0)


@torch.no_grad()
def test_convolutions_of_other_kinds_stay_as_they_are() -> None:
    kinds = (
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    )
    x = randn(2, 4, 9, 6)
    for plain in kinds:
        model = nn.ModuleList([copy.deepcopy(plain)])
        optimize(model)
        assert torch.equal(model[0](x), plain(x))
