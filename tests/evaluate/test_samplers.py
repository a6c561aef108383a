"""Every sampler by the number of its calls of the UNet."""

from __future__ import annotations

import json
import math

import pytest
import torch

import ldm
from ldm.evaluate.samplers import (
    ANY_MODELS,
    Measured,
    SamplerResults,
    evaluate_samplers,
)


@pytest.fixture(scope="module")
def found() -> SamplerResults:
    pipe = ldm.load(device="cpu", dtype=torch.float32)
    names = ("ddim", "heun", "euler_ancestral")
    return evaluate_samplers(pipe, samplers=names, steps=(2, 8), prompts=2, reference_steps=16)


def test_calls_are_counted_as_they_are_made(found: SamplerResults) -> None:
    calls = {(one.sampler, one.steps): one.calls for one in found.measured}
    assert calls["ddim", 2] == calls["euler_ancestral", 2] == 4  # a guided step is two
    assert calls["ddim", 8] == 16
    assert calls["heun", 8] == 2 * (2 * 8 - 1)  # its last step is Euler's
    assert all((one.pictures, one.total >= 2) == (2, True) for one in found.measured)


def test_more_calls_come_nearer_to_the_end_of_the_path(found: SamplerResults) -> None:
    distance = found.curves("distance")
    assert distance.keys() == {"ddim", "heun"}  # the third adds noise
    for line in distance.values():
        few, many = line.values()
        assert many < 0.7 * few


def test_results_are_told_to_programs_and_to_people() -> None:
    ddim = Measured("ddim", 5, 10.0, 9, 10, 1, 4, 0.25)
    rows = [ddim, Measured("ddpm", 5, 9.0, 5, 10, 0, 4, math.nan)]
    results = SamplerResults(rows, {"guidance_scale": 3.0})
    assert json.loads(json.dumps(results.as_dict()))["measured"][1]["distance"] is None
    table = results.as_markdown().splitlines()
    assert table[-2].startswith("| 9 | ddpm | 5 | 50.0% (at least 23.7%) | 0 / 4 |  |")
    assert table[-1].startswith("| 10 | ddim | 5 | 90.0% (at least ") and "| 0.250 |" in table[-1]
    assert results.curves("right") == {"ddpm": {9.0: 0.5}, "ddim": {10.0: 0.9}}
    assert results.curves("impossible")["ddim"] == {10.0: 0.25}


def test_what_cannot_be_is_refused_before_the_first_picture() -> None:
    pipe = ldm.load(device="cpu", dtype=torch.float32)
    for asked, told in (
        (dict(prompts=0), "prompts must be 1 or more"),
        (dict(samplers=("dimm",)), "unknown sampler 'dimm'"),
        (dict(reference_steps=2000), "steps must be between 1 and 1000"),
    ):
        with pytest.raises(ValueError, match=told):
            evaluate_samplers(pipe, **asked)
    assert "lcm" not in ANY_MODELS and "unipc" in ANY_MODELS
