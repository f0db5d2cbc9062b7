"""What the benchmarks share: medians with their range, and an order of runs that is fair on a noisy machine."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence


def interleaved(arms: Mapping[str, Callable[[], float]], repeats: int, seed: int = 0) -> dict[str, list[float]]:
    """Run every arm once per repeat, in random order within the repeat; returns the values by arm, repeats aligned."""
    rng, values = random.Random(seed), {name: [] for name in arms}
    for _ in range(repeats):
        for name in rng.sample(list(arms), len(arms)):
            values[name].append(arms[name]())
    return values


def ratio(of: Sequence[float], to: Sequence[float]) -> str:
    """Median of the pairwise ratios with their range."""
    pairs = [a / b for a, b in zip(of, to, strict=True)]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f} - {max(pairs):.3f}, n = {len(pairs)})"


def middle(values: Sequence[float], digits: int = 1) -> str:
    """Median with its range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"
