"""The error budget finds a planted fault in the link where it was planted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ldm
from ldm.evaluate.budget import FIGURES, Budget, Link, evaluate_budget
from ldm.pipeline import TextToImage

NAMES = ["the world", "autoencoder", "1,000 steps", "its steps", "UNet", "guidance"]


def budget(pipe: TextToImage, **settings) -> Budget:
    asked = dict(per_kind=8, atoms=24, kinds=("green grass",), steps=12, guidance_scale=2.0)
    return evaluate_budget(pipe, **(asked | settings))


def horizon() -> TextToImage:
    return ldm.load(device="cpu", dtype=torch.float32)


def test_bars_add_up_to_the_end() -> None:
    links = [Link(name, i / 7, i**2 / 50, -i / 100) for i, name in enumerate(NAMES)]
    found = Budget(links, {"steps": 3})
    for figure in FIGURES:
        bars = [found.bar(name, figure) for name in NAMES]
        assert sum(bars) == pytest.approx(getattr(links[-1], figure))
        assert bars[0] == getattr(links[0], figure)
    assert found.as_dict()["links"][1] == dataclasses.asdict(links[1])
    table = found.as_markdown().splitlines()
    assert len(table) == 2 + 2 + len(NAMES) and "(steps 3)" in table[0]
    assert table[-1].startswith("| guidance | 71.4% | 14.3% |")


@pytest.mark.parametrize(
    "asked, told",
    [
        (dict(per_kind=0), "per_kind and atoms must be 1 or more, not 0 and 24"),
        (dict(steps=0), "steps must be"),
        (dict(sampler="dimm"), "unknown sampler 'dimm'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_picture(asked: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        budget(horizon(), **asked)


@pytest.fixture(scope="module")
def plain() -> Budget:
    return budget(horizon())


def worse_decoder(pipe: TextToImage) -> None:
    """Pictures with coarse spots."""
    weight = pipe.vae.decoder.conv_in.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data += 2.0 * weight.std() * noise


def noise_on_the_unet(pipe: TextToImage) -> None:
    """Whatever it says is uncertain."""
    weight = pipe.unet.conv_out.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data += 0.5 * weight.std() * noise


FAULTS = {"autoencoder": worse_decoder, "UNet": noise_on_the_unet}


@pytest.mark.slow
@pytest.mark.parametrize("link", FAULTS)
def test_a_planted_fault_is_found_in_its_link(plain: Budget, link: str) -> None:
    assert [one.name for one in plain.links] == NAMES
    assert plain.links[0].impossible == plain.links[0].disobedient == 0
    pipe = horizon()
    FAULTS[link](pipe)
    found = budget(pipe)
    added = {name: found.bar(name, "impossible") - plain.bar(name, "impossible") for name in NAMES}
    assert max(added, key=added.__getitem__) == link and added[link] > 0.3


@pytest.mark.slow
def test_too_few_steps_are_found_in_their_link(plain: Budget) -> None:
    """In one step a perfect model makes the mean of all scenes, which is no scene."""
    found = budget(horizon(), steps=1)
    added = {name: found.bar(name, "impossible") - plain.bar(name, "impossible") for name in NAMES}
    assert max(added, key=added.__getitem__) == "its steps" and added["its steps"] > 0.5
