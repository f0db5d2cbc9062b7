"""One draft more after n_streak verifications in a row that accept all, one less after as many that do not (0: as 1).

Source: llama.cpp PR 25726 (open; --spec-draft-adaptive-length-threshold, which its author sets to 11, and
--spec-draft-adaptive-length-bias: how many drafts may be missing from all). It begins with n_min and never stops
drafting.
"""

from typing import NamedTuple


class Params(NamedTuple):
    n_max: int = 8
    n_min: int = 1
    n_streak: int = 11
    bias: int = 0
    p_min: float = 0.0


class State(NamedTuple):
    n_draft: int
    n_good: int  # in a row
    n_bad: int


def begin(params):
    return State(min(max(1, params.n_min), params.n_max), 0, 0)


def decide(params, state, now):
    return state.n_draft, params.p_min


def learn(params, state, now, seen):
    if seen.n_drafted == 0:
        return state
    if seen.n_accepted >= state.n_draft - params.bias:
        if state.n_good + 1 < params.n_streak or state.n_draft >= params.n_max:
            return State(state.n_draft, state.n_good + 1, 0)
        return State(state.n_draft + 1, 0, 0)
    if state.n_bad + 1 < params.n_streak or state.n_draft <= max(1, params.n_min):
        return State(state.n_draft, 0, state.n_bad + 1)
    return State(state.n_draft - 1, 0, 0)
