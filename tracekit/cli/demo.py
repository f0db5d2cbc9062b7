"""``tracekit demo``: the whole loop on the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out


def demo(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FOLDER", help="Where models, traces, policies and the picture go."),
    ] = Path("demo"),
    layers: Annotated[int, typer.Option("--layers", help="Trunk layers of the expanded reference model.")] = 36,
    width: Annotated[int, typer.Option("--width", help="Its channels: 256, 1024, 4096; 0: as it is.")] = 0,
    dtype: Annotated[str, typer.Option("--type", help="f32: exact at every batch width; f16: as one serves.")] = "f32",
    max_tokens: options.MaxTokens = 96,
    temp: options.Temp = 0.8,
    repeats: Annotated[int, typer.Option("--repeats", help="Live runs of every held-out prompt under every arm.")] = 2,
    prompts_per_category: Annotated[
        int, typer.Option("--prompts", help="Prompts per category to record; half as many are held out; 0: all.")
    ] = 5,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a demo with the same options stopped.")] = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Record, replay, tune, apply and verify on the reference model: should it speculate, how, and how sure are we?"""
    from tracekit.demo import Plan, run
    from tracekit.report import pictures
    from tracekit.study import Workload

    workload = Workload(max_tokens, temp, repeats, prompts_per_category, seed)
    story = run(Plan(layers, width, dtype, threads, workload), output, out.teller(), force, resume)
    if json:
        out.print_json([out.finding_json(head) for head in story.heads])
    else:
        for head in story.heads:
            out.print_finding(head, f"{head.name} head")
    for path in story.files:
        out.wrote(path)
    out.wrote(pictures.save(pictures.verdict_chart(story.frame), output / "verdict.png"))
