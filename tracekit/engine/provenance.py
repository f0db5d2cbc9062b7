"""Where a trace comes from: the model, the machine, the build and every setting, as one row of the table ``runs``."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import tracekit
from tracekit.engine import lib
from tracekit.engine.model import Model
from tracekit.engine.probe import Probe
from tracekit.engine.settings import Settings
from tracekit.policy.rule import Policy
from tracekit.trace import schema


def run_facts(
    model: Model, draft_model: Model | None, settings: Settings, policy: Policy, probe: Probe | None
) -> dict[str, Any]:
    """The ``runs`` row for a recording that an engine of these parts starts now."""
    facts = model.facts
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
        "settings": settings.as_dict() | ({"probe_seed": probe.seed} if probe else {}),
        "machine": machine(),
    }


def device_name() -> str:
    """Every device that ggml can compute on, by name."""
    return "; ".join(f"{name}: {description}" for name, description, _ in lib.devices())


def machine() -> dict[str, Any]:
    """Operating system, processor, cores, memory and Python of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver() -> str | None:
    """Version of the NVIDIA driver, or None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
