"""Where a model really lies and what it really runs with, from what llama.cpp says while loading it.

llama.cpp has no calls that answer this; its log does (src/llama-model.cpp, load_tensors; src/llama-kv-cache.cpp;
src/llama-context.cpp). A run that was meant for a GPU and silently used the processor is found here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tracekit.engine.lib import is_processor
from tracekit.errors import TracekitError

_MIB = 1 << 20
_BUFFER = re.compile(r"(\S+)\s+(model|KV|compute|output) buffer size =\s+([\d.]+) MiB")
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_LAYER = re.compile(r"layer\s+\d+ assigned to device (\S+),")
_FLASH = re.compile(r"Flash Attention (?:not supported, set to )?(enabled|disabled)|flash_attn\s+= (enabled|disabled)")


@dataclass(frozen=True)
class Placement:
    """``buffers``: bytes by kind (``model``, ``KV``, ``compute``, ``output``) and backend buffer, target and MTP
    context together. ``layers``: trunk, NextN and output layers by device. ``flash_attn``: what ``auto`` came to, empty
    where llama.cpp did not say.
    """

    buffers: dict[str, dict[str, int]] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    offloaded: int = 0
    offloadable: int = 0
    flash_attn: str = ""

    @classmethod
    def of(cls, log: Iterable[str]) -> Placement:
        """The placement that the lines of llama.cpp's log tell."""
        buffers: dict[str, dict[str, int]] = {}
        layers: dict[str, int] = {}
        offloaded = offloadable = 0
        flash = ""
        for line in log:
            if found := _BUFFER.search(line):
                name, kind, size = found.groups()
                of_kind = buffers.setdefault(kind, {})
                of_kind[name] = of_kind.get(name, 0) + round(float(size) * _MIB)
            elif found := _LAYER.search(line):
                layers[found[1]] = layers.get(found[1], 0) + 1
            elif found := _OFFLOADED.search(line):
                offloaded, offloadable = offloaded + int(found[1]), offloadable + int(found[2])
            elif found := _FLASH.search(line):
                flash = found[1] or found[2]
        return cls(buffers, layers, offloaded, offloadable, flash)

    @property
    def on_gpu(self) -> bool:
        """Whether every layer, the output layer included, is on a device that is no processor."""
        return bool(self.layers) and not any(map(is_processor, self.layers))

    def demand_gpu(self, model: str) -> None:
        """Raise :class:`TracekitError` unless every layer is on a GPU: a slow recording is worse than none."""
        if self.on_gpu:
            return
        where = ", ".join(f"{n} on {device}" for device, n in sorted(self.layers.items())) or "nothing is known"
        raise TracekitError(
            f"{model}: not all layers are on a GPU ({where}); llama-cpp-python must be built with CUDA (docs/cuda.md), "
            "the GPU have room, and --gpu-layers be -1"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a trace's provenance."""
        return asdict(self) | {"on_gpu": self.on_gpu}
