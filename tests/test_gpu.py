"""GPUs as NVIDIA's library tells of them, those included that it does not tell everything of."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace

import pynvml
import pytest

from tracekit.cli.doctor import doctor
from tracekit.engine import lib
from tracekit.engine.doctor import demand_gpu, surroundings
from tracekit.engine.gpu import GpuSensors, gpus
from tracekit.errors import TracekitError


class Nvml:
    """NVIDIA's library on a machine with three GPUs, of which the first is lost and the last says no more than
    ``told``.
    """

    NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_TEMPERATURE_GPU = 0

    def __init__(self, **told: object):
        self.told = {"nvmlDeviceGetCount": 3} | told

    def nvmlDeviceGetHandleByIndex(self, i):
        """The GPU's number."""
        if i == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return i

    def __getattr__(self, name):
        def ask(*_):
            if name not in self.told:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return self.told[name]

        return ask


def test_gpus_that_do_not_answer(monkeypatch, capsys):
    """A lost GPU is left out, the others keep their numbers, and what one does not tell is not made up."""
    monkeypatch.setattr("tracekit.engine.gpu._nvml", lambda: Nvml())
    silent = gpus()
    assert len(silent) == 2
    assert {value for gpu in silent for value in gpu.values()} == {None}
    assert [reading.gpu for reading in GpuSensors()(0, 0)] == [1, 2]
    doctor()
    assert "power limit not told, clock limit not told" in capsys.readouterr().out
    told = {"nvmlDeviceGetPersistenceMode": 0, "nvmlDeviceGetMigMode": [1, 0], "nvmlDeviceGetEnforcedPowerLimit": 7e5}
    monkeypatch.setattr("tracekit.engine.gpu._nvml", lambda: Nvml(**told))
    assert [gpus()[0][key] for key in ("persistence_mode", "mig", "power_limit_w")] == [False, True, 700]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    doctor()
    printed = capsys.readouterr().out
    assert "power limit 700 W, clock limit not told" in printed
    assert "CUDA_VISIBLE_DEVICES is '1'" in printed
    facts = {"devices": [], "machine": surroundings()["machine"]}
    with pytest.raises(TracekitError, match=r"shows a GPU \(CUDA_VISIBLE_DEVICES is '1'\), but llama.cpp sees no GPU"):
        demand_gpu(facts)


def test_what_llama_cpp_heeds_is_told(monkeypatch, capsys):
    """Variables that change what a GPU's back end does are in the provenance and in `doctor`; no others are."""
    for name in ("GGML_CUDA_DISABLE_GRAPHS", "CUDA_VISIBLE_DEVICES", "LLAMA_API_KEY"):
        monkeypatch.setenv(name, "1")
    told = surroundings()["machine"]["environment"]
    assert told == {"GGML_CUDA_DISABLE_GRAPHS": "1", "CUDA_VISIBLE_DEVICES": "1"}
    doctor()
    assert "heeded   GGML_CUDA_DISABLE_GRAPHS is '1'" in capsys.readouterr().out


CUDA = """
int cudaPeekAtLastError(void) { return %d; }
const char *cudaGetErrorString(int code) { return code == 700 ? "an illegal memory access was encountered" : "?"; }
"""


@pytest.mark.parametrize(("code", "told"), [(700, "an illegal memory access was encountered"), (0, "")])
def test_the_reason_of_a_cuda_error(tmp_path, monkeypatch, code, told):
    """The CUDA runtime that llama.cpp is linked with is asked what was wrong; here one that is made up."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "cuda.c").write_text(CUDA % code)
    cc = shutil.which("cc") or shutil.which("gcc") or "c++"
    library = tmp_path / "lib" / "libggml-cuda.so"
    subprocess.run([cc, "-shared", "-fPIC", "-o", library, tmp_path / "cuda.c"], check=True)
    monkeypatch.setattr(lib, "llama", SimpleNamespace(__file__=tmp_path / "llama_cpp.py"))
    assert lib._cuda_error() == told
    library.unlink()
    assert lib._cuda_error() == ""
