"""How long ours takes, and how long diffusers takes for the same: `python -m tests.benchmarks`.

Both are timed in turn, in one run, on the same weights, so that what else the machine does meets
both alike. What counts is the ratio.
"""

from ldm.speed.waiting import choose_wait_policy

choose_wait_policy()  # before any of these files imports torch
