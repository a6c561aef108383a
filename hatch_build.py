"""Lets Horizon's weights travel inside the wheel, as `ldm/weights/horizon`.

An editable install reads the checkout's own `weights/`, so it gets no copy that could grow old.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShipWeights(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the folder to standard wheels only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["weights/horizon"] = "ldm/weights/horizon"
