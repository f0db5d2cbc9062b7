"""``tracekit calibrate``: what decodes cost on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import interrupted, options, out


@options.with_engine
def calibrate(
    model: options.ModelFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The calibration to write (DuckDB).")],
    n_max: Annotated[int, typer.Option("--n-max", help="Longest draft that is measured.")] = 16,
    slots: Annotated[str, typer.Option("--slots", help="Numbers of slots that generate at once.")] = "1,4,16",
    contexts: Annotated[
        str, typer.Option("--contexts", help="Context depths: tokens of (random) prompt per slot.")
    ] = "512,2048,8192",
    steps: Annotated[int, typer.Option("--steps", help="Steps in a row at each draft length, in each block.")] = 4,
    blocks: Annotated[int, typer.Option("--blocks", help="Rounds over everything; each reads its prompts anew.")] = 3,
    temp: options.Temp = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of prompts, order and sampling.")] = 0,
    ctx_size: Annotated[
        int, typer.Option("--ctx-size", help="Context per slot, tokens; 0: as much as --contexts need.")
    ] = 0,
    *,
    engine_options: options.EngineOptions,
    plot: options.Plot = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Measure the cost surface alone: draft lengths, contexts, slots, catch-up; for --cost of replay and tune."""
    from tracekit.errors import TracekitError
    from tracekit.report import pictures

    pictures.check(plot, force, (model, engine_options.draft_model, output))
    n_slots, depths = _numbers("--slots", slots), _numbers("--contexts", contexts)

    from tracekit.engine import Engine, Sampling
    from tracekit.engine.calibrate import Plan, Sweep
    from tracekit.engine.calibrate import calibrate as measure
    from tracekit.report import surface
    from tracekit.trace.store import open_trace

    plan = Plan(n_slots, depths, n_max, steps, blocks)
    rows = plan.slots[-1] * (n_max + 1)
    if rows > engine_options.batch_size:
        raise TracekitError(
            f"--batch-size {engine_options.batch_size} cannot verify --n-max {n_max} drafts for --slots "
            f"{plan.slots[-1]}; raise it to {rows}, or lower one of these"
        )
    needed = plan.n_ctx(engine_options.batch_size)
    if ctx_size and ctx_size < needed:
        raise TracekitError(
            f"--ctx-size {ctx_size} does not hold --contexts {plan.contexts[-1]} and what is generated after it; "
            f"raise it to {needed}, or leave it out"
        )
    settings = replace(engine_options, ctx_size=ctx_size or needed).settings(plan.slots[-1])
    sweep = Sweep(n_max, seed)
    with (
        interrupted.told(output),
        Engine(model, None, settings, engine_options.draft_model, trace=output, probe=sweep, force=force) as engine,
        out.progress("decodes") as update,
    ):
        recorder = engine.recorder
        measure(engine, sweep, plan, Sampling(temp=temp, seed=seed), recorder.demanding(update))
    recorder.demand()
    cells = surface.surface(open_trace(output))
    if json:
        out.print_json({"file": str(output), "bytes": output.stat().st_size} | surface.as_json(cells))
    else:
        for table in surface.surface_tables(cells):
            out.print_table(table)
        for line in surface.surface_notes(cells):
            print(line)
    if plot:
        out.wrote(pictures.save(surface.surface_chart(cells), plot))
    out.wrote(output)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """A list of whole numbers, ``1,4,16``."""
    from tracekit.errors import TracekitError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise TracekitError(f"{option} {text}: whole numbers, as in 1,4,16") from None
