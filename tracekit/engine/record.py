"""Recording sessions: which requests run, in which arms, so that a trace answers every question it will be asked.

A probe recording serves every prompt several times, a few tokens each but for the probe itself: without MTP (the baseline), with MTP
idle, and with a fixed draft length (what live steps cost). The arms of a prompt follow each other, so that a
machine that slows down slows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tracekit.engine.engine import Engine
from tracekit.engine.slot import Completion, Request
from tracekit.policy.rule import rule

BASELINE_TOKENS = 48

Progress = Callable[[int, int], None]


def record(engine: Engine, requests: Sequence[Request], baseline: bool, progress: Progress | None = None) -> list[Completion]:
    """Serve ``requests`` in an engine that records; returns their completions, in order.

    ``baseline`` adds the arms without MTP, idle, and with fixed draft lengths (1, 2, 4, ... in turn), of at most 48 tokens each.
    ``progress(done, total)`` counts tokens.
    """
    n_slots, n_max = engine.settings.n_slots, engine.settings.n_max
    lengths = [0, *(1 << i for i in range(n_max.bit_length()) if 1 << i <= n_max)] if n_max else [0]
    short = [replace(r, max_tokens=min(r.max_tokens, BASELINE_TOKENS), arm="calibration") for r in requests]
    per_prompt = sum(r.max_tokens for r in requests) + (3 * sum(r.max_tokens for r in short) if baseline else 0)
    finished: dict[str, Completion] = {}
    done = 0
    for start in range(0, len(requests), n_slots):
        group, briefly = list(requests[start : start + n_slots]), short[start : start + n_slots]
        arms: list[tuple[str, list[Request]]] = [("main", group)]
        if baseline:
            fixed = rule("static")(n_max=lengths[1 + start // n_slots % (len(lengths) - 1)]) if n_max else rule("off")()
            arms = [
                ("no_mtp", [replace(r, policy=rule("off")()) for r in briefly]),
                ("idle", [replace(r, policy=rule("off")()) for r in briefly]),
                ("fixed", [replace(r, policy=fixed) for r in briefly]),
                *arms,
            ]
        for arm, chosen in arms:
            engine.set_arm(mtp=arm != "no_mtp", probing=arm == "main")
            for completion in engine.run(chosen):
                done += completion.request.max_tokens
                if arm == "main":
                    finished[completion.request.prompt_id] = completion
                if progress:
                    progress(done, per_prompt)
    return [finished[r.prompt_id] for r in requests]
