"""``tracekit record``: real MTP runs into a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out


def record(
    model: options.ModelFile,
    prompts: options.PromptsFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The trace to write (DuckDB).")],
    mode: Annotated[
        str, typer.Option("--mode", help="probe: drafts at every position; live: what --policy does.")
    ] = "probe",
    policy: Annotated[str | None, typer.Option("--policy", help="The policy that decides; --mode live only.")] = None,
    baseline: Annotated[
        bool | None,
        typer.Option(
            "--baseline/--no-baseline",
            help="Also run each prompt briefly without MTP, idle and at fixed lengths [default: probe only].",
        ),
    ] = None,
    max_tokens: options.MaxTokens = 128,
    temp: options.Temp = 0.0,
    seed: options.Seed = 0,
    n_max: options.NMax = 8,
    draft_model: options.DraftModel = None,
    ctx_size: options.CtxSize = 1024,
    batch_size: options.BatchSize = 512,
    threads: options.Threads = 0,
    gpu_layers: options.GpuLayers = -1,
    parallel: options.Parallel = 1,
    cache_type_k: options.CacheTypeK = "f16",
    cache_type_v: options.CacheTypeV = "f16",
    flash_attn: options.FlashAttn = "auto",
    spec_draft_backend_sampling: options.SpecDraftBackendSampling = None,
    backend_sampling: options.BackendSampling = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Record a trace: what was drafted, what was accepted, and how long each part took."""
    from tracekit.errors import TracekitError
    from tracekit.model.prompt_sets import load
    from tracekit.policy.spec import parse_one

    if mode not in ("probe", "live"):
        raise TracekitError(f"--mode {mode}: probe or live")
    if (mode == "live") != (policy is not None):
        raise TracekitError(
            "--mode live needs --policy" if mode == "live" else "--policy decides nothing in a probe; add --mode live"
        )
    loaded = load(prompts)
    chosen = parse_one(policy) if policy else None

    from tracekit.engine import Engine, Probe
    from tracekit.engine.record import as_requests
    from tracekit.engine.record import record as record_requests

    settings = options.settings(
        n_max,
        ctx_size,
        batch_size,
        threads,
        gpu_layers,
        parallel,
        cache_type_k,
        cache_type_v,
        flash_attn,
        spec_draft_backend_sampling,
        backend_sampling,
    )
    requests = as_requests(loaded, max_tokens, temp, seed)
    probe = Probe(n_max, seed) if mode == "probe" else None
    out.show_log()
    with (
        Engine(model, chosen, settings, draft_model, trace=output, probe=probe, force=force) as engine,
        out.progress("tokens") as update,
    ):
        done = record_requests(engine, requests, mode == "probe" if baseline is None else baseline, update)
        failed = engine.recorder.failed
    summary = {
        "file": str(output),
        "requests": len(done),
        "tokens": sum(len(c.tokens) for c in done),
        "bytes": output.stat().st_size,
        "complete": not failed,
    }
    if json:
        out.print_json(summary)
    else:
        print(
            f"{summary['requests']} requests, {summary['tokens']} tokens in the {mode} arm, "
            f"{summary['bytes'] / 1e6:.1f} MB"
        )
    if failed:
        raise TracekitError(f"{output}: recording stopped ({failed}); what was committed is kept")
    out.wrote(output)
