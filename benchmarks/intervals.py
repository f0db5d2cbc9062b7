"""How often a 95 % interval holds the truth: leagues of few requests, drawn from a trace, against all of it.

    python benchmarks/intervals.py [TRACE ...]

The requests of a trace are taken for all there are, at its prices. Leagues of 2 to 20 of them, drawn with replacement,
each say what a policy's speed-up is, in an interval; counted is how often that lies wholly above or below the speed-up
of all.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from tracekit.policy.spec import parse
from tracekit.replay.league import League
from tracekit.trace.store import open_trace

TRACES = Path(__file__).parent.parent / "traces"
SHIPPED = [
    TRACES / name for name in ("reference-aligned-probe.duckdb", "h200/8b-aligned.duckdb", "h200/1b-aligned.duckdb")
]
POLICIES = parse("static:n_max=2,8,static:n_max=8,p_min=0.4,fallback:n_max=8,min_ratio=0.25,resume_after=16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", default=SHIPPED, metavar="TRACE", help="default: three that ship")
    parser.add_argument("--draws", type=int, default=300, help="leagues of each size, trace and policy")
    args = parser.parse_args()
    rng, sizes = np.random.default_rng(0), (2, 3, 5, 8, 20)
    below, above, n = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0), 0
    for path in args.traces:
        whole = League.of(open_trace(path))
        cost = replace(whole.cost, boot=whole.cost.prices[None])  # prices are known here
        true = whole.table(POLICIES)["speedup"].to_numpy()
        n += args.draws * len(POLICIES)
        for size in sizes:
            for _ in range(args.draws):
                some = whole.positions.at(rng.integers(0, whole.positions.n_requests, size))
                few = League(replace(some, prompt_ids=("",) * size), cost)  # drawn twice, it is another request
                told = few.table(POLICIES)
                below[size] += int((told["speedup_high"].to_numpy() < true).sum())
                above[size] += int((told["speedup_low"].to_numpy() > true).sum())
    print(f"n = {n} intervals of each size ({len(args.traces)} traces, {len(POLICIES)} policies, {args.draws} draws)")
    print("requests   holds the truth   too low   too high")
    for size in sizes:
        held = 1 - (below[size] + above[size]) / n
        reach = 1.96 * math.sqrt(held * (1 - held) / n)
        parts = (
            f"{100 * held:.1f} % (+- {100 * reach:.1f})",
            f"{100 * below[size] / n:.1f} %",
            f"{100 * above[size] / n:.1f} %",
        )
        print(f"{size:8}   {parts[0]:>15}   {parts[1]:>7}   {parts[2]:>8}")


if __name__ == "__main__":
    main()
