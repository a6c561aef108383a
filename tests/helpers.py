"""Random models for the tests.

Fresh modules start some of their layers at zero, so that they do nothing: a test on such a model
could not see what stands behind those layers. Here every parameter is drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoints.config_json import config_to_json
from ldm.checkpoints.keys import key_map
from ldm.checkpoints.saving import save_checkpoint
from ldm.checkpoints.stages import build_stage
from ldm.checkpoints.tokenizer_files import write_tokenizer
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.pipeline import TextToImage
from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer

STAGES = ("unet", "vae", "text")
CONTAINERS = ("safetensors", "torch zip pickle", "torch legacy pickle")

TRANSFORMERS_5 = int(version("transformers").split(".")[0]) >= 5
text_in_fp64 = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="transformers 4 fills its causal mask in fp32: it cannot run in fp64"
)

# Layers that write into the residual stream (or into what a norm reads next): scaling their
# weights and biases scales the activations.
WRITES = re.compile(
    r"(^|\.)(conv_in|conv1|conv2|time_proj|to_out|proj_out|token_embedding|position_embedding"
    r"|out_proj|fc2)$|(^|(?<!feed_forward)\.)proj_in$"
)
# Layers that pass the stream on: their weights keep its scale, their biases must follow it.
PASSES = re.compile(r"(^|\.)(skip|downsample\.conv|upsample\.conv)$")


@functools.cache
def a_million_dicts() -> float:
    """The CPU time that Python takes here to make a million dicts, one by one.

    "Soon" is so many times this: in seconds it would be another on every machine.
    """

    def once() -> float:
        started = time.process_time()  # what runs beside this takes none of it
        stack: list[dict[str, int]] = []
        for _ in range(1_000_000):
            stack.append({})
        return time.process_time() - started

    return min(once() for _ in range(3))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=dtype)


def randomise(
    model: nn.Module, generator: torch.Generator, activation_std: float = 1.0
) -> nn.Module:
    """Draw every parameter of a model, in place, and return it.

    Weights are N(0, 1 / fan_in), so that activations keep their size; embeddings N(0, 1); norm
    weights near 1; biases small. `activation_std` scales the layers that write into the residual
    stream, so that what the norms read has about that standard deviation.
    """
    drawn: set[int] = set()

    def fill(parameter: Tensor, mean: float, std: float) -> None:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(mean + std * noise)
        drawn.add(id(parameter))

    with torch.no_grad():
        for name, module in model.named_modules():
            weight_scale = activation_std if WRITES.search(name) else 1.0
            bias_scale = activation_std if PASSES.search(name) else weight_scale
            if isinstance(module, nn.Linear | nn.Conv2d):
                fill(module.weight, 0.0, weight_scale * module.weight[0].numel() ** -0.5)
            elif isinstance(module, nn.Embedding):
                fill(module.weight, 0.0, weight_scale)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
                fill(module.weight, 1.0, 0.1)
            if getattr(module, "bias", None) is not None:
                fill(module.bias, 0.0, 0.1 * bias_scale)
    left = [name for name, p in model.named_parameters() if id(p) not in drawn]
    assert not left, f"never drawn: {left}"
    return model


def small_config() -> ModelConfig:
    """Stable Diffusion v1: its levels, blocks, heads and groups, but a tenth as wide."""
    return ModelConfig(
        name="small",
        image_size=64,
        unet=UNetConfig(model_channels=32, context_dim=64),
        vae=VAEConfig(model_channels=32),
        text=TextConfig(
            vocab_size=520,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            mlp_size=256,
            max_length=77,
            bos_token_id=518,
            eos_token_id=519,
        ),
    )


def small_v2_config() -> ModelConfig:
    """The same for Stable Diffusion 2: heads of one width, linear projections, and OpenCLIP."""
    config = small_config()
    unet = dataclasses.replace(config.unet, num_heads=8, head_width=8, linear_projections=True)
    text = dataclasses.replace(config.text, open_clip=True)
    return dataclasses.replace(config, name="small-v2", unet=unet, text=text, prediction="v")


def tiny_config() -> ModelConfig:
    """As little as still has two levels, attention at one of them, and every kind of layer."""
    return ModelConfig(
        name="tiny",
        image_size=16,
        unet=UNetConfig(
            model_channels=16,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(1,),
            num_heads=2,
            context_dim=24,
            norm_groups=4,
        ),
        vae=VAEConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4),
        text=TextConfig(
            vocab_size=530,
            hidden_size=24,
            num_layers=2,
            num_heads=2,
            mlp_size=48,
            max_length=12,
            bos_token_id=528,
            eos_token_id=529,
        ),
    )


def random_stage(
    stage: str,
    config: ModelConfig,
    seed: int = 0,
    activation_std: float = 1.0,
    tokenizer: Tokenizer | None = None,
) -> nn.Module:
    """One stage ("unet", "vae", "text"), every parameter drawn from the seed."""
    model = build_stage(stage, config, tokenizer)
    return randomise(model, rng(seed + STAGES.index(stage)), activation_std).eval()


def random_checkpoint(
    path: Path, config: ModelConfig, seed: int = 0, activation_std: float = 1.0
) -> dict[str, nn.Module]:
    """Save a random whole model to a file in the official layout; returns its stages."""
    models = {stage: random_stage(stage, config, seed, activation_std) for stage in STAGES}
    save_checkpoint(path, config=config, **models)
    return models


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """The largest error, in standard deviations of the reference."""
    reference = reference.detach().double().cpu()
    return float((ours.detach().double().cpu() - reference).abs().max() / reference.std())


def assert_stage_agrees_across_dtypes(
    run, inputs: tuple[Tensor, ...], model: nn.Module, device: str, fp32: float, half: float
) -> dict[str, float]:
    """A stage on a device, in fp32 and the half precisions, against itself in fp64 on the CPU.

    `run(model, *inputs)` gives the output; floating inputs are cast with the model. `fp32` and
    `half` bound the largest error, in standard deviations of the output.
    """

    def at(device: str, dtype: torch.dtype) -> Tensor:
        cast = [x.to(device, dtype if x.is_floating_point() else None) for x in inputs]
        with torch.no_grad():
            return run(model.to(device, dtype), *cast)

    reference = at("cpu", torch.float64)
    dtypes = {torch.float32: fp32, torch.bfloat16: half}
    if device == "cuda":
        dtypes[torch.float16] = half
    errors = {}
    for dtype, bound in dtypes.items():
        output = at(device, dtype)
        assert output.dtype == dtype and output.device.type == device
        errors[str(dtype)] = error = relative_error(output, reference)
        assert error < bound, f"{dtype} on {device}: {error:.3g} of the std"
    # A bound that fp32 errors of half precision would pass says nothing: the two must differ.
    assert errors["torch.bfloat16"] > errors["torch.float32"]
    return errors


def tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random whole model in a folder: `model.safetensors` and the tokenizer beside it."""
    config = tiny_config()
    write_tokenizer(tiny_tokenizer(), folder)
    random_checkpoint(folder / "model.safetensors", config, seed)
    return folder


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """A vocabulary of the size that the tiny config asks for."""
    texts = ["a red house on green grass at night", "the blue sea and the sky by day"]
    tokenizer = Tokenizer.train(texts * 5, tiny_config().text.vocab_size)
    assert len(tokenizer) == tiny_config().text.vocab_size
    return tokenizer


