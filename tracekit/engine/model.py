"""A GGUF file in memory: facts, vocabulary, and the handle that contexts are made from."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tracekit.engine import lib
from tracekit.engine.lib import llama
from tracekit.errors import TracekitError

# their MTP graphs keep only the rows with logits (src/models/*.cpp); llama.cpp aborts where all hidden rows are wanted
_CROPPED = {"deepseek4", "mimo2", "qwen3next", "step35"}
# drafters that keep no memory of their own but read the target's (src/llama-model.cpp, create_memory)
_SHARING = {"gemma4-assistant"}


def sha256_of(path: str | Path) -> str:
    """Hash of a whole model, all its shards one after another; computed once per process and version of the files."""
    path = Path(path)
    _demand_file(path)
    files = [file for file in shards(path) if file.is_file()]
    return _sha256(tuple(files), tuple(file.stat().st_mtime_ns for file in files))


def _demand_file(path: Path, sidecar: bool = False) -> None:
    if path.is_dir():
        raise TracekitError(f"{path}: a folder; give a GGUF file in it")
    if not path.is_file():
        how, what = ("--sidecar ", "model's drafter") if sidecar else ("", "model")
        raise TracekitError(f"{path}: no such model; `tracekit model build {how}-o {path}` writes the reference {what}")


@cache
def _sha256(files: tuple[Path, ...], _mtimes_ns: tuple[int, ...]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: whole)
    return whole.hexdigest()


def shards(path: Path) -> list[Path]:
    """The files of a model that is split as llama.cpp splits it (``NAME-00001-of-00003.gguf``); else ``path`` alone."""
    found = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.gguf)", path.name)
    if found is None:
        return [path]
    return [path.with_name(f"{found[1]}{n:05d}{found[2]}") for n in range(1, int(found[3]) + 1)]


@dataclass(frozen=True)
class ModelFacts:
    """What a trace says about the model it came from."""

    path: str
    arch: str
    desc: str
    n_bytes: int
    n_params: int
    n_layer: int
    n_layer_nextn: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int


class Model:
    """A loaded GGUF file. Raises :class:`TracekitError` where llama.cpp cannot load it.

    ``gpu_layers``: layers on the GPU, -1 for all. ``mtp``: load the NextN blocks too. ``sidecar``: the drafter alone is
    wanted.
    """

    def __init__(self, path: str | Path, gpu_layers: int = -1, mtp: bool = True, sidecar: bool = False):
        self.path = Path(path)
        _demand_file(self.path, sidecar)
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise TracekitError(f"{path}: not a GGUF file")
        names = [name for file in shards(self.path) for name in lib.tensor_names(file)]
        self._has_nextn = not names or any(".nextn." in name for name in names)
        if names and not sidecar and not any(name.startswith("blk.0.") for name in names):
            raise TracekitError(f"{path}: holds no layer 0; a sidecar belongs to --draft-model, beside its model")
        params = llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.load_mtp = mtp
        path_bytes = os.fsencode(self.path)
        self.handle = lib.made(llama.llama_model_load_from_file, llama.llama_model_free, path_bytes, params)
        if not self.handle:
            raise TracekitError(f"{path}: llama.cpp cannot load it ({lib.reason()})")
        self.vocab = llama.llama_model_get_vocab(self.handle)
        self._pieces: dict[int, bytes] = {}

    @cached_property
    def facts(self) -> ModelFacts:
        """Sizes and names, as llama.cpp reports them."""
        buffer = ctypes.create_string_buffer(256)
        llama.llama_model_desc(self.handle, buffer, 256)
        desc = buffer.value.decode()
        return ModelFacts(
            path=str(self.path),
            arch=self.meta("general.architecture"),
            desc=desc,
            n_bytes=llama.llama_model_size(self.handle),
            n_params=llama.llama_model_n_params(self.handle),
            n_layer=llama.llama_model_n_layer(self.handle),
            n_layer_nextn=llama.llama_model_n_layer_nextn(self.handle) if self._has_nextn else 0,  # not as claimed
            n_embd=llama.llama_model_n_embd_out(self.handle),
            n_vocab=llama.llama_vocab_n_tokens(self.vocab),
            n_ctx_train=llama.llama_model_n_ctx_train(self.handle),
        )

    def meta(self, key: str) -> str:
        """Value of a metadata key of the file; empty where it has none."""
        buffer = ctypes.create_string_buffer(1024)
        size = llama.llama_model_meta_val_str(self.handle, key.encode(), buffer, 1024)
        return buffer.value.decode(errors="replace") if size >= 0 else ""

    @property
    def sha256(self) -> str:
        """Hash of the whole file."""
        return sha256_of(self.path)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, its control tokens (a chat template's) recognised as llama-server does, with the
        beginning-of-text token where the model wants one.
        """
        raw = text.encode()
        n = len(raw) + 16
        ids = (llama.llama_token * n)()
        count = llama.llama_tokenize(self.vocab, raw, len(raw), ids, n, True, True)
        if count < 0:
            ids = (llama.llama_token * -count)()
            count = llama.llama_tokenize(self.vocab, raw, len(raw), ids, -count, True, True)
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; empty for control tokens."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._piece(token, 256)
        return found

    def _piece(self, token: int, room: int) -> bytes:
        buffer = ctypes.create_string_buffer(room)
        size = llama.llama_token_to_piece(self.vocab, token, buffer, room, 0, False)
        return buffer.raw[:size] if size >= 0 else self._piece(token, -size)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a generation."""
        n = llama.llama_vocab_n_tokens(self.vocab)
        return frozenset(t for t in range(n) if llama.llama_vocab_is_eog(self.vocab, t))

    def close(self) -> None:
        """Free the model's memory; contexts made from it must be closed before."""
        if self.handle:
            llama.llama_model_free(self.handle)
            self.handle = None


def check_drafter(source: Model, model: Model) -> None:
    """Raise :class:`TracekitError` where the NextN layers of ``source`` (``model`` itself, or a sidecar) cannot draft
    for ``model``.
    """
    if source.facts.arch in _SHARING:
        raise TracekitError(
            f"{source.path}: a {source.facts.arch} drafts in its target's own memory, which the engine cannot do yet; "
            "run the target with policy off"
        )
    if (source.facts.n_embd, source.facts.n_vocab) != (model.facts.n_embd, model.facts.n_vocab):
        raise TracekitError(
            f"{source.path}: its width or vocabulary is not that of {model.path}; a sidecar belongs to one model"
        )
    nextn = source.facts.n_layer_nextn
    if nextn == 0:
        raise TracekitError(
            f"{source.path}: no MTP (NextN) layers in this GGUF (architecture {source.facts.arch}); use "
            "one converted with them, give a sidecar with --draft-model, or use policy off"
        )
    if nextn > 1:
        raise TracekitError(f"{source.path}: {nextn} chained NextN layers; the engine drafts with models that have one")
    if source.facts.arch in _CROPPED:
        raise TracekitError(
            f"{source.path}: llama.cpp's MTP graph for {source.facts.arch} does not give the hidden states of all "
            "rows, which the engine needs; run it with policy off"
        )
