"""A conformance suite that every policy must pass, ours or a user's: call :func:`check_policy` in a test of your own.

::

    from tracekit.policy.rule import rule
    from tracekit.testing import check_policy

    def test_my_policy():
        check_policy(rule("./mine.py"))
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from tracekit.policy.interface import NEVER, Now, Outcome
from tracekit.policy.rule import Policy, Rule
from tracekit.policy.spec import expand
from tracekit.replay import kernel, link
from tracekit.replay.arrays import ANY, Positions
from tracekit.replay.simulate import arrays_of


def check_policy(rule: Rule, n_variants: int = 8, seed: int = 0) -> None:
    """Assert everything an engine and a simulator rely on, for ``rule`` at its defaults and at random points of its
    space.

    Decisions are whole numbers of drafts, 0 or more (or NEVER), and a probability; the functions are pure; the
    compiled policy does exactly what the interpreted one does. Raises ``AssertionError`` saying what failed, with the
    policy and the step.
    """
    rng = random.Random(seed)
    positions = random_positions(rng, n_requests=6, n_max=8)
    for policy in _variants(rule, n_variants, rng):
        _check_decisions(policy, rng)
        _check_compiled(policy, positions)


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
    if rule.space:
        for _ in range(count):
            yield rule(**{k: rng.choice(expand(rule.name, k, text)) for k, text in rule.space.items()})


def _check_decisions(policy: Policy, rng: random.Random) -> None:
    params, functions = policy.params, policy.rule
    state = functions.begin(params)
    assert state == functions.begin(params), f"{policy}: begin is not pure"
    assert isinstance(state, functions.State), f"{policy}: begin returns no State"
    generated = 1
    for step in range(200):
        now = Now(generated, 20 + generated, 1000 - generated, 1)
        decision = functions.decide(params, state, now)
        n, p_min = decision
        assert decision == functions.decide(params, state, now), f"{policy}, step {step}: decide is not pure"
        if n == NEVER:
            break
        assert n in range(1 << 20), f"{policy}, step {step}: {n} drafts are not NEVER (-1), 0, 1, 2, ..."
        assert 0 <= p_min <= 1, f"{policy}, step {step}: p_min {p_min} is no probability"
        drafted = rng.randint(0, int(n))
        accepted = rng.choice((0, drafted, rng.randint(0, drafted)))
        seen = Outcome(int(n), drafted, accepted, accepted + 1)
        after = functions.learn(params, state, now, seen)
        assert after == functions.learn(params, state, now, seen), f"{policy}, step {step}: learn is not pure"
        assert isinstance(after, functions.State), f"{policy}, step {step}: learn returns no State"
        state, generated = after, generated + accepted + 1


def _check_compiled(policy: Policy, positions: Positions) -> None:
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
