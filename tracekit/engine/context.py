"""A llama.cpp context and its batch, with NumPy views of what goes in and comes out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from tracekit.engine import lib
from tracekit.engine.lib import ext, llama
from tracekit.engine.model import Model
from tracekit.engine.settings import CACHE_TYPES, FLASH_ATTN, Settings
from tracekit.errors import TracekitError


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
        self.c = llama.llama_batch()
        self.c.token = self.token.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.c.pos = self.pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.c.logits = self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self.c.n_seq_id = self._n_seq.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.c.seq_id = ctypes.cast(self._seq_pointers, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
        if n_embd:
            self.c.embd = self.embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

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


class Context:
    """One ``llama_context`` under ``settings``. ``target`` makes it the MTP context that drafts for that one, with the
    same threads; close it first.

    ``n_sampled``: most rows of one sequence in a batch whose tokens a backend sampler (:meth:`set_sampler`) chooses.
    ``n_snapshots``: tokens that a recurrent memory shall be able to go back; afterwards what it can, 0 for memories
    that need none (attention) or keep none. Raises :class:`TracekitError` where llama.cpp refuses the settings.
    """

    def __init__(
        self, model: Model, settings: Settings, target: Context | None = None, n_sampled: int = 1, n_snapshots: int = 0
    ):
        s, params = settings, llama.llama_context_default_params()
        params.n_ctx = -(-s.n_ctx // 256) * 256 * s.n_slots  # whole blocks, as llama.cpp allocates them
        params.n_batch, params.n_ubatch, params.n_seq_max = s.n_batch, s.n_ubatch, s.n_slots
        params.n_threads = params.n_threads_batch = s.threads
        params.type_k, params.type_v = CACHE_TYPES[s.cache_type_k], CACHE_TYPES[s.cache_type_v]
        params.flash_attn_type = FLASH_ATTN[s.flash_attn]
        params.kv_unified = s.kv_unified
        params.n_outputs_max_per_seq = n_sampled
        params.n_rs_seq = n_snapshots
        params.no_perf = True
        if target is not None:
            params.ctx_type = llama.LLAMA_CONTEXT_TYPE_MTP
            params.ctx_other = target.handle
        self.handle = lib.made(llama.llama_init_from_model, llama.llama_free, model.handle, params)
        if not self.handle:
            raise TracekitError(f"{model.path}: no context of {s.n_slots} x {s.n_ctx} tokens ({lib.reason()})")
        self.drafts = target is not None
        self.n_snapshots = llama.llama_n_rs_seq(self.handle)
        if self.n_snapshots and min(s.n_batch, s.n_ubatch) <= self.n_snapshots + 1:  # else llama.cpp aborts the process
            llama.llama_free(self.handle)
            raise TracekitError(
                f"{model.path}: its memory is recurrent: n_batch and n_ubatch must be more than n_max + 1, "
                f"{self.n_snapshots + 1}"
            )
        self._memory = ctypes.cast(llama.llama_get_memory(self.handle), ctypes.c_void_p)
        self.n_ctx, self.n_batch = s.n_ctx, s.n_batch
        self._n_embd, self.n_vocab = model.facts.n_embd, model.facts.n_vocab
        self._raw = ctypes.cast(self.handle, ctypes.c_void_p)
        self._waits = lib.has_gpu()  # processors have finished when llama_decode returns
        self.n_begun = self.n_ended = self.n_rows = 0  # decodes, and rows of the newest, for a thread that looks on
        self._views: dict[tuple[int, int, type], np.ndarray] = {}
        self._hidden_at = self._logits_at = 0  # addresses of the two views in use
        self._best: dict[int, Callable[[], int]] = {}  # the arg-max of the row at an address
        self._threads = lib.ThreadPool(s.threads) if target is None else None
        (self if target is None else target)._threads.attach(self._raw)
        self._samplers: dict[int, object] = {}  # chains that llama.cpp runs, by sequence; freed with the context

    def decode(self, batch: Batch) -> None:
        """Run ``batch`` and wait for it. Raises :class:`TracekitError` where llama.cpp fails."""
        batch.c.n_tokens = self.n_rows = batch.n
        self.n_begun += 1
        try:
            code = lib.decode(self._raw, batch.c)
            if lib.interrupts:
                lib.raise_interrupt()
            if code:
                reason = lib.reason()
                raise TracekitError(f"llama_decode returned {code} for {batch.n} tokens ({reason})")
            if self._waits:
                lib.synchronize(self._raw)
        finally:
            self.n_ended += 1

    def extract_hidden(self, enabled: bool) -> None:
        """Have every later decode leave the hidden state of every batch row (not only of those with logits) for
        :meth:`hidden`.

        llama.cpp's ``masked`` setting must be off: with it, ``hy_v3`` and ``qwen35`` return the first rows of the
        batch instead of the marked ones, which a fused catch-up batch would misread.
        """
        ext.llama_set_embeddings_nextn(self.handle, enabled, False)

    def hidden(self) -> np.ndarray:
        """Hidden states ``[n_batch, n_embd]``, a row per row of the last decode; a view that the next overwrites."""
        address = lib.hidden_address(self._raw)
        if address != self._hidden_at:
            self._hidden, self._hidden_at = self._view(address, self._n_embd), address
        return self._hidden

    def logits(self) -> np.ndarray:
        """Logits ``[n_batch, n_vocab]`` of the last decode, one per batch row marked for output, in order; a view."""
        address = lib.logits_address(self._raw)
        if address != self._logits_at:
            self._logits, self._logits_at = self._view(address, self.n_vocab), address
        return self._logits

    def best(self, row: int) -> int:
        """The most likely token at batch row ``row`` of the last decode, the first in the vocabulary of equals."""
        address = lib.logits_row_address(self._raw, row)
        find = self._best.get(address)
        if find is None:
            find = self._best[address] = self._view(address, self.n_vocab)[0].argmax
        return int(find())

    def set_sampler(self, seq: int, chain: object | None) -> bool:
        """Have llama.cpp run the sampler ``chain`` on the device for every output row of ``seq`` (a *backend sampler*):
        the logits stay there, what the chain leaves of them comes back. The context keeps the chain, and frees it.
        None: no backend sampler.

        False where the device cannot run all of it; then ``seq`` has none. llama.cpp itself reports only a chain it
        refuses whole: what of it runs on the device shows in its samplers' names, by a "+" (or "?": does nothing).
        """
        taken = llama.llama_set_sampler(self.handle, seq, chain) and all(
            llama.llama_sampler_name(llama.llama_sampler_chain_get(chain, i))[:1] in (b"+", b"?")
            for i in range(llama.llama_sampler_chain_n(chain) if chain else 0)
        )
        if not taken:
            llama.llama_set_sampler(self.handle, seq, None)
        for unused in (self._samplers.pop(seq, None), None if taken else chain):
            if unused:
                llama.llama_sampler_free(unused)
        if taken and chain:
            self._samplers[seq] = chain
        return taken

    def candidates(self, row: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """What backend samplers left of the output rows from batch row ``row`` on: token ids ``[n_batch, n]`` int32 and
        their logits ``[n_batch, n]`` float32, in no order; views. ``n``: how many the chain leaves of each row.
        """
        logits = self._view(lib.sampled_logits_address(self._raw, row), self.n_vocab)
        ids = self._view(lib.sampled_candidates_address(self._raw, row), self.n_vocab, np.int32)
        return ids[:, :n], logits[:, :n]

    def candidate(self, row: int) -> int:
        """The one token that a backend sampler left of batch row ``row``."""
        return ctypes.c_int32.from_address(lib.sampled_candidates_address(self._raw, row)).value

    def _view(self, address: int | None, width: int, dtype: type = np.float32) -> np.ndarray:
        """All of a row-major output buffer as an array; remembered by address, since llama.cpp rarely moves it."""
        view = self._views.get((address, width, dtype))
        if view is None:
            if address is None:
                raise TracekitError("llama.cpp returned no output rows; the context was made without them")
            buffer = (ctypes.c_float * (self.n_batch * width)).from_address(address)
            view = self._views[address, width, dtype] = np.frombuffer(buffer, dtype).reshape(self.n_batch, width)
        return view

    def remove(self, seq: int, from_pos: int) -> bool:
        """Take every token of ``seq`` at ``from_pos`` and later out of the memory; False where the memory cannot do
        it.
        """
        return lib.memory_remove(self._memory, seq, from_pos, -1)

    def close(self) -> None:
        """Free the context."""
        if self.handle:
            llama.llama_free(self.handle)
            self.handle = None
            for chain in self._samplers.values():
                llama.llama_sampler_free(chain)
            if self._threads is not None:
                self._threads.close()
