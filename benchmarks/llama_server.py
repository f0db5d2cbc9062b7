"""Our engine against llama-server: the same drafted and accepted counts, and how fast, in one interleaved run.

    python benchmarks/llama_server.py --server PATH/llama-server MODEL.gguf [MODEL2.gguf ...]

Build the server from the source that llama-cpp-python was built from: `benchmarks/build_llama_server.sh FOLDER`.
Every repeat starts the engine's and the servers' contexts anew: on a deep model two engines alike differ by 3.5 %, for
as long as they live. Speeds are tokens after the first per second of generation, as each side reports it; catching up
the prompt in the MTP context counts as reading the prompt on both sides, hence the last column for the whole request.
They are compared over the requests in which both sides did the same work. The column `at most` is the ratio that would
be measured if nothing but llama.cpp's decodes took our engine any time: what is left to gain here.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from common import Clock, middle, ratio

from tracekit.engine import Engine, Request, Settings, lib
from tracekit.model.prompt_sets import load
from tracekit.policy.llama_cpp import server_options
from tracekit.policy.rule import Policy
from tracekit.policy.spec import parse

POLICIES = parse("off,static:n_max=1,4,8,static:n_max=8,p_min=0.425")
N_CTX = 512  # llama-server caps a slot at the trained context


class Run(NamedTuple):
    """One request on either side."""

    tokens: list[int]
    drafts: tuple[int, int]
    prompt_ms: float
    generate_ms: float
    decode_ms: float = 0.0  # of generating, in llama.cpp's decodes; the server does not tell


class Server:
    """One llama-server process under a policy that it has options for."""

    def __init__(self, binary: str, model: str, policy: Policy, settings: Settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            binary,
            "-m",
            model,
            "--port",
            str(self.port),
            "-c",
            str(N_CTX),
            "-np",
            "1",
            "-t",
            str(settings.threads),
            "--flash-attn",
            settings.flash_attn,
            "--cache-ram",
            "0",
            *server_options(policy),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        raise SystemExit(f"{binary} did not start with {model}")

    def generate(self, tokens: list[int], n_predict: int) -> dict:
        """llama-server's answer to a greedy completion of ``tokens``."""
        body = {
            "prompt": tokens,
            "n_predict": n_predict,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=300))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--server", required=True)
    parser.add_argument("--prompts", default="heldout")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flash-attn", default="auto", choices=["on", "off", "auto"], help="on both sides")
    parser.add_argument("--every", type=int, default=2, help="take every n-th prompt")
    args = parser.parse_args()
    clock = Clock()
    lib.decode = clock.timing(lib.decode)
    for model in args.models:
        compare(model, args, clock)


class Sides(NamedTuple):
    """The engine and the servers, by policy, on one model."""

    engine: Engine
    servers: dict[Policy, Server]
    max_tokens: int
    clock: Clock

    def ours(self, policy: Policy, prompt: list[int]) -> Run:
        """The engine's run under ``policy``."""
        self.engine.set_arm(mtp=policy.name != "off")
        self.engine.submit(Request(prompt, self.max_tokens, policy=policy))
        done = self.engine.step()  # reads the prompt, and catches it up
        before = self.clock.ns
        while not done:
            done = self.engine.step()
        (d,) = done
        drafts, prompt_us, decode_ns = (d.drafted, d.accepted), d.prompt_us + d.catchup_us, self.clock.ns - before
        return Run(d.tokens, drafts, prompt_us / 1e3, d.generate_us / 1e3, decode_ns / 1e6)

    def theirs(self, policy: Policy, prompt: list[int]) -> Run:
        """The server's."""
        answer = self.servers[policy].generate(prompt, self.max_tokens)
        t = answer["timings"]
        drafts = t.get("draft_n", 0), t.get("draft_n_accepted", 0)
        return Run(answer["tokens"], drafts, t["prompt_ms"], t["predicted_ms"])


