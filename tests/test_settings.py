"""Settings: one value per run, filled in from the model, checked once, written and read again."""

from __future__ import annotations

import dataclasses
import inspect
import json
import tracemalloc

import numpy as np
import pytest

from ldm.config import SD_V1, DefaultsConfig
from ldm.samplers import SAMPLERS
from ldm.schedule import NoiseSchedule
from ldm.settings import MAX_BYTES, Settings, bytes_held
from tests.helpers import tiny_config

CONFIG = tiny_config()
SCHEDULE = NoiseSchedule(CONFIG.schedule)


def test_none_is_the_models_own_default() -> None:
    quick = dataclasses.replace(CONFIG, defaults=DefaultsConfig("ddpm", 7, 2.0))
    settings = Settings.of(quick, "a red house")
    assert (settings.sampler, settings.steps, settings.guidance_scale) == ("ddpm", 7, 2.0)
    assert (settings.height, settings.width) == (quick.image_size, quick.image_size)
    asked = Settings.of(quick, "a red house", sampler="ddim", steps=3, guidance_scale=1, height=8)
    assert (asked.sampler, asked.steps, asked.guidance_scale, asked.height) == ("ddim", 3, 1.0, 8)


def test_stable_diffusion_v1_keeps_the_papers_defaults() -> None:
    settings = Settings.of(SD_V1, "a red house")
    assert (settings.sampler, settings.steps, settings.guidance_scale) == ("ddim", 50, 7.5)
    assert (settings.height, settings.width, settings.eta, settings.seed) == (512, 512, 0.0, 0)


def test_every_setting_is_a_keyword() -> None:
    keywords = inspect.signature(Settings.of).parameters.keys() - {"config"}
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert fields - {"prompts"} == keywords - {"prompt", "num_images"}


def test_prompts_are_one_per_picture_and_each_can_be_drawn_alone() -> None:
    settings = Settings.of(CONFIG, ["a house", "the sea"], num_images=2, seed=5)
    assert settings.prompts == ("a house", "a house", "the sea", "the sea")
    assert settings.num_images == 4
    assert settings.alone(2) == Settings.of(CONFIG, "the sea", seed=7)
    assert settings.alone(2).prompt == "the sea"


def test_a_list_of_prompts_may_have_as_many_negative_prompts() -> None:
    settings = Settings.of(CONFIG, ["a", "b"], negative_prompt=["c", "d"], num_images=2, seed=5)
    assert settings.negative_prompt == ("c", "c", "d", "d")
    assert settings.alone(2) == Settings.of(CONFIG, "b", negative_prompt="d", seed=7)
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings
    same = Settings.of(CONFIG, ["a", "b"], negative_prompt=["c", "c"])
    assert same == Settings.of(CONFIG, ["a", "b"], negative_prompt="c")
    for prompt, negative in (("a", ["c"]), (["a", "b"], ["c"]), (["a"], [5]), (["a"], None)):
        with pytest.raises(ValueError, match="negative_prompt must be a string"):
            Settings.of(CONFIG, prompt, negative_prompt=negative)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_images": 10**6},
        {"num_images": 10**12},  # whose list of prompts alone would be 8 TB
        {"num_images": 10**300},
        {"height": 10**7, "width": 10**7},
        {"height": 8, "width": 10**10},
        {"height": 10**300},
        {"num_images": 1000, "height": 4096, "width": 4096},
    ],
)
def test_what_no_machine_can_hold_is_refused_before_any_of_it_is_asked_for(
    asked: dict[str, int],
) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"that takes [\d,]+ bytes at once") as error:
            Settings.of(SD_V1, "a", **asked)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert all(f"{name}=" in str(error.value) for name in asked)


def test_what_a_large_machine_can_hold_is_allowed() -> None:
    Settings.of(SD_V1, "a", height=4096, width=4096)
    Settings.of(SD_V1, "a", num_images=10_000)
    small = Settings.of(SD_V1, "a")
    assert bytes_held(SD_V1, 1, 512, 512) < bytes_held(SD_V1, 2, 512, 512) < MAX_BYTES
    with pytest.raises(ValueError, match="bytes at once"):  # a recipe's, not of `Settings.of`
        dataclasses.replace(small, height=10**7, width=10**7).check(SD_V1)


def test_numbers_of_numpys_become_pythons() -> None:
    settings = Settings.of(
        CONFIG, "a", steps=np.int64(3), guidance_scale=np.float32(2), seed=np.uint8(4)
    )
    assert [type(v) for v in (settings.steps, settings.guidance_scale, settings.seed)] == [
        int,
        float,
        int,
    ]