# --- Files of weights, and what becomes of them in the wild ------------------------------------

Tensors = dict[str, Tensor]


@functools.cache
def _tiny_tensors(seed: int) -> Tensors:
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(Path(folder) / "model.safetensors", tiny_config(), seed)
        return load_file(Path(folder) / "model.safetensors")


def tiny_tensors(seed: int = 0) -> Tensors:
    """A random tiny model in the official layout: key -> tensor, buffers included. Not to be
    changed in place; the dict may be."""
    return dict(_tiny_tensors(seed))


def with_ema(tensors: Tensors, factor: float = 0.5) -> Tensors:
    """The same with a running mean of the UNet's weights, as LDM's training writes it; here it is
    `factor` times the weights, so that one can tell which was loaded."""
    means = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): (value * factor).to(value.dtype)
        for key, value in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return tensors | means | counts


def write_weights(
    path: Path,
    content: Mapping[str, Any],
    container: str = "safetensors",
    config: ModelConfig | None = None,
) -> Path:
    """A file in a container; only safetensors can carry a config, only pickles other things than
    tensors."""
    if container == "safetensors":
        metadata = None if config is None else {"ldm": config_to_json(config)}
        save_file({k: v.contiguous() for k, v in content.items()}, path, metadata=metadata)
    else:
        zipped = container == "torch zip pickle"
        torch.save(dict(content), path, _use_new_zipfile_serialization=zipped)
    return path


