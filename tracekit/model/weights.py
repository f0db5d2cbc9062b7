"""A model between two GGUF files: hyper-parameters, tokenizer and tensors that are made only when they are written.

Tensors are lazy (a shape and a function) so that an 8B-sized expansion never lies in memory at once.
Names are llama.cpp's; shapes are NumPy's, ``(rows, columns)`` of a matrix that maps columns to rows.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tracekit import beside
from tracekit.errors import TracekitError

ARCH = "hy_v3"
TYPES = {"f16": np.float16, "f32": np.float32}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be: its shape, and ``make() -> float32 array`` of that shape."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        """A tensor that exists already."""
        return cls(array.shape, lambda: np.asarray(array, np.float32))


@dataclass(frozen=True)
class Weights:
    """One ``hy_v3`` model: trunk of ``n_layer`` blocks, then ``n_layer_nextn`` NextN blocks."""

    n_layer: int
    n_layer_nextn: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_ctx_train: int
    rope_freq_base: float
    norm_rms_eps: float
    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    notes: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def with_tensors(self, tensors: Mapping[str, Tensor], **changes: Any) -> Weights:
        """The same model with other tensors (and hyper-parameters)."""
        return replace(self, tensors=dict(tensors), **changes)


def read(path: str | Path) -> Weights:
    """The weights in a ``hy_v3`` GGUF file. Raises :class:`TracekitError` where the file is something else."""
    reader = open_gguf(path)

    def get(key: str) -> Any:
        entry = reader.get_field(key)
        if entry is None:
            raise TracekitError(f"{path}: no key {key}; not a model that `tracekit model build` wrote")
        return entry.contents()

    arch = get("general.architecture")
    if arch != ARCH:
        raise TracekitError(f"{path}: architecture {arch}; only {ARCH} files can be expanded")
    nextn = get(f"{ARCH}.nextn_predict_layers")
    if not any(tensor.name.startswith("blk.0.") for tensor in reader.tensors):
        raise TracekitError(f"{path}: holds no layer 0, only a drafter (a sidecar); give the model that it belongs to")
    return Weights(
        n_layer=get(f"{ARCH}.block_count") - nextn,
        n_layer_nextn=nextn,
        n_embd=get(f"{ARCH}.embedding_length"),
        n_ff=get(f"{ARCH}.feed_forward_length"),
        n_head=get(f"{ARCH}.attention.head_count"),
        n_head_kv=get(f"{ARCH}.attention.head_count_kv"),
        n_embd_head=get(f"{ARCH}.attention.key_length"),
        n_ctx_train=get(f"{ARCH}.context_length"),
        rope_freq_base=get(f"{ARCH}.rope.freq_base"),
        norm_rms_eps=get(f"{ARCH}.attention.layer_norm_rms_epsilon"),
        tokens=tuple(get("tokenizer.ggml.tokens")),
        merges=tuple(get("tokenizer.ggml.merges")),
        notes={k.removeprefix("tracekit."): get(k) for k in reader.fields if k.startswith("tracekit.")},
        tensors={t.name: Tensor(tuple(int(n) for n in reversed(t.shape)), _maker(t)) for t in reader.tensors},
    )


def open_gguf(path: str | Path) -> gguf.GGUFReader:
    """A reader of the GGUF file ``path``. Raises :class:`TracekitError` where there is none."""
    if Path(path).is_dir():
        raise TracekitError(f"{path}: a folder; give a GGUF file in it")
    if not Path(path).is_file():
        raise TracekitError(f"{path}: no such file; `tracekit model build -o {path}` writes the reference model")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        with Path(path).open("rb") as file:
            if file.read(4) == b"GGUF":
                raise TracekitError(f"{path}: truncated or damaged; make it, or copy it, again") from None
        raise TracekitError(f"{path}: not a GGUF file ({error})") from None


def _maker(tensor: gguf.ReaderTensor) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(tensor.data, np.float32)


def write(
    weights: Weights, path: str | Path, dtype: str = "f16", progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write ``weights`` as GGUF: matrices in ``dtype`` (``f16`` or ``f32``), vectors in float32.

    The file appears under its name only when it is complete. ``progress(done, total)`` is called per tensor.
    """
    path, w = Path(path), weights
    out = gguf.GGUFWriter(None, ARCH)
    out.add_name("tracekit reference model")
    out.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "f16" else gguf.LlamaFileType.ALL_F32)
    out.add_block_count(w.n_layer + w.n_layer_nextn)
    out.add_nextn_predict_layers(w.n_layer_nextn)
    out.add_context_length(w.n_ctx_train)
    out.add_embedding_length(w.n_embd)
    out.add_feed_forward_length(w.n_ff)
    out.add_expert_feed_forward_length(w.n_ff)
    out.add_expert_count(0)
    out.add_expert_used_count(0)
    out.add_head_count(w.n_head)
    out.add_head_count_kv(w.n_head_kv)
    out.add_key_length(w.n_embd_head)
    out.add_value_length(w.n_embd_head)
    out.add_rope_dimension_count(w.n_embd_head)
    out.add_rope_freq_base(w.rope_freq_base)
    out.add_layer_norm_rms_eps(w.norm_rms_eps)
    out.add_vocab_size(len(w.tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(list(w.tokens))
    out.add_token_types([gguf.TokenType.CONTROL if t.startswith("<|") else gguf.TokenType.NORMAL for t in w.tokens])
    out.add_token_merges(list(w.merges))
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    out.add_add_bos_token(True)
    for key, value in w.notes.items():
        out.add_string(f"tracekit.{key}", value)
    types = {name: np.dtype(TYPES[dtype] if len(t.shape) == 2 else np.float32) for name, t in w.tensors.items()}
    for name, tensor in w.tensors.items():
        out.add_tensor_info(name, tensor.shape, types[name], int(np.prod(tensor.shape)) * types[name].itemsize)
    size = sum(info.nbytes for info in out.tensors[0].values())
    try:
        with beside.claimed(path) as partial:
            if size > (free := shutil.disk_usage(partial.parent).free):
                raise TracekitError(
                    f"{path}: takes {size / 1e9:.1f} GB, {free / 1e9:.1f} are free; choose another place"
                )
            out.write_header_to_file(partial)
            out.write_kv_data_to_file()
            out.write_ti_data_to_file()
            for done, values in enumerate(_made_ahead(w.tensors, types), 1):
                out.write_tensor_data(values)
                if progress:
                    progress(done, len(w.tensors))
            out.close()
            os.replace(partial, path)
    except OSError as error:
        raise TracekitError(f"{path}: {error.strerror or error}; choose another place with -o") from None
    return path


def _made_ahead(tensors: Mapping[str, Tensor], types: Mapping[str, np.dtype]) -> Iterator[np.ndarray]:
    """The values of ``tensors`` as ``types``, in order, made by all processors while earlier ones are written; no more
    at once than there are processors, and eight.
    """

    def make(name: str) -> np.ndarray:
        return np.ascontiguousarray(tensors[name].make(), types[name])

    n_ahead = min(os.cpu_count() or 1, 8)
    pool, waiting = ThreadPoolExecutor(n_ahead), deque()
    try:
        for name in tensors:
            if len(waiting) == n_ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(make, name))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
