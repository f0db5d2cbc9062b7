"""How a trace's requests are served: one at a time, or over several slots at once; and what follows from that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from tracekit.errors import TracekitError
from tracekit.policy.rule import Policy, rule
from tracekit.replay import costs, kernel, lockstep, lockstep_costs, simulate
from tracekit.replay.arrays import Positions
from tracekit.replay.costs import CostModel, Progress
from tracekit.trace.store import TraceFile

_NO_ROUNDS = np.zeros((0, 2), np.int16)


@dataclass(frozen=True)
class Serving:
    """``n_slots`` slots, batches of at most ``n_batch`` tokens in passes of ``n_ubatch``, one memory for all slots or
    not (the engine's settings of these names). ``tail``: the last rows of a slot that one pass must take, for snapshots
    of a recurrent state to go back to; -1: attention only.

    With one slot a request's time is that of its generation. With several, requests queue in the trace's order, all
    from the start or in waves of ``wave`` requests, each when the one before has ended; and a request's time is its
    share of the machine from its prompt to its end: shares add up to the whole run, prompts included.
    """

    n_slots: int = 1
    n_batch: int = 512
    n_ubatch: int = 512
    kv_unified: bool = False
    wave: int | None = None
    tail: int = -1

    @classmethod
    def of(cls, trace: TraceFile, n_slots: int | None = None, wave: int | None = None) -> Serving:
        """As ``trace`` was recorded, or with ``n_slots`` slots. Raises :class:`TracekitError` for fewer than one."""
        if n_slots is not None and n_slots < 1:
            raise TracekitError(f"--parallel {n_slots}: 1 or more")
        last = json.loads(trace.runs["settings"][-1])
        most, tail = n_slots or last["n_slots"], last["n_max"] + 1 if last["memory"] == "snapshot" else -1
        unified = last["kv_unified"] and most > 1
        return cls(most, last["n_batch"], last["n_ubatch"], unified, wave, tail)

    def unlike(self, other: Any) -> str:
        """How batches are made otherwise than by ``other``, another serving or an engine's settings; empty where they
        are not, and with one slot.
        """
        names = ("kv_unified", "n_batch", "n_ubatch") if self.n_slots > 1 else ()
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return ", ".join(f"{name} {mine} and not {its}" for name, mine, its in pairs if mine != its)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest request whose time counts: on one slot time starts with the second."""
        return 2 if self.n_slots == 1 else 1

    @property
    def sizes(self) -> lockstep_costs.Sizes:
        """What the simulator takes."""
        return self.n_slots, self.n_batch, self.n_ubatch, self.kv_unified, self.tail, self.wave or 1 << 62

    def fit(self, trace: TraceFile, n_max: int, progress: Progress | None = None) -> CostModel:
        """What things cost when served like this, for drafts of up to ``n_max`` tokens, from the times in ``trace``.
        ``progress(done, total)`` counts bootstrap draws. Raises :class:`TracekitError` where they do not tell.
        """
        with threadpool_limits(1, "blas"):  # products are small: threads wait busily for each other, for up to a minute
            if self.n_slots == 1:
                return costs.fit(trace, n_max, progress=progress)
            return lockstep_costs.fit(trace, n_max, self.sizes, progress=progress)

    def tokens(self, positions: Positions) -> np.ndarray:
        """Tokens of each request that its time brings, float64 ``[n_requests]``."""
        return (positions.n_generated + 1 - self.shortest).astype(float)

    def counts(self, policies: Sequence[Policy], positions: Positions) -> np.ndarray:
        """Everything a :class:`CostModel` of :meth:`fit` prices: ``[n_policies, n_requests, n_counts]``, scalars as in
        :mod:`tracekit.replay.kernel` first. Raises :class:`TracekitError` for a policy the trace cannot answer.
        """
        if self.n_slots == 1:
            return simulate.counts(policies, positions)
        out = np.empty((len(policies), positions.n_requests, lockstep.N_COUNTS))
        for chosen, part in self._in_lockstep(policies, positions, _NO_ROUNDS):
            out[chosen] = part
        return out

    def no_mtp_counts(self, positions: Positions) -> np.ndarray:
        """The same, ``[n_requests, n_counts]``, of the baseline: MTP is not loaded, nor are snapshots taken."""
        found = replace(self, tail=min(self.tail, 0)).counts([rule("off")()], positions)[0]
        found[:, kernel.BARE] = found[:, kernel.OVER]
        return found

    def _in_lockstep(
        self, policies: Sequence[Policy], positions: Positions, rounds: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Indices of some of the policies, and their counts."""
        shape = positions.n_requests, lockstep.N_COUNTS
        for run, chosen, rows, shared in simulate.by_rule(policies, positions, 8 * shape[0] * shape[1], lockstep):
            part = np.empty((len(chosen), *shape))
            run(rows, shared, self.sizes, simulate.arrays_of(positions), part, rounds)
            yield chosen, part

    def times(self, policies: Sequence[Policy], positions: Positions, prices: np.ndarray) -> np.ndarray:
        """Microseconds of every request under every policy, float64 ``[n_policies, n_requests]``; raises as
        :meth:`counts`.
        """
        if self.n_slots == 1:
            return simulate.times(policies, positions, prices)
        out = np.empty((len(policies), positions.n_requests))
        for chosen, part in self._in_lockstep(policies, positions, _NO_ROUNDS):
            out[chosen] = part @ prices
        return out

    def rounds(self, policy: Policy, positions: Positions) -> list[list[tuple[int, int]]]:
        """``(drafted, accepted)`` of every step of every request: what the engine's ``Completion.rounds`` will be."""
        if self.n_slots == 1:
            return simulate.rounds(policy, positions)
        found = np.zeros((len(positions.match), 2), np.int16)
        ((_, counted),) = self._in_lockstep([policy], positions, found)
        steps = counted[0, :, lockstep.STEPS].astype(int)
        return [
            list(map(tuple, found[start : start + n].tolist())) for start, n in zip(positions.first, steps, strict=True)
        ]
