"""``tracekit tune``: the best safe policy for a trace, with its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out


def tune(
    trace: options.TraceArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The policy file to write (TOML); without it nothing is written."
        ),
    ] = None,
    max_slowdown: Annotated[
        float,
        typer.Option(
            "--max-slowdown",
            help="No prompt category may be slower than no MTP by more than this fraction (0.02: 2 %), with 95 % "
            "confidence.",
        ),
    ] = 0.02,
    space: Annotated[
        Path | None,
        typer.Option(
            "--space",
            metavar="FILE",
            help="What to search: TOML, a table per policy, such as two lines: [static] and n_max = [1, 2, 4] (or a "
            "range, n_max = '1..8/1') [default: what `tracekit policies` tells].",
        ),
    ] = None,
    cost: Annotated[
        Path | None,
        typer.Option("--cost", metavar="TRACE", help="Take the times from another trace, or a calibration."),
    ] = None,
    parallel: options.Parallel = None,
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds", help="Parts of the cross-validation, by prompt [default: 5, or as many as there are prompts]."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the split into folds.")] = 0,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Search policies on a trace and write the best safe one, judged on requests it was not chosen on."""
    from tracekit import beside
    from tracekit.errors import TracekitError
    from tracekit.policy import file
    from tracekit.policy.llama_cpp import server_advice, server_options
    from tracekit.replay.league import League
    from tracekit.report import tables
    from tracekit.trace.store import open_trace
    from tracekit.tune.evidence import tune as search
    from tracekit.tune.space import read_space

    if output is not None:
        beside.check_new(output, force, (trace, cost, space))  # now, and not when the search is done
        file.check(output)
    elif force:
        raise TracekitError("--force needs -o, the file that it overwrites")
    wanted = None if space is None else read_space(space)
    with out.progress("fitting costs") as update:
        league = League.of(open_trace(trace), open_trace(cost) if cost else None, parallel, progress=update)
    with out.progress("policies") as update:
        found = search(league, wanted, max_slowdown, folds, seed, update)
    if output is not None:
        found.save(output)
    if json:
        head = {"policy": found.policy.label, "llama_server": server_options(found.policy)}
        out.print_json(head | found.evidence.model_dump(mode="json"))
    else:
        out.print_table(tables.evidence_table(found))
        print(
            "(cross-validated): on requests that its choice did not see, fold by fold; the others on all of them. "
            + tables.league_note(league)
        )
        print("\n".join(filter(None, (found.evidence.advice, server_advice(found.policy)))))
    if output is not None:
        out.wrote(output)
