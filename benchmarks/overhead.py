"""What caution and curiosity cost: a tripped policy, MTP loaded but idle, and recording, against a plain engine.

    python benchmarks/overhead.py MODEL.gguf [MODEL2.gguf ...]

Two engines that never loaded MTP are compared with each other too: the measurement's own noise.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from common import interleaved, middle, ratio

from tracekit.engine import Engine, Settings
from tracekit.model.prompt_sets import load
from tracekit.policy.rule import Policy, rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=6)
    args = parser.parse_args()
    for model in args.models:
        compare(model, args)


def compare(model: str, args: argparse.Namespace) -> None:
    off, four = rule("off")(), rule("static")(n_max=4)
    trips = rule("fallback")(n_max=1, min_ratio=1.0)  # at the first draft that is not accepted
    tripped = rule("fallback")(n_max=1, min_ratio=1.0, scope="engine")  # for good: no request drafts after that
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def engine(**options) -> Engine:
            return stack.enter_context(Engine(model, settings=Settings(n_max=8), **options))

        plain, again = engine(mtp=False), engine(mtp=False)
        prompts = [p.prompt for p in load("heldout") if full(plain, p.prompt, args.max_tokens)][: args.prompts]
        mtp, recorded = engine(), engine(trace=Path(folder) / "t.duckdb")

        def arm(of: Engine, policy: Policy, prompt: str) -> Callable[[], float]:
            def tokens_per_s() -> float:
                done = of.generate(prompt, max_tokens=args.max_tokens, policy=policy)
                return 1e6 * (len(done.tokens) - 1) / done.speculated_us

            return tokens_per_s

        arms = {
            "plain": (plain, off),
            "plain again": (again, off),
            "idle": (mtp, off),
            "tripped": (mtp, tripped),
            "trips": (mtp, trips),
            "n_max=4": (mtp, four),
            "n_max=4 recorded": (recorded, four),
            "idle recorded": (recorded, off),
        }
        values: dict[str, list[float]] = {name: [] for name in arms}
        for of, policy in arms.values():
            arm(of, policy, prompts[0])()
        for n, prompt in enumerate(prompts):
            run = {name: arm(of, policy, prompt) for name, (of, policy) in arms.items()}
            for name, found in interleaved(run, args.repeats, seed=n).items():
                values[name] += found
    print(
        f"\n{model}: {len(prompts)} prompts x {args.max_tokens} tokens, {args.repeats} interleaved repeats of each; "
        "median of the pairwise ratios (95 % interval)"
    )
    for name in arms:
        print(f"{name:18s} {middle(values[name])} tokens/s")
    for what, of, to in (
        ("noise: a second plain engine", "plain again", "plain"),
        ("off with MTP loaded", "idle", "plain"),
        ("a policy that has tripped", "tripped", "plain"),
        ("a request that trips at once", "trips", "plain"),
        ("recording, MTP idle", "idle recorded", "idle"),
        ("recording, n_max=4", "n_max=4 recorded", "n_max=4"),
    ):
        print(f"{what:32s} {ratio(values[of], values[to])}")


def full(engine: Engine, prompt: str, max_tokens: int) -> bool:
    """Whether the completion of ``prompt`` is as long as it may be."""
    return len(engine.generate(prompt, max_tokens=max_tokens).tokens) == max_tokens


if __name__ == "__main__":
    main()
