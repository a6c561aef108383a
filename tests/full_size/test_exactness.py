"""Every stage at its real size, and a whole picture, against diffusers and transformers.

Small models add up short sums in few layers; these are the sums of the real thing. The weights go
through one file, which diffusers reads by its own conversion. Models are loaded one at a time and
dropped at once: only what they computed stays. The fast layers of `pipe.optimize()` are held to the
same bounds. The autoencoder is held to fp64 on a quarter of a picture: at 512x512 the picture that
is drawn says the same to one grey level.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.loading import load_stages, load_text_encoder, load_unet, load_vae
from ldm.config import SD_V1
from ldm.pipeline import TextToImage
from ldm.samplers import ddim, guide
from ldm.schedule import NoiseSchedule
from ldm.speed.cpu import optimize
from tests.helpers import randn, relative_error, rng, text_in_fp64
from tests.parity import assert_parity

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.full_size

STEPS, GUIDANCE = 2, 7.5


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.benchmarks.diffusers_side import write_configs

    return write_configs(tmp_path_factory.mktemp("configs"), SD_V1)


def oracle(
    stage: str, checkpoint: Path, configs: Path, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """diffusers' (or transformers') own model, filled by diffusers' own conversion, which reads
    it as the file has it: in fp64 the numbers are those of fp32."""
    from tests.benchmarks import diffusers_side

    return diffusers_side.load(stage, checkpoint, configs).to(dtype)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Token ids (2, 77): no words but the padding, and a prompt that fills all places."""
    config = SD_V1.text
    ids = torch.full((2, config.max_length), config.eos_token_id)
    ids[:, 0] = config.bos_token_id
    words = (config.max_length - 2,)
    ids[1, 1:-1] = torch.randint(0, config.bos_token_id, words, generator=rng(9))
    return ids


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return randn(1, 4, 64, 64, seed=5)


@pytest.fixture(scope="module")
@torch.no_grad()
def context(checkpoint: Path, ids: Tensor) -> Tensor:
    """The text states (2, 77, 768) that both sides draw from, without a prompt first."""
    return load_text_encoder(checkpoint).encode(ids)


@dataclass(frozen=True)
class Drawn:
    """What drawing a picture gave: both predictions (2, 4, 64, 64) of the first step, the latents
    after the last, and the picture."""

    eps: Tensor
    latents: Tensor
    picture: Image.Image


@pytest.fixture(scope="module")
def our_picture(checkpoint: Path, context: Tensor, noise: Tensor) -> Drawn:
    pipe = TextToImage(*load_stages(checkpoint), NoiseSchedule(), SD_V1)
    eps_fn = guide(pipe.unet, context[1:], context[:1], GUIDANCE)
    steps = list(ddim(eps_fn, noise, pipe.schedule.ddim_timesteps(STEPS), pipe.schedule))
    first, last = steps[0], steps[-1]
    eps = torch.cat([first.eps_uncond, first.eps_cond])
    return Drawn(eps, last.x_prev, pipe.decode(last.x_prev)[0])


@pytest.fixture(scope="module")
@torch.no_grad()
def their_picture(checkpoint: Path, configs: Path, context: Tensor, noise: Tensor) -> Drawn:
    from diffusers.image_processor import VaeImageProcessor

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    unet, x, predictions = oracle("unet", checkpoint, configs), noise, []
    for t in scheduler.timesteps:
        predictions.append(unet(torch.cat([x, x]), t, context).sample)
        uncond, cond = predictions[-1].chunk(2)
        x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
    del unet
    vae = oracle("vae", checkpoint, configs)
    y = vae.decode(x / vae.config.scaling_factor).sample
    return Drawn(predictions[0], x, VaeImageProcessor().postprocess(y)[0])


@text_in_fp64
@torch.no_grad()
def test_text_states_agree_with_transformers(
    checkpoint: Path, configs: Path, ids: Tensor, context: Tensor
) -> None:
    def states(dtype: torch.dtype) -> Tensor:
        return oracle("text", checkpoint, configs, dtype)(input_ids=ids).last_hidden_state

    assert context.shape == (2, 77, 768)
    theirs, reference = states(torch.float32), states(torch.float64)
    assert_parity(context, theirs, reference, "context")
    optimize(text := load_text_encoder(checkpoint))
    assert_parity(text.encode(ids), theirs, reference, "context, optimised")


@torch.no_grad()
def test_unet_agrees_with_diffusers(
    checkpoint: Path,
    configs: Path,
    context: Tensor,
    noise: Tensor,
    our_picture: Drawn,
    their_picture: Drawn,
) -> None:
    """In fp64 one of the two predictions, that of the prompt: the slowest of all."""
    (t, _), *_ = NoiseSchedule().ddim_timesteps(STEPS)
    exact = oracle("unet", checkpoint, configs, torch.float64)
    reference = exact(noise.double(), t, context[1:].double()).sample
    del exact
    theirs = their_picture.eps[1:]
    assert_parity(our_picture.eps[1:], theirs, reference, "eps")
    optimize(unet := load_unet(checkpoint))
    fast = unet(torch.cat([noise, noise]), torch.full((2,), t), context)
    assert_parity(fast[1:], theirs, reference, "eps, optimised")


def test_guided_steps_agree_with_diffusers(our_picture: Drawn, their_picture: Drawn) -> None:
    error = relative_error(our_picture.latents, their_picture.latents)
    print(f"latents: {error:.3g} of their std")
    assert error <= 1e-4


def test_the_decoded_picture_is_diffusers_own_to_one_grey_level(
    our_picture: Drawn, their_picture: Drawn
) -> None:
    ours, theirs = (
        torch.frombuffer(bytearray(drawn.picture.tobytes()), dtype=torch.uint8).int()
        for drawn in (our_picture, their_picture)
    )
    assert our_picture.picture.size == their_picture.picture.size == (512, 512)
    # A picture of black and white alone would agree too.
    assert ((theirs > 0) & (theirs < 255)).float().mean() > 0.5
    difference = (ours - theirs).abs()
    print(f"{int((difference > 0).sum())} of {len(difference)} values differ")
    assert difference.max() <= 1


@torch.no_grad()
def test_vae_decode_agrees_with_diffusers(checkpoint: Path, configs: Path) -> None:
    z = randn(1, 4, 32, 32, seed=8)
    vae = load_vae(checkpoint)
    mine = vae.decode(z)
    theirs = oracle("vae", checkpoint, configs).decode(z).sample
    reference = oracle("vae", checkpoint, configs, torch.float64).decode(z.double()).sample
    assert mine.shape == (1, 3, 256, 256)
    assert_parity(mine, theirs, reference, "picture")
    optimize(vae)
    assert_parity(vae.decode(z), theirs, reference, "picture, optimised")


@torch.no_grad()
def test_vae_encode_agrees_with_diffusers(checkpoint: Path, configs: Path) -> None:
    x = randn(1, 3, 256, 256, seed=7).clamp(-1, 1)
    vae = load_vae(checkpoint)
    mine = vae.encode(x)
    theirs = oracle("vae", checkpoint, configs).encode(x).latent_dist
    exact = oracle("vae", checkpoint, configs, torch.float64).encode(x.double()).latent_dist
    assert mine.mean.shape == (1, 4, 32, 32)
    assert_parity(mine.mean, theirs.mean, exact.mean, "mean")
    assert_parity(mine.logvar, theirs.logvar, exact.logvar, "logvar")
    optimize(vae)
    fast = vae.encode(x)
    assert_parity(fast.mean, theirs.mean, exact.mean, "mean, optimised")
    assert_parity(fast.logvar, theirs.logvar, exact.logvar, "logvar, optimised")
