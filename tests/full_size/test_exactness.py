"""Every stage at its real size, and a whole picture, against diffusers and transformers.

Small models add up short sums in few layers; these are the sums of the real thing. The weights go
through one file, which diffusers reads by its own conversion. Each model is loaded once, computes
all that is asked of it (ours plain, and then with the fast layers of `pipe.optimize()`, which are
held to the same bounds; theirs in fp32, and then in fp64) and is dropped: only what it computed
stays. The autoencoder is held to fp64 on a quarter of a picture: at 512x512 the picture that is
drawn says the same to one grey level.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.loading import load_stages
from ldm.config import SD_V1
from ldm.pipeline import TextToImage
from ldm.samplers import ddim, guide
from ldm.schedule import NoiseSchedule
from ldm.speed.cpu import optimize
from ldm.vae import AutoencoderKL
from tests.helpers import randn, relative_error, rng, text_in_fp64
from tests.parity import assert_parity

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.full_size

STEPS, GUIDANCE = 2, 7.5

Answers = dict[str, Tensor]
"""What stages computed: context (2, 77, 768), without a prompt first; eps, both predictions
(2, 4, 64, 64) of the first step; picture (1, 3, 256, 256), mean and logvar (1, 4, 32, 32)."""


@dataclass(frozen=True)
class Drawn:
    """The latents after the last step, and the picture."""

    latents: Tensor
    picture: Image.Image


@dataclass(frozen=True)
class Ours:
    plain: Answers
    fast: Answers
    drawn: Drawn


@dataclass(frozen=True)
class Theirs:
    """`exact`, in fp64, has of the two predictions that of the prompt: the slowest of all."""

    fp32: Answers
    exact: Answers


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
def latents() -> Tensor:
    """For the decoder alone."""
    return randn(1, 4, 32, 32, seed=8)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """For the encoder."""
    return randn(1, 3, 256, 256, seed=7).clamp(-1, 1)


# --- Ours ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
@torch.no_grad()
def ours(checkpoint: Path, ids: Tensor, noise: Tensor, latents: Tensor, pixels: Tensor) -> Ours:
    def autoencoded(vae: AutoencoderKL) -> Answers:
        posterior = vae.encode(pixels)
        return {
            "picture": vae.decode(latents),
            "mean": posterior.mean,
            "logvar": posterior.logvar,
        }

    pipe = TextToImage(*load_stages(checkpoint), NoiseSchedule(), SD_V1)
    context = pipe.text.encode(ids)
    eps_fn = guide(pipe.unet, context[1:], context[:1], GUIDANCE)
    first, last = ddim(eps_fn, noise, pipe.schedule.ddim_timesteps(STEPS), pipe.schedule)
    plain = {"context": context, "eps": torch.cat([first.eps_uncond, first.eps_cond])}
    plain |= autoencoded(pipe.vae)
    drawn = Drawn(last.x_prev, pipe.decode(last.x_prev)[0])

    for stage in (pipe.text, pipe.unet, pipe.vae):
        optimize(stage)
    t = torch.full((2,), first_timestep())
    fast = {
        "context": pipe.text.encode(ids),
        "eps": pipe.unet(noise.expand(2, -1, -1, -1), t, context),
    }
    return Ours(plain, fast | autoencoded(pipe.vae), drawn)


def first_timestep() -> int:
    (t, _), *_ = NoiseSchedule().ddim_timesteps(STEPS)
    return t


# --- Theirs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.benchmarks.diffusers_side import write_configs

    return write_configs(tmp_path_factory.mktemp("configs"), SD_V1)


def oracle(stage: str, checkpoint: Path, configs: Path) -> nn.Module:
    """diffusers' (or transformers') own model, filled by diffusers' own conversion, which reads
    the file as it is: made fp64 afterwards, its numbers are those of fp32."""
    from tests.benchmarks import diffusers_side

    return diffusers_side.load(stage, checkpoint, configs)


@pytest.fixture(scope="module")
@torch.no_grad()
def their_text(checkpoint: Path, configs: Path, ids: Tensor) -> Theirs:
    text = oracle("text", checkpoint, configs)
    states = {"context": text(input_ids=ids).last_hidden_state}
    return Theirs(states, {"context": text.double()(input_ids=ids).last_hidden_state})


@pytest.fixture(scope="module")
@torch.no_grad()
def their_steps(
    checkpoint: Path, configs: Path, ours: Ours, noise: Tensor
) -> tuple[Theirs, Tensor]:
    """The UNet's answers, given our context, and the latents after the last step."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    context = ours.plain["context"]
    unet, x, predictions = oracle("unet", checkpoint, configs), noise, []
    for t in scheduler.timesteps:
        predictions.append(unet(torch.cat([x, x]), t, context).sample)
        uncond, cond = predictions[-1].chunk(2)
        x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
    exact = unet.double()(noise.double(), first_timestep(), context[1:].double()).sample
    return Theirs({"eps": predictions[0]}, {"eps": exact}), x


