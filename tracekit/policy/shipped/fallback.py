"""Draft n_max tokens until a verification disappoints, then stop drafting: the adaptive fallback for MTP.

Source: llama.cpp PR 22931. After the first verification: off when accepted < min_ratio * drafted. After any later
one: off when nothing was accepted (zero_trip). Off lasts for the rest of the request; there, with resume_after = 0
and scope = request, as its author proposed it. Ours: min_drafts (how many drafts must have been verified before the
ratio is judged; the PR judges the first verification whatever its size), resume_after (drafting starts afresh after
that many plain tokens), scope = engine (a trip outlives the request) and p_min.
"""

from typing import NamedTuple

from tracekit.policy.interface import NEVER, Scope

SPACE = {
    "n_max": "1..8/1",
    "min_ratio": "0..0.9/0.15",
    "zero_trip": "true,false",
    "resume_after": "0,8,16,32,64",
    "p_min": "0,0.35,0.65",
}


class Params(NamedTuple):
    n_max: int = 8
    min_ratio: float = 0.75
    zero_trip: bool = True
    min_drafts: int = 1
    resume_after: int = 0
    p_min: float = 0.0
    scope: Scope = "request"


class State(NamedTuple):
    judged: bool  # whether the first verifications have been judged by their ratio
    tripped: bool
    n_drafted: int  # until judged
    n_accepted: int  # until judged
    n_plain: int  # tokens emitted since the trip


def begin(params):
    return State(False, False, 0, 0, 0)


def decide(params, state, now):
    if state.tripped:
        return (0 if params.resume_after else NEVER), 0.0
    return params.n_max, params.p_min


def learn(params, state, now, seen):
    if state.tripped:
        n_plain = state.n_plain + seen.n_emitted
        if params.resume_after > 0 and n_plain >= params.resume_after:
            return State(False, False, 0, 0, 0)
        return State(True, True, 0, 0, n_plain)
    if seen.n_drafted == 0:
        return state
    if params.zero_trip and seen.n_accepted == 0:
        return State(True, True, 0, 0, 0)
    if state.judged:
        return state
    n_drafted = state.n_drafted + seen.n_drafted
    n_accepted = state.n_accepted + seen.n_accepted
    if n_drafted < params.min_drafts:
        return State(False, False, n_drafted, n_accepted, 0)
    tripped = n_accepted < params.min_ratio * n_drafted
    return State(True, tripped, 0, 0, 0)
