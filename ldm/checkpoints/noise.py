"""What a file says of the noise, beside its weights: how much there is, and what the UNet predicts.

Official files carry the noise schedule as tables, and other programs draw by those. Most are Stable
Diffusion v1's, often rounded with the weights; where they are not, they count. What the UNet
predicts is said in one of several places, or nowhere: then it is as the config says, and that of
Stable Diffusion v1 says the noise, eps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.entries import Archive, Entry
from ldm.config import BETAS, MOST_TIMESTEPS, PREDICTIONS, ScheduleConfig
from ldm.errors import ConfigError
from ldm.files import file_sha256
from ldm.schedule import exact_tables

# --- The schedule ----------------------------------------------------------------------------

CLOSE = 1 / 64
"""How far, relatively, a copy may be from a table: bfloat16 rounds betas by 1/512, and their
product gathers some of that. Schedules that differ do so by a third and more."""


def own_schedule(
    entries: Mapping[str, Entry], config: ScheduleConfig
) -> tuple[ScheduleConfig, str]:
    """The noise schedule of a file, and what is to be said of it: `config` itself and nothing, if
    the file has no tables, or copies of those; else a table of its own. Tables that hold no
    schedule do not count: programs that merge models leave zeros there. The tensor `ztsnr` says
    that the config's is to be rescaled.

    Args:
        entries: by official keys. Where both tables differ from the config's, samplers draw by
            `alphas_cumprod`; but where `betas` say the same, they are the more precise.
    """
    known = dict(zip(("betas", "alphas_cumprod"), exact_tables(config), strict=True))
    found = {name: entries[name] for name in known if name in entries}
    tables = {n: read_table(entry) for n, entry in found.items() if not is_copy(entry, known[n])}
    if not tables and RESCALED in entries and not config.ends_in_noise:
        rescaled = dataclasses.replace(config, zero_terminal_snr=True)
        return rescaled, f"it ends in pure noise, as the tensor {RESCALED} says"
    if not tables:
        return config, ""
    betas, alpha_bar = tables.get("betas"), tables.get("alphas_cumprod")
    candidates = [] if betas is None else [betas]
    if alpha_bar is not None:
        agree = betas is not None and is_close(torch.cumprod(1 - betas, 0), alpha_bar)
        candidates.insert(1 if agree else 0, betas_of(alpha_bar))
    for numbers in (tuple(one.tolist()) for one in candidates if len(one)):
        first, last = numbers[0], numbers[-1]
        with contextlib.suppress(ConfigError):  # these cannot be betas
            schedule = ScheduleConfig(len(numbers), first, last, numbers)
            span = f"{len(numbers)} betas from {first:.3g} to {last:.3g}"
            return schedule, f"its own noise schedule: {span}"
    return config, "its tables hold no noise schedule: the config's is used"


def betas_of(alpha_bar: Tensor) -> Tensor:
    """The betas whose cumulative product a table is. In half precision its first values are equal,
    since all round to 1: those are taken for the least betas that there are."""
    before = torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
    return torch.where(alpha_bar == before, BETAS[0], 1 - alpha_bar / before)


def is_copy(entry: Entry, table: Tensor) -> bool:
    """Whether an entry holds a table, but for the rounding to whatever types it went through."""
    return is_close(read_table(entry), table.to(entry.dtype).double())


def is_close(found: Tensor, table: Tensor) -> bool:
    """Whether two tables agree, relatively, at every timestep."""
    return found.shape == table.shape and torch.allclose(found, table, rtol=CLOSE, atol=0)


def read_table(entry: Entry) -> Tensor:
    """The numbers of an entry, (T,) float64; none if that is no table of a schedule's size."""
    is_row = len(entry.shape) == 1 and entry.shape[0] <= MOST_TIMESTEPS
    if not is_row or not entry.dtype.is_floating_point:
        return torch.empty(0, dtype=torch.float64)
    return entry.map().double()


# --- What the UNet predicts ------------------------------------------------------------------

