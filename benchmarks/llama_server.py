"""Our engine against llama-server: the same drafted and accepted counts, and how fast, in one interleaved run.

    python benchmarks/llama_server.py --server PATH/llama-server MODEL.gguf [MODEL2.gguf ...]

Build the server from the source that llama-cpp-python was built from: `benchmarks/build_llama_server.sh FOLDER`.
Every repeat starts the engine's and the servers' contexts anew: on a deep model two engines alike differ by 3.5 %, for
as long as they live. Speeds are tokens after the first per second of generation, as each side reports it; catching up
the prompt in the MTP context counts as reading the prompt on both sides, hence the last column for the whole request.
They are compared over the requests in which both sides did the same work.
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

from common import middle, ratio

from tracekit.engine import Engine, Settings
from tracekit.model.prompt_sets import load
from tracekit.policy.rule import rule

LENGTHS = (0, 1, 4, 8)
N_CTX = 512  # llama-server caps a slot at the trained context


class Run(NamedTuple):
    """One request on either side."""

    tokens: list[int]
    drafts: tuple[int, int]
    prompt_ms: float
    generate_ms: float


class Server:
    """One llama-server process with a fixed draft length."""

    def __init__(self, binary: str, model: str, n_max: int, threads: int):
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
            str(threads),
            "--cache-ram",
            "0",
        ]
        if n_max:
            command += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_max)]
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
    parser.add_argument("--every", type=int, default=2, help="take every n-th prompt")
    args = parser.parse_args()
    for model in args.models:
        compare(model, args)


class Sides:
    """The engine and the servers, one for each draft length, on one model."""

    def __init__(self, model: str, args: argparse.Namespace):
        settings = Settings(n_ctx=N_CTX, n_max=max(LENGTHS))
        with ExitStack() as stack:
            self.engine = stack.enter_context(Engine(model, settings=settings))
            servers = [stack.enter_context(Server(args.server, model, n, settings.threads)) for n in LENGTHS]
            self._stack = stack.pop_all()
        self._servers = dict(zip(LENGTHS, servers, strict=True))
        self._max_tokens = args.max_tokens
        self.threads = settings.threads
        self.prompts = [self.engine.model.tokenize(p.prompt) for p in load(args.prompts)[:: args.every]]

    def ours(self, n: int, prompt: list[int]) -> Run:
        """The engine's run with ``n`` drafts."""
        self.engine.set_arm(mtp=n > 0)
        d = self.engine.generate(prompt, max_tokens=self._max_tokens, policy=rule("static")(n_max=n))
        return Run(d.tokens, (d.drafted, d.accepted), (d.prompt_us + d.catchup_us) / 1e3, d.generate_us / 1e3)

    def theirs(self, n: int, prompt: list[int]) -> Run:
        """The server's."""
        answer = self._servers[n].generate(prompt, self._max_tokens)
        t = answer["timings"]
        drafts = t.get("draft_n", 0), t.get("draft_n_accepted", 0)
        return Run(answer["tokens"], drafts, t["prompt_ms"], t["predicted_ms"])

    def all(self) -> dict[tuple[str, int], list[Run]]:
        """Every prompt on both sides at every length, in order: warms both up, and the counts to compare."""
        return {
            (side.__name__, n): [side(n, p) for p in self.prompts] for n in LENGTHS for side in (self.ours, self.theirs)
        }

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def compare(model: str, args: argparse.Namespace) -> None:
    rng, runs = random.Random(0), defaultdict(list)
    for repeat in range(args.repeats):
        with Sides(model, args) as sides:
            first, prompts = sides.all(), sides.prompts
            for prompt in prompts:
                arms = [(side, n) for n in LENGTHS for side in (sides.ours, sides.theirs)]
                for side, n in rng.sample(arms, len(arms)):
                    runs[side.__name__, n, repeat].append(side(n, prompt))
            # drafts that two tokens are as good for: which, depends on where the request before left the server's cells
            other_counts = [
                (n, i, a, b, [sides.theirs(n, prompts[i]) for _ in range(2)][-1])
                for n in LENGTHS
                for i, (a, b) in enumerate(zip(first["ours", n], first["theirs", n], strict=True))
                if a.tokens == b.tokens and a.drafts != b.drafts
            ]
    print(
        f"\n{model}: {len(prompts)} prompts x {args.max_tokens} tokens, greedy, {sides.threads} threads, "
        f"{args.repeats} repeats, each with new processes, interleaved by prompt"
    )
    pairs = [(n, a, b) for n in LENGTHS for a, b in zip(first["ours", n], first["theirs", n], strict=True)]
    equal = sum(a.tokens == b.tokens and a.drafts == b.drafts for _, a, b in pairs)
    print(f"tokens and (drafted, accepted) equal llama-server's in {equal} of {len(pairs)} requests")
    for n, prompt, a, b, c in other_counts:
        print(f"  n_max {n}, prompt {prompt}: ours {a.drafts}, llama-server {b.drafts}, and twice in a row {c.drafts}")
    sides = f"{'ours, tokens/s':>26}  {'llama-server, tokens/s':>26}"
    print(f"{'n_max':>5}  {'accepted':>8}  {sides}  {'ratio':>30}  ratio, whole request")
    for n in LENGTHS:
        speeds = defaultdict(list)
        for repeat in range(args.repeats):
            both = zip(runs["ours", n, repeat], runs["theirs", n, repeat], strict=True)
            same = list(zip(*((a, b) for a, b in both if (a.tokens, a.drafts) == (b.tokens, b.drafts)), strict=True))
            for whole in (False, True):
                for who, of in zip(("ours", "theirs"), same, strict=True):
                    speeds[who, whole].append(speed(of, whole))
        drafted, accepted = (sum(r.drafts[i] for r in first["ours", n]) for i in (0, 1))
        share = f"{100 * accepted / drafted:.0f} %" if drafted else "-"
        a, b = speeds["ours", False], speeds["theirs", False]
        both = ratio(speeds["ours", True], speeds["theirs", True])
        print(f"{n:5d}  {share:>8}  {middle(a):>26}  {middle(b):>26}  {ratio(a, b):>30}  {both}")


def speed(runs: Sequence[Run], whole: bool) -> float:
    """Tokens after the first per second, of generation or of the whole request."""
    ms = sum(r.generate_ms + (r.prompt_ms if whole else 0) for r in runs)
    return 1e3 * sum(len(r.tokens) - 1 for r in runs) / ms


if __name__ == "__main__":
    main()
