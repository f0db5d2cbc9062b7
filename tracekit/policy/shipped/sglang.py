"""Follow a running mean of accepted drafts up and down the lengths 1, 3, 5, 7 (and 0): SGLang's adaptive steps.

Source: SGLang, --speculative-adaptive (adaptive_spec_params.py, strategy ema). The mean begins one below the length,
with weight alpha for the newest. After n_warmup verifications, every n_interval-th decides: as far down as the mean is
no more than half a draft below the next shorter length (plus down_hysteresis), or else as far up as it is more than
half a draft below the length (plus up_hysteresis). From 0, where n_min allows it, the next decision tries 1. The
defaults are SGLang's for fewer than 8 requests at once, where it never stops drafting; for 8 to 31 they are n_max = 3,
n_min = 0, down_hysteresis = 0 and n_start = 1. It begins with --speculative-num-steps where that is one of the lengths,
else with the middle one. SGLang learns from the mean over a batch, this from one verification after the other.
"""

from typing import NamedTuple

from tracekit.policy.interface import Scope


class Params(NamedTuple):
    n_max: int = 7
    n_min: int = 1
    n_start: int = 5
    alpha: float = 0.2
    n_warmup: int = 10
    n_interval: int = 5
    down_hysteresis: float = -0.25
    up_hysteresis: float = 0.0
    p_min: float = 0.0
    scope: Scope = "engine"


class State(NamedTuple):
    n_draft: int
    mean_accepted: float
    n_seen: int


def begin(params):
    n = max(0, min(max(params.n_start, params.n_min), params.n_max))
    if n > 0 and n % 2 == 0:
        n += 1 if n < params.n_max else -1
    return State(n, n - 1.0, 0)


def decide(params, state, now):
    return state.n_draft, params.p_min


def learn(params, state, now, seen):
    n, mean, n_seen = state.n_draft, state.mean_accepted, state.n_seen + 1
    if n > 0:
        if seen.n_drafted == 0:  # no room: nothing was tried
            return state
        mean = (1 - params.alpha) * mean + params.alpha * seen.n_accepted
    if n_seen <= params.n_warmup or (n_seen - params.n_warmup) % max(1, params.n_interval) > 0:
        return State(n, mean, n_seen)
    if n == 0:
        n = min(1, max(0, params.n_max))
        return State(n, mean if mean >= 0 else n - 1.0, n_seen)
    while n > 0 and _shorter(n) >= params.n_min and mean <= max(0.5, _shorter(n) - 0.5) + params.down_hysteresis:
        n = _shorter(n)
    if n == state.n_draft:
        while n + 2 <= params.n_max and mean > n - 0.5 + params.up_hysteresis:
            n += 2
    return State(n, mean, n_seen)


def _shorter(n):
    return max(0, n - 2)
