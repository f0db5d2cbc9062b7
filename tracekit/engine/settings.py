"""Every setting of the engine, in llama.cpp's names: what a trace records, and what a run can be repeated from."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracekit.errors import TracekitError
from tracekit.policy.rule import Policy

CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # ggml_type
MOST_BATCH = 2**15 - 1  # tokens; a trace counts them in 16 bits
MOST_THREADS = 512  # GGML_MAX_N_THREADS
MOST_SLOTS = 256  # LLAMA_MAX_SEQ
MOST_DRAFTS = 254  # the simulator counts right ones in 8 bits (tracekit.replay.arrays), and 255 has a meaning there
MOST_TOKENS = 2**31 - 1  # of all slots
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}  # float32 as the weights: no near ties
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}  # llama_flash_attn_type
_OPTIONS = {"n_slots": "--parallel", "n_ctx": "--ctx-size", "n_batch": "--batch-size", "n_ubatch": "--batch-size"}


def physical_cores() -> int:
    """Processor cores this process may use, hyper-threads counted once: llama.cpp's default number of threads."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.is_file() else str(cpu))
    return len(siblings)


@dataclass(frozen=True)
class Settings:
    """How the engine runs. ``n_ctx``: tokens per slot. ``n_max``: most drafts any policy may ask for.

    ``threads`` 0: one per physical core. ``gpu_layers`` -1: all. ``kv_unified``: one memory for all slots, so that a
    step is one pass over the weights whatever each slot drafts; otherwise llama.cpp splits a batch whose slots differ
    in rows, or are not neighbours, into several. ``spec_draft_backend_sampling``: the device picks each draft's ten
    most likely tokens, and the logits stay there (llama.cpp's default); None: where the output layer is on a GPU, since
    beside a processor there is nothing to save. ``backend_sampling``: the device samples the target's tokens too
    (llama.cpp's default: off). An engine's own settings say what is really done. Raises :class:`TracekitError` for
    values that cannot work.
    """

    n_slots: int = 1
    n_ctx: int = 1024
    n_batch: int = 512
    n_ubatch: int = 512
    threads: int = 0
    gpu_layers: int = -1
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: str = "auto"
    kv_unified: bool = False
    n_max: int = 8
    spec_draft_backend_sampling: bool | None = None
    backend_sampling: bool = False

    def __post_init__(self):
        for name, least in (
            ("n_slots", 1),
            ("n_ctx", 8),
            ("n_batch", 8),
            ("n_ubatch", 8),
            ("threads", 0),
            ("gpu_layers", -1),
            ("n_max", 0),
        ):
            if getattr(self, name) < least:
                raise TracekitError(f"{self._told(name)}: {least} or more")
        for name, known in (("cache_type_k", CACHE_TYPES), ("cache_type_v", CACHE_TYPES), ("flash_attn", FLASH_ATTN)):
            if getattr(self, name) not in known:
                raise TracekitError(f"{self._told(name)}: one of {', '.join(known)}")
        if self.cache_type_v == "q8_0" and self.flash_attn == "off":
            raise TracekitError("--cache-type-v q8_0 needs flash attention: --flash-attn auto or on, or another type")
        for name, most in (
            ("threads", MOST_THREADS),
            ("n_slots", MOST_SLOTS),
            ("n_ctx", MOST_TOKENS // self.n_slots),
            ("n_batch", MOST_BATCH),
            ("n_max", MOST_DRAFTS),
        ):
            if getattr(self, name) > most:
                raise TracekitError(f"{self._told(name)}: {most} or less")
        if self.n_slots * (self.n_max + 1) > self.n_batch:
            raise TracekitError(
                f"{self._told('n_batch')} cannot verify {self.n_max} drafts (--n-max) in each of {self.n_slots} slots "
                "(--parallel); raise --batch-size or lower --n-max"
            )
        if not self.threads:
            object.__setattr__(self, "threads", physical_cores())

    def check(self, policy: Policy) -> None:
        """Raise :class:`TracekitError` for a policy that may ask for more drafts than ``n_max``."""
        wanted = getattr(policy.params, "n_max", 0)
        if wanted > self.n_max:
            raise TracekitError(
                f"policy {policy}: n_max {wanted} is more than the engine's {self.n_max}; raise the engine's (--n-max)"
            )

    def _told(self, name: str) -> str:
        """A field and its value as on the command line, and the name in Python where that is another."""
        option = _OPTIONS.get(name)
        value = getattr(self, name)
        return f"{option} {value} ({name})" if option else f"--{name.replace('_', '-')} {value}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a trace's provenance."""
        return asdict(self)
