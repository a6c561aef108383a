"""Pictures of latents by a linear map, and what the statistics of latents say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import viz
from ldm.config import SD_V1
from ldm.vae import Posterior
from tests.helpers import randn, rng, tiny_config
from tests.viz.runs import CHANNELS, made_trace, tiny_pipe

WEIGHT = torch.tensor([[0.3, 0.1, 0.0], [0.0, 0.2, -0.1], [-0.2, 0.0, 0.4], [0.1, 0.1, 0.1]])
BIAS = torch.tensor([0.1, 0.0, -0.3])


def linear_pictures(latents: Tensor, factor: int = 4) -> Tensor:
    """Pictures whose mean colours are an exactly linear map of latents, though no two pixels of a
    place are alike."""
    colours = torch.einsum("bchw,cr->brhw", latents, WEIGHT) + BIAS.view(3, 1, 1)
    large = F.interpolate(colours, scale_factor=factor)
    texture = 0.05 * randn(factor, factor, seed=9)
    return large + (texture - texture.mean()).repeat(*colours.shape[2:])


class LinearVAE(nn.Module):
    """An autoencoder whose latents are a linear map of the mean colours of 2 x 2 pixels."""

    config = tiny_config().vae

    def encode(self, x: Tensor) -> Posterior:
        colours = F.avg_pool2d(x, self.config.factor)
        z = torch.einsum("brhw,rc->bchw", colours - 0.2, randn(3, 4)) / self.config.scaling_factor
        return Posterior(z, torch.zeros_like(z))


def test_fitting_recovers_an_exactly_linear_map() -> None:
    latents = randn(2, 4, 8, 6)
    before = latents.clone()
    rgb = viz.LatentRGB.fit(latents, linear_pictures(latents))
    # Pictures are float32: their means carry about 1e-7 each.
    torch.testing.assert_close(torch.tensor(rgb.weight), WEIGHT, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(rgb.bias), BIAS, rtol=0, atol=1e-6)
    assert torch.equal(latents, before)


def test_a_channel_that_says_nothing_gets_no_colour() -> None:
    latents = randn(2, 4, 8, 6)
    pictures = linear_pictures(latents)
    silent = torch.cat([latents, torch.zeros(2, 1, 8, 6)], dim=1)
    rgb = viz.LatentRGB.fit(silent, pictures)
    torch.testing.assert_close(torch.tensor(rgb.weight[:4]), WEIGHT, rtol=0, atol=1e-6)
    assert max(map(abs, rgb.weight[4])) < 1e-9


def test_the_map_of_an_autoencoder_gives_the_colours_of_new_pictures() -> None:
    pipe = tiny_pipe(LinearVAE())
    noise = torch.randint(0, 256, (5, 16, 16, 3), generator=rng()).byte().numpy()
    *images, new = [Image.fromarray(one) for one in noise]
    rgb = viz.fit_rgb(pipe, images)
    pixels = torch.from_numpy(np.asarray(new).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    # The latents are divided and multiplied by the scaling factor in float32.
    torch.testing.assert_close(
        rgb.rgb(pipe.encode(new)), F.avg_pool2d(pixels, 2), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("latents", "pictures"), [((2, 4, 8, 8), (1, 3, 32, 32)), ((2, 4, 8, 8), (2, 4, 32, 32))]
)
def test_what_is_no_pair_cannot_be_fitted(latents: tuple, pictures: tuple) -> None:
    with pytest.raises(ValueError, match="fitting needs"):
        viz.LatentRGB.fit(torch.zeros(latents), torch.zeros(pictures))


def test_fitting_needs_pictures_of_one_size() -> None:
    sizes = [Image.new("RGB", (16, 16)), Image.new("RGB", (16, 18))]
    for images in ([], sizes):
        with pytest.raises(ValueError, match="all of one size"):
            viz.fit_rgb(tiny_pipe(LinearVAE()), images)


def test_a_map_draws_one_pixel_a_place_and_clamps_what_is_too_bright() -> None:
    rgb = viz.LatentRGB(((1.0, 0.0, 0.0), (0.0, 0.5, 0.0)), (0.0, 0.0, -1.0))
    latents = torch.zeros(2, 2, 3, 5)
    latents[1, 0, 2, 4], latents[1, 1, 2, 4] = 7.0, 1.0
    zero, one = rgb(latents)
    assert zero.size == one.size == (5, 3)
    assert zero.getcolors() == [(15, (128, 128, 0))]
    assert one.getpixel((4, 2)) == (255, 191, 0)
    with pytest.raises(ValueError, match=r"\(B, 2, h, w\)"):
        rgb(torch.zeros(1, 4, 3, 5))


def test_sd_v1s_map_sees_grey_in_nothing_and_darkness_in_its_last_channel() -> None:
    assert viz.SD_V1_RGB(torch.zeros(1, 4, 1, 1))[0].getpixel((0, 0)) == (128, 128, 128)
    dark = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 4, 1, 1)
    assert viz.SD_V1_RGB(dark)[0].getpixel((0, 0)) == (104, 93, 67)


def test_a_trace_is_shown_by_the_map_that_fits_its_own_picture() -> None:
    latents = randn(1, CHANNELS, 8, 6)
    # A picture has whole levels from 0 to 255: the colours are made to fit into them.
    levels = (linear_pictures(latents / 4) + 1) * 127.5
    picture = levels.clamp(0, 255).round()[0].permute(1, 2, 0).byte()
    trace = made_trace(latents=latents, picture=picture)
    # 48 places, each the mean of 16 pixels rounded by up to half a level of 1/127.5.
    error = torch.tensor(viz.trace_rgb(trace).weight) - WEIGHT / 4
    assert error.abs().max() < 1 / 127.5
    assert viz.trace_rgb(made_trace(picture=None)) == viz.false_colours(CHANNELS)
    assert viz.trace_rgb(made_trace(picture=None, model=SD_V1.name)) == viz.SD_V1_RGB


def test_pixels_keep_their_colours_and_latents_have_false_ones() -> None:
    pixels = randn(1, 3, 4, 4)
    assert torch.equal(viz.false_colours(3).rgb(pixels), pixels)
    grey = viz.false_colours(1).rgb(pixels[:, :1])
    assert torch.equal(grey, pixels[:, :1].expand_as(pixels))
    latents = randn(1, 4, 4, 4)
    assert torch.equal(viz.false_colours(4).rgb(latents), latents[:, :3] / 2)
    assert torch.equal(viz.false_colours(2).rgb(latents[:, :2])[:, 2], torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="without channels"):
        viz.false_colours(0)


def test_scenes_to_fit_with_follow_their_generator() -> None:
    first, second = (viz.scene_images(2, 16, np.random.default_rng(3)) for _ in range(2))
    assert [image.size for image in first] == [(16, 16)] * 2
    assert [i.tobytes() for i in first] == [i.tobytes() for i in second]
    assert first[0].tobytes() != first[1].tobytes()


def test_histograms_count_each_channel_by_itself() -> None:
    latents = torch.zeros(2, 2, 1, 2)
    latents[:, 0] = torch.tensor([0.0, 1.0])
    latents[:, 1] = torch.tensor([[4.0, 4.0]])
    edges, densities = viz.histogram(latents, bins=4)
    assert edges.tolist() == [0, 1, 2, 3, 4]
    assert densities.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]]
    edges, densities = viz.histogram(torch.full((1, 1, 2, 2), 3.0), bins=5)
    assert (densities * edges.diff()).sum() == pytest.approx(1.0)


def test_principal_components_are_the_directions_that_the_latents_were_made_of() -> None:
    rotation, _ = torch.linalg.qr(randn(4, 4, seed=3).double())
    spread = torch.tensor([3.0, 1.0, 0.3, 0.1], dtype=torch.float64)
    coordinates = randn(3, 4, 40, 40).double() * spread.view(4, 1, 1)
    latents = torch.einsum("bkhw,kc->bchw", coordinates, rotation) + 5.0
    found = viz.principal_components(latents, 4)
    # 4800 places: correlations of the order of 1/sqrt(4800) tilt the directions.
    assert ((found.directions @ rotation.T).diagonal().abs() > 0.99).all()
    assert found.shares.sum() == pytest.approx(1.0)
    assert found.shares[0] == pytest.approx(9 / 10.1, abs=0.02)
    largest = found.directions.abs().argmax(dim=1)
    assert (found.directions[range(4), largest] > 0).all()
    projected = found.project(latents).transpose(0, 1).flatten(1)
    covariance = projected @ projected.T / projected.shape[1]
    torch.testing.assert_close(covariance, found.variances.diag(), rtol=0, atol=1e-9)


def test_components_shown_as_colours_have_their_mean_in_the_middle() -> None:
    latents = randn(2, 4, 16, 16) + 3.0
    found = viz.principal_components(latents)
    colours = found.rgb(spread=2.0).rgb(latents).transpose(0, 1).flatten(1)
    torch.testing.assert_close(colours.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-5)
    deviation = colours.std(dim=1, correction=0)
    torch.testing.assert_close(deviation, torch.full((3,), 0.5), rtol=1e-4, atol=0)
    flat = viz.principal_components(torch.ones(1, 4, 2, 2))
    assert torch.equal(flat.rgb().rgb(torch.ones(1, 4, 2, 2)), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="have no 5 components"):
        viz.principal_components(latents, 5)
