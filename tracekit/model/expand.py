"""Bigger models that compute the same function, and drafters that do not.

A five-million-parameter model has the wrong economics: drafting costs as much as decoding. These functions
give the reference model a big model's cost and keep its output:

* :func:`deepen` inserts identity blocks (``attn_output`` and ``ffn_down`` zero, the rest random): the residual
  stream passes through them untouched, bit for bit.
* :func:`widen` adds channels that stay zero in the residual stream. An RMS norm over ``4**k`` times as many
  channels divides by ``2**k`` less, which its weight takes back; both are powers of two, so nothing is rounded.
* :func:`misalign` breaks the NextN block's input projection: a drafter that drafts fluently and is never right.
* :func:`sidecar` keeps only what a separate draft file needs.

All return new :class:`~tracekit.model.weights.Weights`; tensors are made when they are written.
"""

from __future__ import annotations

import zlib

import numpy as np

from tracekit.errors import TracekitError
from tracekit.model.weights import Tensor, Weights

_NORMS = ("attn_norm", "ffn_norm", "output_norm", "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm")
_POOL = 1 << 22


def noise(shape: tuple[int, ...], name: str, seed: int) -> np.ndarray:
    """Float32 values of standard deviation ``columns ** -0.5``, a function of tensor name and seed alone.

    At most four million different values, repeated to the size: as good as fresh ones for the cost of a matrix product.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    size = int(np.prod(shape))
    pool = rng.standard_normal(min(size, _POOL), np.float32) * np.float32(shape[-1] ** -0.5)
    return np.resize(pool, size).reshape(shape)


def deepen(w: Weights, n_layer: int, seed: int = 0) -> Weights:
    """The same function with ``n_layer`` trunk blocks. Raises :class:`TracekitError` for fewer than there are."""
    if n_layer < w.n_layer:
        raise TracekitError(f"--layers {n_layer}: the model has {w.n_layer} already; give that or more")
    added, tensors = n_layer - w.n_layer, {}
    for name, tensor in w.tensors.items():
        head, block, rest = _split(name)
        if block is not None and block >= w.n_layer:
            name = f"{head}.{block + added}.{rest}"
        tensors[name] = tensor
    like = {_split(n)[2]: t.shape for n, t in w.tensors.items() if _split(n)[1] == 0}
    for i in range(w.n_layer, n_layer):
        for rest, shape in like.items():
            tensors[f"blk.{i}.{rest}"] = _identity_part(f"blk.{i}.{rest}", shape, seed)
    return w.with_tensors(tensors, n_layer=n_layer)


def _identity_part(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith(("attn_output.weight", "ffn_down.weight")):
        return Tensor(shape, lambda: np.zeros(shape, np.float32))
    if len(shape) == 1:
        return Tensor(shape, lambda: np.ones(shape, np.float32))
    return Tensor(shape, lambda: noise(shape, name, seed))


def widen(w: Weights, n_embd: int, seed: int = 0) -> Weights:
    """The same function with ``n_embd`` channels, heads and feed-forward in proportion.

    Raises :class:`TracekitError` unless ``n_embd`` is the model's times a power of four.
    """
    factor = 1
    while w.n_embd * factor < n_embd:
        factor *= 4
    if w.n_embd * factor != n_embd:
        raise TracekitError(f"--width {n_embd}: exact only for {', '.join(str(w.n_embd * 4**k) for k in range(4))}")
    big = w.with_tensors(
        {},
        n_embd=n_embd,
        n_ff=w.n_ff * factor,
        n_head=w.n_head * factor,
        n_head_kv=max(w.n_head_kv, w.n_head * factor // 4),
    )
    tensors = {name: _widened(name, tensor, w, big, seed) for name, tensor in w.tensors.items()}
    return big.with_tensors(tensors)


def _widened(name: str, tensor: Tensor, w: Weights, big: Weights, seed: int) -> Tensor:
    """Place one tensor's values in the wide model's; what they cannot reach is random, or zero where it would leak."""
    kind = _split(name)[2].removesuffix(".weight")
    wide, narrow = np.arange(w.n_embd), big.n_embd
    heads, heads_kv = _head_rows(w, big), np.arange(w.n_head_kv * w.n_embd_head)
    n_q, n_kv = big.n_head * w.n_embd_head, big.n_head_kv * w.n_embd_head
    if kind in _NORMS:
        scale = np.float32((w.n_embd / big.n_embd) ** 0.5)
        return Tensor((narrow,), lambda: _place(np.ones(narrow, np.float32), (wide,), tensor.make() * scale))
    if kind in ("attn_q_norm", "attn_k_norm"):
        return tensor
    both = np.concatenate((wide, narrow + wide))
    places: dict[str, tuple[tuple[int, int], np.ndarray, np.ndarray, str]] = {
        "token_embd": ((tensor.shape[0], narrow), np.arange(tensor.shape[0]), wide, "zero"),
        "attn_q": ((n_q, narrow), heads, wide, "random"),
        "attn_k": ((n_kv, narrow), heads_kv, wide, "random"),
        "attn_v": ((n_kv, narrow), heads_kv, wide, "random"),
        "attn_output": ((narrow, n_q), wide, heads, "zero"),
        "ffn_gate": ((big.n_ff, narrow), np.arange(w.n_ff), wide, "random"),
        "ffn_up": ((big.n_ff, narrow), np.arange(w.n_ff), wide, "random"),
        "ffn_down": ((narrow, big.n_ff), wide, np.arange(w.n_ff), "zero"),
        "nextn.eh_proj": ((narrow, 2 * narrow), wide, both, "zero"),
    }
    shape, rows, columns, rest = places[kind]

    def make() -> np.ndarray:
        out = np.zeros(shape, np.float32) if rest == "zero" else noise(shape, name, seed)
        return _place(out, np.ix_(rows, columns), tensor.make())

    return Tensor(shape, make)


def _head_rows(w: Weights, big: Weights) -> np.ndarray:
    """Where the narrow model's query heads go, so that each still reads its own key-value head."""
    per_kv, per_kv_big = w.n_head // w.n_head_kv, big.n_head // big.n_head_kv
    heads = [kv * per_kv_big + i for kv in range(w.n_head_kv) for i in range(per_kv)]
    return np.concatenate([np.arange(h * w.n_embd_head, (h + 1) * w.n_embd_head) for h in heads])


