"""Two drafts more after a verification that accepts all, one less after any other: transformers' heuristic.

Source: Hugging Face transformers, num_assistant_tokens_schedule = heuristic_transient (here scope = request) or
heuristic (scope = engine: the number outlives a request); num_assistant_tokens = 20 to begin with, at least 1. Ours is
n_max, which nothing goes beyond. It never stops drafting.
"""

from typing import NamedTuple

from tracekit.policy.interface import Scope


class Params(NamedTuple):
    n_max: int = 8
    n_start: int = 20
    p_min: float = 0.0
    scope: Scope = "request"


class State(NamedTuple):
    n_draft: int


def begin(params):
    return State(min(max(1, params.n_start), params.n_max))


def decide(params, state, now):
    return state.n_draft, params.p_min


def learn(params, state, now, seen):
    if seen.n_drafted == 0:
        return state
    if seen.n_accepted == seen.n_drafted:
        return State(min(state.n_draft + 2, params.n_max))
    return State(min(max(1, state.n_draft - 1), params.n_max))
