"""What a campaign runs: plan files (TOML) that ship here, one's own, and everything that can be wrong with one.

What the engine or a later stage would refuse is refused when a plan is read, not when its stage comes, hours later.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FilePath, ValidationError, field_validator, model_validator

from tracekit.engine import Settings
from tracekit.engine import calibrate as surface
from tracekit.engine.record import wave_of
from tracekit.errors import TracekitError
from tracekit.model.build import REFERENCE
from tracekit.model.prompt_sets import SETS
from tracekit.policy.spec import parse_one
from tracekit.study import Workload

PLANS = Path(__file__).parent
HELD_OUT = SETS["heldout"]  # prompts of every category; over several slots, one for each slot at least


@contextmanager
def _refused(where: str = "") -> Iterator[None]:
    """What is refused within is wrong with the plan, ``where``."""
    try:
        yield
    except TracekitError as error:
        raise ValueError(f"{where}{str(error).removeprefix('--')}") from None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(_Strict):
    """One expansion of the reference model (:mod:`tracekit.model.expand`), or of another that
    :mod:`tracekit.model.train` wrote to ``source``.
    """

    name: str = Field(pattern=r"^[a-z0-9.]+$")
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    type: Literal["f16", "f32"] = "f16"
    source: FilePath = REFERENCE


class Surface(_Strict):
    """What is calibrated (:class:`tracekit.engine.calibrate.Plan`)."""

    n_max: int
    slots: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    blocks: int

    @property
    def plan(self) -> surface.Plan:
        """For the engine. Raises :class:`TracekitError` for what cannot be measured."""
        return surface.Plan(**self.model_dump())

    def settings(self, base: Settings) -> Settings:
        """``base`` with room for it. Raises :class:`TracekitError` as :attr:`plan` does."""
        plan = self.plan
        return replace(base, n_slots=plan.slots[-1], n_max=plan.n_max, n_ctx=plan.n_ctx(base.n_batch))


class Live(_Strict):
    """One live recording: ``slots`` at once, each prompt led up to a context of ``context`` tokens."""

    policy: str
    slots: int
    context: int
    head: str = Field("aligned", pattern="^(mis)?aligned$")

    @field_validator("policy")
    @classmethod
    def _is_one(cls, policy: str) -> str:
        with _refused():
            parse_one(policy)
        return policy

    @property
    def name(self) -> str:
        """Part of the file's name."""
        policy = re.sub(r"[^a-z0-9.]+", "-", parse_one(self.policy).label)
        return f"live-{self.head}-{policy}-{self.slots}x{self.context}"


class Plan(_Strict):
    """A plan file (TOML); :mod:`tracekit.study` says what the workload's keys mean. ``parallel``: slots of further
    studies, with more prompts where ``prompts`` would leave slots empty.
    """

    about: str
    require_gpu: bool
    n_max: int
    max_tokens: int = Field(ge=1)
    temp: float = Field(ge=0, le=100)
    prompts: int = Field(ge=0)
    repeats: int = Field(ge=1)
    seed: int = Field(ge=0, lt=1 << 31)
    parallel: tuple[Annotated[int, Field(ge=2, le=sum(HELD_OUT.values()))], ...] = ()
    sizes: tuple[Size, ...] = Field(min_length=1)
    calibrate: Surface
    live: tuple[Live, ...]

    @model_validator(mode="after")
    def _can_run(self) -> Plan:
        """What the engine would refuse is refused before anything runs, not at the stage that needs it, hours later."""
        for key, named in (("sizes", self.sizes), ("live", self.live)):
            names = [each.name for each in named]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key}: {twice[0]} is there twice")
        with _refused(f"n_max = {self.n_max}: "):
            base = Settings(n_max=self.n_max)
        for slots in self.parallel:
            with _refused(f"parallel = {slots}: "):
                replace(base, n_slots=slots)
        with _refused("calibrate: "):
            self.calibrate.settings(base)
        for i, live in enumerate(self.live):
            with _refused(f"live.{i}.slots = {live.slots}, context = {live.context}: "):
                replace(base, n_slots=live.slots, n_ctx=live.context)
            if getattr(parse_one(live.policy).params, "n_max", 0) > self.n_max:
                raise ValueError(f"live.{i}.policy = {live.policy}: more drafts than the plan's n_max = {self.n_max}")
            if live.context <= self.max_tokens:
                raise ValueError(f"live.{i}.context = {live.context}: no room for max_tokens = {self.max_tokens}")
        return self

    def workload(self, n_slots: int = 1) -> Workload:
        """What a study over ``n_slots`` generates: enough to record a wave, and to verify with every slot in use."""
        fill = -(-wave_of(n_slots) // len(HELD_OUT)) if self.prompts else 0
        return Workload(self.max_tokens, self.temp, self.repeats, max(self.prompts, fill), self.seed)


def shipped_plans() -> list[str]:
    """Names of the plans that come with tracekit."""
    return sorted(p.stem for p in PLANS.glob("*.toml"))


def read_plan(name_or_path: str) -> tuple[Plan, str]:
    """A shipped plan or a plan file, and its text. Raises :class:`TracekitError` naming the key that is wrong."""
    path = PLANS / f"{name_or_path}.toml" if name_or_path in shipped_plans() else Path(name_or_path)
    try:
        text = path.read_text("utf-8")
        return Plan.model_validate(tomllib.loads(text)), text
    except (FileNotFoundError, IsADirectoryError):
        raise TracekitError(f"{name_or_path}: no such plan; shipped: {', '.join(shipped_plans())}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TracekitError(f"{path}: not TOML ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key, given = ".".join(map(str, first["loc"])), first["input"]
        found = f" = {given}" if isinstance(given, str | int | float) else ""
        why = first["msg"].removeprefix("Value error, ")
        where = f"{key}{found}: " if key else ""  # what is wrong with several keys together names them
        raise TracekitError(f"{path}: {where}{why[:1].lower()}{why[1:]}") from None
