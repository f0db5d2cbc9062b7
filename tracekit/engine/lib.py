"""llama-cpp-python, checked: the one file that knows which version works and which of its symbols are not public.

llama.cpp's MTP interface (``llama-ext.h``) is not part of its stable API, so the version is pinned and every symbol
that the engine needs is looked up when the engine is imported, not in the middle of a request.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tracekit.errors import EngineMissing

PINNED = "0.3.36"
_INSTALL = f"pip install llama-cpp-python=={PINNED}"
_NEEDED_EXT = ("llama_set_embeddings_nextn", "llama_get_embeddings_nextn")
_NEEDED = (
    "llama_model_n_layer_nextn",
    "llama_memory_seq_rm",
    "llama_sampler_sample",
    "llama_sampler_copy",
    "llama_set_sampler",
    "llama_get_sampled_candidates_ith",
    "llama_get_sampled_logits_ith",
    "LLAMA_CONTEXT_TYPE_MTP",
)

log = logging.getLogger("tracekit.llama_cpp")
_WARN, _ERROR = 3, 4  # ggml_log_level
_complaints: deque[tuple[int, str]] = deque(maxlen=200)  # warnings and errors that nobody asked for yet
_listeners: list[list[str]] = []
_making = threading.RLock()  # the log and Python's hooks are the process's: one thread makes things, and listens
interrupts: dict[int, BaseException] = {}  # by thread: Ctrl-C and the like that came while llama.cpp was logging


def _load():
    try:
        found = version("llama-cpp-python")
    except PackageNotFoundError:
        raise EngineMissing(
            f"the live engine needs llama-cpp-python {PINNED}: {_INSTALL} (builds from source, about 6 "
            "minutes on 2 cores)"
        ) from None
    try:
        from llama_cpp import llama_cpp, llama_cpp_ext
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise EngineMissing(
            f"llama-cpp-python {found} does not load ({error}); version {PINNED} works: {_INSTALL}"
        ) from None
    missing = [n for n in _NEEDED if not hasattr(llama_cpp, n)] + [
        n for n in _NEEDED_EXT if not hasattr(llama_cpp_ext, n)
    ]
    if missing:
        raise EngineMissing(f"llama-cpp-python {found} lacks {', '.join(missing)}; version {PINNED} works: {_INSTALL}")
    return llama_cpp, llama_cpp_ext, found


llama, ext, VERSION = _load()


@llama.llama_log_callback
def _on_log(level: int, text: bytes, _user_data) -> None:
    try:
        line = text.decode("utf-8", errors="replace").rstrip("\n")
        if line:
            if level in (_WARN, _ERROR):
                _complaints.append((level, line))
            for heard in _listeners:
                heard.append(line)
            log.debug("%s", line)
    except BaseException as error:  # a signal's; through llama.cpp it would not come
        interrupts[threading.get_ident()] = error


def raise_interrupt() -> None:
    """After a call of llama.cpp: raise what a signal raised during it, in this thread."""
    if error := interrupts.pop(threading.get_ident(), None):
        raise error


def made(make: Callable, free: Callable, *arguments: Any) -> Any:
    """The handle that ``make(*arguments)`` of llama.cpp returns; ``free``d where a signal came meanwhile, whose
    exception is raised. Making takes seconds and logs: a callback's first line, where Python raises what a signal
    asks for, is outside of every ``try``, and ctypes hands it to ``sys.unraisablehook``. Threads wait for each other.
    """
    with _making:
        return _made(make, free, *arguments)


def _made(make: Callable, free: Callable, *arguments: Any) -> Any:
    kept: list[Any] = []
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if "ctypes callback" in (lost.err_msg or ""):
            interrupts[threading.get_ident()] = lost.exc_value
        else:  # another's: a finalizer's, say
            before(lost)

    sys.unraisablehook = hook
    _complaints.clear()
    try:
        llama.llama_log_set(_on_log, None)
        kept.extend(map(make, *([a] for a in arguments)))  # by C alone: it is kept before a signal is raised
        raise_interrupt()
        if kept[0]:
            _complaints.clear()
    except BaseException:
        for handle in filter(None, kept):
            free(handle)
        raise
    finally:
        sys.unraisablehook = before
        _hush()
    return kept[0]


def _hush() -> None:
    """Have ggml log nothing until something is :func:`made` again: its CUDA part says of every decode whether the graph
    was new, and a callback of Python's is where signals are lost. llama.cpp's own lines are still heard.
    """
    ggml = _ggml()
    ggml.ggml_log_set.argtypes, ggml.ggml_log_set.restype = [ctypes.c_void_p] * 2, None
    ggml.ggml_log_set(ctypes.cast(llama._lib.llama_supports_mmap, ctypes.c_void_p), None)  # which does nothing, in C


def _ggml() -> ctypes.CDLL:
    folder = Path(llama.__file__).parent / "lib"
    # by its soname, so that this is the library that llama.cpp has loaded and not a second copy of it
    path = next((p for p in (folder / f"libggml.{s}" for s in ("so.0", "so", "0.dylib", "dylib")) if p.exists()), None)
    return ctypes.CDLL(str(path)) if path else llama._lib


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _on_abort(message: bytes) -> None:
    """Say why llama.cpp is about to end the process, which it does without asking: an assertion, or an error of CUDA,
    whose name it tells only the log.
    """
    place, _, what = message.decode("utf-8", errors="replace").partition(": ")
    known = f" ({why})" if (why := _cuda_error()) else ""
    print(
        f"tracekit: error: llama.cpp ends this process: {what}{known}, {place.rpartition('/')[2]}; "
        "a trace that was being recorded keeps all but its last second",
        file=sys.stderr,
        flush=True,
    )


def _cuda() -> ctypes.CDLL | None:
    """llama.cpp's back end for CUDA, which is loaded already: names are looked up in what it is linked with, too."""
    found = next(Path(llama.__file__).parent.glob("lib/*ggml-cuda*"), None)
    try:
        return ctypes.CDLL(str(found)) if found else None
    except OSError:
        return None


