"""Draft deeper while a bucket of accepted drafts is full, less deep when it is empty: llama.cpp's draft-mtp-adaptive.

Source: llama.cpp PR 27210 (open; as of September 2026). A draft accepted to the end adds what was accepted, minus one
and at least 1; any other takes out as many as were missing. A bucket that holds n_climb more than it began with makes
drafts one longer, an empty one makes them one shorter; at a new length it begins with n_drop, or n_drop_per_draft for
each draft where that is more. The PR advises an n_max of 7 or more; its n_min (--spec-draft-n-min-adaptive) is 1 or
more: it never stops drafting.
"""

from typing import NamedTuple


class Params(NamedTuple):
    n_max: int = 8
    n_min: int = 3
    n_climb: int = 20
    n_drop: int = 20
    n_drop_per_draft: int = 4
    p_min: float = 0.0


class State(NamedTuple):
    n_draft: int
    n_bucket: int


def begin(params):
    return _at(params, min(max(1, params.n_min), params.n_max))


def decide(params, state, now):
    return state.n_draft, params.p_min


def learn(params, state, now, seen):
    if seen.n_drafted == 0:
        return state
    n = state.n_draft
    missing = n - seen.n_accepted
    n_bucket = state.n_bucket + (max(1, seen.n_accepted - 1) if missing <= 0 else -missing)
    full = _at(params, n).n_bucket + params.n_climb
    if n_bucket >= full:
        return _at(params, n + 1) if n < params.n_max else State(n, full)
    if n_bucket <= 0:
        return _at(params, n - 1) if n > max(1, params.n_min) else State(n, 0)
    return State(n, n_bucket)


def _at(params, n):
    return State(n, max(params.n_drop, params.n_drop_per_draft * n))
