"""How much of a step is not llama.cpp's: the engine's own work between decodes, by policy.

python benchmarks/host.py MODEL.gguf [MODEL2.gguf ...]
"""

from __future__ import annotations

import argparse
from time import perf_counter_ns

from common import Clock

from tracekit.engine import Engine, Request, Settings, lib
from tracekit.model.prompt_sets import load
from tracekit.policy.rule import Policy
from tracekit.policy.spec import parse

POLICIES = parse("off,static:n_max=1,4,8,static:n_max=8,p_min=0.425")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    clock = Clock()
    lib.decode, lib.synchronize = clock.timing(lib.decode), clock.timing(lib.synchronize)
    for model in args.models:
        print(f"\n{model}: us per step after the prompt, in llama_decode and outside it")
        with Engine(model, settings=Settings(n_ctx=512)) as engine:
            for policy in POLICIES:
                print(f"  {policy!s:28s} {share(engine, policy, clock, args.max_tokens)}")


def share(engine: Engine, policy: Policy, clock: Clock, max_tokens: int) -> str:
    """Mean times of a step under ``policy``; the first pass warms up."""
    engine.set_arm(mtp=policy.name != "off")
    for _ in range(2):
        n_steps = inside = whole = 0
        for prompt in load("heldout")[::3]:
            engine.submit(Request(prompt.prompt, max_tokens, policy=policy))
            engine.step()
            before, began = clock.ns, perf_counter_ns()
            while not engine.idle:
                engine.step()
                n_steps += 1
            inside, whole = inside + clock.ns - before, whole + perf_counter_ns() - began
    outside = whole - inside
    return (
        f"{inside / n_steps / 1000:9.1f} {outside / n_steps / 1000:7.1f} ({100 * outside / whole:.1f} %, n = {n_steps})"
    )


if __name__ == "__main__":
    main()