def compare(model: str, args: argparse.Namespace, clock: Clock) -> None:
    settings = Settings(n_ctx=N_CTX, flash_attn=args.flash_attn)
    rng, runs = random.Random(0), defaultdict(list)
    for repeat in range(args.repeats):
        with ExitStack() as stack:
            engine = stack.enter_context(Engine(model, settings=settings))
            servers = {p: stack.enter_context(Server(args.server, model, p, settings)) for p in POLICIES}
            sides = Sides(engine, servers, args.max_tokens, clock)
            prompts = [engine.model.tokenize(p.prompt) for p in load(args.prompts)[:: args.every]]
            # not timed: warms both up, and gives the counts to compare
            pairs = [(p, text, sides.ours(p, text), sides.theirs(p, text)) for p in POLICIES for text in prompts]
            arms = [(side, p) for p in POLICIES for side in (sides.ours, sides.theirs)]
            for prompt in prompts:
                for side, policy in rng.sample(arms, len(arms)):
                    runs[side.__name__, policy, repeat].append(side(policy, prompt))
            # drafts that two tokens are as good for: which, depends on where the request before left the server's cells
            other_counts = [
                (p, prompts.index(text), a, b, [sides.theirs(p, text) for _ in range(2)][-1])
                for p, text, a, b in pairs
                if a.tokens == b.tokens and a.drafts != b.drafts
            ]
    print(
        f"\n{model}: {len(prompts)} prompts x {args.max_tokens} tokens, greedy, {settings.threads} threads, "
        f"{args.repeats} repeats, each with new contexts, interleaved by prompt"
    )
    equal = sum(same_work(a, b) for _, _, a, b in pairs)
    print(f"tokens and (drafted, accepted) equal llama-server's in {equal} of {len(pairs)} requests")
    for policy, prompt, a, b, c in other_counts:
        print(f"  {policy}, prompt {prompt}: ours {a.drafts}, llama-server {b.drafts}, and twice in a row {c.drafts}")
    heads = f"{'ours, tokens/s':>26}  {'llama-server, tokens/s':>26}"
    print(f"{'policy':26}  {'accepted':>8}  {heads}  {'ratio':>30}  {'at most':>30}  {'ratio, whole request':>30}")
    for policy in POLICIES:
        speeds = defaultdict(list)
        for repeat in range(args.repeats):
            both = zip(runs["ours", policy, repeat], runs["theirs", policy, repeat], strict=True)
            same = [pair for pair in both if same_work(*pair)]
            if not same:
                raise SystemExit(f"{policy}: in no request did both sides do the same work; no speed to compare")
            for who, of in zip(("ours", "theirs"), zip(*same, strict=True), strict=True):
                speeds[who].append(speed(of, sum(r.generate_ms for r in of)))
                speeds[who, "whole"].append(speed(of, sum(r.generate_ms + r.prompt_ms for r in of)))
                if who == "ours":
                    speeds["decodes"].append(speed(of, sum(r.decode_ms for r in of)))
        drafted, accepted = (sum(ours.drafts[i] for p, _, ours, _ in pairs if p == policy) for i in (0, 1))
        share = f"{100 * accepted / drafted:.0f} %" if drafted else "-"
        a, b = speeds["ours"], speeds["theirs"]
        ratios = ratio(a, b), ratio(speeds["decodes"], b), ratio(speeds["ours", "whole"], speeds["theirs", "whole"])
        print(f"{policy!s:26}  {share:>8}  {middle(a):>26}  {middle(b):>26}  " + "  ".join(f"{r:>30}" for r in ratios))


def same_work(a: Run, b: Run) -> bool:
    """Whether two runs have the same tokens, drafted and accepted alike."""
    return a.tokens == b.tokens and a.drafts == b.drafts


def speed(runs: Sequence[Run], ms: float) -> float:
    """Tokens after the first per second of ``ms``."""
    return 1e3 * sum(len(r.tokens) - 1 for r in runs) / ms


if __name__ == "__main__":
    main()