@contextlib.contextmanager
def lightning() -> Iterator[type]:
    """PyTorch Lightning's ModelCheckpoint, which official pickles name, as a stand-in that can be
    pickled, and that no one can import afterwards."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})  # type: ignore
    parents = [name.rsplit(".", n)[0] for n in (2, 1)]
    added = {parent: types.ModuleType(parent) for parent in parents} | {name: module}
    with pytest.MonkeyPatch.context() as patch:
        for parent, stand_in in added.items():
            patch.setitem(sys.modules, parent, stand_in)
        yield module.ModelCheckpoint


def write_training_run(path: Path, tensors: Tensors, container: str, wrapped: int = 1) -> Path:
    """A pickle as LDM's training leaves it: the weights in `state_dict` (`wrapped` times), and
    beside them an optimizer's states and a callback of PyTorch Lightning's."""
    states = {
        n: {"exp_avg": value, "step": n} for n, value in enumerate(list(tensors.values())[:9])
    }
    content: dict[str, Any] = dict(tensors)
    for _ in range(wrapped):
        content = {"state_dict": content}
    with lightning() as callback:
        content |= {
            "epoch": 3,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "callbacks": {callback: {"monitor": "val/loss", "best": torch.ones(1)}},
            "optimizer_states": [{"state": states, "param_groups": [{"lr": 1e-4}]}],
            "lr_schedulers": [{"last_epoch": 5}],
        }
        return write_weights(path, content, container)


def assert_filled(model: nn.Module, tensors: Mapping[str, Tensor], dtype=torch.float32) -> None:
    """Every weight of a stage is, bit for bit, the one that the official key has, in the dtype."""
    state = model.state_dict()
    for ours, official in key_map(model).items():
        expected = tensors[official].to(dtype).reshape(state[ours].shape)
        assert state[ours].dtype == dtype, ours
        assert torch.equal(state[ours].cpu(), expected), ours
    everything = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in everything)


def pipe_that_reads(*, channel_mult: tuple[int, ...], max_length: int) -> TextToImage:
    """A random model with a tokenizer, and attention at every level."""
    config = tiny_config()
    levels = tuple(range(len(channel_mult)))
    unet = dataclasses.replace(config.unet, channel_mult=channel_mult, attention_levels=levels)
    tokenizer = Tokenizer.train(["a red house and the blue sea", "a red house"] * 5, 600)
    text = dataclasses.replace(
        config.text,
        max_length=max_length,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = dataclasses.replace(config, unet=unet, text=text)
    stages = {name: random_stage(name, config, tokenizer=tokenizer) for name in ("unet", "text")}
    vae = random_stage("vae", config)
    return TextToImage(stages["unet"], vae, stages["text"], NoiseSchedule(config.schedule), config)
