"""What caution and curiosity cost: a tripped policy, MTP loaded but idle, and recording, against an engine without MTP.

    python benchmarks/overhead.py MODEL.gguf [MODEL2.gguf ...]

The first part moves several engines through the same request in turn, one step each, so that a machine that drifts
drifts for all. Two engines alike differ by a few per cent for as long as they live, so all are started anew, in another
order, several times; two without MTP are compared with each other too, which is the measurement's own noise.
The second part times whole requests, in pairs, in one engine whose recorder is taken away and given back. What it
writes, on a thread of its own every 0.9 s, falls on both alike: its processor time comes on top where no core is idle.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter_ns

import numpy as np
from common import interleaved, middle, ratio

from tracekit.engine import Engine, Request, Settings
from tracekit.engine.recorder import Recorder
from tracekit.model.prompt_sets import load
from tracekit.policy.rule import Policy, rule
from tracekit.trace.store import open_trace

OFF, FOUR, WAITING = rule("off")(), rule("static")(n_max=4), rule("static")(n_max=0)
SEED = rule("fallback")()  # trips in every request of a misaligned drafter
TRIPPED = rule("fallback")(n_max=1, min_ratio=1.0, scope="engine")  # once and for all requests
Arms = Mapping[str, tuple[bool, Policy]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--starts", type=int, default=5, help="how often the engines are started anew")
    parser.add_argument("--prompts", type=int, default=6)
    args = parser.parse_args()
    for model in args.models:
        with Engine(model, mtp=False) as engine:
            prompts = [p.prompt for p in load("heldout") if full(engine, p.prompt, args.max_tokens)][: args.prompts]
        print(f"\n{model}: {len(prompts)} prompts x {args.max_tokens} tokens")
        caution(model, prompts, args)
        recording(model, prompts, args)


def full(engine: Engine, prompt: str, max_tokens: int) -> bool:
    """Whether the completion of ``prompt`` is as long as it may be."""
    return len(engine.generate(prompt, max_tokens=max_tokens).tokens) == max_tokens


def caution(model: str, prompts: list[str], args: argparse.Namespace) -> None:
    arms = {
        "without MTP": (False, OFF),
        "without MTP, again": (False, OFF),
        "off, with MTP loaded": (True, OFF),
        "a policy that has tripped": (True, TRIPPED),
        "the fallback": (True, SEED),
        "drafts nothing, but might": (True, WAITING),
    }
    per_token: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    for start in range(args.starts):
        times = raced(model, arms, prompts, args, random.Random(start))
        base = np.array(times["without MTP"])
        per_token += (base / 1000 / (args.max_tokens - 1)).tolist()
        for name, of in times.items():
            ratios[name].append(float(np.median(base / np.array(of))))
    print(
        f"generating without MTP takes {middle(per_token, 0)} us per token (median, range); speed relative to it, "
        f"median and range of {args.starts} starts of {len(prompts) * args.repeats} requests each:"
    )
    for name in list(arms)[1:]:
        print(f"  {name:28s} {middle(ratios[name], 3)}")


def raced(
    model: str, arms: Arms, prompts: list[str], args: argparse.Namespace, rng: random.Random
) -> dict[str, list[float]]:
    """Nanoseconds of every request in an engine of its own for each arm, all started here."""
    with ExitStack() as stack:
        settings = Settings(n_max=8)
        engines = {
            n: stack.enter_context(Engine(model, settings=settings, mtp=arms[n][0])) for n in shuffled(arms, rng)
        }
        for name, (_, policy) in arms.items():  # warm, and tripped
            list(engines[name].run([Request(p, args.max_tokens, policy=policy) for p in prompts]))
        times: dict[str, list[float]] = {name: [] for name in arms}
        for prompt in prompts * args.repeats:
            for name, (_, policy) in arms.items():
                engines[name].submit(Request(prompt, args.max_tokens, policy=policy))
                engines[name].step()
            spent = dict.fromkeys(arms, 0)
            while busy := [name for name in arms if not engines[name].idle]:
                for name in shuffled(busy, rng):
                    began = perf_counter_ns()
                    done = engines[name].step()
                    spent[name] += perf_counter_ns() - began + sum(1000 * d.catchup_us for d in done)
            for name, time in spent.items():
                times[name].append(time)
    return times


def shuffled(names: Collection[str], rng: random.Random) -> list[str]:
    """``names`` in random order."""
    return rng.sample(list(names), len(names))


def recording(model: str, prompts: list[str], args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.duckdb"
        engine = Engine(model, settings=Settings(n_max=8), trace=path)

        def us(policy: Policy, prompt: str, recorder: Recorder | None) -> int:
            engine._loop.observer = recorder  # in one engine: two alike differ by more than recording costs
            return engine.generate(prompt, max_tokens=args.max_tokens, policy=policy).speculated_us

        print("speed of the generating thread while recording, relative to not recording:")
        for name, policy in (("no drafts", WAITING), ("n_max=4", FOUR)):
            values: dict[str, list[float]] = {"silent": [], "recorded": []}
            for n, prompt in enumerate(prompts):
                recorders = {"silent": None, "recorded": engine.recorder}
                pair = {arm: partial(us, policy, prompt, recorder) for arm, recorder in recorders.items()}
                for arm, found in interleaved(pair, 2 * args.starts * args.repeats, seed=n).items():
                    values[arm] += found
            print(f"  {name:28s} {ratio(values['silent'], values['recorded'])}")
        engine.close()
        own = open_trace(path).frame(
            "SELECT record_us / busy AS main, writer_us / busy AS writer FROM run_ends, "
            "(SELECT sum(wall_us) AS busy FROM steps)"
        )
    print(
        f"  the recorder's own account: {100 * own['main'][0]:.2f} % of the time of all steps between them, and "
        f"{100 * own['writer'][0]:.2f} % processor time of its thread"
    )


if __name__ == "__main__":
    main()
