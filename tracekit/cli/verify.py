"""``tracekit verify``: predicted against live."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out


@options.with_engine
def verify(
    model: options.ModelFile,
    policy_file: Annotated[
        Path, typer.Argument(metavar="POLICY", help="The policy file that `tune` wrote, or a policy.")
    ],
    prompts: options.PromptsFile = "heldout",
    cost: Annotated[
        Path | None,
        typer.Option(
            "--cost",
            metavar="TRACE",
            help="Take the times from another trace, or a calibration, and not from probes of the prompts.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="POLICIES", help="Compare these too; sweeps as in replay. May be given again."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Live runs of every prompt under every arm.")] = 3,
    max_tokens: options.MaxTokens = 128,
    parallel: options.Slots = 1,
    *,
    sampling_options: options.SamplingOptions,
    engine_options: options.EngineOptions,
    plot: options.Plot = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Run held-out prompts live under no MTP, the naive static policies, the fallback and the tuned policy; compare
    with the prediction.
    """
    from dataclasses import asdict

    import polars as pl

    from tracekit.cli.tuned import read, warn, warn_of_settings, warn_of_times
    from tracekit.errors import TracekitError
    from tracekit.model.prompt_sets import load
    from tracekit.policy import spec
    from tracekit.report import pictures, tables
    from tracekit.trace.store import open_trace

    if repeats < 1:
        raise TracekitError(f"--repeats {repeats}: 1 or more")
    if force and plot is None:
        raise TracekitError("--force needs --plot, the file that it overwrites")
    pictures.check(plot, force, (model, engine_options.draft_model, policy_file, Path(prompts), cost))
    if engine_options.n_max < 1:
        raise TracekitError(f"--n-max {engine_options.n_max}: 1 or more; verify compares drafting")
    text = str(policy_file)
    tuned = read(text)
    others = dict.fromkeys(p for text in also or [] for p in spec.parse(text))  # each once, in order
    loaded = load(prompts)
    times = open_trace(cost) if cost else None

    from tracekit.engine.record import as_requests
    from tracekit.verify import Arm, standard_arms
    from tracekit.verify import verify as run

    settings, sampling = engine_options.settings(parallel), sampling_options.sampling(seeded=True)
    warn(tuned, text, model, n_slots=parallel)
    warn_of_settings(tuned, text, settings.as_dict() | asdict(sampling))
    if times is not None:
        warn_of_times(times, model, settings.as_dict())
    requests = as_requests(loaded, max_tokens, sampling)
    arms = [*standard_arms(tuned.policy, settings.n_max), *(Arm(p.label, p) for p in others)]
    with out.progress("live runs") as update:
        verdict = run(
            model, arms, requests, settings, engine_options.draft_model, repeats, times, sampling.seed, update,
        )  # fmt: skip  # what is run, then how
    if json:
        out.print_json(verdict.as_json())
    else:
        out.print_table(tables.verdict_table(verdict))
        out.print_table(tables.categories_table(verdict))
        print("intervals are for exactly these prompts: predicted, of the fit of costs; measured, of the repeats")
        print(verdict.sentence + (f" Warning: {verdict.warning}." if verdict.warning else ""))
        if tuned.evidence is not None:
            e = tuned.evidence
            print(
                f"tuned for {e.speedup:.3f} x no MTP ({e.speedup_low:.3f} - {e.speedup_high:.3f}) on "
                f"{e.n_prompts or e.n_requests} other prompts"
            )
    if plot:
        out.wrote(pictures.save(pictures.verdict_chart(verdict.arms.with_columns(head=pl.lit(model.name))), plot))
