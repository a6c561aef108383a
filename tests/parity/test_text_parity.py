"""The text encoder against transformers' CLIPTextModel, filled by diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.checkpoints.loading import load_text_encoder
from ldm.config import ModelConfig
from ldm.text import CLIPTextEncoder
from tests import oracle_configs
from tests.helpers import relative_error, rng, small_config, text_in_fp64
from tests.parity import assert_parity, only_small

pytest.importorskip("diffusers")
pytestmark = text_in_fp64


@pytest.fixture(scope="session")
def ours(checkpoint: Path) -> CLIPTextEncoder:
    return load_text_encoder(checkpoint)


@pytest.fixture(scope="session")
def oracle(
    checkpoint: Path, config: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> nn.Module:
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("clip_config")
    CLIPTextConfig(**oracle_configs.text(config.text)).save_pretrained(folder)
    return create_diffusers_clip_model_from_ldm(
        CLIPTextModel, load_file(checkpoint), config=str(folder), local_files_only=True
    )


def prompts() -> Tensor:
    """One prompt that fills all 77 places, and one of six words that is padded."""
    config = small_config().text
    ids = torch.randint(0, config.bos_token_id, (2, config.max_length), generator=rng(9))
    ids[:, 0] = config.bos_token_id
    ids[0, -1] = config.eos_token_id
    ids[1, 7:] = config.eos_token_id
    return ids


def context_of(model: nn.Module, device: str, dtype: torch.dtype) -> Tensor:
    model = copy.deepcopy(model).to(device, dtype)
    ids = prompts().to(device)
    with torch.no_grad():
        if isinstance(model, CLIPTextEncoder):
            return model.encode(ids)
        return model(input_ids=ids).last_hidden_state


def test_context_agrees_with_transformers(
    ours: CLIPTextEncoder, oracle: nn.Module, device: str
) -> None:
    reference = context_of(oracle, "cpu", torch.float64)
    theirs = context_of(oracle, device, torch.float32)
    mine = context_of(ours, device, torch.float32)
    assert mine.shape == (2, 77, small_config().text.hidden_size)
    assert_parity(mine, theirs, reference, "context")


@only_small
def test_left_out_layers_agree_with_diffusers_clip_skip(
    ours: CLIPTextEncoder, oracle: nn.Module
) -> None:
    """`StableDiffusionPipeline.encode_prompt` of these ids, with clip_skip=1."""
    from diffusers import StableDiffusionPipeline

    class Ids:
        """A tokenizer that has these ids for any prompt."""

        model_max_length = small_config().text.max_length

        def __call__(self, *_: object, **__: object) -> Any:
            return SimpleNamespace(input_ids=prompts(), attention_mask=None)

        def batch_decode(self, ids: Tensor) -> list[str]:
            return [""] * len(ids)

    if not hasattr(oracle, "text_model"):  # transformers 5; diffusers' clip_skip asks for it
        object.__setattr__(oracle, "text_model", oracle)  # not as a module: it would hold itself
    pipe = SimpleNamespace(tokenizer=Ids(), text_encoder=oracle, unet=None)
    theirs, _ = StableDiffusionPipeline.encode_prompt(
        pipe, ["a", "b"], "cpu", 1, False, clip_skip=1
    )
    with torch.no_grad():
        mine = ours.encode(prompts(), clip_skip=1)
        assert relative_error(mine, theirs) <= 1e-5
        assert relative_error(ours.encode(prompts()), theirs) > 1e-2


@only_small
@pytest.mark.parametrize("norms", ["layer_norm1", "layer_norm2", "final_layer_norm"])
def test_parity_would_show_a_wrong_epsilon(
    ours: CLIPTextEncoder,
    oracle: nn.Module,
    norms: str,
) -> None:
    wrong = copy.deepcopy(ours)
    changed = [m for name, m in wrong.named_modules() if name.endswith(norms)]
    assert changed
    for norm in changed:
        norm.eps *= 10
    reference = context_of(oracle, "cpu", torch.float64)
    assert relative_error(context_of(wrong, "cpu", torch.float32), reference) > 1e-3