@pytest.fixture(scope="module")
@torch.no_grad()
def their_vae(
    checkpoint: Path,
    configs: Path,
    their_steps: tuple[Theirs, Tensor],
    latents: Tensor,
    pixels: Tensor,
) -> tuple[Theirs, Drawn]:
    """The autoencoder's answers, and the picture that it makes of their latents."""
    from diffusers.image_processor import VaeImageProcessor

    def autoencoded(dtype: torch.dtype) -> Answers:
        posterior = vae.to(dtype).encode(pixels.to(dtype)).latent_dist
        return {
            "picture": vae.decode(latents.to(dtype)).sample,
            "mean": posterior.mean,
            "logvar": posterior.logvar,
        }

    vae = oracle("vae", checkpoint, configs)
    _, x = their_steps
    y = vae.decode(x / vae.config.scaling_factor).sample
    drawn = Drawn(x, VaeImageProcessor().postprocess(y)[0])
    return Theirs(autoencoded(torch.float32), autoencoded(torch.float64)), drawn


# --- Both ------------------------------------------------------------------------------------


def assert_held(ours: Ours, theirs: Theirs, what: str) -> None:
    """Plain and fast, by the rule for parity."""
    for how, answers in ((what, ours.plain), (f"{what}, optimised", ours.fast)):
        exact = theirs.exact[what]
        mine, fp32 = (side[what][-len(exact) :] for side in (answers, theirs.fp32))
        assert_parity(mine, fp32, exact, how)


@text_in_fp64
def test_text_states_agree_with_transformers(ours: Ours, their_text: Theirs) -> None:
    assert ours.plain["context"].shape == (2, 77, 768)
    assert_held(ours, their_text, "context")


def test_unet_agrees_with_diffusers(ours: Ours, their_steps: tuple[Theirs, Tensor]) -> None:
    theirs, _ = their_steps
    assert ours.plain["eps"].shape == (2, 4, 64, 64) and len(theirs.exact["eps"]) == 1
    assert_held(ours, theirs, "eps")


def test_guided_steps_agree_with_diffusers(ours: Ours, their_steps: tuple[Theirs, Tensor]) -> None:
    _, theirs = their_steps
    error = relative_error(ours.drawn.latents, theirs)
    print(f"latents: {error:.3g} of their std")
    assert error <= 1e-4


def test_the_decoded_picture_is_diffusers_own_to_one_grey_level(
    ours: Ours, their_vae: tuple[Theirs, Drawn]
) -> None:
    pictures = ours.drawn.picture, their_vae[1].picture
    assert all(picture.size == (512, 512) for picture in pictures)
    mine, theirs = (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()
        for picture in pictures
    )
    # A picture of black and white alone would agree too.
    assert ((theirs > 0) & (theirs < 255)).float().mean() > 0.5
    difference = (mine - theirs).abs()
    print(f"{int((difference > 0).sum())} of {len(difference)} values differ")
    assert difference.max() <= 1


def test_vae_decode_agrees_with_diffusers(ours: Ours, their_vae: tuple[Theirs, Drawn]) -> None:
    assert ours.plain["picture"].shape == (1, 3, 256, 256)
    assert_held(ours, their_vae[0], "picture")


def test_vae_encode_agrees_with_diffusers(ours: Ours, their_vae: tuple[Theirs, Drawn]) -> None:
    assert ours.plain["mean"].shape == (1, 4, 32, 32)
    assert_held(ours, their_vae[0], "mean")
    assert_held(ours, their_vae[0], "logvar")
