"""Probing: drafts at every output position, so that a trace can answer what any policy would have done.

At each position the drafter drafts ``n_max`` tokens. The target then verifies a random number of them, after a random
number of rows were caught up again (so that every batch width is timed under real conditions, without bias), and
keeps one token. How many drafts were right is known once the tokens they guessed at have been generated.
"""

from __future__ import annotations

import random
from typing import Protocol

from tracekit.trace.rows import Verification


class _Rewinds(Protocol):
    def rewind(self, seq: int, n: int) -> None: ...


class Probe:
    """The random choices of a probe recording, and the positions whose outcome is not known yet."""

    arm = "probe"  # what its requests are in a trace

    def __init__(self, n_max: int, seed: int = 0):
        self.n_max, self.seed = n_max, seed
        self.n_checked = self.n_diverged = 0
        self._rng = random.Random(seed)
        self._pending: dict[int, list[tuple[Verification, list[int]]]] = {}

    def rewind(self, seq: int, drafter: _Rewinds) -> None:
        """Have the drafter decode up to ``n_max`` rows of ``seq`` again, together with the new one."""
        drafter.rewind(seq, self._rng.randint(0, self.n_max))

    def width(self, n_proposed: int) -> int:
        """How many of the drafts to verify."""
        return self._rng.randint(0, n_proposed)

    def settle(self, row: Verification, choices: list[int], tokens: list[int]) -> list[Verification]:
        """Add a position's row; returns every row of its request whose drafts can now be judged.

        ``choices``: the target's arg-max at each verified draft, to be compared with what it chooses in its own step.
        ``tokens``: all that the request has generated so far.
        """
        waiting = self._pending.setdefault(row.request, [])
        waiting.append((row, choices))
        settled = []
        while waiting and len(tokens) - waiting[0][0].n_generated > waiting[0][0].n_proposed:
            settled.append(self._judged(*waiting.pop(0), tokens))
        return settled

    def end(self, request: int, tokens: list[int]) -> list[Verification]:
        """Every row of ``request`` not judged yet: it has generated ``tokens``, and there will be no more."""
        return [self._judged(*row, tokens) for row in self._pending.pop(request, ())]

    def forget(self) -> None:
        """Drop the rows not judged yet: their requests were."""
        self._pending.clear()

    def _judged(self, row: Verification, choices: list[int], tokens: list[int]) -> Verification:
        matched, following = 0, tokens[row.n_generated :]
        while matched < min(row.n_proposed, len(following)) and row.draft_ids[matched] == following[matched]:
            matched += 1
        for i, choice in enumerate(choices[: min(matched, len(following) - 1)]):
            self.n_checked += 1
            self.n_diverged += choice != following[i + 1]
        return row._replace(n_matched=matched, n_accepted=min(matched, row.n_drafted))
