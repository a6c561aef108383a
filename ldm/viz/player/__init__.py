"""TODO."""

from ldm.viz.player.player import *  # noqa: F403
from ldm.viz.player.player import explain as explain
