"""One call of one model, after a call to warm up: a step of the UNet, a decode, a prompt encoded, a
step of training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoints.stages import build_stage
from ldm.config import ModelConfig
from tests.benchmarks.harness import Benchmark, Setting
from tests.helpers import randn, rng


def our_model(setting: Setting, stage: str) -> Any:
    """As `pipe.optimize()` makes it on a CPU; unread until it runs, as diffusers' is."""
    from ldm.checkpoints.loading import load_stages
    from ldm.speed.cpu import optimize

    where = dict(device=setting.device, dtype=setting.dtype, config=setting.config)
    (model,) = load_stages(setting.weights, (stage,), check=False, **where)
    optimize(model)
    return model


def their_model(setting: Setting, stage: str) -> nn.Module:
    from tests.benchmarks import diffusers_side

    model = diffusers_side.load(stage, setting.weights, setting.configs, setting.dtype)
    return model.to(setting.device).eval()


def without_gradients(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A graph's output, say, is overwritten by its next run: whoever keeps it needs a copy."""

    @torch.no_grad()
    def run() -> Tensor:
        return work().clone()

    return run


def compiled(model: nn.Module) -> Any:
    """By torch.compile at its best, with channels last; on CUDA that makes graphs."""
    model = model.to(memory_format=torch.channels_last)
    return torch.compile(model, mode="max-autotune", fullgraph=True)


def gflop(stage: str, config: ModelConfig, call: Callable[[Any], object]) -> float:
    """How many operations a call of a model is, counted on one without numbers."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        call(build_stage(stage, config))
    return counter.get_total_flops() / 1e9


# --- The UNet ----------------------------------------------------------------------------------


def unet_inputs(setting: Setting, batch: int, latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, context."""
    unet, text = setting.config.unet, setting.config.text
    x = randn(batch, unet.in_channels, latents, latents, seed=1)
    context = randn(batch, text.max_length, unet.context_dim, seed=2)
    t = torch.full((batch,), 501, device=setting.device)
    return x.to(setting.device, setting.dtype), t, context.to(setting.device, setting.dtype)


def our_unet(setting: Setting, *, compile: bool, **shape: int) -> Callable[[], object]:
    unet, inputs = our_model(setting, "unet"), unet_inputs(setting, **shape)
    model = compiled(unet) if compile else unet
    return without_gradients(lambda: model(*inputs))


def their_unet(setting: Setting, *, compile: bool, **shape: int) -> Callable[[], object]:
    unet, inputs = their_model(setting, "unet"), unet_inputs(setting, **shape)
    model = compiled(unet) if compile else unet
    return without_gradients(lambda: model(*inputs, return_dict=False)[0])


def unet(config: ModelConfig, *, batch: int, size: int, compile: bool) -> tuple[Benchmark, ...]:
    latents = size // config.vae.factor
    shape = dict(batch=batch, latents=latents)
    cost = gflop(
        "unet",
        config,
        lambda model: model(
            torch.empty(batch, config.unet.in_channels, latents, latents),
            torch.empty(batch, dtype=torch.int64),
            torch.empty(batch, config.text.max_length, config.unet.context_dim),
        ),
    )
    name = f"UNet step, batch {batch}, {latents}x{latents} latents"

    def against(name: str, **flags: bool) -> Benchmark:
        ours = partial(our_unet, compile=flags["ours"], **shape)
        theirs = partial(their_unet, compile=flags["theirs"], **shape)
        return Benchmark(name, ours, theirs, gflop=cost)

    if not compile:
        return (against(name, ours=False, theirs=False),)
    return (
        against(f"{name}, ours compiled, diffusers not", ours=True, theirs=False),
        against(f"{name}, both compiled", ours=True, theirs=True),
    )


# --- The autoencoder ---------------------------------------------------------------------------


def latents_to_decode(setting: Setting, size: int) -> Tensor:
    side = size // setting.config.vae.factor
    z = randn(1, setting.config.vae.latent_channels, side, side, seed=3)
    return z.to(setting.device, setting.dtype)


def our_decode(setting: Setting, size: int) -> Callable[[], object]:
    vae, z = our_model(setting, "vae"), latents_to_decode(setting, size)
    return without_gradients(lambda: vae.decode(z))


def their_decode(setting: Setting, size: int) -> Callable[[], object]:
    vae, z = their_model(setting, "vae"), latents_to_decode(setting, size)
    return without_gradients(lambda: vae.decode(z, return_dict=False)[0])


def decode(config: ModelConfig, *, size: int) -> tuple[Benchmark, ...]:
    side = size // config.vae.factor
    z = (1, config.vae.latent_channels, side, side)
    cost = gflop("vae", config, lambda vae: vae.decode(torch.empty(z)))
    ours, theirs = partial(our_decode, size=size), partial(their_decode, size=size)
    return (Benchmark(f"decode, {size}x{size} pixels", ours, theirs, gflop=cost),)


# --- The text encoder --------------------------------------------------------------------------


def token_ids(config: ModelConfig) -> Tensor:
    """An empty prompt and a full one, (2, max_length)."""
    text = config.text
    ids = torch.full((2, text.max_length), text.eos_token_id)
    ids[:, 0] = text.bos_token_id
    ids[1, 1:-1] = torch.randint(0, text.bos_token_id, (text.max_length - 2,), generator=rng(9))
    return ids


def our_text(setting: Setting) -> Callable[[], object]:
    text, ids = our_model(setting, "text"), token_ids(setting.config).to(setting.device)
    return without_gradients(lambda: text.encode(ids))


def their_text(setting: Setting) -> Callable[[], object]:
    text, ids = their_model(setting, "text"), token_ids(setting.config).to(setting.device)
    return without_gradients(lambda: text(input_ids=ids).last_hidden_state)


TEXT = (Benchmark("text, 2 prompts", our_text, their_text),)


# --- A step of training ------------------------------------------------------------------------


def training(
    setting: Setting, model: nn.Module, call: Callable[..., Tensor], batch: int
) -> Callable[[], object]:
    """Forward, backward and update, with the same optimizer and the same types for both."""
    from ldm.train.state import Optimisation, TrainState, fast_step

    state = TrainState(
        model.train(), Optimisation(steps=1000, batch_size=batch, learning_rate=1e-6)
    )
    latents = setting.config.image_size // setting.config.vae.factor
    x, t, context = unet_inputs(setting, batch, latents)
    noise = randn(*x.shape, seed=4).to(x)

    def step() -> Tensor:
        with fast_step(torch.device(setting.device)):
            eps = call(x, t, context)
        loss = (eps.float() - noise).square().mean()
        state.update(loss)
        return loss.detach()

    return step


def our_training(setting: Setting, batch: int) -> Callable[[], object]:
    from ldm.checkpoints.loading import load_unet

    unet = load_unet(setting.weights, device=setting.device, config=setting.config, trainable=True)
    return training(setting, unet, unet, batch)


def their_training(setting: Setting, batch: int) -> Callable[[], object]:
    unet = their_model(setting, "unet")

    def call(*inputs: Tensor) -> Tensor:
        return unet(*inputs, return_dict=False)[0]

    return training(setting, unet, call, batch)


def train_step(batch: int) -> tuple[Benchmark, ...]:
    ours, theirs = partial(our_training, batch=batch), partial(their_training, batch=batch)
    return (Benchmark(f"training step of Horizon's UNet, batch {batch}", ours, theirs),)
