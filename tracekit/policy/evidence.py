"""What a tuned policy rests on: written by ``tracekit tune`` into the policy file, read by ``tracekit verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tracekit.errors import TracekitError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Alternative(_Strict):
    """Another policy on the same trace: tokens per second and speed-up against no MTP with their 95 % intervals, and
    whether every category kept within the allowed slowdown with the confidence of the chosen one.
    """

    policy: str
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    speedup: float
    speedup_low: float | None = None
    speedup_high: float | None = None
    safe: bool


class Evidence(_Strict):
    """Out-of-sample prediction for a tuned policy, and everything needed to check it.

    Speeds are tokens per second of generation over all requests, predicted for requests the choice was not made on;
    ``low`` and ``high`` are a 95 % interval. With several ``n_slots`` they are of whole runs, with prompts.
    ``safe``: whether every category kept within ``max_slowdown``, by a one-sided bound of this ``confidence`` on the
    requests the choice was made on. ``worst_category_speedup`` is the lowest over prompt categories, without an
    interval where that has one prompt.
    ``n_prompts``: different ones among the requests; what rests on them rests on so many.
    ``device`` and ``cost_model`` are those of ``priced_by``, a trace. ``recorded_with``: how requests were sampled, as
    far as all were alike, and the settings of the engine that ``priced_by`` timed, in llama.cpp's names.
    """

    advice: str
    tracekit_version: str
    trace: str
    trace_id: str
    model_sha256: str
    model_desc: str
    device: str
    priced_by: str = ""
    cost_model: str
    recorded_with: dict[str, Any] = {}
    n_slots: int = 1
    n_requests: int
    n_prompts: int | None = None
    n_tokens: int
    n_policies: int
    folds: int
    seed: int
    max_slowdown: float
    confidence: float = 0.95
    safe: bool = True
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    worst_category: str
    worst_category_speedup: float
    worst_category_speedup_low: float | None = None
    worst_category_speedup_high: float | None = None
    exact_fraction: float
    alternatives: tuple[Alternative, ...] = ()

    @classmethod
    def parse(cls, path: Path, content: dict[str, Any]) -> Evidence:
        """The table ``[evidence]`` of the policy file ``path``; raises :class:`TracekitError` naming the wrong key."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise TracekitError(
                f"{path}: evidence.{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
            ) from None
