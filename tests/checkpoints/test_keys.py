"""The key map: our names and the official ones."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints.keys import PREFIXES, computed_entries, key_map, schedule_entries
from ldm.checkpoints.stages import build_stage
from ldm.config import HORIZON, SD_V1, ModelConfig, ScheduleConfig
from tests.helpers import STAGES, tiny_config
from tests.places import SHARED

OFFICIAL_KEYS = SHARED / "sd_v1" / "keys.json"
# sha256 of the official checkpoint's 1130 parameters, as sorted lines "key [shape]".
OFFICIAL_DIGEST = "bcf4603c65ebe128ddff3a53973ab8eac10a5560f7a17846af3c3026837b5295"


def official_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Official key -> shape of every parameter, by our map."""
    shapes: dict[str, list[int]] = {}
    for stage in STAGES:
        with torch.device("meta"):
            model = build_stage(stage, config)
        names = key_map(model)
        assert names.keys() == model.state_dict().keys() == dict(model.named_parameters()).keys()
        assert len(set(names.values())) == len(names)  # a bijection
        assert not shapes.keys() & set(names.values())
        shapes |= {names[key]: list(value.shape) for key, value in model.state_dict().items()}
    return shapes


def digest(shapes: dict[str, list[int]]) -> str:
    lines = sorted(f"{key} {list(shape)}\n" for key, shape in shapes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_sd_v1_maps_onto_the_official_keys_and_shapes() -> None:
    shapes = official_shapes(SD_V1)
    counts = {stage: sum(k.startswith(p) for k in shapes) for stage, p in PREFIXES.items()}
    assert counts == {"unet": 686, "vae": 248, "text": 196}
    assert digest(shapes) == OFFICIAL_DIGEST


@pytest.mark.skipif(
    not OFFICIAL_KEYS.is_file(), reason=f"the list of official keys is not here: {OFFICIAL_KEYS}"
)
def test_map_and_computed_entries_are_the_official_list() -> None:
    official = json.loads(OFFICIAL_KEYS.read_text())
    computed = {key: official[key] for key in computed_entries()}
    parameters = {k: shape for k, shape in official.items() if k not in computed}
    assert len(official) == 1143 and len(parameters) == 1130
    assert official_shapes(SD_V1) == parameters
    assert digest(parameters) == OFFICIAL_DIGEST
    tables = {key: list(table.shape) for key, table in schedule_entries(ScheduleConfig()).items()}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert computed == tables | {positions: [1, 77]}


@pytest.mark.parametrize("config", [HORIZON, tiny_config()], ids=lambda c: c.name)
def test_every_key_of_another_config_maps_into_the_official_layout(config: ModelConfig) -> None:
    shapes = official_shapes(config)
    assert all(key.startswith(tuple(PREFIXES.values())) for key in shapes)
    assert all(key.endswith((".weight", ".bias")) for key in shapes)


@pytest.mark.parametrize(
    "stage, ours, official",
    [
        ("unet", "time_embedding.linear2.bias", "time_embed.2.bias"),
        ("unet", "conv_in.weight", "input_blocks.0.0.weight"),
        ("unet", "down.1.blocks.0.res.skip.weight", "input_blocks.4.0.skip_connection.weight"),
        ("unet", "down.0.downsample.conv.weight", "input_blocks.3.0.op.weight"),
        (
            "unet",
            "down.1.blocks.0.transformer.cross_attention.to_k.weight",
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        ("unet", "mid.res2.time_proj.bias", "middle_block.2.emb_layers.1.bias"),
        ("unet", "up.3.upsample.conv.weight", "output_blocks.2.1.conv.weight"),
        ("unet", "up.1.upsample.conv.weight", "output_blocks.8.2.conv.weight"),
        ("unet", "up.0.blocks.2.res.norm1.weight", "output_blocks.11.0.in_layers.0.weight"),
        ("unet", "conv_out.bias", "out.2.bias"),
        ("vae", "encoder.down.0.downsample.conv.bias", "encoder.down.0.downsample.conv.bias"),
        ("vae", "decoder.up.3.blocks.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("vae", "decoder.mid.attention.to_out.weight", "decoder.mid.attn_1.proj_out.weight"),
        ("text", "transformer.final_layer_norm.bias", "final_layer_norm.bias"),
    ],
)
def test_keys_of_sd_v1_written_out(stage: str, ours: str, official: str) -> None:
    with torch.device("meta"):
        model = build_stage(stage, SD_V1)
    assert key_map(model)[ours] == PREFIXES[stage] + official


def test_no_map_for_another_module() -> None:
    with pytest.raises(TypeError, match="Linear"):
        key_map(nn.Linear(1, 1))


def test_computed_entries_follow_from_the_betas() -> None:
    entries = schedule_entries(ScheduleConfig())
    assert len(entries) == 12 and len(computed_entries()) == 13
    assert all(v.shape == (1000,) and v.dtype == torch.float32 for v in entries.values())
    b = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - b, dim=0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])

    def close(name: str, expected: Tensor) -> None:
        # Computed in float64 and cast once: half a unit in the last place of float32, 2^-24, and
        # float64's own roundings.
        found = entries.pop(name).double()
        torch.testing.assert_close(found, expected, rtol=2**-24 + 1e-10, atol=0, msg=name)

    close("betas", b)
    close("alphas_cumprod", a)
    close("alphas_cumprod_prev", previous)
    close("sqrt_alphas_cumprod", a.sqrt())
    close("sqrt_one_minus_alphas_cumprod", (1 - a).sqrt())
    close("log_one_minus_alphas_cumprod", (1 - a).log())
    close("sqrt_recip_alphas_cumprod", a.rsqrt())
    close("sqrt_recipm1_alphas_cumprod", (1 / a - 1).sqrt())
    variance = b * (1 - previous) / (1 - a)
    close("posterior_variance", variance)
    close("posterior_log_variance_clipped", variance.clamp(min=1e-20).log())
    close("posterior_mean_coef1", b * previous.sqrt() / (1 - a))
    close("posterior_mean_coef2", (1 - b).sqrt() * (1 - previous) / (1 - a))
    assert not entries  # these are all
