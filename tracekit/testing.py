"""A conformance suite that every policy must pass, ours or a user's: call :func:`check_policy` in a test of your own.

::

    from tracekit.testing import check_policy

    def test_my_policy():
        check_policy("./mine.py")
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from tracekit.policy.interface import NEVER, SCOPES, Now, Outcome
from tracekit.policy.rule import Policy, Rule
from tracekit.policy.rule import rule as load
from tracekit.policy.spec import expand
from tracekit.replay import kernel, link, lockstep
from tracekit.replay.arrays import ANY, Positions
from tracekit.replay.simulate import arrays_of, rows_of


def check_policy(rule: Rule | str | Path, n_variants: int = 8, seed: int = 0) -> None:
    """Assert everything an engine and a simulator rely on, for ``rule`` (or the one of that name or in that file) at
    its defaults and at random points of its space, over 1 to 16 slots.

    Decisions are whole numbers of drafts, 0 or more (or NEVER) and no more than a parameter ``n_max``, and a
    probability; every field of the state has its declared type; the functions are pure and raise nothing; both
    simulators make the steps that these functions themselves make. Raises ``AssertionError`` saying what failed, with
    the policy and the step; :class:`~tracekit.errors.TracekitError` for a file that is no policy or cannot be compiled.
    """
    rng = random.Random(seed)
    positions = random_positions(rng, n_requests=24, n_max=8)
    for policy in _variants(rule if isinstance(rule, Rule) else load(rule), n_variants, rng):
        expected = {n_slots: _rounds(policy, positions, n_slots) for n_slots in (1, 3, 16)}
        _check_compiled(policy, positions, expected[1])
        for n_slots, steps in expected.items():
            _check_lockstep(policy, positions, n_slots, steps)


def random_positions(rng: random.Random, n_requests: int, n_max: int, probe: bool = True) -> Positions:
    """Made-up positions with stretches of good and bad drafts, some of them unknown unless ``probe``."""
    n_generated = np.array([rng.randint(2, 80) for _ in range(n_requests)], np.int64)
    total = int((n_generated - 1).sum())
    match, known, probs = np.zeros(total, np.uint8), np.full(total, ANY, np.uint8), np.zeros((total, n_max), np.float32)
    first = np.concatenate(([0], np.cumsum(n_generated - 1)))[:-1]
    good = 0.5
    for r in range(n_requests):
        for g in range(1, n_generated[r]):
            good = rng.choice((0.05, 0.5, 0.95)) if rng.random() < 0.1 else good
            p = first[r] + g - 1
            while match[p] < min(n_max, n_generated[r] - g) and rng.random() < good:
                match[p] += 1
            probs[p] = [
                rng.random() * (1 if j >= match[p] else 0.5) + (0.5 if j < match[p] else 0) for j in range(n_max)
            ]
            if match[p] == n_max:
                known[p] = n_max
            if not probe and rng.random() < 0.4:
                match[p] = known[p] = 0
                probs[p] = -1.0
    return Positions(
        first=first,
        n_generated=n_generated,
        n_prompt=np.array([rng.randint(1, 40) for _ in range(n_requests)], np.int64),
        max_tokens=n_generated + np.array([rng.choice((0, 0, 5)) for _ in range(n_requests)], np.int64),
        n_ctx=np.full(n_requests, 130, np.int64),
        match=match,
        known=known,
        probs=probs,
        categories=tuple(rng.choice("ab") for _ in range(n_requests)),
        prompt_ids=tuple(f"r{i}" for i in range(n_requests)),
        mode="probe" if probe else "live",
    )


def _variants(rule: Rule, count: int, rng: random.Random) -> Iterator[Policy]:
    yield rule()
    space = {k: expand(rule.name, k, text) for k, text in rule.space.items()}
    if "scope" in rule.types:
        space["scope"] = list(SCOPES)
    for _ in range(count if space else 0):
        yield rule(**{k: rng.choice(values) for k, values in space.items()})


def _rounds(policy: Policy, positions: Positions, n_slots: int) -> list[list[tuple[int, int]]]:
    """``(drafted, accepted)`` of every step of every request, by the policy's own functions: neither the simulators nor
    their source has a part in it. Every prompt is read in one step.
    """
    first, n_generated, n_prompt, max_tokens, n_ctx, match, _, probs = (a.tolist() for a in arrays_of(positions))
    found: list[list[tuple[int, int]]] = [[] for _ in first]
    waiting, slots = list(range(len(first))), dict.fromkeys(range(n_slots))
    states = {None: _state(policy, 0, "begin")}  # by slot, or of the engine
    while waiting or any(slots.values()):
        active = [slot for slot in slots.values() if slot is not None]
        for i, occupant in slots.items():
            if occupant is None and waiting:
                r, key = waiting.pop(0), None if policy.scope == "engine" else i
                if key is not None:
                    states[key] = _state(policy, 0, "begin")
                now = Now(1, n_prompt[r], max_tokens[r] - 1, 1)
                slots[i] = _Slot(r, key, now, _decision(policy, 0, states[key], now))
        for s in active:
            past = n_prompt[s.request] + s.generated - 1
            s.now = Now(s.generated, past, max_tokens[s.request] - s.generated, len(active))
            if s.decision[0] != NEVER:
                s.decision = _decision(policy, len(found[s.request]), states[s.key], s.now)
        for s in active:
            r, p, (asked, p_min) = s.request, first[s.request] + s.generated - 1, s.decision
            n = max(0, min(asked, positions.n_max, n_ctx[r] - s.now.n_past - 2, s.now.n_remaining - 1))
            drafted = next((j for j in range(n) if probs[p][j] < p_min), n)
            accepted = min(drafted, match[p])
            emitted = min(accepted + 1, n_generated[r] - s.generated)
            if asked != NEVER:
                seen = Outcome(asked, drafted, accepted, emitted)
                states[s.key] = _state(policy, len(found[r]), "learn", states[s.key], s.now, seen)
            found[r].append((drafted, accepted))
            s.generated += emitted
        slots = {i: None if s and s.generated == n_generated[s.request] else s for i, s in slots.items()}
    return found


@dataclass
class _Slot:
    request: int
    key: int | None  # of its state
    now: Now
    decision: tuple[int, float]  # the last one, NEVER for good
    generated: int = 1


def _decision(policy: Policy, step: int, state: Any, now: Now) -> tuple[int, float]:
    decision = _call(policy, step, "decide", state, now)
    is_pair = isinstance(decision, tuple) and len(decision) == 2
    assert is_pair, f"{policy}, step {step}: decide returns {decision!r}, not (n_draft, p_min)"
    n, p_min = decision
    is_count, is_probability = _is(n, int) and n >= NEVER, _is(p_min, float) and 0 <= p_min <= 1
    assert is_count, f"{policy}, step {step}: {n!r} drafts are not NEVER (-1), 0, 1, 2, ..."
    most = getattr(policy.params, "n_max", n)  # an engine that starts with this policy allows as many
    assert n <= most, f"{policy}, step {step}: {n} drafts are more than its n_max {most}"
    assert is_probability, f"{policy}, step {step}: p_min {p_min!r} is no probability"
    return decision


def _state(policy: Policy, step: int, function: str, *arguments: Any) -> Any:
    state = _call(policy, step, function, *arguments)
    assert isinstance(state, policy.rule.State), f"{policy}, step {step}: {function} returns {state!r}, no State"
    for (name, kind), value in zip(policy.rule.state_types.items(), state, strict=True):
        assert _is(value, kind), (
            f"{policy}, step {step}: {function} returns State.{name} = {value!r}, declared {kind.__name__}"
        )
    return state


def _call(policy: Policy, step: int, function: str, *arguments: Any) -> Any:
    try:
        found, again = (getattr(policy.rule, function)(policy.params, *arguments) for _ in range(2))
    except Exception as error:  # whatever the policy may raise
        raise AssertionError(f"{policy}, step {step}: {function} raises {type(error).__name__}: {error}") from error
    assert found == again, f"{policy}, step {step}: {function} is not pure"
    return found


def _is(value: Any, kind: type) -> bool:
    """Whether ``value`` is what ``kind`` declares: a whole number is a float too, a truth value is no number."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def _check_lockstep(policy: Policy, positions: Positions, n_slots: int, expected: list[list[tuple[int, int]]]) -> None:
    out = np.zeros((1, positions.n_requests, lockstep.N_COUNTS))
    rounds = np.zeros((len(positions.match), 2), np.int16)
    rows, shared = rows_of([policy]), np.array([policy.scope == "engine"])
    sizes = (n_slots, 1 << 20, 1 << 20, True, -1, 1 << 20)
    link.compiled(policy.rule, lockstep)(rows, shared, sizes, arrays_of(positions), out, rounds)
    for r, (start, steps) in enumerate(zip(positions.first, expected, strict=True)):
        walked = [tuple(pair) for pair in rounds[start : start + int(out[0, r, kernel.STEPS])].tolist()]
        step = next((i for i, (a, b) in enumerate(zip_longest(walked, steps)) if a != b), None)
        assert step is None, (
            f"{policy}, step {step} of request {r} over {n_slots} slots: simulated (drafted, accepted) "
            f"{walked[step : step + 1]} are not the policy's own {steps[step : step + 1]}"
        )


def _check_compiled(policy: Policy, positions: Positions, expected: list[list[tuple[int, int]]]) -> None:
    size = kernel.n_counts(positions.n_max)
    found = []
    for run in (link.compiled(policy.rule), link.interpreted(policy.rule).run):
        detail = np.zeros((1, positions.n_requests, size), np.int64)
        rows, shared = np.array([policy.row() or [0.0]]), np.array([policy.scope == "engine"])
        run(rows, shared, arrays_of(positions), np.zeros(size), np.zeros((0, 0)), detail)
        found.append(detail)
    different = np.argwhere(found[0] != found[1])
    assert not len(different), (
        f"{policy}: compiled and interpreted differ first at (policy, request, count) {different[0]}"
    )
    for r, steps in enumerate(expected):
        own = [len(steps), *np.sum(steps, 0).tolist()]
        walked = found[0][0, r, [kernel.STEPS, kernel.DRAFTED, kernel.ACCEPTED]].tolist()
        assert walked == own, (
            f"{policy}, request {r}: simulated steps, drafts and accepts {walked} are not the policy's own {own}"
        )
