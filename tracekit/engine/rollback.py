"""Taking rejected drafts back out of the target's memory: the seam for memories that cannot forget single tokens."""

from __future__ import annotations

from typing import Protocol

from tracekit.engine.context import Context
from tracekit.engine.settings import Settings
from tracekit.errors import TracekitError


class Rollback(Protocol):
    """How a target forgets. Checkpoints (recurrent memories that keep no snapshots) will plug in here."""

    kind: str

    def before(self, seq: int, n_past: int) -> None:
        """A verification of ``seq`` is about to be decoded, its memory holding ``n_past`` tokens."""

    def keep(self, seq: int, n_past: int, rejected: int) -> int:
        """Keep the first ``n_past`` tokens of ``seq``, forget ``rejected`` later ones; returns tokens that must be
        decoded again.
        """


class PartialRollback:
    """``llama_memory_seq_rm`` of the rejected tail: attention forgets its cells, a recurrent memory goes back to one of
    the snapshots of its state that llama.cpp keeps for the last rows of a batch. Nothing is ever decoded again.

    Raises :class:`TracekitError` for slots whose states llama.cpp would mix up: a pass over several moves their states
    next to each other, and what lies between elsewhere, but not its snapshots, to which a later removal goes back
    (src/llama-memory-recurrent.cpp, find_slot). Which state lies where depends on the requests before, with one memory
    for all slots or without. With two slots there is nothing between.
    """

    def __init__(self, context: Context, settings: Settings):
        self._context = context
        self.kind = "snapshot" if context.n_snapshots else "partial"
        if context.n_snapshots and settings.n_slots > 2:
            raise TracekitError(
                "this model's memory is recurrent: where more than two slots draft, llama.cpp mixes up their states; "
                "give --parallel 2 or less"
            )

    def before(self, seq: int, n_past: int) -> None:
        """Nothing to save."""

    def keep(self, seq: int, n_past: int, rejected: int) -> int:
        """See :meth:`Rollback.keep`. Raises :class:`TracekitError` where the memory refuses."""
        if rejected and not self._context.remove(seq, n_past):
            raise TracekitError(
                "this model's memory cannot forget single tokens (recurrent, without snapshots); run it with policy off"
            )
        return 0
