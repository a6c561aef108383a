"""The page's normal numbers are torch's, number by number."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import torch

from tests.places import ROOT

NODE = shutil.which("node")
MODULE = ROOT / "ldm" / "viz" / "player" / "model" / "normals.js"
SEEDS = (0, 1, 5, 42, 1234, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**63 - 1)
SIZES = (1, 2, 7, 15, 16, 17, 31, 32, 100, 625, 1024, 4 * 64 * 64)

# torch computes logarithms, sines and cosines of 32-bit floats, the page those of 64-bit ones; near
# a zero of the sine or the logarithm that is a small part of a small number.
CLOSE = dict(rtol=2e-5, atol=2e-6)


def by_node(script: str) -> Any:
    """What a script, which has `Normals`, prints as JSON."""
    if NODE is None:
        pytest.skip("there is no node on this machine")
    whole = f"import {{ Normals }} from {json.dumps(MODULE.as_uri())};\n{script}"
    command = [NODE, "--no-warnings", "--experimental-default-type=module", "--input-type=module"]
    run = subprocess.run([*command, "-e", whole], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_one_draw_of_any_seed_and_size_is_torchs() -> None:
    drawn = by_node(
        "console.log(JSON.stringify("
        f"{json.dumps([str(seed) for seed in SEEDS])}.map((seed) => {json.dumps(SIZES)}.map("
        "(size) => [...new Normals(BigInt(seed)).draw(size)]))))"
    )
    for seed, rows in zip(SEEDS, drawn, strict=True):
        for size, row in zip(SIZES, rows, strict=True):
            expected = torch.randn(size, generator=torch.Generator().manual_seed(seed))
            np.testing.assert_allclose(row, expected, **CLOSE, err_msg=f"{seed} {size}")


def test_many_seeds_give_torchs_noise_of_horizons_latents() -> None:
    drawn = by_node(
        "console.log(JSON.stringify([...Array(200).keys()].map((seed) => "
        "[...new Normals(seed).draw(1024)])))"
    )
    for seed, row in enumerate(drawn):
        expected = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(row, expected.flatten(), **CLOSE, err_msg=str(seed))


@pytest.mark.parametrize("sizes", [(1024, 1024), (3, 3, 2), (17, 33, 1), (5, 20, 4)])
def test_draws_that_follow_each_other_are_torchs(sizes: tuple[int, ...]) -> None:
    drawn = by_node(
        "const normals = new Normals(7);\n"
        f"console.log(JSON.stringify({json.dumps(sizes)}.map((n) => [...normals.draw(n)])))"
    )
    generator = torch.Generator().manual_seed(7)
    for size, row in zip(sizes, drawn, strict=True):
        np.testing.assert_allclose(row, torch.randn(size, generator=generator), **CLOSE)
