"""How few right answers are too few: bounds for tests that count."""

from __future__ import annotations

import math


def fewest(total: int, share: float, chance: float = 1e-3) -> int:
    """The count that what is right with probability `share` falls below in `total` tries with at
    most this chance: the lower end of a binomial's one-sided interval."""
    tail = 0.0
    for right in range(total + 1):
        tail += math.comb(total, right) * share**right * (1 - share) ** (total - right)
        if tail > chance:
            return right
    return total
