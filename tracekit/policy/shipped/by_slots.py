"""Draft by load: up to n_max tokens while at most max_slots slots generate, up to n_crowded when more do.

Source: vLLM, dynamic speculative decoding (num_speculative_tokens_per_batch_size, there a list of ranges). Verifying
is nearly free while a decode waits for memory, and no longer when many slots share it. An n_crowded above n_max counts
as n_max.
"""

from typing import NamedTuple

SPACE = {"n_max": "1..8/1", "max_slots": "1,2,4,8", "n_crowded": "0,1,2", "p_min": "0,0.5"}


class Params(NamedTuple):
    n_max: int = 3
    max_slots: int = 1
    n_crowded: int = 0
    p_min: float = 0.0


class State(NamedTuple):
    nothing: int


def begin(params):
    return State(0)


def decide(params, state, now):
    if now.n_active <= params.max_slots:
        return params.n_max, params.p_min
    return min(params.n_crowded, params.n_max), params.p_min


def learn(params, state, now, seen):
    return state
