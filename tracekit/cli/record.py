"""``tracekit record``: real MTP runs into a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import interrupted, lengths, options, out
from tracekit.words import counted


@options.with_engine
def record(
    model: options.ModelFile,
    prompts: options.PromptsFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The trace to write (DuckDB).")],
    mode: Annotated[
        str, typer.Option("--mode", help="probe: drafts at every position; live: what --policy does.")
    ] = "probe",
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="POLICY", help="The policy that decides; --mode live only.")
    ] = None,
    baseline: Annotated[
        bool | None,
        typer.Option(
            "--baseline/--no-baseline",
            help="Also run each prompt briefly without MTP, idle and at fixed lengths [default: probe only].",
        ),
    ] = None,
    max_tokens: options.MaxTokens = 128,
    parallel: options.Slots = 1,
    *,
    sampling_options: options.SamplingOptions,
    engine_options: options.EngineOptions,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Record a trace: what was drafted, what was accepted, and how long each part took."""
    from tracekit.cli.tuned import read, warn
    from tracekit.errors import TracekitError
    from tracekit.model.prompt_sets import load

    if mode not in ("probe", "live"):
        raise TracekitError(f"--mode {mode}: probe or live")
    if (mode == "live") != (policy is not None):
        raise TracekitError(
            "--mode live needs --policy" if mode == "live" else "--policy decides nothing in a probe; add --mode live"
        )
    loaded = load(prompts)
    if len(loaded) < parallel:
        raise TracekitError(f"--parallel {parallel} needs {parallel} prompts or more; {prompts} has {len(loaded)}")
    tuned = read(policy) if policy else None

    from tracekit.engine import Engine, Probe
    from tracekit.engine.record import as_requests
    from tracekit.engine.record import record as record_requests

    settings = engine_options.settings(parallel)
    sampling = sampling_options.sampling(seeded=mode == "probe")
    requests = as_requests(loaded, max_tokens, sampling)
    probe = Probe(settings.n_max, sampling.seed) if mode == "probe" else None
    out.show_log()
    with (
        interrupted.told(output),
        Engine(
            model, tuned and tuned.policy, settings, engine_options.draft_model, trace=output, probe=probe, force=force
        ) as engine,
        out.progress("tokens") as update,
    ):
        recorder, trained = engine.recorder, engine.model.facts.n_ctx_train
        if tuned is not None:
            warn(tuned, policy, model, n_slots=parallel)
        baselines = mode == "probe" if baseline is None else baseline
        done = record_requests(engine, requests, baselines, recorder.demanding(update))
    recorder.demand()
    summary = {
        "file": str(output),
        "requests": len(done),
        "tokens": sum(len(c.tokens) for c in done),
        "bytes": output.stat().st_size,
        "ended_at_context": sum(c.stop == "context" for c in done),
    }
    if json:
        out.print_json(summary)
    else:
        print(
            f"{counted(summary['requests'], 'request')}, {counted(summary['tokens'], 'token')} in the {mode} arm, "
            f"{summary['bytes'] / 1e6:.1f} MB"
        )
    if n := summary["ended_at_context"]:
        out.say(
            f"warning: {n} of {counted(len(done), 'request')} ended where the context of {settings.n_ctx} tokens did; "
            "raise --ctx-size"
        )
    lengths.warn_of_training(done, trained)
    out.wrote(output)
