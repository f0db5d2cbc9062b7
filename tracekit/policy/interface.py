"""What a policy sees and what it learns from: two small tuples, shared by the live engine and the simulator.

A policy is a Python file with five names::

    class Params(NamedTuple): ...          # its parameters: int, float or bool, each with a default
    class State(NamedTuple): ...           # what it remembers: int, float or bool, as declared
    def begin(params): ...                 # -> State, when a request starts (or the engine, see scope)
    def decide(params, state, now): ...    # -> (n_draft, p_min), before each verification, and once
                                           # before the prompt is read; n_draft may be NEVER
    def learn(params, state, now, seen):   # -> State, after it

All three functions are pure. The engine calls them as they are; the simulator compiles the same source with Numba,
so they use plain arithmetic, ``math`` and functions of the same file. A parameter ``scope`` of ``"request"`` (the
default) or ``"engine"`` is read by whoever runs the policy, not by its functions: with ``"engine"`` the state outlives
the request. A parameter ``max_slots`` is one that means nothing where no more slots are served. A sixth name,
``SPACE``, may say what a search tries: for some parameters a range (``"low..high/step"``) or a list of values.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Scope = Literal["request", "engine"]
NEVER = -1  # what decide returns for: no drafts in this request any more. It is not asked, or told, anything after that
SCOPES: tuple[str, ...] = ("request", "engine")


class Now(NamedTuple):
    """What the engine knew before a verification.

    ``n_generated``: tokens emitted so far in this request (1 or more). ``n_past``: tokens in the target's memory.
    ``n_remaining``: tokens the request may still emit. ``n_active``: slots generating in this step; 1
    where a policy is asked before the prompt is read whether it drafts right after it.
    """

    n_generated: int
    n_past: int
    n_remaining: int
    n_active: int


class Outcome(NamedTuple):
    """What a verification brought.

    ``n_asked``: drafts the policy asked for. ``n_drafted``: drafts verified (fewer where a draft's probability fell
    below ``p_min`` or the request's end was near). ``n_accepted``: drafts equal to the target's choice.
    ``n_emitted``: tokens emitted.
    """

    n_asked: int
    n_drafted: int
    n_accepted: int
    n_emitted: int
