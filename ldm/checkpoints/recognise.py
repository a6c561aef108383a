"""The second step: from the keys of a file to the official ones, and to the model's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.checkpoints.config_json import config_from_json, said_of
from ldm.checkpoints.diffusers.names import PART_OF, official_keys
from ldm.checkpoints.entries import DIFFUSERS_FOLDER, Archive, Entry
from ldm.checkpoints.families import LOADS, known_config, other_family
from ldm.checkpoints.noise import (
    UNSAID,
    is_unsaid,
    objection,
    own_schedule,
    predictions,
    published_prediction,
)
from ldm.checkpoints.open_clip import split
from ldm.checkpoints.spellings import official_name, stages_in
from ldm.config import PREDICTIONS, SD_V1, SD_V2, SD_V2_768, ModelConfig
from ldm.errors import ConfigError, FamilyError, KeysError, some


@dataclass(frozen=True, repr=False)
class Weights:
    """Weights whose names and model are known. Nothing is read yet.

    Attributes:
        archive: what the file or folder holds, by its own keys.
        entries: the same, by official keys; what has none keeps its own.
        config: of the model that it belongs to, with the file's own noise schedule and prediction.
        schedule: what is to be said of that schedule; empty where it is the config's anyway.
        predictions: what the UNet predicts, by each who says so: the caller, or those whom
            `noise.predictions` asks. They may contradict each other: loading a UNet asks
            `noise.objection`.
    """

    archive: Archive
    entries: Mapping[str, Entry]
    config: ModelConfig
    schedule: str
    predictions: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.archive.path

    def __repr__(self) -> str:
        """One line: the model, and how much of each stage there is."""
        stages = [f"{count} keys of {stage}" for stage, count in stages_in(self.entries).items()]
        return f"Weights({self.path}: {self.config.name}, {', '.join(stages) or 'no stage'})"


def recognise(
    archive: Archive,
    config: ModelConfig | None = None,
    default: ModelConfig | None = None,
    prediction: str | None = None,
) -> Weights:
    """Which model a file or a folder holds, with its tensors by official keys.

    Args:
        config: the model's. Without it the file's own counts, then `default`, and then Stable
            Diffusion v1's, if the weights have its width. The noise schedule is the file's own in
            any case: its tables, where they are not those of the config.
        prediction: what the UNet predicts, one of `ldm.config.PREDICTIONS`: it counts before what
            the file says, as that counts before the config.

    Raises:
        ValueError: no UNet predicts that.
        FamilyError: it is another kind of model.
        ConfigError: there is no config for it, or the prediction says nothing in its noise.
        MissingPartsError: a folder without parts, or a part without its config.
        UnreadableError: the config that it brings is none.
        KeysError: two keys mean one weight.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        there = ", ".join(PREDICTIONS)
        raise ValueError(f"prediction must be one of {there}, not {prediction!r:.80}")
    stored = own_config(archive)
    given = config or stored or default
    entries = official_entries(archive, given)
    if prediction is None and is_unsaid(understood(archive, entries, given).predictions):
        prediction = published_prediction(archive.path)
    return understood(archive, entries, given, prediction)


def understood(
    archive: Archive,
    entries: Mapping[str, Entry],
    config: ModelConfig | None,
    prediction: str | None = None,
) -> Weights:
    """The second half of `recognise`: an archive whose official keys, and config if any, are known.

    Raises:
        FamilyError, ConfigError: as `recognise`.
    """
    if other := other_family(entries, config):
        raise FamilyError(f"{archive.path} is {other}; {LOADS}")
    if config is None and stages_in(entries) and not known_config(entries):
        raise ConfigError(
            f"{archive.path} is not as wide as Stable Diffusion 1 or 2, and brings no config: "
            "pass its config"
        )
    is_v2 = config is None and known_config(entries) is SD_V2
    config = config or known_config(entries) or SD_V1
    schedule, told = own_schedule(entries, config.schedule)
    if prediction is not None:
        said = {"prediction=": prediction}
    else:
        said = predictions(archive, entries, schedule, config.prediction)
        if is_v2 and not said:
            said = UNSAID
    drawn_by = config.prediction
    if said and not objection(said):
        (drawn_by,) = set(said.values())
    if is_v2 and drawn_by == SD_V2_768.prediction:
        config = SD_V2_768
    with said_of(archive.path):
        config = dataclasses.replace(config, schedule=schedule, prediction=drawn_by)
    return Weights(archive, entries, config, told, said)


def own_config(archive: Archive) -> ModelConfig | None:
    """The config that a file or a folder brings, if any."""
    if archive.container == DIFFUSERS_FOLDER:
        from ldm.checkpoints.diffusers.configs import folder_config

        return folder_config(archive)
    text = archive.metadata.get("ldm")
    return None if text is None else config_from_json(text, archive.path)


def official_entries(archive: Archive, config: ModelConfig | None) -> dict[str, Entry]:
    """The tensors of an archive by official keys; a key that has none keeps its own.

    Args:
        config: the archive's own or the model's, along which the names of a diffusers folder
            unroll; it also says how many of OpenCLIP's blocks are run.

    Raises:
        KeysError: two keys of a file mean one weight.
    """
    if archive.container == DIFFUSERS_FOLDER and config is not None:
        return folder_entries(archive, config)
    entries: dict[str, Entry] = {}
    layers = (config or SD_V2).text.num_layers
    for key, entry in split(archive.entries, layers).items():
        if entries.setdefault(official_name(key), entry) is not entry:
            raise KeysError(f"{archive.path} holds {some([official_name(key)])} under two names")
    return entries


def folder_entries(archive: Archive, config: ModelConfig) -> dict[str, Entry]:
    """The tensors of a diffusers folder by official keys. A key that has none keeps its own, below
    its part's name: `unet/lora.weight`; and so does the second of two that mean one weight, the old
    and the new name of it, since one of them is too many."""
    from ldm.checkpoints.diffusers.configs import part_stages

    entries: dict[str, Entry] = {}
    for part, stage in part_stages(archive).items():
        official = official_keys(stage, config)
        beginning = f"{part}/" if part else ""
        for key, entry in archive.entries.items():
            if not key.startswith(beginning):
                continue
            theirs = key.removeprefix(beginning)
            name = official.get(theirs, "")
            entries[f"{PART_OF[stage]}/{theirs}" if not name or name in entries else name] = entry
    return entries
