"""The simulator's speed: verifications per second and core, against its interpreted twin and against C.

    python benchmarks/kernel.py [--positions 1000000]

The C loop does the same bookkeeping (histograms, sums over context, catch-up) by hand for one policy; `cc` must be
there.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from tracekit.policy.rule import Policy, rule
from tracekit.replay import kernel, link
from tracekit.replay.arrays import ANY, Positions
from tracekit.replay.simulate import arrays_of

N_MAX, TOKENS = 8, 512

C_SOURCE = r"""
#include <stdint.h>
#include <stdbool.h>
#define MIN(a, b) ((a) < (b) ? (a) : (b))
/* policy 0: static; 1: fallback with ratio, zero-accept trip and resumption */
void walk(int policy, int64_t n_max, double min_ratio, int zero_trip, int64_t resume_after,
          int64_t n_requests, const int64_t *first, const int64_t *n_generated, const int64_t *n_prompt,
          const int64_t *max_tokens, const int64_t *n_ctx, const uint8_t *match, const uint8_t *known,
          int64_t *out, int64_t n_counts, int64_t widths) {
    for (int64_t r = 0; r < n_requests; r++) {
        int64_t *counts = out + r * n_counts, g = 1, behind = n_max ? 1 : n_prompt[r] + 1, before = 0;
        int64_t accepted = 0, emitted = 0, trips = 0, inexact = 0, kv_all = 0, kv_drafted = 0, lc = 0, lr = 0;
        int64_t past_width = 0, kv_one = 0, captures_one = 0, reshapes = 0, reshapes_one = 0, past_draft = 0;
        int64_t draft_reshapes = 0, drafted_before = -1, kv_before = -1, rows_before = 0, plain = 0;
        int64_t captures = 0, draft_captures = 0, settling = 0, calm = 0;
        bool fresh = false, draft_fresh = false;
        int64_t room = MIN(n_ctx[r] - n_prompt[r] - 1, max_tokens[r] - 1);
        bool tripped = false, judged = false;
        while (g < n_generated[r]) {
            int64_t past = n_prompt[r] + g - 1, asked = policy && tripped ? 0 : n_max, n = MIN(asked, room - g);
            int64_t drafted = 0;
            accepted = 0;
            if (n > 0) {
                int64_t p = first[r] + g - 1;
                drafted = n;
                accepted = MIN(drafted, (int64_t) match[p]);
                inexact += drafted > known[p];
                past_draft += past * (n - 1 + (behind < widths ? behind : 1));
                if (behind < widths) counts[behind + SCALARS + widths]++; else { lc++; lr += behind; }
                bool other = behind != rows_before;
                draft_reshapes += other + (n > 1 && behind != 1);
                draft_captures += (draft_fresh && !other) + (n > 1 && (behind == 1 ? other : n > 2));
                draft_fresh = n > 1 ? behind != 1 && n == 2 : other;
                rows_before = n == 1 ? behind : 1;
                behind = calm = 0;
            } else {
                trips += asked == 0 && before > 0;
                settling += calm < CALM ? CALM - calm : 0;
                calm++;
            }
            before = asked;
            emitted = MIN(accepted + 1, n_generated[r] - g);
            counts[SCALARS + 1 + drafted]++;
            int64_t kv = (past + 1 + drafted + 255) & -256;
            bool other = drafted != drafted_before || kv != kv_before;
            captures += fresh && !other;
            captures_one += fresh && !other && !drafted;
            fresh = other;
            reshapes += fresh && drafted;
            reshapes_one += fresh && !drafted;
            drafted_before = drafted;
            kv_before = kv;
            kv_all += kv;
            kv_drafted += kv * drafted;
            kv_one += drafted ? 0 : kv;
            past_width += past * (drafted + 1);
            if (policy) {
                if (tripped) {
                    plain += emitted;
                    if (resume_after > 0 && plain >= resume_after) { tripped = judged = false; plain = 0; }
                } else if (drafted) {
                    if (zero_trip && accepted == 0) { tripped = true; plain = 0; }
                    else if (!judged) { judged = true; tripped = accepted < min_ratio * drafted; plain = 0; }
                }
            }
            g += emitted; behind += emitted;
        }
        int64_t steps = 0, drafted = 0, rounds = lc;
        for (int64_t i = 1; i < widths; i++) {
            steps += counts[SCALARS + i];
            drafted += counts[SCALARS + i] * (i - 1);
            rounds += counts[SCALARS + widths + i];
        }
        int64_t s[SCALARS] = {steps, steps - counts[SCALARS + 1], drafted,
                              n_generated[r] - 1 - steps + accepted + 1 - emitted, n_generated[r] - 1, rounds, drafted,
                              trips, inexact, kv_all - kv_one, kv_all - kv_one + kv_drafted, kv_drafted, lc, lr,
                              n_max > 0, n_max ? n_prompt[r] : 0, draft_reshapes, 0, 0,
                              captures - captures_one, captures_one, draft_captures, settling, n_generated[r] > 1,
                              past_width, kv_one, reshapes, reshapes_one, past_draft};
        for (int i = 0; i < SCALARS; i++) counts[i] = s[i];
    }
}
"""


def positions(total: int, seed: int = 0) -> Positions:
    """Requests of 512 tokens whose acceptance comes in good and bad stretches."""
    rng = np.random.default_rng(seed)
    n = total // (TOKENS - 1)
    size = n * (TOKENS - 1)
    p = np.repeat(rng.choice([0.15, 0.6, 0.9], size // 32 + 1), 32)[:size]
    match = np.minimum(rng.geometric(1 - p) - 1, N_MAX).astype(np.uint8)
    return Positions(
        first=np.arange(n, dtype=np.int64) * (TOKENS - 1),
        n_generated=np.full(n, TOKENS),
        n_prompt=np.full(n, 200),
        max_tokens=np.full(n, TOKENS),
        n_ctx=np.full(n, 4096),
        match=match,
        known=np.full(size, ANY, np.uint8),
        probs=rng.random((size, N_MAX)).astype(np.float32),
        categories=("all",) * n,
        prompt_ids=tuple(str(i) for i in range(n)),
        mode="probe",
    )


def c_walk(folder: Path):
    """The C loop, compiled with ``cc -O3``."""
    (folder / "walk.c").write_text(C_SOURCE)
    subprocess.run(
        [
            "cc",
            "-O3",
            f"-DSCALARS={kernel.N_SCALARS}",
            f"-DCALM={kernel.CALM}",
            "-march=native",
            "-shared",
            "-fPIC",
            "-o",
            folder / "walk.so",
            folder / "walk.c",
        ],
        check=True,
    )
    return ctypes.CDLL(str(folder / "walk.so")).walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    p = positions(args.positions)
    few = positions(20_000)
    size = kernel.n_counts(N_MAX)
    n_bytes = sum(a.nbytes for a in arrays_of(p))
    print(
        f"{len(p.match)} positions, {p.n_requests} requests, arrays of {n_bytes / 1e6:.0f} MB; one core, "
        f"{args.repeats} repeats, medians (range)"
    )
    print(f"{'policy':44s} {'M verifications/s':>26s} {'M steps/s':>12s} {'x C -O3':>24s} {'x interpreted':>14s}")
    with tempfile.TemporaryDirectory() as folder:
        walk = c_walk(Path(folder))
        for policy, c_arguments in (
            *((rule("static")(n_max=n), (0, n, 0.0, 0, 0)) for n in (1, 4, 8)),
            (rule("fallback")(n_max=4, min_ratio=0.0, zero_trip=False), (1, 4, 0.0, 0, 0)),
            (rule("fallback")(n_max=8, min_ratio=0.0, resume_after=1), (1, 8, 0.0, 1, 1)),
            (rule("fallback")(n_max=4, min_ratio=0.5, resume_after=16), (1, 4, 0.5, 1, 16)),
            (rule("static")(n_max=8, p_min=0.5), None),
        ):
            row(policy, c_arguments, p, few, size, walk, args.repeats)


def row(policy: Policy, c_arguments: tuple | None, p: Positions, few: Positions, size: int, walk, repeats: int) -> None:
    run, twin = link.compiled(policy.rule), link.interpreted(policy.rule).run

    def ours(which, on: Positions) -> tuple[np.ndarray, float]:
        out = np.zeros((1, on.n_requests))
        detail = np.zeros((1, on.n_requests, size), np.int64)
        arguments = np.array([policy.row()]), np.array([False]), arrays_of(on), np.ones(size), out, detail
        started = time.perf_counter()
        which(*arguments)
        return detail[0], time.perf_counter() - started

    def theirs() -> tuple[np.ndarray, float]:
        out = np.zeros((p.n_requests, size), np.int64)
        pointers = [
            a.ctypes.data_as(ctypes.c_void_p)
            for a in (p.first, p.n_generated, p.n_prompt, p.max_tokens, p.n_ctx, p.match, p.known)
        ]
        kind, n, ratio, zero, resume = c_arguments
        started = time.perf_counter()
        walk(
            kind, ctypes.c_int64(n), ctypes.c_double(ratio), zero, ctypes.c_int64(resume),
            ctypes.c_int64(p.n_requests), *pointers,
            out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(size), ctypes.c_int64(N_MAX + 2),
        )  # fmt: skip  # one call of C
        return out, time.perf_counter() - started

    ours(run, p)
    mine, c_times = [], []
    for _ in range(repeats):
        counts, seconds = ours(run, p)
        mine.append(seconds)
        if c_arguments:
            c_counts, seconds = theirs()
            assert (c_counts == counts).all(), f"{policy}: C and the compiled policy count differently"
            c_times.append(seconds)
    slow_counts, slow = ours(twin, few)
    fast_counts, fast = ours(run, few)
    assert (slow_counts == fast_counts).all(), f"{policy}: the interpreted twin counts differently"
    steps, verifications = counts[:, kernel.STEPS].sum(), counts[:, kernel.VERIFICATIONS].sum()
    speeds = [verifications / s / 1e6 for s in mine]
    against_c = [c / m for c, m in zip(c_times, mine, strict=True)] if c_times else []
    c_text = f"{statistics.median(against_c):.2f} ({min(against_c):.2f} - {max(against_c):.2f})" if against_c else "-"
    speed_text = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} - {max(speeds):.0f})"
    print(
        f"{policy.label:44s} {speed_text:>26s} {steps / statistics.median(mine) / 1e6:12.0f} {c_text:>24s} "
        f"{slow / fast:14.0f}"
    )


if __name__ == "__main__":
    main()