def _place(out: np.ndarray, where: tuple, values: np.ndarray) -> np.ndarray:
    out[where] = values
    return out


def misalign(w: Weights, seed: int = 0) -> Weights:
    """The same trunk with a drafter whose ``nextn.eh_proj`` is noise of the same size: near-zero acceptance."""

    def broken(name: str, tensor: Tensor) -> Tensor:
        def make() -> np.ndarray:
            values = tensor.make()
            random = noise(values.shape, name, seed)
            return random * (values.std() / random.std())

        return Tensor(tensor.shape, make)

    tensors = {n: broken(n, t) if n.endswith("nextn.eh_proj.weight") else t for n, t in w.tensors.items()}
    return w.with_tensors(tensors, notes={**w.notes, "misaligned": "nextn.eh_proj replaced by noise"})


def sidecar(w: Weights) -> Weights:
    """Only what a draft file needs beside its target: embeddings, final norm and the NextN blocks."""

    def kept(name: str) -> bool:
        block = _split(name)[1]
        return block is None or block >= w.n_layer

    return w.with_tensors({n: t for n, t in w.tensors.items() if kept(n)})


def _split(name: str) -> tuple[str, int | None, str]:
    """``blk.3.attn_q.weight`` as ``("blk", 3, "attn_q.weight")``; other names as ``("", None, name)``."""
    head, _, rest = name.partition(".")
    if head != "blk":
        return "", None, name
    block, _, rest = rest.partition(".")
    return head, int(block), rest
