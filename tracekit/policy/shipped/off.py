"""Never draft: the baseline every other policy has to beat."""

from typing import NamedTuple

from tracekit.policy.interface import NEVER


class Params(NamedTuple):
    pass


class State(NamedTuple):
    nothing: int


def begin(params):
    return State(0)


def decide(params, state, now):
    return NEVER, 0.0


def learn(params, state, now, seen):
    return state
