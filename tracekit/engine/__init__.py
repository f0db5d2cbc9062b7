"""The live engine on llama-cpp-python (the extra ``engine``)."""

from tracekit.engine.engine import Engine
from tracekit.engine.probe import Probe
from tracekit.engine.sampling import Sampling
from tracekit.engine.settings import Settings
from tracekit.engine.slot import Completion, Request

__all__ = ["Completion", "Engine", "Probe", "Request", "Sampling", "Settings"]
