"""Our engine against llama-server: the same drafted and accepted counts, and how fast, in one interleaved run.

    python benchmarks/llama_server.py --server PATH/llama-server MODEL.gguf [MODEL2.gguf ...]

Build the server from the source that llama-cpp-python was built from: `benchmarks/build_llama_server.sh FOLDER`.
Speeds are tokens after the first per second of generation, as each side reports it.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import time
import urllib.request
from contextlib import ExitStack

from common import interleaved, middle, ratio
from tracekit.engine import Engine, Settings
from tracekit.model.prompt_sets import load
from tracekit.policy.rule import rule

LENGTHS = (0, 1, 4, 8)
N_CTX = 512  # llama-server caps a slot at the trained context


class Server:
    """One llama-server process with a fixed draft length."""

    def __init__(self, binary: str, model: str, n_max: int, threads: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [binary, "-m", model, "--port", str(self.port), "-c", str(N_CTX), "-np", "1", "-t", str(threads), "--cache-ram", "0"]
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
        body = {"prompt": tokens, "n_predict": n_predict, "temperature": 0, "cache_prompt": False, "return_tokens": True}
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


def compare(model: str, args: argparse.Namespace) -> None:
    with ExitStack() as stack:
        settings = Settings(n_ctx=N_CTX, n_max=max(LENGTHS))
        engine = stack.enter_context(Engine(model, settings=settings))
        servers = {n: stack.enter_context(Server(args.server, model, n, settings.threads)) for n in LENGTHS}
        prompts = [engine.model.tokenize(p.prompt) for p in load(args.prompts)[:: args.every]]
        equal, compared = 0, 0

        def ours(n: int) -> float:
            engine.set_arm(mtp=n > 0)
            done = [engine.generate(p, max_tokens=args.max_tokens, policy=rule("static")(n_max=n)) for p in prompts]
            last[n] = done
            return 1e6 * sum(len(d.tokens) - 1 for d in done) / sum(d.generate_us for d in done)

        def theirs(n: int) -> float:
            nonlocal equal, compared
            done = [servers[n].generate(p, args.max_tokens) for p in prompts]
            for a, b in zip(last.get(n, []), done, strict=False):
                same = a.tokens[: len(b["tokens"])] == b["tokens"]
                drafts = (b["timings"].get("draft_n", 0), b["timings"].get("draft_n_accepted", 0))
                compared += 1
                equal += same and (a.drafted, a.accepted) == drafts
                if same and (a.drafted, a.accepted) != drafts:
                    differences.append(f"n_max {n}: ours {(a.drafted, a.accepted)}, llama-server {drafts}, ended by {a.stop}")
            return 1e3 * sum(d["timings"]["predicted_n"] - 1 for d in done) / sum(d["timings"]["predicted_ms"] for d in done)

        last: dict = {}
        differences: list[str] = []
        arms = {f"{side.__name__} {n}": (lambda side=side, n=n: side(n)) for n in LENGTHS for side in (ours, theirs)}
        for arm in arms.values():
            arm()  # a round that is not counted
        equal = compared = 0
        differences.clear()
        values = interleaved(arms, args.repeats)
    print(f"\n{model}: {len(prompts)} prompts x {args.max_tokens} tokens, greedy, {settings.threads} threads, {args.repeats} interleaved repeats")
    print(f"tokens and (drafted, accepted) equal llama-server's in {equal} of {compared} comparisons")
    for line in sorted(set(differences)):
        print(f"  {line}")
    print(f"{'n_max':>5}  {'ours, tokens/s':>28}  {'llama-server':>28}  ratio")
    for n in LENGTHS:
        a, b = values[f"ours {n}"], values[f"theirs {n}"]
        print(f"{n:5d}  {middle(a):>28}  {middle(b):>28}  {ratio(a, b)}")
    print(f"median over draft lengths: {statistics.median(statistics.median(values[f'ours {n}']) / statistics.median(values[f'theirs {n}']) for n in LENGTHS):.3f}")


if __name__ == "__main__":
    main()
