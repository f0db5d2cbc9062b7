"""Recording sessions: which requests run, in which arms, so that a trace answers every question it will be asked.

A probe recording serves every prompt several times, a few tokens each but for the probe itself: without MTP (the
baseline), with MTP idle, and with a fixed draft length (what live steps cost); where the target takes snapshots of
its state, also with MTP loaded and off. The arms of a prompt follow each
other, so that a machine that slows down slows all of them. Over several slots the arms serve a wave of prompts, two for
each slot, so that prompts are read beside generation and slots run empty, as they do in serving.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from tracekit.engine.engine import Engine
from tracekit.engine.sampling import Sampling
from tracekit.engine.slot import Completion, Request
from tracekit.policy.rule import rule

BASELINE_TOKENS = 48

Progress = Callable[[int, int], None]


class _Prompt(Protocol):
    id: str
    category: str
    prompt: str


def as_requests(prompts: Sequence[_Prompt], max_tokens: int, sampling: Sampling) -> list[Request]:
    """A request for each prompt; request ``i`` samples with the seed of ``sampling`` plus ``i``."""
    seeded = [replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
    return [
        Request(p.prompt, max_tokens, own, prompt_id=p.id, category=p.category)
        for p, own in zip(prompts, seeded, strict=True)
    ]


def wave_of(n_slots: int) -> int:
    """Prompts that are served together: one at a time on one slot, two for each of several."""
    return 1 if n_slots == 1 else 2 * n_slots


def record(
    engine: Engine,
    requests: Sequence[Request],
    baseline: bool,
    progress: Progress | None = None,
    turn: int = 0,
) -> list[Completion]:
    """Serve ``requests`` in an engine that records; returns their completions, in order.

    ``baseline`` adds the arms without MTP, with MTP off where the target takes snapshots, idle, and with a fixed draft
    length (1, 2, 4, ... taking turns, from the ``turn``-th on), of at most 48 tokens each. ``progress(done, total)``
    counts tokens as many as requests may have.
    """
    n_max, wave = engine.settings.n_max, wave_of(engine.settings.n_slots)
    lengths = [1 << i for i in range(n_max.bit_length())] or [0]
    short = [replace(r, max_tokens=min(r.max_tokens, BASELINE_TOKENS), arm="calibration") for r in requests]
    arms_beside = 3 + engine.snapshots if baseline else 0
    total = sum(r.max_tokens for r in requests) + arms_beside * sum(r.max_tokens for r in short)
    for request in requests:
        engine.prepare(request)  # a prompt that cannot be served is refused before anything is recorded
    if baseline:
        engine.set_arm(mtp=False)  # so is a memory that does not hold the second context that snapshots make necessary
    finished: dict[str, Completion] = {}
    done = 0
    order = list(range(len(requests)))
    if baseline:
        # categories must not meet the machine's moods one after the other
        random.Random(0).shuffle(order)
    for start in range(0, len(requests), wave):
        group = [requests[i] for i in order[start : start + wave]]
        briefly = [short[i] for i in order[start : start + wave]]
        arms: list[tuple[str, list[Request]]] = [("main", group)]
        if baseline:
            length = lengths[(turn + start // wave) % len(lengths)]
            fixed = rule("static")(n_max=length) if length else rule("off")()
            arms = [
                ("no_mtp", [replace(r, policy=rule("off")()) for r in briefly]),
                *([("loaded", [replace(r, policy=rule("off")()) for r in briefly])] * engine.snapshots),
                ("idle", [replace(r, policy=rule("static")(n_max=0)) for r in briefly]),  # might draft: not over
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
                    progress(done, total)
    return [finished[r.prompt_id] for r in requests]
