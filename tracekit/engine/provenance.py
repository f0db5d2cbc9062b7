"""Where a trace comes from: the model, the machine, the build and every setting, as one row of the table ``runs``."""

from __future__ import annotations

import datetime
import os
import platform
import uuid
from pathlib import Path
from typing import Any

import tracekit
from tracekit.engine import lib
from tracekit.engine.gpu import driver, gpus
from tracekit.engine.model import Model
from tracekit.engine.placement import Placement
from tracekit.engine.probe import Probe
from tracekit.engine.settings import Settings
from tracekit.policy.rule import SHIPPED, Policy
from tracekit.trace import schema


def run_facts(
    model: Model,
    draft_model: Model | None,
    settings: Settings,
    policy: Policy,
    probe: Probe | None,
    placement: Placement,
    memory: str,
) -> dict[str, Any]:
    """The ``runs`` row for a recording that an engine of these parts, placed so, starts now; ``memory``: how its target
    forgets.
    """
    facts, asked = model.facts, {"probe_seed": probe.seed} if probe else _source(policy)
    return {
        "run": 0,
        "trace_id": uuid.uuid4().hex,
        "schema_version": schema.VERSION,
        "mode": probe.arm if probe else "live",
        "started_at": datetime.datetime.now(datetime.UTC),
        "tracekit_version": tracekit.__version__,
        "policy": None if probe else policy.label,
        "n_max": probe.n_max if probe else settings.n_max,
        "model_path": facts.path,
        "model_sha256": model.sha256,
        "model_arch": facts.arch,
        "model_desc": facts.desc,
        "model_bytes": facts.n_bytes,
        "model_n_params": facts.n_params,
        "n_layer_nextn": facts.n_layer_nextn,
        "draft_sha256": draft_model.sha256 if draft_model else None,
        "llama_cpp": lib.build(),
        "device": device_name(),
        "driver": driver(),
        "settings": settings.as_dict() | {"memory": memory} | asked,
        "machine": machine() | {"placement": placement.as_dict()},
    }


def _source(policy: Policy) -> dict[str, str]:
    """The text of a policy file of one's own, which its path alone would not bring back."""
    rule = policy.rule
    return {} if rule.path.parent == SHIPPED else {"policy_sha256": rule.sha256, "policy_source": rule.source}


# how what llama.cpp and its back ends read begins, where numbers or times depend on it; the rest only prints more
_HEEDED = "GGML_", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "LLAMA_ATTN_", "LLAMA_GRAPH_REUSE_"


def device_name() -> str:
    """Every device that ggml can compute on, by name."""
    return "; ".join(f"{name}: {description}" for name, description, _ in lib.devices())


def machine() -> dict[str, Any]:
    """Operating system, processor, cores, memory, Python and NVIDIA GPUs of this machine, whether CUDA launches whole
    graphs and which cuBLAS multiplies (None without CUDA), and what ``environment`` holds of the variables that
    llama.cpp and its back ends heed.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "gpus": gpus(),
        "cuda_graphs": lib.cuda_graphs(),
        "cublas": lib.cublas_version(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_HEEDED)},
    }


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
