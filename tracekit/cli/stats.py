"""``tracekit stats``: what happened in a trace."""

from __future__ import annotations

from tracekit.cli import options, out


def stats(trace: options.TraceArgument, json: options.Json = False) -> None:
    """What happened: acceptance per position, tau, amplification, where time went, the baselines; or the cost
    surface of a calibration.

    right: share of positions where this draft and all before it are right. tau: tokens of a verification that had
    drafts. ampl.: rows the target decodes for each token. Arms: probe drafts at every position; live is what the policy
    did; baselines are brief runs at fixed lengths and idle; no_mtp runs without MTP. Time: draft is drafting, catchup
    the MTP context reading what was accepted, target the model's own decodes. Baselines: no MTP decodes plainly; MTP
    idle has it loaded and drafts nothing; K = 1 verifies one draft per step.
    """
    from tracekit.report import surface, tables
    from tracekit.report.stats import summarise
    from tracekit.trace.store import open_trace

    summary = summarise(open_trace(trace))
    if json:
        out.print_json(summary.as_json())
        return
    print(summary.headline)
    costs = summary.surface
    for table in tables.stats_tables(summary) if costs is None else surface.surface_tables(costs):
        out.print_table(table)
    for line in summary.notes:
        print(line)
