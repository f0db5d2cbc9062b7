"""Choosing drafts and tokens on the device (llama.cpp's backend samplers) against copying the logits and choosing here.

    python benchmarks/backend_sampling.py MODEL.gguf [MODEL2.gguf ...]

What is saved is a copy of the vocabulary's logits per draft and per verified row, and a pass over it on the host; what
is paid is a few small operations in the graph. The reference model's vocabulary of 2,048 has little of either; beside a
processor nothing is copied anyway. Every arm is an engine of its own, with the model in memory: name fewer with --arms
where that is too much. All arms must draft, accept and generate the same, or the script says so and fails.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from contextlib import ExitStack

from common import middle, ratio

from tracekit.engine import Engine, Request, Sampling, Settings
from tracekit.engine.provenance import device_name
from tracekit.model.prompt_sets import load
from tracekit.policy.spec import parse_one

ARMS = {"drafts": (True, False), "target": (False, True), "both": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--draft-model", help="sidecar GGUF that holds the NextN layers")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--policy", nargs="+", default=["static:n_max=4", "static:n_max=4,p_min=0.1"])
    parser.add_argument("--temp", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--prompts", default="heldout")
    parser.add_argument("--every", type=int, default=3, help="take every n-th prompt")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    print(f"devices: {device_name()}")
    for model in args.models:
        compare(model, args)


def compare(model: str, args: argparse.Namespace) -> None:
    arms = {"host": (False, False)} | {name: ARMS[name] for name in args.arms}
    cases = [(p, t) for p in args.policy for t in args.temp]
    runs, told = defaultdict(list), {}
    with ExitStack() as stack:
        engines = {}
        for name, (drafts, target) in arms.items():
            settings = Settings(threads=args.threads, spec_draft_backend_sampling=drafts, backend_sampling=target)
            engine = stack.enter_context(Engine(model, settings=settings, draft_model=args.draft_model))
            if (engine.settings.spec_draft_backend_sampling, engine.settings.backend_sampling) != (drafts, target):
                raise SystemExit(f"{model}: the device does not run the samplers of the arm {name}")
            engines[name] = engine
        prompts = load(args.prompts)[:: args.every]
        rng = random.Random(0)
        for repeat in range(args.repeats + 1):  # the first warms up, and is compared
            for case in cases:
                for i, prompt in enumerate(prompts):
                    for name in rng.sample(list(arms), len(arms)):
                        sampling = Sampling(temp=case[1], seed=i)
                        request = Request(prompt.prompt, args.max_tokens, sampling, policy=parse_one(case[0]))
                        (done,) = engines[name].run([request])
                        same = told.setdefault((case, i), (done.tokens, done.rounds))
                        if (done.tokens, done.rounds) != same:
                            raise SystemExit(f"{model}: {name} differs at {case}, prompt {prompt.id}")
                        if repeat:
                            runs[case, name, repeat].append((len(done.tokens) - 1, done.speculated_us))
        vocabulary, threads = engines["host"].model.facts.n_vocab, engines["host"].settings.threads
    print(
        f"\n{model}: vocabulary {vocabulary}, {len(prompts)} prompts x {args.max_tokens} tokens, {threads} threads, "
        f"{args.repeats} repeats, interleaved by prompt; tokens and drafts equal in all arms"
    )
    print(f"{'policy':28}{'temp':>5}  {'on the device':14}{'tokens/s':>26}  {'x host':>30}")
    for case in cases:
        speeds = {name: [speed(runs[case, name, k]) for k in range(1, args.repeats + 1)] for name in arms}
        for name, values in speeds.items():
            where = "nothing" if name == "host" else name
            print(f"{case[0]:28}{case[1]:5}  {where:14}{middle(values):>26}  {ratio(values, speeds['host']):>30}")


def speed(runs: list[tuple[int, int]]) -> float:
    """Tokens after the first per second."""
    return 1e6 * sum(n for n, _ in runs) / sum(us for _, us in runs)


if __name__ == "__main__":
    main()
