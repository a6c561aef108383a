"""The page's tokenizer and sampler are ours: the same ids, the same grid, the same step."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import torch

from ldm.config import PREDICTIONS, ScheduleConfig
from ldm.samplers import SAMPLERS
from ldm.schedule import NoiseSchedule, pair_from
from ldm.tokenizer import Tokenizer
from tests.helpers import randn
from tests.places import ROOT

NODE = shutil.which("node")
FOLDER = ROOT / "ldm" / "viz" / "player" / "model"
TEXTS = (
    "a red house on green grass at night",
    "  A RED\tHouse,\n\n the house's   sea!! it'll 12 times",
    "Ünïcode é é ΑΣ ὈΔΥΣΣΕΎΣ 😀 日本語 <|endoftext|> <|EndOfText|> x<|startoftext|>y",
    "</script><img src=x onerror=alert(1)> & {{data}} `${1}`",
    "'s 'S don't 3.14 \u00a0 \u2003 ½ ²",
    "",
)


def by_node(name: str, script: str, *names: str) -> Any:
    """What a script, which has these names of one of the page's files, prints as JSON."""
    if NODE is None:
        pytest.skip("there is no node on this machine")
    where = json.dumps((FOLDER / f"{name}.js").as_uri())
    whole = f"import {{ {', '.join(names)} }} from {where};\n{script}"
    command = [NODE, "--no-warnings", "--experimental-default-type=module", "--input-type=module"]
    run = subprocess.run([*command, "-e", whole], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_the_ids_of_a_text_are_those_of_our_tokenizer() -> None:
    tokenizer = Tokenizer.train(["a red house and the blue sea", "a red house"] * 5, 600)
    tokenizer = tokenizer.knowing(["a red house"])
    arguments = ", ".join(
        json.dumps(one) for one in (tokenizer.vocab, tokenizer.merges, sorted(tokenizer.words))
    )
    ids, padded, unseen = by_node(
        "tokenizer",
        f"const one = new Tokenizer({arguments}); const texts = {json.dumps(TEXTS)};\n"
        "console.log(JSON.stringify([texts.map((text) => one.encode(text)), "
        "texts.map((text) => one.pad(one.encode(text), 12)), "
        "texts.map((text) => one.unseen(text))]))",
        "Tokenizer",
    )
    assert ids == [tokenizer.encode(text) for text in TEXTS]
    assert padded == [tokenizer.pad(tokenizer.encode(text), 12) for text in TEXTS]
    assert unseen == [tokenizer.unseen(text) for text in TEXTS]


@pytest.mark.parametrize("ends_in_noise", [False, True])
def test_the_grid_is_that_of_our_ddim(ends_in_noise: bool) -> None:
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=ends_in_noise))
    counts = [1, 2, 3, 7, 10, 11, 12, 16, 20, 50, 112, 333, 501, 999, 1000]
    grids = by_node(
        "sampling",
        f"const table = {json.dumps(schedule.alpha_bar.tolist())};\n"
        f"console.log(JSON.stringify({counts}.map((n) => ddimTimesteps(n, table))))",
        "ddimTimesteps",
    )
    for steps, grid in zip(counts, grids, strict=True):
        ours = SAMPLERS["ddim"].grid(steps, schedule)
        assert grid == [[here.t, there.t] for here, there in ours], steps


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("alpha_bar", [0.0, 0.3, 0.999])
def test_what_a_prediction_says_is_what_it_says_to_us(prediction: str, alpha_bar: float) -> None:
    if prediction == "eps" and alpha_bar == 0.0:
        pytest.skip("a prediction of the noise says nothing of pure noise")
    output, x = randn(20), randn(20).roll(1)
    found = by_node(
        "sampling",
        f"const [output, x] = {json.dumps([output.tolist(), x.tolist()])}.map("
        "(one) => Float32Array.from(one));\n"
        f"const {{ x0, eps }} = pairFrom({json.dumps(prediction)}, output, x, {alpha_bar});\n"
        "const there = ddimStep({ x0, eps }, 0.9);\n"
        "console.log(JSON.stringify([x0, eps, there].map((one) => [...one])))",
        *("pairFrom", "ddimStep"),
    )
    x0, eps = pair_from(prediction, output, x, alpha_bar)
    there = 0.9**0.5 * x0 + 0.1**0.5 * eps
    np.testing.assert_allclose(found, torch.stack([x0, eps, there]), rtol=1e-5, atol=1e-5)
