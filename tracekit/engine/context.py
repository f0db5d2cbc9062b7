"""A llama.cpp context and its batch, with NumPy views of what goes in and comes out."""

from __future__ import annotations

import ctypes

import numpy as np

from tracekit.engine import lib
from tracekit.engine.lib import ext, llama
from tracekit.engine.model import Model
from tracekit.errors import TracekitError

_decode, _synchronize = llama.llama_decode, llama.llama_synchronize


class Batch:
    """Rows for one ``llama_decode``: token, position, sequence, whether logits are wanted, and, for MTP, an embedding.

    Arrays are allocated once (``n_rows``); ``embd`` is ``[n_rows, n_embd]`` float32, or None without ``n_embd``.
    """

    def __init__(self, n_rows: int, n_embd: int = 0):
        self.n = 0
        self.token = np.zeros(n_rows, np.int32)
        self.pos = np.zeros(n_rows, np.int32)
        self.logits = np.zeros(n_rows, np.int8)
        self.embd = np.zeros((n_rows, n_embd), np.float32) if n_embd else None
        self._seq = np.zeros(n_rows, np.int32)
        self._n_seq = np.ones(n_rows, np.int32)
        # ctypes arrays of the same memory take single numbers and short lists in half the time
        self._tokens, self._positions, self._seqs = (
            (ctypes.c_int32 * n_rows).from_buffer(values) for values in (self.token, self.pos, self._seq)
        )
        self._outputs = (ctypes.c_int8 * n_rows).from_buffer(self.logits)
        self._seq_pointers = (ctypes.POINTER(ctypes.c_int32) * n_rows)(
            *(ctypes.cast(self._seq.ctypes.data + 4 * i, ctypes.POINTER(ctypes.c_int32)) for i in range(n_rows))
        )
        self._c = llama.llama_batch()
        self._c.token = self.token.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._c.pos = self.pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._c.logits = self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self._c.n_seq_id = self._n_seq.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._c.seq_id = ctypes.cast(self._seq_pointers, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
        if n_embd:
            self._c.embd = self.embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def add(self, token: int, pos: int, seq: int, logits: bool) -> int:
        """Append one row; returns its index."""
        i = self.n
        self._tokens[i], self._positions[i], self._seqs[i], self._outputs[i] = token, pos, seq, logits
        self.n = i + 1
        return i

    def extend(self, tokens: list[int], pos: int, seq: int, logits: bool) -> int:
        """Append ``tokens`` at consecutive positions from ``pos``; returns the first row's index."""
        i, j = self.n, self.n + len(tokens)
        self._tokens[i:j] = tokens
        self._positions[i:j] = range(pos, pos + len(tokens))
        self._seq[i:j] = seq
        self.logits[i:j] = logits
        self.n = j
        return i

    def raw(self):
        """The C structure for the rows added so far."""
        self._c.n_tokens = self.n
        return self._c


class Context:
    """One ``llama_context``. ``target`` makes it the MTP context that drafts for that one.

    ``n_ctx`` is tokens per sequence. Raises :class:`TracekitError` where llama.cpp refuses the settings.
    """

    def __init__(
        self,
        model: Model,
        n_seq: int,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        n_threads: int,
        type_k: int,
        type_v: int,
        flash_attn: int,
        target: Context | None = None,
    ):
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx * n_seq
        params.n_batch, params.n_ubatch, params.n_seq_max = n_batch, n_ubatch, n_seq
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k, params.type_v, params.flash_attn_type = type_k, type_v, flash_attn
        params.no_perf = True
        if target is not None:
            params.ctx_type = llama.LLAMA_CONTEXT_TYPE_MTP
            params.ctx_other = target.handle
        self.handle = llama.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise TracekitError(
                f"{model.path}: no context of {n_seq} x {n_ctx} tokens ({lib.last_error('no reason given')})"
            )
        self.memory = llama.llama_get_memory(self.handle)
        self.n_ctx = llama.llama_n_ctx_seq(self.handle)
        self.n_batch = n_batch
        self._n_embd, self._n_vocab = model.facts.n_embd, model.facts.n_vocab
        self._raw = ctypes.cast(self.handle, ctypes.c_void_p)
        self._views: dict[tuple[int, int], np.ndarray] = {}

    def decode(self, batch: Batch) -> None:
        """Run ``batch`` and wait for it. Raises :class:`TracekitError` where llama.cpp fails."""
        code = _decode(self.handle, batch.raw())
        if code:
            reason = lib.last_error("no reason given")
            raise TracekitError(f"llama_decode returned {code} for {batch.n} tokens ({reason})")
        _synchronize(self.handle)

    def extract_hidden(self, enabled: bool) -> None:
        """Have every later decode leave the hidden state of every batch row (not only of those with logits) for
        :meth:`hidden`.

        llama.cpp's ``masked`` setting must be off: with it, ``hy_v3`` and ``qwen35`` return the first rows of the
        batch instead of the marked ones, which a fused catch-up batch would misread.
        """
        ext.llama_set_embeddings_nextn(self.handle, enabled, False)

    def hidden(self) -> np.ndarray:
        """Hidden states ``[n_batch, n_embd]``, a row per row of the last decode; a view that the next overwrites."""
        return self._view(lib.hidden_address(self._raw), self._n_embd)

    def logits(self) -> np.ndarray:
        """Logits ``[n_batch, n_vocab]`` of the last decode, one per batch row marked for output, in order; a view."""
        return self._view(lib.logits_address(self._raw), self._n_vocab)

    def _view(self, address: int | None, width: int) -> np.ndarray:
        """All of a row-major output buffer as an array; remembered by address, since llama.cpp rarely moves it."""
        view = self._views.get((address, width))
        if view is None:
            if address is None:
                raise TracekitError("llama.cpp returned no output rows; the context was made without them")
            buffer = (ctypes.c_float * (self.n_batch * width)).from_address(address)
            view = self._views[address, width] = np.frombuffer(buffer, np.float32).reshape(self.n_batch, width)
        return view

    def remove(self, seq: int, from_pos: int) -> bool:
        """Take every token of ``seq`` at ``from_pos`` and later out of the memory; False where the memory cannot do
        it.
        """
        return llama.llama_memory_seq_rm(self.memory, seq, from_pos, -1)

    def close(self) -> None:
        """Free the context."""
        if self.handle:
            llama.llama_free(self.handle)
            self.handle = None
