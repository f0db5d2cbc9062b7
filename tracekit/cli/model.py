"""``tracekit model``: the reference model as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out

app = typer.Typer(help="The reference model: small, ours, and expandable.", no_args_is_help=True)


@app.command("build", short_help="Write the reference model, as it is or expanded.")
def build(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The GGUF file to write.")],
    layers: Annotated[
        int | None,
        typer.Option("--layers", help="Trunk layers: identity layers are added [default: the source's; ours has 5]."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            help="Channels: the source's times a power of four, exactly [default: the source's; ours has 256].",
        ),
    ] = None,
    misaligned: Annotated[bool, typer.Option("--misaligned", help="Break the drafter: near-zero acceptance.")] = False,
    sidecar: Annotated[bool, typer.Option("--sidecar", help="The drafter alone, for --draft-model.")] = False,
    dtype: Annotated[str, typer.Option("--type", help="Type of the matrices: f16 or f32.")] = "f16",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the values that do not contribute.")] = 0,
    source: Annotated[
        Path | None,
        typer.Option("--source", metavar="FILE", help="Another model that tracekit.model.train wrote [default: ours]."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write the reference model, as it is or expanded; expansion keeps its output and raises its cost."""
    _need_gguf()
    from tracekit.errors import TracekitError
    from tracekit.model.build import REFERENCE, inspect
    from tracekit.model.build import build as build_model

    if seed and layers is None and width is None and not misaligned:
        raise TracekitError("--seed needs --layers, --width or --misaligned: without them nothing is random")
    how = layers, width, misaligned, sidecar, dtype, seed, source or REFERENCE
    with out.progress("tensors") as update:
        path = build_model(output, *how, force=force, progress=update)
    if json:
        out.print_json(inspect(path))
    out.wrote(path)


@app.command("inspect", short_help="What a GGUF file holds, without loading it.")
def inspect(model: options.ModelFile, json: options.Json = False) -> None:
    """Sizes, NextN layers and provenance of a GGUF file, without loading it."""
    _need_gguf()
    from tracekit.model.build import inspect as look

    facts = look(model)
    if json:
        out.print_json(facts)
        return
    notes = facts.pop("notes")
    for key, value in facts.items():
        print(f"{key:18s} {value}")
    for key, value in notes.items():
        print(f"{key:18s} {value}")


def _need_gguf() -> None:
    from importlib.util import find_spec

    from tracekit.errors import EngineMissing

    if find_spec("gguf") is None:
        raise EngineMissing("GGUF files need the package gguf: pip install gguf")
