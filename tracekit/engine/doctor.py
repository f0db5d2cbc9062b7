"""What this machine has and what a model can do on it, found by trying: where layers lie, how memory forgets."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tracekit.engine import lib
from tracekit.engine.context import Batch, Context
from tracekit.engine.model import Model, check_drafter
from tracekit.engine.placement import Placement
from tracekit.engine.provenance import machine
from tracekit.engine.rollback import PartialRollback
from tracekit.engine.settings import Settings
from tracekit.errors import TracekitError

_ROW_BY_ROW = (  # source: ggml/src/ggml-cpu/ops.cpp, ggml_compute_forward_flash_attn_ext_f16 (GGML_FA_TILE_Q)
    "llama.cpp's flash attention on a processor takes batches under 64 rows, as verifications are, row by row; "
    "--flash-attn off may verify drafts much faster (compare both with `tracekit calibrate`)"
)


def surroundings() -> dict[str, Any]:
    """The llama.cpp build, every device that it can compute on, and the machine, as a trace's provenance has them."""
    devices = [{"name": n, "description": d, "memory_bytes": b} for n, d, b in lib.devices()]
    return {"llama_cpp": lib.build(), "devices": devices, "machine": machine()}


def demand_gpu(facts: dict[str, Any]) -> None:
    """Raise :class:`TracekitError` unless ``facts`` (:func:`surroundings`; ``model``: :func:`examine`) tell of a GPU
    that llama.cpp can use, and of a model that lies on it.
    """
    if all(lib.is_processor(device["name"]) for device in facts["devices"]):
        gpus, visible = facts["machine"]["gpus"], facts["machine"].get("environment", {}).get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        seen = f"the driver shows {gpus[0]['name'] or 'a GPU'}{hidden}, but " if gpus else ""
        raise TracekitError(
            f"{seen}llama.cpp sees no GPU; build it with CUDA: `make demo-cuda`, or docs/cuda.md for a machine offline"
        )
    if "model" in facts:
        Placement(**{k: v for k, v in facts["model"]["placement"].items() if k != "on_gpu"}).demand_gpu(
            facts["model"]["file"]
        )


def examine(path: str | Path, gpu_layers: int = -1, draft_model: str | Path | None = None) -> dict[str, Any]:
    """Facts about the GGUF file ``path``, loaded with ``gpu_layers``, and a verdict on drafting with its own NextN
    layer or with that of the sidecar ``draft_model``.

    ``memory``: how it forgets rejected drafts: ``partial`` (``llama_memory_seq_rm``), ``snapshot`` (the same, of a
    recurrent state), or ``checkpoint`` where that fails. ``placement``: layers by device,
    buffers by backend, and what flash attention ``auto`` comes to (:class:`tracekit.engine.placement.Placement`).
    ``advice``: sentences, on settings that may be better than llama.cpp's defaults.
    """
    works = []
    with lib.listening() as log, ExitStack() as opened:
        model = opened.enter_context(closing(Model(path, gpu_layers)))
        source = model
        if draft_model is not None:
            source = opened.enter_context(closing(Model(draft_model, gpu_layers, sidecar=True)))
        target = opened.enter_context(closing(_context(model)))
        facts, memory = model.facts, _memory_kind(target)
        try:
            check_drafter(source, model)
            _context(source, target).close()
        except TracekitError as error:
            works.append(str(error).removeprefix(f"{path}: "))
    placement = Placement.of(log)
    if memory == "checkpoint":
        works.append("its memory cannot forget single tokens: not supported yet")
    if gpu_layers and not placement.on_gpu and lib.has_gpu():
        works.append("a GPU is there and does not hold all layers: more memory, or a smaller type, would help")
    return {
        "file": facts.path,
        "architecture": facts.arch,
        "description": facts.desc,
        "parameters": facts.n_params,
        "layers": facts.n_layer,
        "NextN layers": facts.n_layer_nextn,
        "trained context": facts.n_ctx_train,
        "memory": memory,
        "placement": placement.as_dict(),
        "verdict": "; ".join(works) or "MTP drafting works with this model",
        "advice": [_ROW_BY_ROW] if placement.flash_attn == "enabled" and not placement.on_gpu else [],
    }


def _context(model: Model, target: Context | None = None) -> Context:
    return Context(model, Settings(n_ctx=64, n_batch=32, n_ubatch=32), target, n_snapshots=0 if target else 2)


def _memory_kind(context: Context) -> str:
    """How a model's memory takes tokens back out, found by trying."""
    batch = Batch(32)
    batch.extend([0, 0, 0, 0], 0, 0, True)
    context.decode(batch)
    if not context.remove(0, 2):
        return "checkpoint"
    return PartialRollback(context, Settings()).kind
