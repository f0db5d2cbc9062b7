"""Several slots with one KV cache (--kv-unified) against one each, under policies whose slots draft alike, or not.

    python benchmarks/kv_unified.py MODEL.gguf --slots 4

Two engines serve the same requests in turn; one line per policy with the median ratio and its range over the repeats.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from time import perf_counter

import numpy as np

from tracekit.engine import Engine, Sampling, Settings
from tracekit.engine.record import as_requests
from tracekit.model.prompt_sets import load
from tracekit.policy.spec import parse

POLICIES = "off,static:n_max=1,static:n_max=4,static:n_max=8,static:n_max=8,p_min=0.55"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    requests = as_requests(load("heldout"), args.max_tokens, Sampling())[: 2 * args.slots]
    apart, unified = (Settings(n_slots=args.slots, kv_unified=one) for one in (False, True))
    with Engine(args.model, None, apart) as first, Engine(args.model, None, unified) as second:
        for policy in parse(POLICIES):
            times = {first: [], second: []}
            for _ in range(args.repeats):
                for engine in random.sample((first, second), 2):
                    began = perf_counter()
                    n_tokens = sum(len(c.tokens) for c in engine.run([replace(r, policy=policy) for r in requests]))
                    times[engine].append(n_tokens / (perf_counter() - began))
            ratio = np.array(times[second]) / times[first]
            print(
                f"{policy!s:28} {np.median(times[first]):8.1f} tokens/s apart, {np.median(times[second]):8.1f} in one, "
                f"ratio {np.median(ratio):.3f} ({ratio.min():.3f} - {ratio.max():.3f}, n = {len(ratio)})",
                flush=True,
            )


if __name__ == "__main__":
    main()
