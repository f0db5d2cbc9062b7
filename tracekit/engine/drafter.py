"""Drafting: the seam for anything that proposes tokens, and MTP with lazy, fused catch-up behind it.

A drafter is told every hidden row the target produced (:meth:`Drafter.extend`) and asked for drafts
(:meth:`Drafter.draft`). What it decodes in between, and when, is its own business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Protocol

import numpy as np

from tracekit.engine.context import Batch, Context

TOP = 10  # llama.cpp's draft sampler is top-k 10, and the draft probability a soft-max over those ten


@dataclass
class Ask:
    """A slot's wish for drafts, and what came of it.

    ``tokens`` is the slot's whole sequence, the last one not yet decoded by the target; at most ``n`` drafts, stopping at the first whose
    probability is below ``p_min``. Afterwards: ``drafts``, ``probs`` (one more after a ``p_min`` stop; empty unless measured),
    ``n_rows`` of the first decode, ``n_decodes`` and ``stop``.
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

    def begin(self, seq: int) -> None:
        """A new request starts in ``seq``: forget what was there."""

    def extend(self, seq: int, hidden: np.ndarray) -> None:
        """The target decoded (and keeps) as many further positions of ``seq`` as ``hidden`` has rows ``[n, n_embd]``."""

    def draft(self, asks: list[Ask], probs: bool) -> None:
        """Fill in every ask; ``probs``: measure draft probabilities even where no ``p_min`` needs them."""

    def close(self) -> None:
        """Free what the drafter holds."""


class _Lag:
    """Hidden rows of one slot that the MTP context has not seen yet, kept on the host in one growing array.

    Row ``i`` of :meth:`rows` is the target's hidden state at position ``next_pos - 1 + i``: the partner, in the MTP
    batch, of the token at ``next_pos + i``. The last ``keep`` rows already decoded stay, for :meth:`rewind`.
    """

    def __init__(self, n_embd: int, keep: int):
        self._data = np.zeros((64 + keep, n_embd), np.float32)
        self._keep = keep
        self.reset()

    def reset(self) -> None:
        self.next_pos = 0
        self._data[0] = 0.0  # position 0 has no predecessor: its partner is zero
        self._start, self._end = 0, 1

    def rows(self) -> np.ndarray:
        return self._data[self._start : self._end]

    def append(self, hidden: np.ndarray) -> None:
        end = self._end + len(hidden)
        if end > len(self._data):
            self._make_room(len(hidden))
            end = self._end + len(hidden)
        self._data[self._end : end] = hidden
        self._end = end

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
        target = self._data if needed <= len(self._data) // 2 else np.zeros((2 * needed, self._data.shape[1]), np.float32)
        target[: len(live)] = live.copy()
        self._data, self._start, self._end = target, self._start - first, len(live)


class MtpDrafter:
    """Drafts with a model's NextN block, in an MTP context beside the target's.

    *Lazy*: hidden rows wait on the host while a slot drafts nothing. *Fused*: they go through the MTP context in the batch
    whose last row yields the first draft, so ``n`` drafts take ``n`` decodes. Rejected drafts are never decoded again.
    """

    def __init__(self, context: Context, n_seq: int, n_embd: int, keep: int = 0):
        self.times = DraftTimes()
        self._context = context
        context.extract_hidden(True)
        self._batch = Batch(context.n_batch, n_embd)
        self._lags = [_Lag(n_embd, keep) for _ in range(n_seq)]

    def begin(self, seq: int) -> None:
        self._context.remove(seq, 0)
        self._lags[seq].reset()

    def extend(self, seq: int, hidden: np.ndarray) -> None:
        self._lags[seq].append(hidden)

    def rewind(self, seq: int, n: int) -> None:
        """Forget the last ``n`` decoded rows of ``seq`` (at most ``keep``), to decode them again: how a probe samples catch-up costs."""
        lag = self._lags[seq]
        if lag.rewind(n):
            self._context.remove(seq, lag.next_pos)

    def draft(self, asks: list[Ask], probs: bool) -> None:
        started = perf_counter_ns()
        self.times = times = DraftTimes()
        context, batch = self._context, self._batch
        self._decode_ahead(asks)
        caught_up = perf_counter_ns()
        batch.n = 0
        last_rows = []
        for ask in asks:
            lag = self._lags[ask.seq]
            rows = lag.rows()
            n, pos = len(rows), lag.next_pos
            first = batch.extend(ask.tokens[pos : pos + n], pos, ask.seq, False)
            batch.embd[first : first + n] = rows
            batch.logits[batch.n - 1] = 1
            last_rows.append(batch.n - 1)
            lag.advance(n)
            ask.n_rows = n
        times.n_rows = batch.n
        alive = asks
        while alive:
            context.decode(batch)
            times.n_decodes += 1
            logits, hidden = context.logits(len(alive)), context.hidden(batch.n)
            batch.n, going, rows = 0, [], []
            for i, ask in enumerate(alive):
                if self._take(ask, logits[i], probs):
                    row = batch.add(ask.drafts[-1], len(ask.tokens) - 1 + len(ask.drafts), ask.seq, True)
                    batch.embd[row] = hidden[last_rows[i]]
                    going.append(ask)
                    rows.append(row)
            alive, last_rows = going, rows
            if times.n_decodes == 1:
                times.first_us = (perf_counter_ns() - caught_up) // 1000
        for ask in asks:
            if ask.n_decodes > 1:
                context.remove(ask.seq, len(ask.tokens))
        finished = perf_counter_ns()
        times.catchup_us = (caught_up - started) // 1000
        times.total_us = (finished - caught_up) // 1000

    @staticmethod
    def _take(ask: Ask, logits: np.ndarray, probs: bool) -> bool:
        """Take the best token of ``logits`` as the ask's next draft; whether another is wanted."""
        ask.n_decodes += 1
        token = int(logits.argmax())
        if probs or ask.p_min > 0:
            best = np.partition(logits, -TOP)[-TOP:]
            p = 1.0 / float(np.exp(best - logits[token]).sum())
            ask.probs.append(p)
            if p < ask.p_min:
                ask.stop = "p_min"
                return False
        ask.drafts.append(token)
        return len(ask.drafts) < ask.n

    def _decode_ahead(self, asks: list[Ask]) -> None:
        """Decode the oldest waiting rows on their own where all together do not fit into one batch."""
        context, batch = self._context, self._batch
        for ask in asks:
            lag = self._lags[ask.seq]
            while sum(len(self._lags[a.seq].rows()) for a in asks) > context.n_batch and len(lag.rows()) > 1:
                rows = lag.rows()[: min(context.n_batch, len(lag.rows()) - 1)]
                batch.n = 0
                batch.extend(ask.tokens[lag.next_pos : lag.next_pos + len(rows)], lag.next_pos, ask.seq, False)
                batch.embd[: len(rows)] = rows
                context.decode(batch)
                lag.advance(len(rows))

    def close(self) -> None:
        self._context.close()
