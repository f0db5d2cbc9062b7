"""NVIDIA GPUs, as their driver describes them: names, versions, and clocks and power as read. Nothing is ever set."""

from __future__ import annotations

from typing import Any

from tracekit.trace.rows import GpuReading


def _nvml():
    """NVIDIA's management library, ready; None without an NVIDIA driver or without the package nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _asked(ask, *arguments: Any, scale: float = 1) -> Any:
    """The answer of one NVML question, divided by ``scale``; None where this GPU does not answer it."""
    import pynvml

    try:
        found = ask(*arguments)
    except pynvml.NVMLError:
        return None
    return found if scale == 1 else found / scale


def _boards(nvml) -> list[tuple[int, Any]]:
    """Number and handle of every GPU but those that are lost, or forbidden to this process."""
    found = [(i, _asked(nvml.nvmlDeviceGetHandleByIndex, i)) for i in range(_asked(nvml.nvmlDeviceGetCount) or 0)]
    return [(i, gpu) for i, gpu in found if gpu is not None]


def gpus() -> list[dict[str, Any]]:
    """Facts about every NVIDIA GPU, empty without one: what a trace's provenance says of the machine; None for
    what a GPU does not tell.

    Clocks in MHz, power in W; ``*_max`` and ``power_limit_w`` are what the GPU was allowed, not what it reached.
    """
    nvml = _nvml()
    if nvml is None:
        return []
    cuda = _asked(nvml.nvmlSystemGetCudaDriverVersion_v2)
    found = []
    for _, gpu in _boards(nvml):
        memory, capability, persistent, mig = (
            _asked(ask, gpu)
            for ask in (
                nvml.nvmlDeviceGetMemoryInfo,
                nvml.nvmlDeviceGetCudaComputeCapability,
                nvml.nvmlDeviceGetPersistenceMode,
                nvml.nvmlDeviceGetMigMode,
            )
        )
        found.append(
            {
                "name": _asked(nvml.nvmlDeviceGetName, gpu),
                "driver": _asked(nvml.nvmlSystemGetDriverVersion),
                "cuda_driver": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
                "compute_capability": "{}.{}".format(*capability) if capability else None,
                "memory_bytes": memory.total if memory else None,
                "power_limit_w": _asked(nvml.nvmlDeviceGetEnforcedPowerLimit, gpu, scale=1000),
                "sm_clock_max_mhz": _asked(nvml.nvmlDeviceGetMaxClockInfo, gpu, nvml.NVML_CLOCK_SM),
                "mem_clock_max_mhz": _asked(nvml.nvmlDeviceGetMaxClockInfo, gpu, nvml.NVML_CLOCK_MEM),
                "persistence_mode": None if persistent is None else bool(persistent),
                "mig": None if mig is None else bool(mig[0]),
            }
        )
    return found


def driver() -> str | None:
    """Version of the NVIDIA driver; None without one, or where it does not tell."""
    nvml = _nvml()
    return _asked(nvml.nvmlSystemGetDriverVersion) if nvml else None


class GpuSensors:
    """Reads every NVIDIA GPU when called; a few tens of microseconds each. Empty without one."""

    def __init__(self):
        self._nvml = _nvml()
        self._boards = _boards(self._nvml) if self._nvml else []

    def __call__(self, run: int, t_us: int) -> list[GpuReading]:
        """One row per GPU, for ``run`` at ``t_us``."""
        nvml, readings = self._nvml, []
        for i, gpu in self._boards:
            used = _asked(nvml.nvmlDeviceGetUtilizationRates, gpu)
            memory = _asked(nvml.nvmlDeviceGetMemoryInfo, gpu)
            values = (
                _asked(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
                _asked(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_MEM),
                _asked(nvml.nvmlDeviceGetPowerUsage, gpu, scale=1000),
                _asked(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
                used.gpu / 100 if used else None,
                memory.used if memory else None,
            )
            readings.append(GpuReading(run, t_us, i, *(-1 if v is None else v for v in values)))
        return readings
