"""Run policies over the positions of a trace: the compiled walk, in chunks of policies so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import numpy as np

from tracekit.errors import TracekitError
from tracekit.policy.interface import Now
from tracekit.policy.rule import Policy, Rule
from tracekit.replay import kernel, link
from tracekit.replay.arrays import Positions

_CHUNK_BYTES = 32 << 20
_NO_TIMES = np.zeros((0, 0))


def arrays_of(p: Positions) -> tuple[np.ndarray, ...]:
    """The eight arrays of :func:`tracekit.replay.kernel.walk_all`."""
    return p.first, p.n_generated, p.n_prompt, p.max_tokens, p.n_ctx, p.match, p.known, p.probs


def times(policies: Sequence[Policy], positions: Positions, cost: np.ndarray) -> np.ndarray:
    """Microseconds of every policy on every request: float64 ``[n_policies, n_requests]``.

    ``cost``: microseconds per count. Raises :class:`TracekitError` for a policy the trace cannot answer.
    """
    out, no_counts = np.empty((len(policies), positions.n_requests)), np.zeros((0, 0, 0), np.int64)
    for run, chosen, rows, shared in by_rule(policies, positions, out[0].nbytes):
        part = np.empty((len(chosen), positions.n_requests))
        run(rows, shared, arrays_of(positions), cost, part, no_counts)
        out[chosen] = part
    return out


def counts(policies: Sequence[Policy], positions: Positions) -> np.ndarray:
    """All counts of every policy on every request: int64 ``[n_policies, n_requests, n_counts]``
    (:mod:`tracekit.replay.kernel`).
    """
    size = kernel.n_counts(positions.n_max)
    out = np.empty((len(policies), positions.n_requests, size), np.int64)
    for run, chosen, rows, shared in by_rule(policies, positions, out[0].nbytes):
        part = np.empty((len(chosen), *out.shape[1:]), np.int64)
        run(rows, shared, arrays_of(positions), np.zeros(size), _NO_TIMES, part)
        out[chosen] = part
    return out


def rounds(policy: Policy, positions: Positions) -> list[list[tuple[int, int]]]:
    """``(drafted, accepted)`` of every step of every request: what the engine's ``Completion.rounds`` will be.
    Interpreted.
    """
    check(policy, positions)
    module = link.interpreted(policy.rule)
    found: list[list[tuple[int, int]]] = []
    walk, learn = module.walk, module.learn

    def walking(*arguments):
        found.append([])
        return walk(*arguments)

    def listening(params, state, now, seen):
        found[-1].append((int(seen.n_drafted), int(seen.n_accepted)))
        return learn(params, state, now, seen)

    module.walk, module.learn = walking, listening
    try:
        size = kernel.n_counts(positions.n_max)
        counted, shared = np.empty((1, positions.n_requests, size), np.int64), np.array([policy.scope == "engine"])
        module.run(rows_of([policy]), shared, arrays_of(positions), np.zeros(size), _NO_TIMES, counted)
    finally:
        module.walk, module.learn = walk, learn
    steps = counted[0, :, kernel.STEPS]
    return [of + [(0, 0)] * (n - len(of)) for of, n in zip(found, steps, strict=True)]  # after NEVER nothing is learnt


def check(policy: Policy, positions: Positions) -> None:
    """Raise :class:`TracekitError` where ``policy`` begins with more drafts than the trace recorded, and has room to:
    nothing is known, or timed, there. One that begins with fewer may never come to its ``n_max``; what it asks for
    later counts as inexact (:mod:`tracekit.replay.kernel`).
    """
    wanted = getattr(policy.params, "n_max", 0)
    if min(wanted, positions.most_room) > positions.n_max and _begins(policy, positions) > positions.n_max:
        raise beyond(policy, positions)


def beyond(policy: Policy, positions: Positions) -> TracekitError:
    """What to tell where ``policy`` asks for more drafts than were recorded."""
    probe, most = "" if positions.mode == "probe" else "--mode probe ", positions.n_max
    return TracekitError(
        f"policy {policy}: asks for more drafts than the {most} that the trace has; record with {probe}--n-max "
        f"{getattr(policy.params, 'n_max', 'as high as it asks')}, or have it ask for {most} at most"
    )


def _begins(policy: Policy, positions: Positions) -> int:
    """Drafts that ``policy`` asks for first; its ``n_max`` where it raises."""
    now = Now(1, int(positions.n_prompt[0]), int(positions.max_tokens[0]) - 1, 1)
    try:
        return policy.decide(policy.begin(), now)[0]
    except Exception:  # whatever a user's policy may raise
        return policy.params.n_max


def by_rule(
    policies: Sequence[Policy], positions: Positions, bytes_each: int, simulator: ModuleType = kernel
) -> Iterator[tuple[Callable, np.ndarray, np.ndarray, np.ndarray]]:
    """``(compiled run, indices, rows, shared)`` for chunks of policies of one rule, of ``bytes_each`` of results."""
    groups: dict[Rule, list[int]] = {}
    for i, policy in enumerate(policies):
        check(policy, positions)
        groups.setdefault(policy.rule, []).append(i)
    most = max(1, _CHUNK_BYTES // bytes_each)
    for rule, members in groups.items():
        run = link.compiled(rule, simulator)
        for start in range(0, len(members), most):
            chosen = members[start : start + most]
            some = [policies[i] for i in chosen]
            yield run, np.array(chosen), rows_of(some), np.array([p.scope == "engine" for p in some])


def rows_of(policies: Sequence[Policy]) -> np.ndarray:
    """Parameters as float64 ``[n_policies, n_params]``; one idle column for policies without any."""
    return np.array([p.row() or [0.0] for p in policies])