def _cuda_error() -> str:
    """What the CUDA runtime that llama.cpp uses says of its last error; empty without either."""
    try:
        cuda = _cuda()
        cuda.cudaGetErrorString.restype = ctypes.c_char_p
        code = cuda.cudaPeekAtLastError()
        return cuda.cudaGetErrorString(code).decode() if code else ""
    except AttributeError:
        return ""


def cublas_version() -> str | None:
    """Version of the cuBLAS that llama.cpp multiplies with above a few rows, ``13.1.0``; None without CUDA."""
    try:
        ask = _cuda().cublasGetProperty
    except AttributeError:
        return None
    numbers = [ctypes.c_int() for _ in ("major", "minor", "patch")]
    for which, number in enumerate(numbers):
        ask(which, ctypes.byref(number))
    return ".".join(str(number.value) for number in numbers)


llama.llama_log_set(_on_log, ctypes.c_void_p(0))
_ggml().ggml_set_abort_callback(_on_abort)
llama.llama_backend_init()


def _plain(bound, result, *arguments):
    """The function behind a ctypes binding of one with a handle first, taking and returning plain addresses: no pointer
    object per call on the hot path.
    """
    prototype = ctypes.CFUNCTYPE(result, ctypes.c_void_p, *arguments)
    return prototype(ctypes.cast(bound, ctypes.c_void_p).value)


_int = ctypes.c_int32
decode = _plain(llama.llama_decode, _int, llama.llama_batch)
synchronize = _plain(llama.llama_synchronize, None)
memory_remove = _plain(llama.llama_memory_seq_rm, ctypes.c_bool, _int, _int, _int)
logits_address = _plain(llama.llama_get_logits, ctypes.c_void_p)
logits_row_address = _plain(llama.llama_get_logits_ith, ctypes.c_void_p, _int)
hidden_address = _plain(ext.llama_get_embeddings_nextn, ctypes.c_void_p)
sampled_logits_address = _plain(llama.llama_get_sampled_logits_ith, ctypes.c_void_p, _int)  # of a batch row
sampled_candidates_address = _plain(llama.llama_get_sampled_candidates_ith, ctypes.c_void_p, _int)


def reason() -> str:
    """Why the last call failed: what llama.cpp complained of first, an error rather than a warning; the lines after it
    tell only what failed thereby.
    """
    _, line = max(_complaints, key=lambda complaint: complaint[0], default=(0, "no reason given"))
    _complaints.clear()
    return line.split(": ", 1)[-1].strip()


class _GgufParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in a GGUF file, by ggml's own reader, without loading any; empty where it cannot be read."""
    ggml = _ggml()  # whose log is ours
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufParams]
    ggml.gguf_get_n_tensors.restype, ggml.gguf_get_n_tensors.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    ggml.gguf_get_tensor_name.restype = ctypes.c_char_p
    ggml.gguf_get_tensor_name.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    ggml.gguf_free.argtypes = [ctypes.c_void_p]
    file = ggml.gguf_init_from_file(os.fsencode(path), _GgufParams(True, None))
    if not file:
        return []
    names = [ggml.gguf_get_tensor_name(file, i).decode() for i in range(ggml.gguf_get_n_tensors(file))]
    ggml.gguf_free(file)
    return names


