"""Both containers of pickles, in turn."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["zip", "legacy"])
def container(request: pytest.FixtureRequest) -> str:
    return request.param
