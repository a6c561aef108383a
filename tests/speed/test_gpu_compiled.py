"""The UNet's twin and the decoder, as torch.compile takes them: whole, and once for each shape.

On a CPU, and traced alone: what a GPU's kernels are made of, and not the kernels."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from ldm.speed.gpu import twin_of
from tests.helpers import randn, random_stage, relative_error, tiny_config

CONFIG = tiny_config()
pytestmark = pytest.mark.compile


def test_the_twin_compiles_whole_for_each_shape() -> None:
    """No graph breaks, or there would be no one graph to capture; and nothing is compiled twice."""
    unet = random_stage("unet", CONFIG).requires_grad_(False)
    twin, counter = twin_of(unet), CompileCounter()
    twin.unet.compile(fullgraph=True, dynamic=False, backend=counter)
    torch._dynamo.reset()
    with torch.no_grad():
        for batch in (2, 1, 2):
            for t in (7, 981):
                x, context = randn(batch, 4, 8, 8), randn(batch, 12, 24)
                for part in twin.prompted:
                    part.k, part.v = part.to_k(context), part.to_v(context)
                times = torch.full((batch,), t)
                assert relative_error(twin.unet(x, times, context), unet(x, times, context)) < 1e-5
    assert counter.frame_count == 2  # one for each shape


def test_the_decoder_compiles_whole() -> None:
    vae = random_stage("vae", CONFIG).requires_grad_(False)
    explained = torch._dynamo.explain(vae.decoder)(randn(1, 4, 8, 8))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
