"""What a campaign runs: plan files (TOML) that ship here, one's own, and everything that can be wrong with one.

What the engine or a later stage would refuse is refused when a plan is read, not when its stage comes, hours later.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FilePath, ValidationError, field_validator, model_validator

from tracekit.engine import Settings
from tracekit.engine import calibrate as surface
from tracekit.engine.model import Model
from tracekit.engine.record import wave_of
from tracekit.errors import TracekitError
from tracekit.model.build import REFERENCE, grown
from tracekit.model.prompt_sets import SETS
from tracekit.policy.spec import parse_one
from tracekit.study import Workload

PLANS = Path(__file__).parent
Head = Literal["aligned", "misaligned"]
HELD_OUT = SETS["heldout"]  # prompts of every category; over several slots, one for each slot at least


@contextmanager
def _refused(where: str = "") -> Iterator[None]:
    """What is refused within is wrong with the plan, ``where``; in a table (``where`` ends in a dot), or without one,
    an option that is named is a key.
    """
    try:
        yield
    except TracekitError as error:
        named = re.match(r"--([a-z-]+) (\S*): ", why := str(error))
        if named and (not where or where.endswith(".")):
            why = f"{named[1].replace('-', '_')} = {named[2]}: {why[named.end() :]}"
        elif where.endswith("."):
            where = f"{where[:-1]}: "
        raise ValueError(f"{where}{why}") from None


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

    def check(self) -> None:
        """Raise :class:`TracekitError` where it cannot be built."""
        grown(self.layers, self.width, self.type, source=self.source)


class _Stage(_Strict):
    """What is done with every size of the plan, or only with the ``sizes`` named."""

    sizes: tuple[str, ...] | None = Field(None, min_length=1)


class Surface(_Stage):
    """What is calibrated (:class:`tracekit.engine.calibrate.Plan`)."""

    n_max: int
    slots: tuple[int, ...] = Field(min_length=1)
    contexts: tuple[int, ...] = Field(min_length=1)
    steps: int
    blocks: int

    @property
    def plan(self) -> surface.Plan:
        """For the engine. Raises :class:`TracekitError` for what cannot be measured."""
        return surface.Plan(**self.model_dump(exclude={"sizes"}))

    def settings(self, base: Settings) -> Settings:
        """``base`` with room for it. Raises :class:`TracekitError` as :attr:`plan` does."""
        plan = self.plan
        served = replace(base, n_slots=plan.slots[-1], n_max=plan.n_max)  # slots that are too many are refused here
        return replace(served, n_ctx=plan.n_ctx(base.n_batch))


class Studied(_Stage):
    """One study (:mod:`tracekit.study`): with the model's own drafter or with one that is never right,
    over ``slots`` at once, with more prompts than the plan's where slots would be empty.
    """

    head: Head = "aligned"
    slots: int = Field(1, ge=1, le=sum(HELD_OUT.values()))

    @property
    def name(self) -> str:
        """Part of its files' names."""
        return self.head + (f"-{self.slots}-slots" if self.slots > 1 else "")


class Live(_Stage):
    """One live recording: ``slots`` at once, each prompt led up to a context of ``context`` tokens."""

    policy: str
    slots: int
    context: int
    head: Head = "aligned"

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

    def room(self, max_tokens: int) -> int:
        """Tokens of a prompt for which there is room before ``max_tokens`` are generated."""
        return self.context - max_tokens - 1


class Plan(_Strict):
    """A plan file (TOML); :mod:`tracekit.study` says what the workload's keys mean. ``studies``, ``live``
    and ``calibrate`` are what is done, in this order.
    """

    about: str
    require_gpu: bool
    n_max: int
    max_tokens: int
    temp: float = Field(ge=0, le=100)
    prompts: int
    repeats: int
    seed: int = Field(ge=0, lt=1 << 31)
    sizes: tuple[Size, ...] = Field(min_length=1)
    studies: tuple[Studied, ...] = ()
    calibrate: Surface | None = None
    live: tuple[Live, ...] = ()

    @model_validator(mode="after")
    def _can_run(self) -> Plan:
        """What the engine would refuse is refused before anything runs, not at the stage that needs it, hours later."""
        if not (self.studies or self.calibrate or self.live):
            raise ValueError("nothing to do: no studies, no calibrate, no live")
        made = {"sizes": [size.name for size in self.sizes]}
        for key in ("studies", "live"):
            made[key] = [
                f"{stage.name} of {size.name}" for stage in getattr(self, key) for size in self.sizes_of(stage)
            ]
        for key, names in made.items():
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key}: {twice[0]} is there twice")
        for i, size in enumerate(self.sizes):
            with _refused(f"sizes.{i}."):
                size.check()
        sizes = {size.name for size in self.sizes}
        used = set()
        for where, stage in self._stages():
            named = stage.sizes or sizes
            if strange := sorted(set(named) - sizes):
                raise ValueError(f"{where}.sizes: no size {strange[0]}; there are {', '.join(sorted(sizes))}")
            used |= set(named)
        if idle := sorted(sizes - used):
            raise ValueError(f"sizes: nothing is done with {idle[0]}")
        with _refused():
            base = Settings(n_max=self.n_max)
            self.workload().check(base)
        for i, study in enumerate(self.studies):
            with _refused(f"studies.{i}.slots = {study.slots}: "):
                replace(base, n_slots=study.slots)
        if self.calibrate:
            with _refused("calibrate."):
                self.calibrate.settings(base)
        sources = [{size.source for size in self.sizes_of(live)} for live in self.live]
        lengths = {source: self._longest(source) for source in set().union(*sources)}
        for i, live in enumerate(self.live):
            longest = max(lengths[source] for source in sources[i])
            with _refused(f"live.{i}.slots = {live.slots}, context = {live.context}: "):
                replace(base, n_slots=live.slots, n_ctx=live.context)
            if getattr(parse_one(live.policy).params, "n_max", 0) > self.n_max:
                raise ValueError(f"live.{i}.policy = {live.policy}: more drafts than the plan's n_max = {self.n_max}")
            if longest > live.room(self.max_tokens):
                needs = f"a prompt of {longest} tokens and max_tokens = {self.max_tokens}"
                raise ValueError(f"live.{i}.context = {live.context}: no room for {needs}")
        return self

    def _stages(self) -> Iterator[tuple[str, _Stage]]:
        """Every stage, after where it stands."""
        for key in ("studies", "live"):
            yield from ((f"{key}.{i}", stage) for i, stage in enumerate(getattr(self, key)))
        if self.calibrate:
            yield "calibrate", self.calibrate

    def sizes_of(self, stage: _Stage) -> list[Size]:
        """The sizes that ``stage`` is done with, in the plan's order."""
        return [size for size in self.sizes if not stage.sizes or size.name in stage.sizes]

    def _longest(self, source: Path) -> int:
        """Tokens of the longest prompt that is recorded live."""
        with closing(Model(source, gpu_layers=0, mtp=False)) as model:
            return max(len(model.tokenize(request.prompt)) for request in self.workload().requests("tune"))

    def workload(self, n_slots: int = 1) -> Workload:
        """What a study over ``n_slots`` generates: enough to record a wave, and to verify with every slot in use."""
        fill = -(-wave_of(n_slots) // len(HELD_OUT))
        prompts = max(self.prompts, fill) if self.prompts > 0 else self.prompts
        return Workload(self.max_tokens, self.temp, self.repeats, prompts, self.seed)


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
