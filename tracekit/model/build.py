"""The reference model as a GGUF file, as it is or expanded; and what is in a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tracekit import beside
from tracekit.errors import TracekitError
from tracekit.model import expand, weights
from tracekit.model.weights import Weights

REFERENCE = Path(__file__).parent / "reference.gguf"


def build(
    out: str | Path,
    layers: int | None = None,
    width: int | None = None,
    misaligned: bool = False,
    sidecar: bool = False,
    dtype: str = "f16",
    seed: int = 0,
    source: str | Path = REFERENCE,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the reference model to ``out``.

    ``layers``: trunk blocks, identity blocks added; ``width``: channels, zero channels added (see
    :mod:`tracekit.model.expand`); ``misaligned``: with a drafter that is never right; ``sidecar``: the drafter alone.
    ``dtype``: ``f16`` or ``f32`` matrices. ``force`` replaces another GGUF file, or an empty one. Raises
    :class:`TracekitError`.
    """
    out = Path(out)
    beside.check_new(out, force)
    if out.exists() and _head(out) not in (b"", b"GGUF"):
        raise TracekitError(f"{out}: no GGUF file; --force replaces models only, choose another name")
    model = grown(layers, width, dtype, seed, source)
    if misaligned:
        model = expand.misalign(model, seed)
    if sidecar:
        model = expand.sidecar(model)
    return weights.write(model, out, dtype, progress)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise TracekitError(f"{path}: {error.strerror}; choose another name") from None


def grown(
    layers: int | None = None,
    width: int | None = None,
    dtype: str = "f16",
    seed: int = 0,
    source: str | Path = REFERENCE,
) -> Weights:
    """What :func:`build` writes of these, tensors yet to be made. Raises :class:`TracekitError` as it does."""
    if seed < 0:
        raise TracekitError(f"--seed {seed}: 0 or more")
    if dtype not in weights.TYPES:
        raise TracekitError(f"--type {dtype}: one of {', '.join(weights.TYPES)}")
    model = weights.read(source)
    if width is not None:
        model = expand.widen(model, width, seed)
    return model if layers is None else expand.deepen(model, layers, seed)


def inspect(path: str | Path) -> dict[str, Any]:
    """Sizes, NextN layers and provenance of a GGUF file of any architecture, without loading it."""
    reader = weights.open_gguf(path)

    def get(key: str, default: Any = None) -> Any:
        entry = reader.get_field(key)
        return default if entry is None else entry.contents()

    arch = get("general.architecture", "?")
    nextn = get(f"{arch}.nextn_predict_layers", 0)
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "architecture": arch,
        "n_layer": get(f"{arch}.block_count", 0) - nextn,
        "n_layer_nextn": nextn,
        "has_nextn_tensors": any(".nextn." in t.name for t in reader.tensors),
        "has_trunk": any(t.name == "blk.0.attn_norm.weight" for t in reader.tensors),
        "n_embd": get(f"{arch}.embedding_length", 0),
        "n_ff": get(f"{arch}.feed_forward_length", 0),
        "n_head": get(f"{arch}.attention.head_count", 0),
        "n_ctx_train": get(f"{arch}.context_length", 0),
        "n_params": int(sum(t.n_elements for t in reader.tensors)),
        "types": sorted({t.tensor_type.name for t in reader.tensors}),
        "notes": {k.removeprefix("tracekit."): get(k) for k in reader.fields if k.startswith("tracekit.")},
    }
