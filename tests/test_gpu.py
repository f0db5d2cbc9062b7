"""GPUs as NVIDIA's library tells of them, those included that it does not tell everything of."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from tracekit.cli.doctor import doctor
from tracekit.engine import Engine, lib
from tracekit.engine.doctor import demand_gpu, surroundings
from tracekit.engine.gpu import GpuSensors, gpus
from tracekit.engine.placement import Placement
from tracekit.errors import TracekitError
from tracekit.trace.store import open_trace


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


def test_every_switch_of_llama_cpp_is_told(monkeypatch):
    """Variables that turn something off, as the library itself names them, are in the provenance."""
    library = Path(lib.llama.__file__).parent / "lib" / "libllama.so"
    if not library.exists():
        pytest.skip("a library of another name")
    switches = {name.decode() for name in re.findall(rb"LLAMA_[A-Z_]+_DISABLE(?=\0)", library.read_bytes())}
    assert "LLAMA_ATTN_ROT_DISABLE" in switches
    for name in switches:
        monkeypatch.setenv(name, "1")
    assert switches <= surroundings()["machine"]["environment"].keys()


CUDA = """
int cudaPeekAtLastError(void) { return %d; }
const char *cudaGetErrorString(int code) { return code == 700 ? "an illegal memory access was encountered" : "?"; }
int cublasGetProperty(int which, int *found) { *found = which == 0 ? 13 : 4 * which; return 0; }
"""


@pytest.mark.parametrize(("code", "told"), [(700, "an illegal memory access was encountered"), (0, "")])
def test_the_reason_of_a_cuda_error(tmp_path, monkeypatch, code, told):
    """The CUDA runtime that llama.cpp is linked with is asked what was wrong, and cuBLAS which it is; here made up."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "cuda.c").write_text(CUDA % code)
    cc = shutil.which("cc") or shutil.which("gcc") or "c++"
    library = tmp_path / "lib" / "libggml-cuda.so"
    subprocess.run([cc, "-shared", "-fPIC", "-o", library, tmp_path / "cuda.c"], check=True)
    monkeypatch.setattr(lib, "llama", SimpleNamespace(__file__=tmp_path / "llama_cpp.py"))
    assert (lib._cuda_error(), lib.cublas_version()) == (told, "13.4.8")
    library.unlink()
    assert (lib._cuda_error(), lib.cublas_version()) == ("", None)


_HANG = """
    import signal, sys, time
    from tracekit.engine import Engine, Settings, context, watch
    watch.LIMIT_S, watch.LOOKS = 1.0, 5
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with Engine(sys.argv[1], "static:n_max=3", Settings(n_max=6, threads=1), trace=sys.argv[2]) as engine:
        looking = watch.Watch([engine._target, engine._drafter._context])
        began = time.monotonic()
        while time.monotonic() - began < 2:  # it works ...
            engine.generate("import os", max_tokens=20)
        time.sleep(2)  # ... and waits
        print("alive", flush=True)
        context.lib.decode = lambda *_: time.sleep(60)
        engine.generate("import os", max_tokens=20)
"""


def test_a_gpu_that_hangs_ends_the_process(models, tmp_path):
    """A decode that does not come back is told of and ends the process, which an idle or a busy engine never does; what
    was recorded is there.
    """
    path = tmp_path / "t.duckdb"
    command = [sys.executable, "-c", textwrap.dedent(_HANG), str(models["plain"]), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert result.returncode == -signal.SIGABRT
    assert result.stdout == "alive\n"
    (line,) = result.stderr.splitlines()
    assert re.match(
        "tracekit: error: a decode of [0-9]+ rows? by the target has not come back for 1 seconds: the GPU hangs; ", line
    )
    assert open_trace(path).frame("SELECT count(*) AS n FROM requests")["n"][0] > 1


def test_many_graphs_come_back(models):
    """The benchmark that looks for what hangs runs on a processor, too, where nothing does."""
    script = Path(__file__).parent.parent / "benchmarks" / "graphs.py"
    command = [sys.executable, script, models["plain"], "--seconds", "0.2"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    assert [line.split()[0] for line in told] == ["drafter"] * 3 + ["target"] * 3
    assert all(re.search(r" [1-9][0-9]* shapes twice each, all came back$", line) for line in told)


def test_only_models_on_a_gpu_are_watched(models, settings, monkeypatch):
    """A processor may take minutes for a decode. The watch ends with its engine, also one that was forgotten."""

    def watched() -> bool:
        return any(thread.name == "tracekit-watch" for thread in threading.enumerate())

    with Engine(models["plain"], settings=settings):
        assert not watched()
    monkeypatch.setattr(Placement, "on_gpu", True)
    with Engine(models["plain"], settings=settings) as engine:
        assert watched()
        engine.generate("import", max_tokens=4)
    assert not watched()
    assert Engine(models["plain"], settings=settings).mtp  # collected at once
    assert not watched()
