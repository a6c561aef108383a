"""The UNet as a whole; the parity tests hold its arithmetic to diffusers'."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ldm.config import HORIZON, SD_V1, UNetConfig
from ldm.unet import UNet
from tests.helpers import (
    assert_stage_agrees_across_dtypes,
    randn,
    random_stage,
    relative_error,
    small_config,
    tiny_config,
)

TINY = tiny_config().unet


def tiny(device: str = "cpu") -> UNet:
    return random_stage("unet", tiny_config()).to(device)


def inputs(batch: int = 2, size: tuple[int, int] = (8, 8), device: str = "cpu") -> list[Tensor]:
    t = torch.tensor([999, 1, 500, 20][:batch])
    x, context = randn(batch, 4, *size), randn(batch, 6, TINY.context_dim, seed=1)
    return [a.to(device) for a in (x, t, context)]


@pytest.mark.parametrize("size", [(8, 8), (65, 73), (7, 12), (2, 3), (1, 1)])
@torch.no_grad()
def test_output_has_the_size_of_the_input_even_or_odd(size: tuple[int, int], device: str) -> None:
    x, t, context = inputs(size=size, device=device)
    out = tiny(device)(x, t, context)
    assert out.shape == x.shape and out.isfinite().all()


@torch.no_grad()
def test_odd_sizes_survive_four_levels(device: str) -> None:
    """9 x 13 goes to 5 x 7, 3 x 4, 2 x 2 and back."""
    unet = random_stage("unet", small_config()).to(device)
    x, context = randn(1, 4, 9, 13).to(device), randn(1, 5, 64).to(device)
    out = unet(x, torch.tensor([3], device=device), context)
    assert out.shape == x.shape and out.isfinite().all()


X, CONTEXT, TIMES = randn(2, 4, 8, 8), randn(2, 6, 24), torch.tensor([20, 1])


@pytest.mark.parametrize(
    "change, match",
    [
        ({"t": 981}, "t must be a tensor, a timestep for each of 2 latents, not 981"),
        ({"t": torch.tensor(981)}, r"t must be \(2,\), a timestep for each latent, not \(\)"),
        ({"t": torch.tensor([981])}, r"t must be \(2,\).*not \(1,\)"),
        ({"t": torch.tensor([[1], [2]])}, r"t must be \(2,\).*not \(2, 1\)"),
        ({"t": torch.tensor([True, False])}, "t must hold integers or floats, not torch.bool"),
        ({"t": torch.tensor([20, 5000])}, "t must be between 0 and 999, not 5000"),
        ({"t": torch.tensor([-7, 20])}, "t must be between 0 and 999, not -7"),
        ({"t": torch.tensor([20.0, 999.5])}, "t must be between 0 and 999, not 999.5"),
        ({"t": torch.tensor([torch.nan, 20.0])}, "t must be between 0 and 999, not nan"),
        ({"context": CONTEXT[:1]}, r"context must be \(2, M, 24\), not \(1, 6, 24\)"),
        ({"context": CONTEXT[..., :8]}, r"context must be \(2, M, 24\), not \(2, 6, 8\)"),
        ({"context": CONTEXT[0]}, r"context must be \(2, M, 24\), not \(6, 24\)"),
        ({"x": X[0]}, r"x must be \(B, 4, H, W\), not \(4, 8, 8\)"),
        ({"x": X[:, :3]}, r"x must be \(B, 4, H, W\), not \(2, 3, 8, 8\)"),
        ({"x": X[..., :0]}, r"x must be \(B, 4, H, W\), not \(2, 4, 8, 0\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line_that_names_it(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        tiny()(**({"x": X, "t": TIMES, "context": CONTEXT} | change))
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_no_latents_have_no_noise() -> None:
    assert tiny()(X[:0], TIMES[:0], CONTEXT[:0]).shape == (0, 4, 8, 8)


@torch.no_grad()
def test_a_timestep_is_any_real_number_within_the_table(device: str) -> None:
    unet = tiny(device)
    x, t, context = inputs(device=device)
    for dtype in (torch.int32, torch.float32, torch.float64):
        assert torch.equal(unet(x, t.to(dtype), context), unet(x, t, context))
    ends = torch.tensor([0.0, 999.0], device=device)
    assert unet(x, ends, context).isfinite().all()
    low, between, high = (unet(x, torch.full_like(ends, at), context) for at in (400, 400.5, 401))
    # Half way, but for the bend of waves whose angle changes by half: 1 / 8 of its square.
    assert relative_error(between, (low + high) / 2) < 0.2 * relative_error(low, high)


def test_the_table_is_as_long_as_its_schedule_says() -> None:
    schedule = dataclasses.replace(tiny_config().schedule, num_train_timesteps=4000)
    unet = random_stage("unet", dataclasses.replace(tiny_config(), schedule=schedule))
    assert unet(X, torch.tensor([3999, 1]), CONTEXT).isfinite().all()
    with pytest.raises(ValueError, match="between 0 and 3999, not 4000"):
        unet(X, torch.tensor([4000, 1]), CONTEXT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_the_check_never_waits_for_the_device() -> None:
    unet, (x, t, context) = tiny("cuda"), inputs(device="cuda")
    unet(x, t, context)  # the first call may set up libraries
    try:
        torch.cuda.set_sync_debug_mode("error")
        unet(x, t, context)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(device: str) -> None:
    unet = tiny(device)
    x, t, context = inputs(batch=3, device=device)
    together = unet(x, t, context)
    for i in range(3):
        alone = unet(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        # Another batch size may choose another kernel, which adds in another order: fp32 rounding
        # through a dozen layers, on outputs of size 1.
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_input_matters() -> None:
    unet = tiny()
    x, t, context = inputs()
    out = unet(x, t, context)
    assert relative_error(unet(x.flip(0), t, context), out) > 0.1
    assert relative_error(unet(x, t.flip(0), context), out) > 0.1
    assert relative_error(unet(x, t, context.flip(0)), out) > 0.1


@pytest.mark.parametrize("config", [TINY, HORIZON.unet], ids=["tiny", "horizon"])
@torch.no_grad()
def test_fresh_unet_predicts_zero(config: UNetConfig) -> None:
    x, t, _ = inputs()
    out = UNet(config)(x, t, randn(2, 6, config.context_dim))
    assert torch.equal(out, torch.zeros_like(x))


def test_gradients_reach_every_parameter_and_input(device: str) -> None:
    unet = tiny(device)
    x, t, context = inputs(device=device)
    x.requires_grad_()
    context.requires_grad_()
    unet(x, t, context).square().sum().backward()
    for key, tensor in [*unet.named_parameters(), ("x", x), ("context", context)]:
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, key


def test_gradient_is_that_of_finite_differences() -> None:
    unet = tiny().double()
    x, t, context = inputs(batch=1, size=(4, 4))
    x, context = x.double().requires_grad_(), context.double()
    direction = randn(1, 4, 4, 4, seed=2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(unet(x, t, context).sin().sum(), x)
    h = 1e-5
    with torch.no_grad():
        ends = [unet(x + s * h * direction, t, context).sin().sum() for s in (1, -1)]
    # Central differences in fp64: the error is of the order h^2 = 1e-10 and 1e-16 / h = 1e-11.
    slope = (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_half_precision_stays_close(device: str) -> None:
    # fp32: rounding through a dozen layers. Half precision: bfloat16 rounds each of some dozen
    # results by up to 2^-9 = 0.2 %, and the largest error among all outputs is some four times
    # the usual one; measured 4.9 % of the std in bfloat16, 2.3e-6 in fp32.
    assert_stage_agrees_across_dtypes(
        lambda unet, *args: unet(*args), tuple(inputs()), tiny(), device, fp32=1e-5, half=0.1
    )


@pytest.mark.compile
@torch.no_grad()
def test_compiled_unet_equals_eager(device: str) -> None:
    unet = tiny(device)
    args = inputs(device=device)
    compiled = torch.compile(unet, backend="inductor", fullgraph=True)  # no graph break
    # Fused kernels round less often, and add in another order: fp32 rounding, on outputs of size 1.
    torch.testing.assert_close(compiled(*args), unet(*args), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config, count", [(SD_V1.unet, 859_520_964), (HORIZON.unet, None)], ids=["sd-v1", "horizon"]
)
def test_number_of_parameters(config: UNetConfig, count: int | None) -> None:
    with torch.device("meta"):
        unet = UNet(config)
    total = sum(p.numel() for p in unet.parameters())
    if count is None:
        assert 1_000_000 < total < 50_000_000  # "a few million"
    else:
        assert total == count


def test_group_norms_have_sd_v1s_epsilons() -> None:
    with torch.device("meta"):
        unet = UNet(SD_V1.unet)
    norms = {n: m for n, m in unet.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert {m.eps for n, m in norms.items() if n.endswith("norm_in")} == {1e-6}
    assert {m.eps for n, m in norms.items() if not n.endswith("norm_in")} == {1e-5}
    assert {m.num_groups for m in norms.values()} == {32}


def test_no_attention_levels_leaves_the_middle_one() -> None:
    unet = UNet(dataclasses.replace(TINY, attention_levels=()))
    places = {n for n, m in unet.named_modules() if type(m).__name__ == "SpatialTransformer"}
    assert places == {"mid.transformer"}


def test_module_names_teach() -> None:
    with torch.device("meta"):
        names = dict(UNet(SD_V1.unet).named_modules())
    assert "down.1.blocks.0.transformer.cross_attention" in names
    assert "up.2.upsample.conv" in names and "mid.res2.conv1" in names