@pytest.mark.parametrize("like", [None, "diffusers"])
def test_settings_survive_json(like: str | None) -> None:
    settings = Settings.of(
        CONFIG, ["a naïve house, 家", "b"], seed=2**62, guidance_scale=0.1 + 0.7 + 1, like=like
    )
    again = Settings.from_dict(json.loads(json.dumps(settings.as_dict())))
    assert again == settings
    again.check(CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "3"},
        {"seed": True},
        {"seed": 1.5},
        {"steps": None},
        {"guidance_scale": [1]},
        {"prompts": "a house"},
        {"prompts": [3]},
        {"like": 3},
        {"height": 10**400},
        {"guidance_scale": 10**400},
        {"more": 1},
    ],
)
def test_what_is_not_settings_is_not_read(change: dict[str, object]) -> None:
    fields = Settings.of(CONFIG, "a house").as_dict()
    with pytest.raises(ValueError) as error:
        Settings.from_dict(fields | change)
    assert "\n" not in str(error.value)
    for wrong in (None, [], {}, {**fields, "steps": 3} | {"prompt": "a"}):
        with pytest.raises(ValueError, match="settings have the fields"):
            Settings.from_dict(wrong)


def test_a_field_with_a_default_may_be_missing_and_no_other() -> None:
    """So what was written before there was such a setting can still be read."""
    fields = Settings.of(CONFIG, "a house").as_dict()
    without = {name: value for name, value in fields.items() if name != "like"}
    assert Settings.from_dict(without) == Settings.of(CONFIG, "a house")
    del without["eta"]
    with pytest.raises(ValueError, match="settings have the fields"):
        Settings.from_dict(without)


def test_the_grid_is_the_presets_timesteps_with_the_samplers_end() -> None:
    def walked(**asked: object) -> list[tuple[float, float]]:
        grid = Settings.of(CONFIG, "a", **asked).grid(SCHEDULE)
        return [(here.t, there.t) for here, there in grid]

    assert walked(steps=3) == [(667, 334), (334, 1), (1, 0)]
    assert walked(steps=2, sampler="ddpm") == [(501, 1), (1, -1)]
    assert walked(steps=2, sampler="euler") == [(999, 499), (499, -1)]
    assert walked(steps=2, sampler="euler", spacing="leading") == [(501, 1), (1, -1)]
    compvis = dataclasses.replace(Settings.of(CONFIG, "a", steps=7), like="compvis")
    assert len(compvis.grid(SCHEDULE)) == 8


def test_fresh_noise_is_ddpms_and_that_of_an_eta() -> None:
    noisy = [Settings.of(CONFIG, "a", sampler="ddpm"), Settings.of(CONFIG, "a", eta=0.1)]
    noisy.append(Settings.of(CONFIG, "a", sampler="dpmpp_2m_sde"))
    assert all(one.adds_noise for one in noisy)
    assert not Settings.of(CONFIG, "a", sampler="heun").adds_noise


def test_a_sampler_made_for_other_models_brings_its_own_defaults() -> None:
    settings = Settings.of(SD_V1, "a", sampler="lcm")
    assert (settings.steps, settings.guidance_scale) == (4, 1.0)
    asked = Settings.of(SD_V1, "a", sampler="lcm", steps=2, guidance_scale=1.5)
    assert (asked.steps, asked.guidance_scale) == (2, 1.5)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"sampler": "euler", "eta": 0.5}, "eta is a setting of ddim: euler has none"),
        ({"spacing": "karas"}, "unknown spacing 'karas': there are leading, linspace.*karras"),
        ({"spacing": 3}, "unknown spacing 3"),
        ({"sampler": "lcm", "steps": 51}, "lcm was distilled at 50 timesteps: steps must be 1 to"),
        ({"sampler": ["euler"]}, "unknown sampler"),
        (
            {"like": "diffusers", "sampler": "euler_ancestral", "spacing": "karras"},
            "like='diffusers' has no spacing 'karras' for euler_ancestral",
        ),
        ({"like": "diffusers", "spacing": "trailing"}, "leading and karras, not trailing"),
        ({"like": "diffusers", "sampler": "plms", "steps": 1}, "that is ddim"),
        ({"like": "compvis", "spacing": "leading"}, "one spacing of its own, not 'leading'"),
        ({"like": "compvis", "sampler": "euler"}, "has no sampler 'euler': there is ddim, plms"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    asked: dict[str, object], match: str
) -> None:
    with pytest.raises(ValueError, match=match) as error:
        Settings.of(CONFIG, "a", **asked)
    assert "\n" not in str(error.value)


def test_settings_of_a_file_are_checked_like_all_others() -> None:
    fields = Settings.of(CONFIG, "a house").as_dict()
    for change, match in (
        ({"steps": 1001}, "steps must be between 1 and 1000"),
        ({"height": 15}, "height must be a positive multiple of 2"),
        ({"prompts": []}, "the prompt is empty"),
        ({"sampler": "euleR"}, f"unknown sampler 'euleR': there are {', '.join(SAMPLERS)}"),
    ):
        with pytest.raises(ValueError, match=match):
            Settings.from_dict(fields | change).check(CONFIG)
