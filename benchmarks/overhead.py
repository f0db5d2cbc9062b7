"""What caution and curiosity cost: a tripped policy, MTP loaded but idle, and recording, against a plain engine.

    python benchmarks/overhead.py MODEL.gguf [MODEL2.gguf ...]

Two engines that never loaded MTP are compared with each other too: the measurement's own noise.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from common import interleaved, middle, ratio

from tracekit.engine import Engine, Settings
from tracekit.model.prompt_sets import load
from tracekit.policy.rule import Policy, rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=6)
    args = parser.parse_args()
    for model in args.models:
        compare(model, args)


def compare(model: str, args: argparse.Namespace) -> None:
    never = rule("fallback")(n_max=1, min_ratio=1.0)
    prompts = [p.prompt for p in load("heldout")][:: max(1, 20 // args.prompts)]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def engine(**options) -> Engine:
            return stack.enter_context(Engine(model, settings=Settings(n_max=8), **options))

        plain, again = engine(mtp=False), engine(mtp=False)
        mtp, recorded = engine(), engine(trace=Path(folder) / "t.duckdb")

        def speed(of: Engine, policy: Policy) -> float:
            tokens = time = 0.0
            for prompt in prompts:
                done = of.generate(prompt, max_tokens=args.max_tokens, policy=policy)
                tokens += len(done.tokens) - 1
                time += done.speculated_us
            return 1e6 * tokens / time

        off, four = rule("off")(), rule("static")(n_max=4)
        arms = {
            "plain": lambda: speed(plain, off),
            "plain again": lambda: speed(again, off),
            "idle": lambda: speed(mtp, off),
            "tripped": lambda: speed(mtp, never),
            "n_max=4": lambda: speed(mtp, four),
            "n_max=4 recorded": lambda: speed(recorded, four),
            "idle recorded": lambda: speed(recorded, off),
        }
        for arm in arms.values():
            arm()
        values = interleaved(arms, args.repeats)
    print(
        f"\n{model}: {len(prompts)} prompts x {args.max_tokens} tokens, {args.repeats} interleaved repeats, "
        "ratios pairwise (median, range)"
    )
    for name in arms:
        print(f"{name:18s} {middle(values[name])} tokens/s")
    for what, of, to in (
        ("noise: a second plain engine", "plain again", "plain"),
        ("off with MTP loaded", "idle", "plain"),
        ("tripped after one verification", "tripped", "plain"),
        ("recording, MTP idle", "idle recorded", "idle"),
        ("recording, n_max=4", "n_max=4 recorded", "n_max=4"),
    ):
        print(f"{what:32s} {ratio(values[of], values[to])}")


if __name__ == "__main__":
    main()
