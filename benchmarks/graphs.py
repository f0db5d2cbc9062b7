"""Do graphs of many rows come back? What CUDA captures is decoded over and over, by the drafter and by the target.

    python benchmarks/graphs.py MODEL.gguf --seconds 20

For GPUs on which llama.cpp has ended a recording with an error of CUDA's, or hung (docs/cuda.md). A decode of the shape
of the one before is captured; above sixteen rows its products are cuBLAS's. Each arm is a process of its own, so that
what hangs can be ended: as llama.cpp does it, without programmatic dependent launch, and without graphs. An arm that
fails as it is, and none that fails without graphs, tells where to look. On a processor nothing is captured.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from tracekit.engine import Engine, Settings
from tracekit.engine.context import Batch
from tracekit.engine.drafter import Ask

ARMS = {"as it is": {}, "GGML_CUDA_PDL=0": {"GGML_CUDA_PDL": "0"}, "no graphs": {"GGML_CUDA_DISABLE_GRAPHS": "1"}}
LEAST = 17  # rows


def main() -> None:
    """Run every arm of both decodes, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=20, help="of each of the six")
    parser.add_argument("--patience", type=float, default=60, help="seconds beyond these after which one hangs")
    parser.add_argument("--decodes", choices=DECODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decodes:
        print(shapes(args.model, args.seconds, *DECODES[args.decodes]))
        return
    for whose in DECODES:
        for arm, variables in ARMS.items():
            command = [sys.executable, __file__, args.model, "--seconds", str(args.seconds), "--decodes", whose]
            try:
                done = subprocess.run(
                    command, env=os.environ | variables, capture_output=True, text=True,
                    timeout=args.seconds + args.patience,
                )  # fmt: skip  # what is run, then how
                told = f"{done.stdout.strip()} shapes twice each, all came back"
                if done.returncode:
                    said = (done.stderr.strip() or "nothing said").splitlines()[-1]
                    told = f"ends with code {done.returncode}: {said}"
            except subprocess.TimeoutExpired:
                told = "hangs"
            print(f"{whose:8} {arm:16} {told}", flush=True)


def shapes(model: str, seconds: float, twice: Callable[[Engine, int], None], most: int) -> int:
    """Decode other numbers of rows, up to ``most``, for so long; returns how many came back."""
    rng, n, ends = random.Random(0), 0, time.monotonic() + seconds
    with Engine(model, None, Settings(n_max=1)) as engine:
        while time.monotonic() < ends:
            twice(engine, rng.randint(LEAST, most))
            n += 1
    return n


def caught_up(engine: Engine, rows: int) -> None:
    """Catch up a prompt in the MTP context twice, as two arms of a recording do."""
    drafter, hidden = engine._drafter, np.zeros((rows, engine.model.facts.n_embd), np.float32)
    for _ in range(2):
        drafter.forget(0)
        drafter.extend(0, hidden, 0, rows)
        drafter.catch_up(0, [1] * (rows + 1))
        drafter.draft([Ask(0, [1] * (rows + 1), 1, 0.0)], probs=False)


def verified(engine: Engine, rows: int) -> None:
    """Decode as many rows in the target twice in a row, as steps of several slots do."""
    batch = Batch(rows)
    for k in range(2):
        batch.n = 0
        batch.extend([1] * rows, k * rows, 0, True)
        engine._target.decode(batch)
    engine._target.remove(0, 0)


DECODES = {"drafter": (caught_up, 300), "target": (verified, 75)}  # and up to how many rows

if __name__ == "__main__":
    main()
