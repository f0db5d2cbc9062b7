"""How long tuning takes: thousands of policies on 100,000 positions, cross-validated, and what it holds in memory.

    python benchmarks/tune.py [--positions 100000] [--policies 5000] [--folds 5]

Positions are made up (stretches of good and bad drafts); the cost model is one that a machine could have.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np
from kernel import N_MAX, positions

from tracekit.replay import kernel as walk
from tracekit.replay.costs import N_BOOT, CostModel, layout
from tracekit.replay.league import League
from tracekit.replay.simulate import arrays_of
from tracekit.tune.search import held_out_counts, search
from tracekit.tune.space import default_space, grid


def cost_model() -> CostModel:
    """Drafting at a twentieth of a target decode, nine tokens verified for three times the price of one."""
    prices = np.zeros(walk.n_counts(N_MAX))
    prices[walk.STEPS], prices[walk.TOKENS], prices[walk.DRAFT_DECODES] = 50, 10, 400
    widths, catchups = layout(N_MAX)
    prices[widths][1:], prices[catchups] = np.linspace(8000, 24000, N_MAX + 1), np.linspace(0, 300, N_MAX + 2)
    prices[walk.LONG_CATCHUP_ROWS] = 30
    noise = np.random.default_rng(0).normal(1, 0.01, (N_BOOT, len(prices)))
    return CostModel(N_MAX, prices, prices * noise, None, 0.01, 0, 1 << 20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=100_000)
    parser.add_argument("--policies", type=int, default=5000)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    space = default_space()
    others = len(grid({**space, "fallback": {**space["fallback"], "min_ratio": "0.5"}}, N_MAX))
    space["fallback"]["min_ratio"] = f"0..0.9/{0.9 / (args.policies // others + 3):.6f}"
    seconds = []
    league = League(positions(args.positions), cost_model())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(args.repeats + 1):
        started = time.perf_counter()
        found = search(league, space, folds=args.folds)
        gain = league.gain(held_out_counts(league, found))
        seconds.append(time.perf_counter() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    counted = seconds[1:]  # the first compiles
    print(
        f"{len(found.policies)} policies, {len(league.positions.match)} positions, {args.folds} folds: "
        f"{statistics.median(counted):.2f} s ({min(counted):.2f} - {max(counted):.2f}, n = {len(counted)}); "
        f"{seconds[0]:.2f} s with compilation"
    )
    n_bytes = sum(a.nbytes for a in arrays_of(league.positions))
    print(f"trace arrays {n_bytes / 1e6:.0f} MB; peak memory grew by {grown:.0f} MB, Numba's compiler included")
    print(f"chosen: {found.policy}, {gain.value:.3f} x no MTP on held-out requests ({gain.low:.3f} - {gain.high:.3f})")


if __name__ == "__main__":
    main()
