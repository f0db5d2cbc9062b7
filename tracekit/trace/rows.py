"""One tuple per row of a trace's tables, fields in the order of the columns in :mod:`tracekit.trace.schema` (a test
compares them); for a step, what its row is worked out of.
"""

from __future__ import annotations

from typing import NamedTuple

STOPS = "off", "n_max", "p_min", "room"  # why drafting stopped


class RunEnd(NamedTuple):
    """What is known when a run has ended."""

    run: int
    wall_us: int
    record_us: int
    writer_us: int
    n_checked: int
    n_diverged: int


class RequestRow(NamedTuple):
    """What is known when a request begins."""

    run: int
    request: int
    prompt_id: str
    category: str
    arm: str
    slot: int
    n_prompt: int
    max_tokens: int
    n_ctx: int
    temp: float
    seed: int
    top_k: int
    top_p: float
    min_p: float
    policy: str


class RequestEnd(NamedTuple):
    """What is known when a request has ended."""

    run: int
    request: int
    n_generated: int
    stop: str
    prompt_us: int
    catchup_us: int


class Moments(NamedTuple):
    """A step as the generating thread leaves it: moments, in nanoseconds of a monotonic clock, where its table has
    spans. Working those out can wait until they are written.
    """

    began_ns: int
    decided_ns: int
    filled_ns: int  # drafts made, batch filled
    decoded_ns: int
    sampled_ns: int
    learned_ns: int
    step: int
    mtp: bool
    n_slots: int
    n_tokens: int
    n_prompt: int
    n_past: int
    n_draft_decodes: int
    n_draft_slots: int
    n_catchup: int
    first_draft_us: int
    draft_us: int
    n_ahead: int
    ahead_us: int  # catching up prompts as they were read, between decoded_ns and sampled_ns
    catchup_us: int  # rows ahead of a draft
    record_ns: int  # in all steps before


class GpuReading(NamedTuple):
    """What one GPU was doing at one moment; -1 for what it does not tell."""

    run: int
    t_us: int
    gpu: int
    sm_clock_mhz: int
    mem_clock_mhz: int
    power_w: float
    temperature_c: int
    utilization_ratio: float
    memory_used_bytes: int


class Verification(NamedTuple):
    """One slot's share of one step."""

    run: int
    request: int
    step: int
    n_generated: int
    n_asked: int
    n_proposed: int
    n_drafted: int
    n_accepted: int
    n_matched: int
    n_redecoded: int
    n_decodes: int
    stop: str
    draft_ids: list[int]
    draft_probs: list[float]
    tokens: list[int]


def plain(run: int, request: int, step: int, n_generated: int, token: int) -> Verification:
    """The row of a slot that wanted no drafts, and so got one token."""
    return Verification(run, request, step, n_generated, 0, 0, 0, 0, 0, 0, 0, "off", [], [], [token])
