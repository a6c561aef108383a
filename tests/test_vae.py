"""The autoencoder and its posterior; the parity tests hold the arithmetic to diffusers'."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.config import HORIZON, SD_V1, VAEConfig
from ldm.layers import Downsample
from ldm.observe.hooks import record
from ldm.vae import AutoencoderKL, Posterior
from tests.helpers import (
    assert_stage_agrees_across_dtypes,
    randn,
    random_stage,
    relative_error,
    rng,
    tiny_config,
)


def tiny(device: str = "cpu") -> AutoencoderKL:
    return random_stage("vae", tiny_config()).to(device)


def posterior(device: str = "cpu") -> Posterior:
    mean, logvar = randn(3, 4, 5, 6), randn(3, 4, 5, 6, seed=1)
    return Posterior(mean.to(device), logvar.to(device))


BAD_MAPS = [(4, 8, 8), (2, 5, 8, 8), (2, 4, 0, 8)]


@pytest.mark.parametrize("shape", BAD_MAPS)
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^z must be \(B, 4, H, W\), not "):
        tiny().decode(torch.zeros(shape))
    assert tiny().decode(torch.zeros(0, 4, 8, 8)).shape == (0, 3, 16, 16)  # none are none


@pytest.mark.parametrize("shape", BAD_MAPS)
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^x must be \(B, 3, H, W\), not "):
        tiny().encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="sides of x must be multiples of 2, not 8 and 9"):
        tiny().encode(torch.zeros(1, 3, 8, 9))


# --- The posterior ---------------------------------------------------------------------------


def test_kl_is_that_of_torch_distributions(device: str) -> None:
    q = posterior(device)
    normal = Normal(q.mean, torch.exp(0.5 * q.logvar))
    expected = kl_divergence(normal, Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean)))
    assert q.kl().shape == (3,)
    # 120 fp32 terms of size 1 to 10, summed in another order.
    torch.testing.assert_close(q.kl(), expected.sum(dim=(1, 2, 3)), rtol=1e-5, atol=0)


def test_kl_of_a_standard_normal_is_zero() -> None:
    zeros = torch.zeros(2, 4, 3, 3)
    assert torch.equal(Posterior(zeros, zeros).kl(), torch.zeros(2))


def test_mode_is_the_mean() -> None:
    q = posterior()
    assert torch.equal(q.mode(), q.mean)


def test_sample_is_mean_plus_std_times_the_generators_noise(device: str) -> None:
    q = posterior(device)
    noise = torch.randn(q.mean.shape, generator=rng(7)).to(device)  # drawn on the CPU
    expected = q.mean + q.logvar.exp().sqrt() * noise
    # exp(a / 2) against sqrt(exp(a)): a few fp32 roundings.
    torch.testing.assert_close(q.sample(rng(7)), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(q.sample(rng(8)), q.sample(rng(7)))


def test_sample_without_a_generator_draws_from_torchs_own() -> None:
    q = posterior()
    torch.manual_seed(3)
    first = q.sample()
    assert not torch.equal(q.sample(), first)
    torch.manual_seed(3)
    assert torch.equal(q.sample(), first)


def test_samples_have_the_posteriors_moments() -> None:
    q = Posterior(torch.full((1, 1, 200, 200), 1.5), torch.full((1, 1, 200, 200), -1.0))
    draws = q.sample(rng(0))
    std = torch.tensor(-0.5).exp()
    # Five standard errors of the mean and of the standard deviation of 40,000 draws.
    assert abs(draws.mean() - 1.5) < 5 * std / 200
    assert abs(draws.std() - std) < 5 * std / 200 / 2**0.5


@torch.no_grad()
def test_logvar_is_clamped_to_minus_30_and_20() -> None:
    vae = tiny()
    x = randn(2, 3, 8, 8)
    free = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)[1]
    torch.testing.assert_close(vae.encode(x).logvar, free, rtol=0, atol=0)  # nothing to clamp
    vae.quant_conv.weight[4:] *= 1000
    logvar = vae.encode(x).logvar
    assert logvar.min() == -30.0 and logvar.max() == 20.0
    assert ((logvar > -30) & (logvar < 20)).any()


# --- The autoencoder -------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(8, 8), (2, 6), (10, 14)])
@torch.no_grad()
def test_sizes_down_and_up_by_the_factor(height: int, width: int, device: str) -> None:
    vae = tiny(device)
    q = vae.encode(randn(2, 3, height, width).to(device))
    assert q.mean.shape == q.logvar.shape == (2, 4, height // 2, width // 2)
    assert vae.decode(q.mode()).shape == (2, 3, height, width)


def test_factor_of_the_presets() -> None:
    assert SD_V1.vae.factor == 8
    assert HORIZON.vae.factor == 8


def test_every_downsampling_of_the_encoder_pads_right_and_bottom_only() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(SD_V1.vae)
    pads = [m.pad for m in vae.encoder.modules() if isinstance(m, Downsample)]
    assert pads == [(0, 1, 0, 1)] * 3


@torch.no_grad()
def test_encoder_sees_the_left_edge_but_pads_the_right() -> None:
    """The first downsampling is a stride-2 convolution without padding over a map that has one
    more column and row of zeros at its end."""
    vae = tiny()
    level = vae.encoder.down[0]
    h = vae.encoder.conv_in(randn(1, 3, 6, 6))
    inside = level.blocks(h)
    padded = torch.zeros(1, 16, 7, 7)
    padded[..., :6, :6] = inside
    conv = level.downsample.conv
    expected = F.conv2d(padded, conv.weight, conv.bias, stride=2)
    # The same convolution in fp32, perhaps by another kernel.
    torch.testing.assert_close(level(h), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(device: str) -> None:
    vae = tiny(device)
    x = randn(3, 3, 8, 8).to(device)
    q = vae.encode(x)
    y = vae.decode(q.mode())
    for i in range(3):
        # Another batch size may choose another kernel: fp32 rounding, on outputs of size 1.
        one = vae.encode(x[i : i + 1])
        torch.testing.assert_close(q.mean[i : i + 1], one.mean, rtol=0, atol=1e-5)
        alone = vae.decode(q.mean[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_forward_encodes_samples_and_decodes() -> None:
    vae = tiny()
    x = randn(2, 3, 8, 8)
    y, q = vae(x, rng(4))
    assert torch.equal(q.mean, vae.encode(x).mean)
    assert torch.equal(y, vae.decode(vae.encode(x).sample(rng(4))))


@torch.no_grad()
def test_encode_and_decode_change_no_input(device: str) -> None:
    vae = tiny(device)
    x, z = randn(1, 3, 8, 8).to(device), randn(1, 4, 4, 4).to(device)
    before = x.clone(), z.clone()
    vae.encode(x)
    vae.decode(z)
    assert torch.equal(x, before[0]) and torch.equal(z, before[1])


@torch.no_grad()
def test_decoded_pictures_are_not_clamped() -> None:
    y = tiny().decode(10 * randn(1, 4, 4, 4))
    assert y.abs().max() > 1


def test_gradients_reach_every_parameter_and_the_picture(device: str) -> None:
    vae = tiny(device)
    x = randn(2, 3, 8, 8).to(device).requires_grad_()
    y, q = vae(x, rng(0))
    (y.square().sum() + q.kl().sum()).backward()
    for key, tensor in [*vae.named_parameters(), ("x", x)]:
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, key


def test_all_norms_have_the_autoencoders_epsilon() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(SD_V1.vae)
    norms = [m for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)]
    # Two in each ResBlock (10 down, 14 up), one in each attention (2), one at each end (2).
    assert len(norms) == 2 * 24 + 2 + 2
    assert {m.eps for m in norms} == {1e-6}


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_half_precision_stays_close(part: str, device: str) -> None:
    # fp32: rounding through a dozen layers. Half precision: bfloat16 rounds each of some dozen
    # results by up to 2^-9 = 0.2 %, and the largest error among all outputs is some four times
    # the usual one; measured 6.1 % of the std in bfloat16, 3.6e-6 in fp32.
    x = randn(2, 3, 16, 16) if part == "encode" else randn(2, 4, 8, 8)

    def run(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
        return vae.encode(x).mean if part == "encode" else vae.decode(x)

    assert_stage_agrees_across_dtypes(run, (x,), tiny(), device, fp32=1e-5, half=0.1)


@pytest.mark.compile
@torch.no_grad()
def test_compiled_autoencoder_equals_eager(device: str) -> None:
    config = dataclasses.replace(tiny_config(), vae=COMPILED)
    vae = random_stage("vae", config).to(device)
    x = randn(1, 3, 8, 8).to(device)
    compiled = torch.compile(
        lambda x: vae.decode(vae.encode(x).mode()), backend="inductor", fullgraph=True
    )
    eager = vae.decode(vae.encode(x).mode())
    # Fused kernels round less often, and add in another order: fp32 rounding, on outputs of size 1.
    torch.testing.assert_close(compiled(x), eager, rtol=0, atol=1e-5)


# One level: a compiled kernel takes a second, and this has already 15. The UNet's test compiles the
# layers between levels.
COMPILED = VAEConfig(model_channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4)


def test_sd_v1_has_83_653_863_parameters() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(SD_V1.vae)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_attention_can_be_watched_and_is_the_same_watched() -> None:
    vae = random_stage("vae", tiny_config())
    z = randn(1, 4, 3, 4)
    with torch.no_grad():
        plain = vae.decode(z)
        with record(vae, "decoder.mid.attention.weights") as seen:
            watched = vae.decode(z)
    (weights,) = seen["decoder.mid.attention.weights"]
    assert weights.shape == (1, 1, 12, 12)
    # Sums of 12 fp32 numbers below 1.
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 12), rtol=0, atol=1e-6)
    # The fast kernel adds in another order.
    assert relative_error(watched, plain) <= 1e-5


def test_queries_keys_and_values_of_attention_lie_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of others no fast kernel of attention wants to know: all (h w)^2 weights are written down."""
    strides: list[int] = []
    plain = F.scaled_dot_product_attention

    def look(*qkv: Tensor) -> Tensor:
        strides.extend(a.stride(-1) for a in qkv)
        return plain(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    vae = random_stage("vae", tiny_config())
    with torch.no_grad():
        vae.decode(randn(1, 4, 8, 8))
    assert strides == [1, 1, 1]
