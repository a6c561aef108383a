"""`ldm.verify`: it tells weights, and code, that are not what they should be.

A random model stands in for the official weights: numbers of it in full precision for those that
others published.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.download import known_files
from ldm.checkpoints.loading import load_stages
from ldm.checkpoints.tokenizer_files import read_tokenizer
from ldm.config import SD_V1
from ldm.errors import FamilyError
from ldm.evaluate.verify import compared, full_float32, picture_part, verify
from ldm.evaluate.verify_file import PROMPT, WORDS
from ldm.evaluate.verify_published import (
    Published,
    published,
    read_json,
    version_by_hash,
    versions,
)
from ldm.evaluate.verify_stages import MEASURES
from ldm.evaluate.verify_tables import Row, Verification
from tests.evaluate.mistakes import MISTAKES, PICTURE, Mistake
from tests.helpers import (
    random_checkpoint,
    text_in_fp64,
    tiny_config,
    tiny_tensors,
    with_ema,
    write_weights,
)
from tests.places import ROOT

OURS = "of the test"
RUN = {"words": [5, 300], "sampler": "ddim", "steps": 3, "guidance_scale": 2.0, "seed": 0}
ASKED: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "text-embeddings": ("text", "text_embeddings", {"ids": [[0, 1], [528, 529]]}),
    "text-mlp": ("text", "text_mlp", {}),
    "text-norm": ("text", "text_norm", {}),
    "text": ("text", "text_states", {"ids": [[0, 1], [4, 5], [528, 529]]}),
    "unet": ("unet", "unet_corner", dict(x=0.5, side=8, t=1, context=0.5, tokens=1)),
    "decoder": ("vae", "decoded_corner", {"z": 0.5, "side": 8}),
    "autoencoder": ("vae", "autoencoded_corner", {"x": 1.0, "side": 16}),
    PICTURE: (PICTURE, "picture", RUN),
}
SMALL = 0.03
"""The standard deviation of what norms read: only small activations show a norm's epsilon."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "model.safetensors"
    random_checkpoint(path, tiny_config(), seed=4, activation_std=SMALL)
    return path


@pytest.fixture(scope="module")
@torch.no_grad()
def numbers(path: Path) -> tuple[Published, ...]:
    """What the random model gives in fp64, each to 1e-5 of its standard deviation (a sum: of
    itself)."""
    stages = load_stages(path, ("text", "unet", "vae"), dtype=torch.float64)
    models = dict(zip(("text", "unet", "vae"), stages, strict=True))

    def number(name: str) -> Published:
        stage, measure, inputs = ASKED[name]
        empty = Published(name, stage, measure, (OURS,), OURS, name, "fp64", 0.0, (), inputs)
        if stage == PICTURE:
            made: Tensor | None = None
            for part, model in models.items():
                made = picture_part(part, model, made, empty, tiny_config())
            assert made is not None and made.min() > 0 and made.max() < 1
        else:
            made = MEASURES[measure](models[stage], **inputs)
        atol = 1e-5 * (made.std() if len(made) > 1 else made.abs()).max().item()
        return dataclasses.replace(empty, values=tuple(made.tolist()), atol=atol)

    return tuple(map(number, ASKED))


def differing(found: Verification) -> set[str]:
    return {row.name for row in found.rows if row.verdict != "agrees"}


@text_in_fp64
def test_right_weights_agree_in_every_row_and_are_proved(
    path: Path, numbers: tuple[Published, ...]
) -> None:
    found = verify(path, picture=True, numbers=numbers)
    assert {row.name for row in found.rows} == ASKED.keys() and not differing(found)
    assert found.proved and found.summary == f"{len(ASKED)} of {len(ASKED)} published rows agree"
    assert (found.version, found.told_by) == (OURS, "by the numbers that agree")


@text_in_fp64
def test_other_weights_differ_in_every_row(tmp_path: Path, numbers: tuple[Published, ...]) -> None:
    other = tmp_path / "other.safetensors"
    random_checkpoint(other, tiny_config(), seed=9, activation_std=SMALL)
    found = verify(other, picture=True, numbers=numbers)
    assert differing(found) == ASKED.keys()
    assert not found.proved and found.version is None
    assert "the UNet agrees with none of them" in found.summary


