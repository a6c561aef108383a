"""Our stages against diffusers and transformers, on the same random weights.

The weights go through our own file: we save a checkpoint in the official layout, and diffusers'
own conversion code reads it. So these tests hold the key map as well as the arithmetic.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.helpers import small_config

# The autoencoder is the same in Stable Diffusion 1 and 2.
only_v1 = pytest.mark.parametrize("config", [small_config()], indirect=True, ids=["small"])
# Only small activations are sensitive to the epsilon of a norm.
only_small = pytest.mark.parametrize("activation_std", [0.01], indirect=True, ids=["small"])


def assert_parity(ours: Tensor, oracle: Tensor, reference: Tensor, what: str = "") -> None:
    """Both in fp32, against the oracle in fp64, by their largest errors.

    Two correct programs that add in another order differ by rounding alone. So ours may be at most
    twice as far from the exact result as the oracle is, which follows the rounding wherever the
    weights make it larger, and never further than 1e-4 of the output's standard deviation, some
    1000 times fp32's epsilon: what the sums of a deep network cost, and less than any other epsilon
    or activation would.
    """
    assert ours.shape == oracle.shape == reference.shape
    reference = reference.detach().double().cpu()
    error = float((ours.detach().cpu().double() - reference).abs().max())
    allowed = float((oracle.detach().cpu().double() - reference).abs().max())
    std = float(reference.std())
    told = f"{what}: ours {error:.3g}, the oracle's fp32 {allowed:.3g}, std {std:.3g}"
    print(told)
    assert error <= 2 * allowed, told
    assert error <= 1e-4 * std, told
