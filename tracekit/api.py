"""The library's front: a trace in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from tracekit.errors import TracekitError
from tracekit.policy.file import PolicyFile
from tracekit.policy.rule import Policy
from tracekit.policy.spec import PolicyLike, parse, policy_of
from tracekit.replay.league import League
from tracekit.report import pictures
from tracekit.report.query import query as ask
from tracekit.report.stats import Summary, acceptance_by_position, summarise
from tracekit.report.surface import surface, surface_chart
from tracekit.trace.store import TraceFile, open_trace

if TYPE_CHECKING:
    import altair as alt

# what replay and the plots take, and what tune searches
Policies = PolicyLike | Iterable["Policies"]
Space = Mapping[str, Mapping[str, Any]]


class Trace:
    """A trace, open for questions. Raises :class:`~tracekit.errors.TracekitError` where ``path`` is none.

    ``cost``: another trace to take the times from (*what if this workload ran on that machine?*). ``n_slots``: serve
    its requests over so many slots; None: as recorded.
    """

    def __init__(self, path: str | Path, cost: str | Path | None = None, n_slots: int | None = None):
        if n_slots is not None and (not isinstance(n_slots, int) or n_slots < 1):
            raise TracekitError(f"n_slots={n_slots!r}: a whole number, 1 or more; None: as recorded")
        self.file: TraceFile = open_trace(path)
        self._cost = None if cost is None else open_trace(cost)
        self._n_slots = n_slots

    @cached_property
    def league(self) -> League:
        """Positions, costs and references: made on first use, shared by everything below."""
        return League.of(self.file, self._cost, self._n_slots)

    @cached_property
    def stats(self) -> Summary:
        """What happened, as frames (:class:`tracekit.report.stats.Summary`)."""
        return summarise(self.file)

    def replay(self, policies: Policies) -> pl.DataFrame:
        """One row per policy, as :meth:`tracekit.replay.league.League.table`. Policies are written as on the command
        line, sweeps included; or what :meth:`tune` found, a path, or a list of these.
        """
        return self.league.table(_policies(policies))

    def tune(
        self,
        max_slowdown: float = 0.02,
        space: Space | str | Path | None = None,
        folds: int | None = None,
        seed: int = 0,
    ) -> PolicyFile:
        """The best safe policy and its evidence (:func:`tracekit.tune.evidence.tune`). ``space``: as
        ``{"static": {"n_max": "1..8/1", "p_min": [0, 0.5]}}``, or a TOML file of it; None: that of every shipped policy
        that has one. ``folds`` None: five, or as many as there are prompts.
        """
        from tracekit.tune.evidence import tune

        return tune(self.league, _space(space), max_slowdown, folds, seed)

    def sql(self, query: str) -> pl.DataFrame:
        """The result of ``query`` on the trace's tables (:mod:`tracekit.trace.schema`)."""
        return ask(self.file, query)

    def plot_acceptance(self) -> alt.LayerChart:
        """How often the first k drafts are all right, by category. Raises
        :class:`~tracekit.errors.TracekitError` where none were made for a prompt, as in a calibration.
        """
        acceptance = acceptance_by_position(self.file)
        if acceptance.is_empty():
            raise TracekitError(
                f"{self.file.path}: no drafts of prompts to judge; `tracekit record` makes a trace of them"
            )
        return pictures.acceptance_chart(acceptance)

    def plot_cost(self) -> alt.Chart | alt.HConcatChart:
        """What a decode costs, by batch width and rows caught up; of a calibration, its cost surface."""
        if self.file.is_calibration:
            return surface_chart(surface(self.file))
        return pictures.cost_chart(self.league.cost)

    def plot_policies(self, policies: Policies) -> alt.LayerChart:
        """Predicted speed of ``policies`` against no MTP and the clairvoyant optimum."""
        return pictures.league_chart(self.replay(policies), self.league)

    def __repr__(self) -> str:
        cost = "" if self._cost is None else f", cost={str(self._cost.path)!r}"
        slots = "" if self._n_slots is None else f", n_slots={self._n_slots}"
        return f"Trace({str(self.file.path)!r}{cost}{slots})"

    def _repr_html_(self) -> str:
        return self.stats._repr_html_()


def open(path: str | Path, cost: str | Path | None = None, n_slots: int | None = None) -> Trace:
    """The trace at ``path``; see :class:`Trace`."""
    return Trace(path, cost, n_slots)


def _policies(of: Policies) -> list[Policy]:
    if isinstance(of, str):
        return parse(of)
    if isinstance(of, PolicyLike) or not isinstance(of, Iterable):
        return [policy_of(of)]
    found = [p for one in of for p in _policies(one)]
    if not found:
        raise TracekitError("no policy given; try 'off', 'static:n_max=4' or 'fallback'")
    return found


def _space(of: Space | str | Path | None) -> dict[str, dict[str, str]] | None:
    from tracekit.tune.space import read_space

    if of is None:
        return None
    if isinstance(of, (str, Path)):
        return read_space(of)
    if not of or not isinstance(of, Mapping) or not all(isinstance(values, Mapping) for values in of.values()):
        raise TracekitError(f'space={of!r}: a dict per policy, as in {{"static": {{"n_max": "1..8/1"}}}}')
    return {
        name: {key: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for key, v in values.items()}
        for name, values in of.items()
    }
