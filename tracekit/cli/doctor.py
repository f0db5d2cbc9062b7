"""``tracekit doctor``: what this machine and this model can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tracekit.cli import options, out


def doctor(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help="A GGUF file to look at too.")] = None,
    draft_model: Annotated[
        Path | None, typer.Option("--draft-model", metavar="FILE", help="Sidecar GGUF that holds the NextN layers.")
    ] = None,
    gpu_layers: options.GpuLayers = -1,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Fail unless there is a GPU, and the model's layers are on it.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Devices, the llama.cpp build, and for a model: where it lies, NextN layers, memory kind, what will work."""
    from tracekit.engine.doctor import demand_gpu, examine, surroundings
    from tracekit.errors import TracekitError

    if gpu_layers < -1:
        raise TracekitError(f"--gpu-layers {gpu_layers}: -1 or more")
    facts = surroundings()
    if model is not None:
        options.warn_of_gpu_layers(gpu_layers)
        facts["model"] = examine(model, gpu_layers, draft_model)
    elif draft_model is not None:
        raise TracekitError("--draft-model needs a MODEL that it drafts for")
    elif gpu_layers != -1:
        raise TracekitError("--gpu-layers needs a MODEL whose layers they are")
    if json:
        out.print_json(facts)
    else:
        _print(facts)
    if require_gpu:
        demand_gpu(facts)


def _print(facts: dict[str, Any]) -> None:
    print(facts["llama_cpp"])
    for device in facts["devices"]:
        print(f"device   {device['name']}: {device['description']}, {device['memory_bytes'] / 2**30:.1f} GiB")
    machine = facts["machine"]
    for gpu in machine["gpus"]:
        told = {key: "not told" if value is None else value for key, value in gpu.items()}
        watts, clock = gpu["power_limit_w"], gpu["sm_clock_max_mhz"]
        print(
            f"gpu      {told['name']}, driver {told['driver']}, CUDA {told['cuda_driver']}, compute capability "
            f"{told['compute_capability']}, power limit {'not told' if watts is None else f'{watts:.0f} W'}, "
            f"clock limit {'not told' if clock is None else f'{clock} MHz'}"
        )
    for name, value in machine["environment"].items():
        print(f"heeded   {name} is {value!r}")
    if machine["cuda_graphs"] is not None:
        print(f"graphs   CUDA launches {'whole graphs' if machine['cuda_graphs'] else 'single kernels'}")
    if machine["cublas"] is not None:
        print(f"cuBLAS   {machine['cublas']}")
    print(f"machine  {machine['processor']}, {machine['cpus']} CPUs, Python {machine['python']}")
    for key, value in facts.get("model", {}).items():
        if key == "placement":
            print(f"{'layers on':17s} {', '.join(f'{device}: {n}' for device, n in value['layers'].items())}")
            weights = value["buffers"].get("model", {})
            print(f"{'weights in':17s} {', '.join(f'{name}: {b / 2**20:.0f} MiB' for name, b in weights.items())}")
            print(f"{'flash attention':17s} {value['flash_attn'] or 'not told'}")
        elif key == "advice":
            for sentence in value:
                print(f"{key:17s} {sentence}")
        else:
            print(f"{key:17s} {value}")
