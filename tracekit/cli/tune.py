"""``tracekit tune``: the best safe policy for a trace, with its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out


def tune(
    trace: options.TraceArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The policy file to write (TOML).")
    ] = None,
    max_slowdown: Annotated[
        float, typer.Option("--max-slowdown", help="No prompt category may be slower than no MTP by more than this.")
    ] = 0.02,
    space: Annotated[
        Path | None,
        typer.Option("--space", metavar="FILE", help="TOML: what to search instead of every shipped policy."),
    ] = None,
    cost: Annotated[
        Path | None,
        typer.Option("--cost", metavar="TRACE", help="Take the times from another trace, or a calibration."),
    ] = None,
    parallel: options.Parallel = None,
    folds: Annotated[int, typer.Option("--folds", help="Parts of the cross-validation, by request.")] = 5,
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Search policies on a trace and write the best safe one, judged on requests it was not chosen on."""
    from tracekit.errors import TracekitError
    from tracekit.replay.league import League
    from tracekit.report import tables
    from tracekit.trace.store import open_trace
    from tracekit.tune.evidence import tune as search
    from tracekit.tune.space import default_space, read_space

    if output is not None and output.exists() and not force:
        raise TracekitError(f"{output}: exists; choose another name or give --force")
    wanted = read_space(space) if space else default_space()
    source = open_trace(trace)
    league = League.of(source, open_trace(cost) if cost else None, parallel)
    with out.progress("policies") as update:
        found = search(league, wanted, max_slowdown, folds, seed, update)
    if json:
        out.print_json({"policy": found.policy.label} | found.evidence.model_dump(mode="json"))
    else:
        out.print_table(tables.evidence_table(found))
        print(tables.league_note(league))
        print(found.evidence.advice)
    if output is not None:
        out.wrote(found.save(output))
