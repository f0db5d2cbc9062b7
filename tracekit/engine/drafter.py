"""Drafting: the seam for anything that proposes tokens, and MTP with lazy, fused catch-up behind it.

A drafter is told every hidden row the target produced (:meth:`Drafter.extend`) and asked for drafts
(:meth:`Drafter.draft`). What it decodes in between, and when, is its own business.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from math import exp
from time import perf_counter_ns
from typing import Protocol

import numpy as np

from tracekit.engine.context import Batch, Context
from tracekit.engine.sampling import TOP, draft_chain

_PARTS, _LARGE = 256, 1 << 14

log = logging.getLogger("tracekit.engine")


@dataclass
class Ask:
    """A slot's wish for drafts, and what came of it.

    ``tokens`` is the slot's whole sequence, the last one not yet decoded by the target; at most ``n`` drafts,
    stopping at the first whose probability is below ``p_min``. Afterwards: ``drafts``, ``probs`` (one more after a
    ``p_min`` stop; empty unless measured), ``n_rows`` of the first decode, ``n_decodes`` and ``stop``.
    """

    seq: int
    tokens: list[int]
    n: int
    p_min: float
    drafts: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    n_rows: int = 0
    n_decodes: int = 0
    stop: str = "n_max"


NOT_ASKED = Ask(0, [], 0, 0.0, stop="off")  # of a slot that wants none


@dataclass
class DraftTimes:
    """Microseconds spent in the last :meth:`Drafter.draft`, and how many decodes it took over all slots."""

    n_decodes: int = 0
    n_rows: int = 0
    first_us: int = 0
    total_us: int = 0
    catchup_us: int = 0


class Drafter(Protocol):
    """Proposes tokens. Checkpointed, sidecar, chained-head and model-free drafters all fit this."""

    times: DraftTimes

    def forget(self, seq: int) -> None:
        """Nothing more is drafted for the request in ``seq``; another may start there."""

    def extend(self, seq: int, hidden: np.ndarray, first: int, n: int) -> None:
        """The target decoded, and keeps, ``n`` further positions of ``seq``: rows ``first`` and following of ``hidden
        [n_batch, n_embd]``.
        """

    def catch_up(self, seq: int, tokens: list[int]) -> int:
        """Prepare for drafting as far as ``tokens`` (the sequence so far) are known; returns rows decoded for it."""

    def draft(self, asks: list[Ask], probs: bool) -> None:
        """Fill in every ask; ``probs``: measure draft probabilities even where no ``p_min`` needs them."""

    def close(self) -> None:
        """Free what the drafter holds."""


class _Lag:
    """Hidden rows of one slot that the MTP context has not seen yet, kept on the host in one growing array.

    Row ``i`` of :meth:`rows` is the target's hidden state at position ``next_pos - 1 + i``: the partner, in the MTP
    batch, of the token at ``next_pos + i``. The last ``keep`` rows already decoded stay, for :meth:`rewind`.
    :meth:`reset` gives back what it grew by.
    """

    def __init__(self, n_embd: int, keep: int):
        self._data = np.zeros((0, n_embd), np.float32)
        self._keep = keep
        self.reset()

    def reset(self) -> None:
        if len(self._data) != 64 + self._keep:
            self._data = np.zeros((64 + self._keep, self._data.shape[1]), np.float32)
        self.next_pos = 0
        self._data[0] = 0.0  # position 0 has no predecessor: its partner is zero
        self._start, self._end = 0, 1

    @property
    def n_rows(self) -> int:
        return self._end - self._start

    def rows(self) -> np.ndarray:
        return self._data[self._start : self._end]

    def append(self, hidden: np.ndarray, first: int, n: int) -> None:
        if self._end + n > len(self._data):
            self._make_room(n)
        if n == 1:  # half the time of a slice
            self._data[self._end] = hidden[first]
        else:
            self._data[self._end : self._end + n] = hidden[first : first + n]
        self._end += n

    def advance(self, n: int) -> None:
        self._start += n
        self.next_pos += n

    def rewind(self, n: int) -> int:
        n = min(n, self._start, self._keep)
        self._start -= n
        self.next_pos -= n
        return n

    def _make_room(self, n: int) -> None:
        first = max(0, self._start - self._keep)
        live = self._data[first : self._end]
        needed = len(live) + n
        target = (
            self._data if needed <= len(self._data) // 2 else np.zeros((2 * needed, self._data.shape[1]), np.float32)
        )
        target[: len(live)] = live.copy()
        self._data, self._start, self._end = target, self._start - first, len(live)


class MtpDrafter:
    """Drafts with a model's NextN block, in an MTP context beside the target's.

    *Lazy*: hidden rows wait on the host while a slot drafts nothing, until its request ends or will never draft: at
    most ``n_ctx * n_embd * 4`` bytes a slot, in an array of up to twice that. *Fused*: they go through the MTP context
    in the batch whose last row yields the first draft, so ``n`` drafts take ``n`` decodes. Rejected drafts are never
    decoded again.

    ``backend_sampling`` asks llama.cpp to find the ten most likely tokens on the device and to leave the logits there;
    afterwards it says whether llama.cpp does. The drafts and their probabilities are the same.
    """

    def __init__(self, context: Context, n_seq: int, n_embd: int, keep: int = 0, backend_sampling: bool = False):
        self.times = DraftTimes()
        self._context = context
        self.backend_sampling = backend_sampling and all(
            context.set_sampler(seq, draft_chain(context.n_vocab)) for seq in range(n_seq)
        )
        if backend_sampling and not self.backend_sampling:
            for seq in range(n_seq):
                context.set_sampler(seq, None)
            log.warning("the device does not run the drafter's sampler; its logits are copied, the processor chooses")
        context.extract_hidden(True)
        self._top = min(TOP, context.n_vocab)
        self._batch = Batch(context.n_batch, n_embd)
        self._lags = [_Lag(n_embd, keep) for _ in range(n_seq)]

    def forget(self, seq: int) -> None:
        """See :meth:`Drafter.forget`."""
        self._context.remove(seq, 0)
        self._lags[seq].reset()

    def extend(self, seq: int, hidden: np.ndarray, first: int, n: int) -> None:
        """See :meth:`Drafter.extend`; the rows wait on the host."""
        self._lags[seq].append(hidden, first, n)

    def catch_up(self, seq: int, tokens: list[int]) -> int:
        """Decode the waiting rows, all but the last, whose token is not chosen yet: what reading a prompt leaves
        behind.
        """
        lag, batch, done = self._lags[seq], self._batch, 0
        while lag.n_rows > 1:
            rows = lag.rows()[: min(self._context.n_batch, lag.n_rows - 1)]
            batch.n = 0
            batch.extend(tokens[lag.next_pos : lag.next_pos + len(rows)], lag.next_pos, seq, False)
            batch.embd[: len(rows)] = rows
            self._context.decode(batch)
            lag.advance(len(rows))
            done += len(rows)
        return done

    def rewind(self, seq: int, n: int) -> None:
        """Forget the last ``n`` decoded rows of ``seq`` (at most ``keep``), to decode them again: how a probe samples
        catch-up costs.
        """
        lag = self._lags[seq]
        if lag.rewind(n):
            self._context.remove(seq, lag.next_pos)

    def draft(self, asks: list[Ask], probs: bool) -> None:
        """See :meth:`Drafter.draft`: one decode per draft length, for all slots together."""
        started = perf_counter_ns()
        self.times = times = DraftTimes()
        context, batch = self._context, self._batch
        n_waiting = 0
        for ask in asks:
            ask.n_rows = self._lags[ask.seq].n_rows
            n_waiting += ask.n_rows
        if n_waiting > context.n_batch:
            for ask in asks:
                self.catch_up(ask.seq, ask.tokens)
                ask.n_rows = self._lags[ask.seq].n_rows
        caught_up = perf_counter_ns()
        batch.n = 0
        last_rows = []
        for ask in asks:
            lag, n = self._lags[ask.seq], ask.n_rows
            pos = lag.next_pos
            first = batch.extend(ask.tokens[pos : pos + n], pos, ask.seq, False)
            last = first + n - 1
            batch.embd[first : last + 1] = lag.rows()
            batch.logits[last] = 1
            last_rows.append(last)
            lag.advance(n)
        times.n_rows = batch.n
        n_decodes, alive, ids = 0, asks, None
        while alive:
            context.decode(batch)
            n_decodes += 1
            if self.backend_sampling:
                ids, logits = context.candidates(last_rows[0], self._top)
            else:
                logits = context.logits()
            hidden = context.hidden()
            batch.n, going, rows = 0, [], []
            for i, ask in enumerate(alive):
                token = int(logits[i].argmax()) if ids is None else _best(ids[i], logits[i])
                drafts = ask.drafts
                if (probs or ask.p_min > 0) and not _likely(ask, logits[i]):
                    ask.n_decodes = n_decodes
                    continue
                drafts.append(token)
                if len(drafts) == ask.n:
                    ask.n_decodes = n_decodes
                    continue
                row = batch.add(token, len(ask.tokens) - 1 + len(drafts), ask.seq, True)
                batch.embd[row] = hidden[last_rows[i]]
                going.append(ask)
                rows.append(row)
            alive, last_rows = going, rows
            if n_decodes == 1:
                times.first_us = (perf_counter_ns() - caught_up) // 1000
        for ask in asks:
            if ask.n_decodes > 1:
                context.remove(ask.seq, len(ask.tokens))
        times.n_decodes = n_decodes
        times.catchup_us = (caught_up - started) // 1000
        times.total_us = (perf_counter_ns() - caught_up) // 1000

    def close(self) -> None:
        """Free the MTP context."""
        self._context.close()


def _best(ids: np.ndarray, logits: np.ndarray) -> int:
    """The most likely of the tokens ``ids``; of equals the first in the vocabulary, as an arg-max over it finds."""
    return int(ids[logits == logits.max()].min())


def _largest(logits: np.ndarray) -> list[float]:
    """The ten largest logits, ascending. Of a large vocabulary each of 256 interleaved parts has a largest one, and the
    tenth of these is a bound that only few values reach: half of the time of a partition.
    """
    n = len(logits)
    if n >= _LARGE:
        largest = logits[: n - n % _PARTS].reshape(-1, _PARTS).max(0)
        largest.partition(_PARTS - TOP)
        logits = logits[logits >= largest[_PARTS - TOP]]
    if len(logits) > TOP:
        logits = logits.copy()
        logits.partition(len(logits) - TOP)
    return sorted(logits[-TOP:].tolist())


def _likely(ask: Ask, logits: np.ndarray) -> bool:
    """Measure the probability of the most likely token of ``logits``, of the vocabulary or of its ten best in any
    order; whether it reaches the ask's ``p_min``.
    """
    best = _largest(logits)
    top = best[-1]
    p = 1.0 / sum([exp(logit - top) for logit in best])
    ask.probs.append(p)
    if p < ask.p_min:
        ask.stop = "p_min"
        return False
    return True
