"""``tracekit doctor``: what this machine and this model can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out


def doctor(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="A GGUF file to look at too.")] = None,
    json: options.Json = False,
) -> None:
    """Devices, the llama.cpp build, and for a model: NextN layers, memory kind, and what will work."""
    from tracekit.engine import lib
    from tracekit.engine.doctor import examine
    from tracekit.engine.provenance import driver, machine

    facts = {
        "llama_cpp": lib.build(),
        "devices": [{"name": n, "description": d, "memory_bytes": b} for n, d, b in lib.devices()],
        "driver": driver(),
        "machine": machine(),
    }
    if model is not None:
        facts["model"] = examine(model)
    if json:
        out.print_json(facts)
        return
    print(facts["llama_cpp"])
    for device in facts["devices"]:
        print(f"device   {device['name']}: {device['description']}, {device['memory_bytes'] / 2**30:.1f} GiB")
    if facts["driver"]:
        print(f"driver   {facts['driver']}")
    print(
        f"machine  {facts['machine']['processor']}, {facts['machine']['cpus']} CPUs, Python "
        f"{facts['machine']['python']}"
    )
    if model is not None:
        for key, value in facts["model"].items():
            print(f"{key:17s} {value}")
