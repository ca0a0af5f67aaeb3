"""Seeds that are the same in every process."""

from __future__ import annotations

import hashlib
import json
import random
from functools import lru_cache


def derive_seed(*parts: str | int) -> int:
    """Derive a seed from the run's seed and from what the random numbers are for.

    Unlike Python's ``hash``, the value does not change from process to process. The parts are encoded as
    a JSON list before they are hashed, so ("ab", "c"), ("a", "bc") and (1,), ("1",) give different seeds.

    Args:
        *parts: the run's seed, and names of the use, such as ``(seed, "memory", task)``.

    Returns:
        An integer in [0, 2**63), valid for ``random.Random`` and ``torch.Generator.manual_seed``.

    Raises:
        TypeError: a part is neither a string nor an integer.
    """
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise TypeError(f"parts of a seed must be strings or integers, got {part!r}")
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@lru_cache(maxsize=8)
def shuffled(size: int, seed: int) -> tuple[int, ...]:
    """A random order of ``range(size)`` that depends only on the seed, not on global generators."""
    return tuple(random.Random(seed).sample(range(size), size))
