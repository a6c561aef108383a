"""A config as JSON: in the metadata of a file of weights, or in a file of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.config import SD_V1, DefaultsConfig, ModelConfig, ScheduleConfig
from ldm.errors import ConfigError, UnreadableError

LONGEST = 100_000  # characters; a config has 1,000
# Fields that are not written where they are Stable Diffusion v1's: part -> name -> that value. So
# files from before there was such a field read, and files without it can be read by older readers.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "": {"prediction": "eps"},
    "schedule": {"zero_terminal_snr": False},
    "unet": {"head_width": 0, "linear_projections": False},
    "text": {"open_clip": False},
}


def config_to_json(config: ModelConfig, indent: int | None = None) -> str:
    """A config as sorted JSON, without the fields of `LEFT_OUT` that are as there, `defaults` where
    they are the dataclass's own, and a noise schedule that is a table: files of weights hold that
    as tensors, and here the plain one stands in its place."""
    if config.schedule.betas is not None:
        config = dataclasses.replace(config, schedule=ScheduleConfig())
    data = dataclasses.asdict(config)
    del data["schedule"]["betas"]
    if config.defaults == DefaultsConfig():
        del data["defaults"]
    for part, fields in LEFT_OUT.items():
        holder = data[part] if part else data
        for name, value in fields.items():
            if holder[name] == value:
                del holder[name]
    return json.dumps(data, sort_keys=True, indent=indent)


def config_from_json(text: str, path: Path) -> ModelConfig:
    """The inverse of `config_to_json`, for a text that comes from `path`.

    What `config_to_json` leaves out is then the dataclass's own.

    Raises:
        UnreadableError: it is not such a config.
        ConfigError: a number in it is out of its range (`ldm.config` has them).
    """
    if len(text) > LONGEST:
        told = f"it has {len(text):,} characters, more than {LONGEST:,}"
        raise UnreadableError(f"what {path} holds is not a config of ldm: {told}")
    try:
        data = json.loads(text)
        if isinstance(data, dict):
            data.setdefault("defaults", dataclasses.asdict(DefaultsConfig()))
            for part, fields in LEFT_OUT.items():
                holder = data.get(part) if part else data
                if isinstance(holder, dict):
                    holder |= fields | holder
        with said_of(path):
            config: ModelConfig = read_like(SD_V1, data)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"what {path} holds is not a config of ldm: {error}") from error
    return config


def read_config(path: Path) -> ModelConfig:
    """The config in a file of its own.

    Raises:
        OSError: there is no such file.
        UnreadableError, ConfigError: as `config_from_json`.
    """
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    return config_from_json(data.decode("utf-8", "replace"), path)


@contextlib.contextmanager
def said_of(path: Path) -> Iterator[None]:
    """What a config says against its numbers is said of the file that they come from."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_like(example: Any, data: Any) -> Any:
    """A value of JSON as one of the same type as an example: a number, a name, a tuple of whole
    numbers, or a dataclass of such, which checks their ranges. A ValueError if it is not."""
    if dataclasses.is_dataclass(example) and not isinstance(example, type):
        fields = dataclasses.fields(example)
        names = [f.name for f in fields if getattr(example, f.name) is not None]
        if not isinstance(data, dict) or data.keys() != set(names):
            raise ValueError(f"{str(data)[:80]!r} does not have just the fields {', '.join(names)}")
        return type(example)(**{n: read_like(getattr(example, n), data[n]) for n in names})
    if isinstance(example, tuple) and isinstance(data, list):
        return tuple(read_like(example[0], one) for one in data)
    if type(data) is type(example) or (isinstance(example, float) and type(data) is int):
        return data
    raise ValueError(f"{str(data)[:80]!r} cannot stand where {example!r} could")
