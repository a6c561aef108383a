"""Curves and maps: the numbers are those of the run, and matplotlib's state is left alone."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import viz
from ldm.schedule import NoiseSchedule
from tests.helpers import randn
from tests.viz.runs import made_trace, steps_of, without_guidance

matplotlib = pytest.importorskip("matplotlib")

SCHEDULE = NoiseSchedule()
GRID = SCHEDULE.ddim_timesteps(10)


def shown(ax) -> np.ndarray:
    """The pixels that Jupyter would show."""
    return np.asarray(Image.open(io.BytesIO(ax._repr_png_())).convert("RGB"))


@pytest.mark.parametrize(
    ("plot", "values"),
    [
        (viz.betas, SCHEDULE.betas),
        (viz.alpha_bar, SCHEDULE.alpha_bar),
        (viz.snr, SCHEDULE.alpha_bar / (1 - SCHEDULE.alpha_bar)),
    ],
)
def test_a_curve_is_the_schedule_with_the_sampler_on_it(plot, values: torch.Tensor) -> None:
    curve, dots = plot(SCHEDULE, GRID).get_lines()[:2]
    assert np.allclose(curve.get_ydata(), values.numpy())
    t = [pair[0] for pair in GRID]
    assert list(dots.get_xdata()) == t
    assert np.allclose(dots.get_ydata(), values[t].numpy())
    again = plot(SCHEDULE, t).get_lines()[1]
    assert list(again.get_xdata()) == t
    assert plot(SCHEDULE).get_legend() is None
    with pytest.raises(ValueError, match="between 0 and 999"):
        plot(SCHEDULE, [1000])
    with pytest.raises(ValueError, match="no timesteps"):
        plot(SCHEDULE, [])


def test_a_legend_names_a_sampler_only_where_there_is_one() -> None:
    for timesteps, said in ((GRID, "the 10 timesteps of the sampler"), ([500, 0], "2 timesteps")):
        legend = viz.alpha_bar(SCHEDULE, timesteps).get_legend()
        assert [text.get_text() for text in legend.get_texts()] == ["alpha_bar", said]


def test_curves_are_the_points_that_were_measured() -> None:
    ax = viz.curves({"a": {1: 2.0, 10: 4.0}, "b": {1: 3.0}}, log="x", truth=2.5, title="T")
    a, b, truth = ax.get_lines()
    assert (list(a.get_xdata()), list(a.get_ydata())) == ([1, 10], [2.0, 4.0])
    assert (list(b.get_xdata()), list(b.get_ydata())) == ([1], [3.0])
    assert set(truth.get_ydata()) == {2.5}
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_title()) == ("log", "linear", "T")
    assert a.get_color() != b.get_color() and a.get_marker() != b.get_marker()
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["a", "b", "truth"]
    assert viz.curves({"alone": {1: 1}}).get_legend() is None
    for wrong in ({}, {"a": {}}):
        with pytest.raises(ValueError, match="nothing to show: each line needs a point"):
            viz.curves(wrong)
    with pytest.raises(ValueError, match="log must be '', 'x', 'y' or 'xy', not 'z'"):
        viz.curves({"a": {1: 1}}, log="z")


def test_lines_of_more_and_more_grow_darker() -> None:
    lines = viz.curves({str(n): {1: n} for n in (2, 8, 32)}, ordered=True).get_lines()
    brightness = [sum(line.get_color()) for line in lines]
    assert brightness == sorted(brightness, reverse=True) and len(set(brightness)) == 3


def test_memorising_is_shown_in_three_axes_with_one_legend_of_the_training_sets() -> None:
    by_heart = {"2 scenes": {16: 3.0, 64: 0.1}, "8 scenes": {16: 3.0, 64: 0.6}}
    truth = {"2 scenes": {16: 3.0, 64: 0.9}, "8 scenes": {16: 3.0, 64: 0.5}}
    first = viz.memorising(by_heart, truth, {"copies": {2: 0.8, 8: 0.1}})
    left, middle, right = first.figure.axes
    low, high = left.get_ylim()
    assert left is first and (low, high) == middle.get_ylim() and low < 0.1 < 3.0 < high
    assert list(left.get_lines()[0].get_ydata()) == [3.0, 0.1]
    assert list(middle.get_lines()[1].get_ydata()) == [3.0, 0.5]
    assert list(right.get_lines()[0].get_ydata()) == [0.8, 0.1]
    (legend,) = first.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["2 scenes", "8 scenes"]


def test_signal_to_noise_is_drawn_on_a_logarithmic_axis() -> None:
    assert viz.snr(SCHEDULE).get_yscale() == "log"


def test_samplers_timesteps_are_rows_of_dots() -> None:
    ax = viz.timestep_rows({"ten": GRID, "three": [900, 500, 0]})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ten", "three"]
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert list(dots[1].get_xdata()) == [900, 500, 0] and set(dots[1].get_ydata()) == {1}
    assert ax.xaxis_inverted() and ax.yaxis_inverted()
    with pytest.raises(ValueError, match="no timesteps"):
        viz.timestep_rows({})


def test_the_guidance_map_is_the_length_of_the_difference() -> None:
    run = made_trace()
    ax = viz.guidance_map(run, 1)
    expected = (run.eps_cond - run.eps_uncond)[1].square().sum(dim=0).sqrt()
    (image,) = ax.get_images()
    assert np.allclose(image.get_array(), expected.numpy())
    assert image.get_clim()[0] == 0.0
    assert "step 2 of 5, t = 601" in ax.get_title()
    assert "step 5 of 5, t = 1" in viz.guidance_map(run).get_title()
    with pytest.raises(ValueError, match="step must be between -5 and 4, not 5"):
        viz.guidance_map(run, 5)


def test_guidance_norms_are_the_traces_own() -> None:
    run = made_trace()
    for source in (run, steps_of(run)):
        (line,) = viz.guidance_norms(source).get_lines()
        assert np.allclose(line.get_ydata(), run.guidance_norms.numpy())
        assert list(line.get_xdata()) == list(run.t)
    for plot in (viz.guidance_norms, viz.guidance_map):
        with pytest.raises(ValueError, match="without guidance"):
            plot(without_guidance(run))


def test_the_histogram_has_every_channel_and_the_normal_distribution() -> None:
    latents = randn(1, 4, 50, 50)
    ax = viz.latent_histogram(latents, bins=20)
    _, densities = viz.histogram(latents, 20)
    stairs = [patch for patch in ax.patches if hasattr(patch, "get_data")]
    assert len(stairs) == 4
    for patch, density in zip(stairs, densities, strict=True):
        assert np.allclose(patch.get_data().values, density.numpy())
    (normal,) = ax.get_lines()
    x = normal.get_xdata()
    assert torch.trapezoid(*map(torch.as_tensor, (normal.get_ydata(), x))) == pytest.approx(
        1.0, abs=2e-3
    )


def test_components_are_shown_as_a_picture_with_their_shares() -> None:
    latents = randn(2, 4, 8, 6)
    found = viz.principal_components(latents)
    ax = viz.latent_components(latents)
    (image,) = ax.get_images()
    assert (np.asarray(image.get_array()) == np.asarray(found.rgb()(latents)[0])).all()
    assert f"red {found.shares[0]:.0%}" in ax.get_title()
    assert viz.latent_components(latents[:, :2]).get_images()


ALL = {
    "betas": lambda ax: viz.betas(SCHEDULE, GRID, ax),
    "alpha_bar": lambda ax: viz.alpha_bar(SCHEDULE, GRID, ax),
    "snr": lambda ax: viz.snr(SCHEDULE, GRID, ax),
    "timestep_rows": lambda ax: viz.timestep_rows({"a sampler of a long name": GRID}, ax),
    "guidance_map": lambda ax: viz.guidance_map(made_trace(), ax=ax),
    "guidance_norms": lambda ax: viz.guidance_norms(made_trace(), ax),
    "curves": lambda ax: viz.curves({"a": {1: 2, 2: 3}, "b": {1: 1}}, ax=ax),
    "unet_shape": lambda ax: viz.unet_shape([viz.UNetMap("conv_in", 8, 4)], ax),
    "latent_histogram": lambda ax: viz.latent_histogram(randn(1, 4, 9, 9), ax),
    "latent_components": lambda ax: viz.latent_components(randn(1, 4, 9, 9), ax),
}


@pytest.mark.parametrize("name", ALL)
def test_a_plot_shows_itself_whole_and_leaves_matplotlib_as_it_was(name: str) -> None:
    before = dict(matplotlib.rcParams)
    ax = ALL[name](None)
    pixels = shown(ax)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("name", ALL)
def test_a_plot_goes_into_the_axes_that_it_is_given(name: str) -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert ALL[name](ax) is ax
    assert ax.has_data()


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.viz import plots

    plots.shown_axes.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError) as error:
        viz.betas(SCHEDULE)
    assert str(error.value) == "plots need matplotlib: pip install 'ldm-from-scratch[viz]'"
