"""Options that several verbs share, in llama.cpp's names where they mean the same thing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracekit.cli import out

if TYPE_CHECKING:
    from tracekit.engine import Sampling, Settings

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
ModelFile = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file with NextN (MTP) layers.")]
TraceArgument = Annotated[
    Path,
    typer.Argument(metavar="TRACE", help="A trace: what `record`, `calibrate`, `merge` or an engine wrote (DuckDB)."),
]
PromptsFile = Annotated[
    str,
    typer.Option("--prompts", metavar="FILE", help="JSON lines of prompts, or a shipped set (tune, heldout, mixed)."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Tokens to generate for each prompt.")]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0 is greedy.")]
_SEED = "Seed of everything random; of several prompts the i-th samples with seed + i"
Seed = Annotated[int, typer.Option("--seed", help=f"{_SEED}.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0: one per physical core.")]
GpuLayers = Annotated[int, typer.Option("--gpu-layers", help="Layers on the GPU; -1: all.")]
Slots = Annotated[int, typer.Option("--parallel", help="Slots served by one decode.")]
Parallel = Annotated[
    int | None, typer.Option("--parallel", help="Slots that the requests are served over [default: as recorded].")
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it: .png, .svg or .html.")]


@dataclass(frozen=True)
class EngineOptions:
    """What every verb that runs an engine lets its user choose."""

    n_max: Annotated[int, typer.Option(help="Most tokens that may be drafted at once.")] = 8
    draft_model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Sidecar GGUF that holds the NextN layers.")
    ] = None
    ctx_size: Annotated[int, typer.Option(help="Context per slot, tokens.")] = 1024
    batch_size: Annotated[int, typer.Option(help="Most tokens in one llama_decode.")] = 512
    threads: Threads = 0
    gpu_layers: GpuLayers = -1
    cache_type_k: Annotated[str, typer.Option(help="Type of the K cache: f16, f32 or q8_0.")] = "f16"
    cache_type_v: Annotated[str, typer.Option(help="Type of the V cache: f16, f32 or q8_0.")] = "f16"
    flash_attn: Annotated[str, typer.Option(help="Flash attention: auto, on or off.")] = "auto"
    kv_unified: Annotated[
        bool, typer.Option("--kv-unified", help="One KV cache for all slots: drafts of unequal length in one pass.")
    ] = False
    spec_draft_backend_sampling: Annotated[
        bool | None,
        typer.Option(
            help="Pick drafts on the device, without copying logits [default: where the output layer is on a GPU]."
        ),
    ] = None
    backend_sampling: Annotated[
        bool, typer.Option("--backend-sampling", help="Sample the target's tokens on the device, too.")
    ] = False

    def settings(self, n_slots: int = 1) -> Settings:
        """The engine's settings for ``n_slots`` slots. Raises :class:`~tracekit.errors.TracekitError` for values that
        cannot work.
        """
        from tracekit.engine import Settings
        from tracekit.errors import TracekitError

        settings = Settings(
            n_slots=n_slots,
            n_ctx=self.ctx_size,
            n_batch=self.batch_size,
            n_ubatch=self.batch_size,
            threads=self.threads,
            gpu_layers=self.gpu_layers,
            cache_type_k=self.cache_type_k,
            cache_type_v=self.cache_type_v,
            flash_attn=self.flash_attn,
            kv_unified=self.kv_unified,
            n_max=self.n_max,
            spec_draft_backend_sampling=self.spec_draft_backend_sampling,
            backend_sampling=self.backend_sampling,
        )
        if self.kv_unified and n_slots == 1:
            raise TracekitError("--kv-unified: a single slot has one KV cache anyway; leave it out")
        warn_of_gpu_layers(self.gpu_layers)
        return settings


def warn_of_gpu_layers(gpu_layers: int) -> None:
    """Say where layers are wanted on a GPU that llama.cpp does not see; what scripts give on any machine is no
    mistake.
    """
    from tracekit.engine import lib

    if gpu_layers > 0 and not lib.has_gpu():
        out.say(f"warning: --gpu-layers {gpu_layers} changes nothing: llama.cpp sees no GPU")


@dataclass(frozen=True)
class SamplingOptions:
    """How the target's tokens are chosen, in llama.cpp's names; None: its default, for the seed 0."""

    temp: Temp = 0.0
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Sample from this many likeliest tokens; 0: all [default: 40].")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            help="Sample from the likeliest tokens whose probabilities add up to this; 1: all [default: 0.95].",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            help="Leave out tokens less likely than this times the likeliest one's probability; 0: none "
            "[default: 0.05].",
        ),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help=f"{_SEED} [default: 0].")] = None

    def sampling(self, seeded: bool = False) -> Sampling:
        """For the engine. ``seeded``: whether the verb has another use for the seed. Raises
        :class:`~tracekit.errors.TracekitError` for values that make no sense, or change nothing.
        """
        from tracekit.engine import Sampling
        from tracekit.errors import TracekitError

        given = {name: value for name, value in asdict(self).items() if value is not None}
        sampling = Sampling(**given)
        idle = [name for name in given if name != "temp" and not (seeded and name == "seed")]
        if idle and self.temp == 0:
            raise TracekitError(
                f"--{idle[0].replace('_', '-')}: changes nothing at --temp 0, which is greedy; leave it out, or give a "
                "higher --temp"
            )
        return sampling


_GROUPS = {"engine_options": EngineOptions, "sampling_options": SamplingOptions}


def with_engine(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with every field of :class:`EngineOptions` as an option of its own, where it takes ``engine_options``;
    of :class:`SamplingOptions` likewise, where it takes ``sampling_options``.

    A parameter of its own with a field's name, for another default or help, stands for that field.
    """
    own = inspect.signature(verb, eval_str=True).parameters
    shared = {name: inspect.signature(_GROUPS[name], eval_str=True).parameters for name in own if name in _GROUPS}

    @functools.wraps(verb)
    def run(**given: object) -> None:
        chosen = {name: _GROUPS[name](**{f: given[f] for f in of}) for name, of in shared.items()}
        verb(**{name: value for name, value in given.items() if name in own}, **chosen)

    seen = []
    for parameter in own.values():
        if parameter.name in shared:
            seen += [p for p in shared[parameter.name].values() if p.name not in own]
        else:
            seen.append(parameter)
    run.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in seen])
    run.__annotations__ = {p.name: p.annotation for p in seen}
    return run
