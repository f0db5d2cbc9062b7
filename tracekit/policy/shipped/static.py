"""Always draft up to n_max tokens: llama.cpp's draft-mtp.

Source: llama.cpp, common/speculative.cpp (--spec-draft-n-max, default 3; --spec-draft-p-min, default 0:
drafting stops at the first draft whose probability, a soft-max over the ten best logits, is below p_min).
"""

from typing import NamedTuple

SPACE = {"n_max": "1..8/1", "p_min": "0,0.2,0.35,0.5,0.65,0.8,0.9"}


class Params(NamedTuple):
    n_max: int = 3
    p_min: float = 0.0


class State(NamedTuple):
    nothing: int


def begin(params):
    return State(0)


def decide(params, state, now):
    return params.n_max, params.p_min


def learn(params, state, now, seen):
    return state
