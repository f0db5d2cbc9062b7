"""tracekit decides, from real traces, whether and how a llama.cpp model should speculate.

::

    trace = tracekit.open("run.duckdb")
    league = trace.replay(["off", "static:n_max=8", "fallback:min_ratio=0.5..0.9/0.05"])
    best = trace.tune(max_slowdown=0.02)
    best.save("policy.toml")
    with tracekit.Engine("model.gguf", policy=best) as engine:
        print(engine.generate("def fib(n):").text)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# imported when first used: the command line stays quick, and analysis never needs the engine
_PLACES = {
    "open": "tracekit.api",
    "Trace": "tracekit.api",
    "TracekitError": "tracekit.errors",
    "Engine": "tracekit.engine",
    "Request": "tracekit.engine",
    "Sampling": "tracekit.engine",
    "Settings": "tracekit.engine",
    "Probe": "tracekit.engine",
}
# `from tracekit import *` leaves Python's own open alone
__all__ = ["__version__", *(name for name in _PLACES if name != "open")]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'tracekit' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return ["__version__", *_PLACES]