RESCALED = "ztsnr"
EDM = "v on the noise levels of EDM"
MARKERS = {"v_pred": "v", RESCALED: "v", "edm_vpred.sigma_min": EDM, "edm_vpred.sigma_max": EDM}
"""Keys of tensors that say it by being there: key -> what is predicted."""
SPELLINGS = {
    "epsilon": "eps",
    "v_prediction": "v",
    "v-prediction": "v",
    "velocity": "v",
    "sample": "x0",
    "flow": "rectified flow",  # on a schedule that is not ours
}
# `parameterization: "v"`, as the training code of latent diffusion has it, and not in a comment.
PARAMETERIZATION = re.compile(r"^[^#\n]*\bparameterization[\"']?\s*:\s*[\"']?(\w+)", re.MULTILINE)
MOST_YAML = 2**20


def predictions(
    archive: Archive, entries: Mapping[str, Entry], schedule: ScheduleConfig, config: str = "eps"
) -> dict[str, str]:
    """What the UNet of a file predicts, by each who says so: name -> "eps", "v", or another word.

    Asked are its config (of which eps is no answer: a config that says nothing has it), tensors
    that are markers, the metadata of safetensors, a `.yaml` beside the file, and, where all of
    these are silent, the noise schedule: from pure noise, the noise says nothing of the picture.
    """
    said = {f"the tensor {key}": what for key, what in MARKERS.items() if key in entries}
    if what := archive.metadata.get("modelspec.prediction_type", "").strip().lower():
        said["its metadata"] = what
    if archive.metadata.get("ss_v_parameterization", "").strip().lower() == "true":
        said["its metadata"] = "v"
    for suffix in (".yaml", ".yml"):
        beside = archive.path.with_suffix(suffix)
        if archive.path.is_file() and beside.is_file() and (told := read_yaml(beside)):
            said[beside.name] = told
    said = {who: SPELLINGS.get(what, what)[:80] for who, what in said.items()}
    if config != "eps":
        said = {"its config": config} | said
    if schedule.ends_in_noise and not said:
        said = {"its noise schedule, which ends in pure noise,": "v"}
    return said


UNSAID = {"nothing": "eps or v"}
"""What is said of the prediction of a Stable Diffusion 2 that does not say: the models for pictures
of 512 pixels predict eps, those for 768 v, and the weights of both look the same."""
PUBLISHED = {
    "d635794c1fedfdfa261e065370bea59c651fc9bfa65dc6d67ad29e11869a1824": "eps",  # 512-base-ema.ckpt
    "88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36": "eps",  # v2-1_512-ema-…
    "bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f": "v",  # 768-v-ema.ckpt
    "ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0": "v",  # v2-1_768-ema-….ckpt
    "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac": "v",  # .safetensors
}
"""The official files of Stable Diffusion 2.0 and 2.1: SHA-256 -> what they predict."""
PUBLISHED_SIZES = range(5_214_000_000, 5_216_000_000)  # bytes; other files are not hashed


def is_unsaid(said: Mapping[str, str]) -> bool:
    """Whether it is a Stable Diffusion 2 of which nobody says what it predicts."""
    return said == UNSAID


def published_prediction(path: Path) -> str | None:
    """What an official file of Stable Diffusion 2 predicts, by its hash; None for any other. A file
    as large as those is read for that, which takes some seconds."""
    if not path.is_file() or path.stat().st_size not in PUBLISHED_SIZES:
        return None
    return PUBLISHED.get(file_sha256(path))


def told(said: Mapping[str, str]) -> str:
    """What is said of a prediction, in words; empty where nothing is."""
    if is_unsaid(said):
        return "does not say whether it predicts eps or v"
    return " and ".join(f"predicts {what}, as {who} says" for who, what in said.items())


def objection(said: Mapping[str, str]) -> str:
    """What is wrong with what is said of a prediction, for a line that begins with the file: it is
    none that ldm draws by, or two say two things. Nothing is wrong with the empty string."""
    if is_unsaid(said):
        sizes = "eps, as for pictures of 512 pixels, or v, as for 768"
        return f"does not say whether it predicts {sizes}; pass prediction="
    for who, what in said.items():
        if what not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            return f"is a model that predicts {what}, as {who} says; ldm draws by {known}"
    if len(set(said.values())) > 1:
        return f"{told(said)}; pass prediction= to say which"
    return ""


def read_yaml(path: Path) -> str | None:
    """What a config of the latent diffusion code says that the model predicts, if anything."""
    with path.open("rb") as file:
        text = file.read(MOST_YAML).decode("utf-8", errors="replace")
    found = PARAMETERIZATION.search(text)
    return None if found is None else found[1].lower()
