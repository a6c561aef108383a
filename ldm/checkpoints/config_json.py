"""A config as JSON: in the metadata of a file of weights, or in a file of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ldm.config import SD_V1, DefaultsConfig, ModelConfig
from ldm.errors import UnreadableError


def config_to_json(config: ModelConfig, indent: int | None = None) -> str:
    """A config as sorted JSON, without `defaults` where they are the dataclass's own."""
    data = dataclasses.asdict(config)
    if config.defaults == DefaultsConfig():
        del data["defaults"]
    return json.dumps(data, sort_keys=True, indent=indent)


def config_from_json(text: str, path: Path) -> ModelConfig:
    """The inverse of `config_to_json`, for a text that comes from `path`.

    The text may leave out `defaults`, and has then the dataclass's own.

    Raises:
        UnreadableError: it is not such a config.
    """
    try:
        data = json.loads(text)
        if isinstance(data, dict):
            data.setdefault("defaults", dataclasses.asdict(DefaultsConfig()))
        config: ModelConfig = read_like(SD_V1, data)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"what {path} holds is not a config of ldm: {error}") from error
    return config


LARGEST = 2**20  # of the whole numbers in a config


def read_like(example: Any, data: Any) -> Any:
    """A value of JSON as one of the same type as an example: a number, a name, a tuple of whole
    numbers, or a dataclass of such. A ValueError if it is not."""
    if dataclasses.is_dataclass(example) and not isinstance(example, type):
        names = [field.name for field in dataclasses.fields(example)]
        if not isinstance(data, dict) or data.keys() != set(names):
            raise ValueError(f"{str(data)[:80]} does not have just the fields {', '.join(names)}")
        return type(example)(**{n: read_like(getattr(example, n), data[n]) for n in names})
    if isinstance(example, tuple) and isinstance(data, list):
        return tuple(read_like(example[0], one) for one in data)
    if isinstance(example, str) and isinstance(data, str) and data.isprintable():
        return data
    if isinstance(example, int) and type(data) is int and 0 <= data <= LARGEST:
        return data
    if isinstance(example, float) and type(data) in (int, float) and 0 < data < math.inf:
        return float(data)
    raise ValueError(f"{str(data)[:80]!r} cannot stand where {example!r} could")