@text_in_fp64
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one.name)
def test_a_mistake_is_told_by_the_rows_of_its_stage(
    mistake: Mistake, path: Path, numbers: tuple[Published, ...]
) -> None:
    draws = PICTURE in mistake.rows  # by all stages, so that mistakes of others show there too
    asked = tuple(number for number in numbers if draws or number.stage != PICTURE)
    with pytest.MonkeyPatch.context() as patch:
        mistake.plant(patch)
        found = verify(path, picture=draws, numbers=asked, version=OURS)
    wrong = {row.name for row in found.rows if row.published and row.verdict != "agrees"}
    assert wrong == set(mistake.rows) and not found.proved


# --- What is said where there is nothing to compare -------------------------------------------


def rows_of(found: Verification, stage: str) -> list[Row]:
    return [row for row in found.rows if row.stage == stage]


@text_in_fp64
def test_a_stage_without_a_published_number_says_so_and_does_not_pass(
    path: Path, numbers: tuple[Published, ...]
) -> None:
    others = tuple(
        dataclasses.replace(one, of=("another",)) if one.stage in ("unet", PICTURE) else one
        for one in numbers
    )
    found = verify(path, picture=True, numbers=others, version=OURS)
    for stage in ("unet", PICTURE):
        (row,) = rows_of(found, stage)
        assert row.verdict == "no number was published" and not row.published
    assert "no number was published for unet and picture: that is not proved" in found.summary
    nothing = verify(path, numbers=(numbers[4],), version=OURS)
    assert [row.verdict for row in nothing.rows].count("agrees") == 1


@text_in_fp64
def test_numbers_of_another_version_do_not_count_against_a_known_one(
    path: Path, numbers: tuple[Published, ...]
) -> None:
    wrong = tuple(value + 1 for value in numbers[4].values)
    other = dataclasses.replace(numbers[4], name="unet-other", of=("other",), values=wrong)
    found = verify(path, numbers=(*numbers, other))
    assert found.version == OURS and found.proved
    assert [row.name for row in rows_of(found, "unet")] == ["unet"]
    (row,) = rows_of(verify(path, numbers=(*numbers, other), version="other"), "unet")
    assert (row.name, row.verdict) == ("unet-other", "DIFFERS")


def test_a_file_with_one_stage_says_what_is_not_there(tmp_path: Path) -> None:
    tensors = {k: v for k, v in tiny_tensors().items() if k.startswith("first_stage_model.")}
    file = write_weights(tmp_path / "vae.safetensors", tensors, config=tiny_config())
    asked = Published("decoder", "vae", "decoded_corner", (OURS,), OURS, "", "", 1e9, (0.0,) * 27)
    asked = dataclasses.replace(asked, inputs=dict(z=1.0, side=4))
    found = verify(file, picture=True, numbers=[asked])
    verdicts = {row.stage: row.verdict for row in found.rows}
    assert verdicts.pop("vae") == "agrees"
    assert set(verdicts.values()) == {"not in the file"} and len(verdicts) == 3


