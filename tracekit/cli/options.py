"""Options that several verbs share, in llama.cpp's names where they mean the same thing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tracekit.engine import Settings

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file with NextN (MTP) layers.")]
TraceArgument = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace: the DuckDB file that `record` wrote.")]
PromptsFile = Annotated[
    str,
    typer.Option("--prompts", metavar="FILE", help="JSON lines of prompts, or a shipped set (tune, heldout, mixed)."),
]
DraftModel = Annotated[
    Path | None, typer.Option("--draft-model", metavar="FILE", help="Sidecar GGUF that holds the NextN layers.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Tokens to generate for each prompt.")]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0 is greedy.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random; request i samples with seed + i.")]
NMax = Annotated[int, typer.Option("--n-max", help="Most tokens that may be drafted at once.")]
CtxSize = Annotated[int, typer.Option("--ctx-size", help="Context per slot, tokens.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Most tokens in one llama_decode.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0: one per physical core.")]
GpuLayers = Annotated[int, typer.Option("--gpu-layers", help="Layers on the GPU; -1: all.")]
Parallel = Annotated[int, typer.Option("--parallel", help="Slots served by one decode.")]
CacheTypeK = Annotated[str, typer.Option("--cache-type-k", help="Type of the K cache: f16, f32 or q8_0.")]
CacheTypeV = Annotated[str, typer.Option("--cache-type-v", help="Type of the V cache: f16, f32 or q8_0.")]
FlashAttn = Annotated[str, typer.Option("--flash-attn", help="Flash attention: auto, on or off.")]
SpecDraftBackendSampling = Annotated[
    bool | None,
    typer.Option(
        "--spec-draft-backend-sampling/--no-spec-draft-backend-sampling",
        help="Pick drafts on the device, without copying logits [default: where the output layer is on a GPU].",
    ),
]
BackendSampling = Annotated[
    bool, typer.Option("--backend-sampling", help="Sample the target's tokens on the device, too.")
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it: .png, .svg or .html.")]


def settings(
    n_max: int,
    ctx_size: int,
    batch_size: int,
    threads: int,
    gpu_layers: int,
    parallel: int,
    cache_type_k: str,
    cache_type_v: str,
    flash_attn: str,
    spec_draft_backend_sampling: bool | None,
    backend_sampling: bool,
) -> Settings:
    """The engine's settings from the options above."""
    from tracekit.engine import Settings

    return Settings(
        n_slots=parallel,
        n_ctx=ctx_size,
        n_batch=batch_size,
        n_ubatch=batch_size,
        threads=threads,
        gpu_layers=gpu_layers,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        flash_attn=flash_attn,
        n_max=n_max,
        spec_draft_backend_sampling=spec_draft_backend_sampling,
        backend_sampling=backend_sampling,
    )
