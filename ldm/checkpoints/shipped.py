"""Where Horizon's weights are."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped_weights() -> Path:
    """The file of Horizon's weights: the repository's own when run from a checkout (or an editable
    install of one), else the copy that was installed with the package."""
    is_checkout = (PACKAGE.parent / "pyproject.toml").is_file()
    root = PACKAGE.parent if is_checkout else PACKAGE
    return root / "weights" / "horizon" / "model.safetensors"
