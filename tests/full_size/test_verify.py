"""Random weights of Stable Diffusion v1's size: no published number agrees with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.evaluate.verify import verify
from ldm.evaluate.verify_published import published

pytestmark = pytest.mark.full_size


def test_random_weights_differ_from_every_published_number(checkpoint: Path) -> None:
    found = verify(checkpoint, picture=True)
    print(found.as_markdown())
    assert {row.name for row in found.rows} == {number.name for number in published()}
    assert {row.verdict for row in found.rows} == {"DIFFERS"}
    assert found.version is None and not found.proved
    assert not any(fact.wrong for fact in found.facts)


@pytest.mark.parametrize("version", ["v1-2", "v1-3"])
def test_a_version_without_numbers_of_its_unet_is_said_to_have_none(
    checkpoint: Path, version: str
) -> None:
    verdicts = {row.stage: row.verdict for row in verify(checkpoint, version=version).rows}
    assert verdicts["unet"] == verdicts["picture"] == "no number was published"
    assert verdicts["text"] == verdicts["vae"] == "DIFFERS"
