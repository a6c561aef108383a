"""The run that `ldm verify` draws its picture by, against diffusers' schedulers as the published
numbers were made: Stable Diffusion v1's settings, latents of NumPy's RandomState."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.evaluate.verify_stages import picture_latents
from ldm.schedule import NoiseSchedule
from tests.helpers import randn, random_stage, relative_error, tiny_config

diffusers = pytest.importorskip("diffusers")

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
}
SETTINGS = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    set_alpha_to_one=False,
    steps_offset=1,
)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@torch.no_grad()
def test_the_published_run_is_diffusers_own(sampler: str) -> None:
    config = tiny_config()
    unet = random_stage("unet", config)
    contexts = randn(2, config.text.max_length, config.unet.context_dim, seed=5)
    run = dict(side=8, sampler=sampler, steps=3, guidance_scale=7.5, seed=0)
    ours = picture_latents(unet, contexts, NoiseSchedule(), **run)

    name, more = SCHEDULERS[sampler]
    scheduler = getattr(diffusers, name)(**SETTINGS, **more)
    scheduler.set_timesteps(3)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, 8, 8))).float()
    for t in scheduler.timesteps:
        eps_uncond, eps_cond = unet(torch.cat([x, x]), t.expand(2), contexts).chunk(2)
        eps = eps_uncond + 7.5 * (eps_cond - eps_uncond)
        x = scheduler.step(eps, t, x).prev_sample
    assert relative_error(ours, x) <= 1e-4