def test_nan_is_told_and_nothing_is_measured_with_it(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    key = "model.diffusion_model.out.2.bias"
    tensors[key] = torch.full_like(tensors[key], torch.nan)
    file = write_weights(tmp_path / "nan.safetensors", tensors, config=tiny_config())
    asked = Published("unet", "unet", "unet_corner", (OURS,), OURS, "", "", 1.0, (0.0,) * 36)
    drawn = Published(PICTURE, PICTURE, PICTURE, (OURS,), OURS, "", "", 1.0, (0.0,) * 9, RUN)
    found = verify(file, picture=True, numbers=[asked, drawn])
    for stage in ("unet", PICTURE):
        (row,) = rows_of(found, stage)
        assert row.verdict == "NOT MEASURED" and not found.proved
    (fact,) = (fact for fact in found.facts if fact.wrong)
    assert fact.name == "numbers of unet" and f"{key} holds NaN" in fact.told


def test_numbers_of_two_versions_of_one_picture_have_it_drawn_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Published(PICTURE, PICTURE, PICTURE, (OURS,), OURS, "", "", 1.0, (0.0,) * 9, RUN)
    again = dataclasses.replace(drawn, name="again", inputs=dict(RUN))
    other = dataclasses.replace(drawn, name="other", inputs=RUN | {"seed": 1})
    parts: list[str] = []

    def counted(stage: str, *arguments: Any) -> Tensor:
        parts.append(stage)
        return picture_part(stage, *arguments)

    monkeypatch.setattr("ldm.evaluate.verify.picture_part", counted)
    rows = rows_of(verify(path, picture=True, numbers=[drawn, other, again]), PICTURE)
    assert parts == ["text", "text", "unet", "unet", "vae", "vae"]
    measured = {row.name: row.measured for row in rows}
    assert measured[PICTURE] and measured[PICTURE] == measured["again"] != measured["other"]


def test_nan_and_a_missing_number_are_no_agreement() -> None:
    number = Published("x", "unet", "unet_row", (OURS,), OURS, "", "", 1e9, (0.0, 0.0))
    assert compared(number, (0.0, float("nan"))).verdict == "DIFFERS"
    assert compared(number, (0.0,)).verdict == "DIFFERS"
    assert compared(number, (0.0, 1.0)).verdict == "agrees"


def test_ema_is_held_against_the_plain_weights(tmp_path: Path) -> None:
    file = write_weights(
        tmp_path / "ema.safetensors", with_ema(tiny_tensors(), 0.5), config=tiny_config()
    )
    found = {fact.name: fact.told for fact in verify(file, numbers=()).facts}
    assert found["EMA"] == "the means are measured; the two are 50.00% of the weights' RMS apart"
    plain = {fact.name: fact.told for fact in verify(file, numbers=(), ema=False).facts}
    assert plain["EMA"].startswith("the plain weights are measured")


def test_a_model_of_another_size_has_no_published_numbers(path: Path) -> None:
    with pytest.raises(FamilyError, match="is tiny: numbers were published for Stable Diffusion"):
        verify(path)


def test_an_unknown_version_lists_those_there_are(path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown version 'v1-9': there are v1-1, .*v1-5"):
        verify(path, version="v1-9")


# --- The report, and what it stands on --------------------------------------------------------


def test_the_report_is_for_people_and_for_programs(
    path: Path, numbers: tuple[Published, ...]
) -> None:
    found = verify(path, numbers=numbers[4:5])
    told = found.as_markdown()
    assert "model.safetensors" in told and str(path.parent) not in told
    assert "| unet | agrees |" in told and "fp64" in told and "torch" in told
    again = json.loads(json.dumps(found.as_dict()))
    assert again["rows"][1]["measured"] == pytest.approx(list(numbers[4].values), abs=1e-3)
    assert again["proved"] is True


def test_published_numbers_are_whole_and_of_known_versions() -> None:
    for number in published():
        assert set(number.of) <= set(versions()) and number.measured_on in number.of
        assert number.measure in MEASURES or number.stage == PICTURE
        count = {"unet_corner": 36, "unet_row": 6, PICTURE: 9}.get(number.measure)
        count = count or (27 if number.stage == "vae" else 1)
        assert len(number.values) == count
        assert 0 < number.atol < 1e-2 and number.source and number.told
    assert len({number.name for number in published()}) == len(published())


def test_the_known_files_are_of_the_version_in_their_name() -> None:
    for file in known_files():
        assert version_by_hash(file.sha256) == file.model[3:7]
    assert version_by_hash("0" * 64) is None
    assert set(map(version_by_hash, read_json()["sha256"])) == {"v1-1", "v1-2", "v1-3"}


def test_the_prompts_ids_are_clips(clip_folder: Path) -> None:
    assert read_tokenizer(clip_folder).encode(PROMPT) == list(WORDS)
    for number in published():
        if number.stage == PICTURE:
            assert PROMPT in number.told and number.inputs["words"] == list(WORDS)


def test_published_inputs_fit_stable_diffusion() -> None:
    for number in published():
        ids = torch.tensor(number.inputs.get("ids", [[0]]))
        assert ids.max() < SD_V1.text.vocab_size


def test_float32_is_float32_while_it_is_measured_and_what_it_was_afterwards() -> None:
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    with pytest.raises(RuntimeError), full_float32():
        assert not any(kind.allow_tf32 for kind in kinds)
        raise RuntimeError
    assert [kind.allow_tf32 for kind in kinds] == before


def test_the_table_of_mistakes_has_a_line_for_each_and_its_row() -> None:
    text = (ROOT / "docs" / "measured" / "mistakes.md").read_text(encoding="utf-8")
    lines = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[2:]]
    assert list(dict.fromkeys(lines)) == [mistake.name for mistake in MISTAKES]