@contextmanager
def listening() -> Iterator[list[str]]:
    """Everything that llama.cpp logs inside the block, a list that grows line by line. Another thread that wants to
    listen, or to make something, waits for the end of the block.
    """
    heard: list[str] = []
    with _making:
        _listeners.append(heard)
        try:
            yield heard
        finally:
            _listeners[:] = [each for each in _listeners if each is not heard]  # others may have heard the same


def build() -> str:
    """Version of llama-cpp-python and llama.cpp's system information (instruction sets, back ends)."""
    info = llama.llama_print_system_info().decode()
    return f"llama-cpp-python {VERSION}; {info.strip().rstrip('|').strip()}"


class _ThreadPoolParams(ctypes.Structure):  # ggml.h: ggml_threadpool_params
    _fields_ = [
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


class ThreadPool:
    """Threads for the processor's share of every graph, kept between graphs; otherwise ggml makes a pool for each.

    As llama-server has it (common/common.cpp, ``common_threadpools::init``). Free it after the contexts it is attached
    to.
    """

    def __init__(self, n_threads: int):
        ggml = _ggml()
        ggml.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
        ggml.ggml_backend_dev_backend_reg.argtypes = [ctypes.c_void_p]
        ggml.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        ggml.ggml_threadpool_params_init.argtypes = [ctypes.POINTER(_ThreadPoolParams), ctypes.c_int]
        for lookup in ("dev_by_type", "dev_backend_reg", "reg_get_proc_address"):
            getattr(ggml, f"ggml_backend_{lookup}").restype = ctypes.c_void_p
        registry = ggml.ggml_backend_dev_backend_reg(ggml.ggml_backend_dev_by_type(0))  # the processor
        new, free = (
            ggml.ggml_backend_reg_get_proc_address(registry, name)
            for name in (b"ggml_threadpool_new", b"ggml_threadpool_free")
        )
        params = _ThreadPoolParams()
        ggml.ggml_threadpool_params_init(params, n_threads)
        self._free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(free)
        self._pool = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ThreadPoolParams))(new)(params)

    def attach(self, context: ctypes.c_void_p) -> None:
        """Have the ``llama_context`` compute with these threads."""
        attach = llama._lib.llama_attach_threadpool  # llama-cpp-python does not bind it
        attach.argtypes, attach.restype = [ctypes.c_void_p] * 3, None
        attach(context, self._pool, None)

    def close(self) -> None:
        """Free the threads."""
        self._free(self._pool)


def has_gpu() -> bool:
    """Whether ggml can compute on a GPU here, discrete or integrated."""
    by_type = _ggml().ggml_backend_dev_by_type
    by_type.argtypes, by_type.restype = [ctypes.c_int], ctypes.c_void_p
    return any(by_type(kind) for kind in (1, 2))  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU


def cuda_graphs() -> bool | None:
    """Whether CUDA launches whole graphs; None in a build without CUDA.

    Source: ggml/src/ggml-cuda/ggml-cuda.cu (feature USE_GRAPHS, environment variable GGML_CUDA_DISABLE_GRAPHS).
    """
    info = llama.llama_print_system_info().decode()
    if "CUDA :" not in info:
        return None
    return "USE_GRAPHS = 1" in info and "GGML_CUDA_DISABLE_GRAPHS" not in os.environ


def is_processor(device: str) -> bool:
    """Whether the device that llama.cpp names so is a processor."""
    return device.startswith("CPU")


def devices() -> list[tuple[str, str, int]]:
    """``(name, description, total memory in bytes)`` of every device that ggml can compute on, processors last."""
    ggml = _ggml()
    get, name, describe = ggml.ggml_backend_dev_get, ggml.ggml_backend_dev_name, ggml.ggml_backend_dev_description
    get.argtypes, get.restype = [ctypes.c_size_t], ctypes.c_void_p
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    for function in (name, describe):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    ggml.ggml_backend_dev_memory.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    ggml.ggml_backend_dev_memory.restype = None
    found = []
    for i in range(ggml.ggml_backend_dev_count()):
        device, free, total = get(i), ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append((name(device).decode(), describe(device).decode(), total.value))
    return sorted(found, key=lambda d: is_processor(d[0]))
