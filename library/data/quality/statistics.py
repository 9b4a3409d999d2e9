"""How many different things there are, if common ones count less."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable


def effective_number(things: Iterable[Hashable]) -> float:
    """The exponential of the Shannon entropy of the things' shares: n for n different ones that are equally common,
    less for unequal shares, 0 for none.

    M. O. Hill, "Diversity and evenness: a unifying notation and its consequences", Ecology 54, 1973: N₁.
    """
    counts = Counter(things)
    whole = counts.total()
    if not whole:
        return 0.0
    return math.exp(-math.fsum(count / whole * math.log(count / whole) for count in counts.values()))
