"""Which version of the package this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def ldm_version() -> str:
    """The version that is installed, or "0+unknown" in a checkout that is not."""
    try:
        return version("ldm-from-scratch")
    except PackageNotFoundError:
        return "0+unknown"
