"""``tracekit replay``: what any policy would have done on a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out


def replay(
    trace: options.TraceArgument,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="POLICIES",
            help="Policies; lists and ranges sweep: fallback:n_max=4,8,min_ratio=0.5..0.9/0.05; may be given again "
            "[default: off, fixed lengths and the fallback].",
        ),
    ] = None,
    cost: Annotated[
        Path | None,
        typer.Option("--cost", metavar="TRACE", help="Take the times from another trace, or a calibration."),
    ] = None,
    parallel: options.Parallel = None,
    sort: Annotated[bool, typer.Option("--sort", help="Fastest first.")] = False,
    plot: options.Plot = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Replay a trace under any policy: token-exact counts, predicted speed with its interval, regret.

    ratio: accepted / drafted. tau: tokens of a verification that had drafts. ampl.: rows the target decodes for each
    token. trips: times the policy stopped drafting. exact: share of steps whose outcome the trace knows; below 100 %
    the interval spans guesses of the rest. regret: time lost against an oracle that knows what will be accepted;
    nothing reaches 0. (95 %): an interval over prompts like these (Student's t) and over the fit of costs (bootstrap).
    """
    from tracekit.errors import TracekitError
    from tracekit.policy.spec import parse
    from tracekit.replay.league import League
    from tracekit.report import pictures, tables
    from tracekit.trace.store import open_trace

    if force and plot is None:
        raise TracekitError("--force needs --plot, the file that it overwrites")
    pictures.check(plot, force, (trace, cost))
    policies = [p for text in policy or [] for p in parse(text)]
    source = open_trace(trace)
    with out.progress("fitting costs") as update:
        league = League.of(source, open_trace(cost) if cost else None, parallel, progress=update)
    frame = league.table(policies or league.usual_policies())
    if sort:
        frame = frame.sort("tokens_per_second", descending=True)
    if plot:
        pictures.save(pictures.league_chart(frame, league), plot)
    if json:
        out.print_json(tables.with_references(frame, league))
    else:
        out.print_table(tables.league_table(frame, league))
        print(tables.league_note(league))
    if plot:
        out.wrote(plot)
