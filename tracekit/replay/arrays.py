"""A trace as arrays: for every position of every request, how many drafts would have been right, and how sure that
is.

A probe trace knows every position. A live trace knows those where a verification began, and how many drafts were
accepted; where all were, more might have been (right-censored); elsewhere nothing. ``known`` carries the difference
into the simulator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl

from tracekit.errors import TracekitError
from tracekit.trace.store import TraceFile

_OF_REQUESTS = ("first", "n_generated", "n_prompt", "max_tokens", "n_ctx")
ANY = 255  # ``known`` where the number of right drafts is known whatever the draft length


@dataclass(frozen=True)
class Positions:
    """The positions of a trace, ready for the compiled simulator; requests in the order they are served.

    Request ``r`` with ``n_generated[r]`` tokens has ``n_generated[r] - 1`` positions, from ``first[r]``: at position
    ``g`` (1-based) ``g`` tokens have been emitted and further ones may be drafted. ``match`` uint8 ``[P]``: drafts
    that equal what follows. ``known`` uint8 ``[P]``: the draft length up to which ``match`` is exact (``ANY``: every
    length). ``probs`` float32 ``[P, n_max]``: draft probabilities, -1 unknown.
    """

    first: np.ndarray
    n_generated: np.ndarray
    n_prompt: np.ndarray
    max_tokens: np.ndarray
    n_ctx: np.ndarray
    match: np.ndarray
    known: np.ndarray
    probs: np.ndarray
    categories: tuple[str, ...]
    prompt_ids: tuple[str, ...]
    mode: str

    @property
    def n_requests(self) -> int:
        """Requests in the arrays."""
        return len(self.n_generated)

    @cached_property
    def prompts(self) -> np.ndarray:
        """Which prompt each request is of (:func:`prompt_numbers`)."""
        return prompt_numbers(self.prompt_ids, self.categories, self.n_prompt)

    @property
    def n_prompts(self) -> int:
        """Different prompts among the requests."""
        return int(self.prompts.max()) + 1

    @property
    def n_max(self) -> int:
        """Longest draft recorded, or asked for where a probability stopped it."""
        return self.probs.shape[1]

    @property
    def most_room(self) -> int:
        """Longest draft for which some request has room, before its end or that of its context."""
        return int(np.minimum(self.n_ctx - self.n_prompt, self.max_tokens).max()) - 2

    def at(self, indices: Sequence[int]) -> Positions:
        """The requests at these ``indices``, in that order."""
        numbers = {name: getattr(self, name)[indices] for name in _OF_REQUESTS}
        texts = {name: tuple(getattr(self, name)[i] for i in indices) for name in ("categories", "prompt_ids")}
        return replace(self, **numbers, **texts)

    def queued(self, prompt_ids: Sequence[str]) -> Positions:
        """The same requests in the order of ``prompt_ids``; those not named there are left out."""
        place = {prompt_id: i for i, prompt_id in enumerate(self.prompt_ids)}
        return self.at([place[prompt_id] for prompt_id in prompt_ids if prompt_id in place])

    @cached_property
    def fills(self) -> tuple[Positions, ...]:
        """The same positions with what a live trace does not know filled in (:meth:`guess`): the best estimate first,
        then those that bracket it. A probe trace knows everything: itself.
        """
        return (self,) if self.mode == "probe" else tuple(self.guess(f) for f in ("mean", "none", "shy", "all"))

    def guess(self, filled: str) -> Positions:
        """The same positions with what is unknown filled in: ``none`` (no draft right, and a probability keeps those
        that are wrong), ``shy`` (no draft right, and it stops every one at once, so that a policy goes on drafting
        though nothing comes of it), ``all`` (all right, and it keeps the right ones alone), or ``mean`` (right as often
        as where it is known, and no probability stops).

        The first three bracket a replay that has to extrapolate, as probes that found this; ``mean`` is its best
        estimate.
        """
        match, short = self.match.astype(np.int64), self.known < ANY
        if filled == "mean":
            # draft j + 1 is right, given that j were, as often as at the positions where that was seen (a fixed seed)
            rng = np.random.default_rng(0)
            for j in range(self.n_max):
                seen = ((self.known > j) | (match > j)) & (match >= j)
                rate = (match[seen] > j).mean() if seen.any() else 0.0
                open_here = short & (match == j) & (self.known <= j)
                match[open_here] += rng.random(int(open_here.sum())) < rate
            return replace(self, match=match.astype(np.uint8))
        if filled == "all":
            match = np.where(short, self.n_max, match)
        right = np.arange(self.n_max) < match[:, None]
        kept = right == (filled == "all") if filled != "shy" else np.zeros_like(right)
        probs = np.where(self.probs < 0, kept.astype(np.float32), self.probs)
        every = np.full_like(self.known, ANY)
        return replace(self, match=match.astype(np.uint8), known=every, probs=probs, mode="probe")


def prompt_numbers(prompt_ids: Iterable[str], categories: Iterable[str], n_prompt: Iterable[int]) -> np.ndarray:
    """Which prompt each request is of, numbered from 0: int64 ``[n_requests]``. Requests whose prompts have one id,
    category and length are of one: they do not tell of others independently. One without an id is of its own.
    """
    found: dict[object, int] = {}
    each = enumerate(zip(prompt_ids, categories, n_prompt, strict=True))
    return np.array([found.setdefault(key if key[0] else r, len(found)) for r, key in each], np.int64)


def positions(trace: TraceFile, shortest: int = 2) -> Positions:
    """The positions of every finished or cut-off request of ``trace`` with ``shortest`` tokens or more: one of a single
    token ends with its prompt, and takes time only from others beside it. Raises :class:`TracekitError` where nothing
    was drafted.
    """
    arms = "('probe', 'live')"
    every = trace.frame(
        f"""SELECT run, request, category, prompt_id, n_prompt, max_tokens, n_ctx, arm,
                   sum(len(tokens))::INT AS n_generated, sum(n_asked) AS n_asked
            FROM requests JOIN verifications USING (run, request)
            WHERE arm IN {arms} GROUP BY ALL ORDER BY run, request"""
    )
    requests = every.filter(pl.col("n_generated") >= shortest)
    if requests.is_empty() and trace.is_calibration:
        raise TracekitError(
            f"{trace.path}: a calibration, which knows costs and no acceptance; give a recorded trace, and this one "
            "as its --cost"
        )
    if requests.is_empty() and every.height:
        raise TracekitError(
            f"{trace.path}: every request in it has fewer than {shortest} tokens; record with a higher --max-tokens"
        )
    if not requests["n_asked"].sum() and "probe" not in requests["arm"]:
        raise TracekitError(
            f"{trace.path}: no request in it drafted anything; record with --mode probe, or live with a "
            "policy that drafts"
        )
    if requests["arm"].n_unique() > 1:
        requests = requests.filter(pl.col("arm") == "probe")
    rows = trace.frame(
        """SELECT run, request, n_generated, len(tokens)::INT AS n_emitted, n_proposed, n_drafted, n_matched,
                  draft_probs, CASE stop WHEN 'p_min' THEN n_asked ELSE n_proposed END AS n_longest
           FROM verifications WHERE n_generated > 0 ORDER BY run, request, n_generated"""
    ).join(
        requests.select("run", "request", pl.int_range(pl.len()).alias("index")),
        on=["run", "request"],
        maintain_order="left",
    )
    follows = (
        pl.col("n_generated") == pl.col("n_emitted").shift(1).over("index").cum_sum().over("index").fill_null(0) + 1
    )
    damaged = rows.filter(~follows)
    if damaged.height:
        raise TracekitError(
            f"{trace.path}: damaged: verifications of request {damaged['request'][0]} are missing or empty"
        )
    probe = requests["arm"][0] == "probe"
    n_generated = requests["n_generated"].to_numpy().astype(np.int64)
    first = np.concatenate(([0], np.cumsum(n_generated - 1)))[:-1]
    total = int((n_generated - 1).sum())
    n_max = max(1, int(rows["n_longest"].max() or 1))
    if n_max >= ANY:
        raise TracekitError(f"{trace.path}: drafts of {n_max} tokens, {ANY - 1} are the most that are counted rightly")
    where = first[rows["index"].to_numpy()] + rows["n_generated"].to_numpy().astype(np.int64) - 1
    matched = rows["n_matched"].to_numpy().astype(np.int64)
    tried = rows["n_proposed" if probe else "n_drafted"].to_numpy().astype(np.int64)
    match, known = np.zeros(total, np.uint8), np.zeros(total, np.uint8)
    match[where] = matched
    known[where] = np.where(matched < tried, ANY, tried)
    return Positions(
        first=first,
        n_generated=n_generated,
        n_prompt=requests["n_prompt"].to_numpy().astype(np.int64),
        max_tokens=requests["max_tokens"].to_numpy().astype(np.int64),
        n_ctx=requests["n_ctx"].to_numpy().astype(np.int64),
        match=match,
        known=known,
        probs=_probs(rows["draft_probs"], where, total, n_max),
        categories=tuple(requests["category"]),
        prompt_ids=tuple(requests["prompt_id"]),
        mode="probe" if probe else "live",
    )


def _probs(lists: pl.Series, where: np.ndarray, total: int, n_max: int) -> np.ndarray:
    """Ragged probability lists as a ``[total, n_max]`` array, -1 where there is none."""
    out = np.full((total, n_max), -1.0, np.float32)
    lengths = lists.list.len().to_numpy().astype(np.int64)
    row = np.repeat(where, lengths)
    column = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    keep = column < n_max
    out[row[keep], column[keep]] = lists.explode().drop_nulls().to_numpy()[keep]
    return out
