"""What a model can do here, found by trying: NextN layers, and how its memory forgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tracekit.engine.context import Batch, Context
from tracekit.engine.model import Model
from tracekit.engine.settings import CACHE_TYPES, physical_cores


def examine(path: str | Path) -> dict[str, Any]:
    """Facts about the GGUF file ``path`` and a verdict. ``memory``: ``partial``, or ``checkpoint`` where
    ``llama_memory_seq_rm`` fails.
    """
    model = Model(path, gpu_layers=0)
    try:
        facts = model.facts
        threads = physical_cores()
        f16 = CACHE_TYPES["f16"]
        context = Context(model, 1, 64, 32, 32, threads, f16, f16, -1)
        try:
            batch = Batch(32)
            batch.extend([0, 0, 0, 0], 0, 0, True)
            context.decode(batch)
            memory = "partial" if context.remove(0, 2) else "checkpoint"
        finally:
            context.close()
        works = []
        if facts.n_layer_nextn == 0:
            works.append("no NextN layers: nothing to draft with; give a sidecar with --draft-model")
        elif facts.n_layer_nextn > 1:
            works.append(f"{facts.n_layer_nextn} chained NextN layers: not supported yet")
        if memory != "partial":
            works.append("its memory cannot forget single tokens: not supported yet")
        return {
            "file": facts.path,
            "architecture": facts.arch,
            "description": facts.desc,
            "parameters": facts.n_params,
            "layers": facts.n_layer,
            "NextN layers": facts.n_layer_nextn,
            "trained context": facts.n_ctx_train,
            "memory": memory,
            "verdict": "; ".join(works) or "MTP drafting works with this model",
        }
    finally:
        model.close()
