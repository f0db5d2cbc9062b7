"""What the benchmarks share: an order of runs that is fair on a noisy machine, a clock, medians with their spread."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns

import numpy as np


class Clock:
    """Nanoseconds spent in the functions it times."""

    def __init__(self):
        self.ns = 0

    def timing(self, call: Callable) -> Callable:
        """``call``, timed."""

        def timed(*arguments: object) -> object:
            began = perf_counter_ns()
            found = call(*arguments)
            self.ns += perf_counter_ns() - began
            return found

        return timed


def interleaved(arms: Mapping[str, Callable[[], float]], repeats: int, seed: int = 0) -> dict[str, list[float]]:
    """Run every arm once per repeat, in random order within the repeat; returns the values by arm, repeats aligned."""
    rng, values = random.Random(seed), {name: [] for name in arms}
    for _ in range(repeats):
        for name in rng.sample(list(arms), len(arms)):
            values[name].append(arms[name]())
    return values


def ratio(of: Sequence[float], to: Sequence[float]) -> str:
    """Median of the pairwise ratios with its 95 % bootstrap interval."""
    pairs = np.array(of) / np.array(to)
    drawn = np.random.default_rng(0).integers(0, len(pairs), (1000, len(pairs)))
    low, high = np.quantile(np.median(pairs[drawn], 1), [0.025, 0.975])
    return f"{np.median(pairs):.3f} ({low:.3f} - {high:.3f}, n = {len(pairs)})"


def middle(values: Sequence[float], digits: int = 1) -> str:
    """Median with its range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"
