"""The library's front: a trace in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from tracekit.policy.file import PolicyFile
from tracekit.policy.rule import Policy
from tracekit.policy.spec import parse
from tracekit.replay.league import League
from tracekit.report import pictures
from tracekit.report.stats import Summary, acceptance_by_position, summarise
from tracekit.trace.store import TraceFile, open_trace

if TYPE_CHECKING:
    import altair as alt


class Trace:
    """A trace, open for questions. Raises :class:`~tracekit.errors.TracekitError` where ``path`` is none.

    ``cost``: another trace to take the times from (*what if this workload ran on that machine?*). ``n_slots``: serve
    its requests over so many slots; None: as recorded.
    """

    def __init__(self, path: str | Path, cost: str | Path | None = None, n_slots: int | None = None):
        self.file: TraceFile = open_trace(path)
        self._cost, self._n_slots = cost, n_slots

    @cached_property
    def league(self) -> League:
        """Positions, costs and references: made on first use, shared by everything below."""
        return League.of(self.file, None if self._cost is None else open_trace(self._cost), self._n_slots)

    @cached_property
    def stats(self) -> Summary:
        """What happened, as frames (:class:`tracekit.report.stats.Summary`)."""
        return summarise(self.file)

    def replay(self, policies: str | Policy | Iterable[str | Policy]) -> pl.DataFrame:
        """One row per policy, as :meth:`tracekit.replay.league.League.table`. Policies are written as on the command
        line, sweeps included.
        """
        return self.league.table(_policies(policies))

    def tune(
        self,
        max_slowdown: float = 0.02,
        space: Mapping[str, Mapping[str, str]] | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> PolicyFile:
        """The best safe policy and its evidence (:func:`tracekit.tune.evidence.tune`); ``space`` None: every shipped
        policy's.
        """
        from tracekit.tune.evidence import tune
        from tracekit.tune.space import default_space

        return tune(self.league, space or default_space(), max_slowdown, folds, seed)

    def sql(self, query: str) -> pl.DataFrame:
        """The result of ``query`` on the trace's tables (:mod:`tracekit.trace.schema`)."""
        return self.file.frame(query)

    def plot_acceptance(self) -> alt.LayerChart:
        """How often the first k drafts are all right, by category."""
        return pictures.acceptance_chart(acceptance_by_position(self.file))

    def plot_cost(self) -> alt.Chart:
        """What a decode costs, by batch width and rows caught up."""
        return pictures.cost_chart(self.league.cost)

    def plot_policies(self, policies: str | Policy | Iterable[str | Policy]) -> alt.LayerChart:
        """Predicted speed of ``policies`` against no MTP and the clairvoyant optimum."""
        return pictures.league_chart(self.replay(policies), self.league)

    def __repr__(self) -> str:
        return f"Trace({str(self.file.path)!r})"


def open(path: str | Path, cost: str | Path | None = None, n_slots: int | None = None) -> Trace:
    """The trace at ``path``; see :class:`Trace`."""
    return Trace(path, cost, n_slots)


def _policies(of: str | Policy | Iterable[str | Policy]) -> list[Policy]:
    chosen = [of] if isinstance(of, (str, Policy)) else list(of)
    return [p for one in chosen for p in ([one] if isinstance(one, Policy) else parse(one))]
