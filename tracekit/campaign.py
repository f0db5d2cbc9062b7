"""Everything one wants from a machine that is there for an hour: a campaign, in stages that go on where they stopped.

Every size of the reference model in the plan is built on this machine, checked for where it lies, and studied with its
own drafter, or with one that is never right (a sidecar, so that the trunk is not written twice), on one slot or over
several; then live traces are recorded at several slots and contexts, and the cost surface is calibrated. What is worth
keeping is one small folder; the models lie elsewhere and can be made again from a seed.
"""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tracekit import beside
from tracekit.engine import Engine, Request, Settings
from tracekit.engine import calibrate as surface
from tracekit.engine.doctor import demand_gpu, examine, surroundings
from tracekit.engine.model import sha256_of
from tracekit.engine.record import record
from tracekit.engine.settings import EXACT
from tracekit.errors import TracekitError
from tracekit.model.build import REFERENCE, build
from tracekit.plans import Live, Plan, Size, Studied, Surface
from tracekit.policy.spec import parse_one
from tracekit.study import Failed, Finding, Study, Teller, complete, conduct, kept, recording, remove
from tracekit.words import counted

KEPT = (".duckdb", ".json", ".png", ".toml", ".txt")
_STAGES = r"(?:mis)?aligned(?:-\d+-slots)?|calibration|live-(?:mis)?aligned-[a-z0-9.-]+-\d+x\d+"
_TOLD = r"plan\.toml|environment\.json|tables\.txt|verdict\.png"
_TIMED = r"(?:backend_sampling|overhead)\.(?:txt|partial)"  # by benchmarks/cuda.sh
_SAME = "threads", "gpu_layers", "llama_cpp"  # and devices and environment: what timings depend on
MOST_BYTES = 16_000_000  # of a trace, to be carried


class Pause(Exception):
    """The time a campaign was given is up; the same command goes on."""


def _names(folder: Path) -> re.Pattern[str]:
    """What a campaign names the files that it leaves in ``folder``; group 1: which study or recording one is of.

    The sizes are those of the ``plan.toml`` there, of any version. Raises :class:`TracekitError` where there is none.
    """
    try:
        plan = tomllib.loads((folder / "plan.toml").read_text("utf-8"))
        sizes = "|".join(re.escape(size["name"]) for size in plan["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise TracekitError(
            f"{folder}: neither empty nor of a campaign (no plan.toml); choose another folder with -o"
        ) from None
    made = rf"((?:{sizes})-(?:{_STAGES})(?:-cut-off(?:-\d+)?)?)\.(?:duckdb(?:\.wal|\.journal)*|toml|json)"
    return re.compile(rf"(?:{made}|{_TOLD}|{_TIMED})(?:(?:\.[0-9a-f]{{8}})?\.partial)?")


def _told(devices: list[dict[str, Any]]) -> str:
    return ", ".join(f"{device['name']} ({device['description']})" for device in devices)


@dataclass(frozen=True)
class Campaign:
    """A plan under way in ``folder``; big models in ``models``. ``minutes`` 0: as long as it takes."""

    plan: Plan
    folder: Path
    models: Path
    tell: Teller
    gpu_layers: int = -1
    threads: int = 0
    minutes: float = 0
    started_s: float = 0.0

    def open(self, text: str, force: bool = False) -> None:
        """Make the folders ready for the plan with this text: new, as the same plan left them, or with ``force``
        without what a campaign of any plan left. Raises :class:`TracekitError` for a folder of something else,
        where this machine or its settings are not those it began with, and where the GPU that is needed is missing.
        """
        folder, path = self.folder, self.folder / "plan.toml"
        used = folder.exists() and any(folder.iterdir())
        names = _names(folder) if used else None
        if used and not force and not (path.is_file() and path.read_bytes() == text.encode()):
            raise TracekitError(
                f"{folder}: not of a campaign with this plan; choose another folder with -o, or give --force"
            )
        if self.plan.require_gpu:
            demand_gpu(surroundings())  # before anything is deleted, or gigabytes are written
        if used and not force:
            self._environment()
        if used and force:
            left = {old: match for old in folder.iterdir() if (match := names.fullmatch(old.name))}
            remove(folder, {match[1] for match in left.values() if match[1]})
            for old in left.keys() - {path}:  # the plan is overwritten: it tells what is a campaign's
                old.unlink(missing_ok=True)
        for made in (folder, self.models):
            made.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def run(self) -> Iterator[Finding]:
        """Every stage that is missing; yields what each study came to. Of every study, recording and surface all sizes
        come in turn, so that a campaign cut short still has a result of each. Raises :class:`Pause` before a stage that
        would begin after the time given, and :class:`Failed` when all else is done where studies were recorded, but
        could not be tuned or verified.
        """
        plan, failed = self.plan, []
        for study in plan.studies:
            for size in plan.sizes_of(study):
                try:
                    finding = self._study(size, study)
                except Failed as error:
                    failed.append(f"{size.name}-{study.name}")
                    self.tell.say(f"[{failed[-1]}] failed, going on: {error}")
                else:
                    yield finding
        for live in plan.live:
            for size in plan.sizes_of(live):
                self._record(size, live)
        if plan.calibrate:
            for size in plan.sizes_of(plan.calibrate):
                self._calibrate(size, plan.calibrate)
        if failed:
            raise Failed(
                f"not tuned or verified, for the reasons told above: {', '.join(failed)}; all else is done; a plan "
                "with more prompts or max_tokens may help"
            )

    @property
    def files(self) -> list[Path]:
        """What there is to bring home, by name."""
        names = _names(self.folder)
        return sorted(p for p in self.folder.iterdir() if p.suffix in KEPT and names.fullmatch(p.name))

    def _may_go_on(self) -> None:
        if self.minutes and time.monotonic() - self.started_s > 60 * self.minutes:
            raise Pause

    def _settings(self, size: Size, **changes: Any) -> Settings:
        exact = EXACT if size.type == "f32" else {}
        base = Settings(n_max=self.plan.n_max, threads=self.threads, gpu_layers=self.gpu_layers, **exact)
        return replace(base, **changes)

    def _ready(self, size: Size, head: str) -> tuple[Path, Path | None]:
        """The expanded model and the draft file of ``head``, built where they are missing, and known to lie where they
        should.
        """
        seed = f"-seed-{self.plan.seed}" if self.plan.seed else ""
        # of another source also what it holds: one that is trained again, or of the same name elsewhere, is another
        of = "" if size.source == REFERENCE else f"-{sha256_of(size.source)[:8]}"
        stem = f"{size.source.stem}{of}-{size.width}x{size.layers}-{size.type}{seed}"
        model, sidecar = self.models / f"{stem}.gguf", self.models / f"{stem}-misaligned-sidecar.gguf"
        for path, drafter_alone in ((model, False), (sidecar, True)):
            if not path.exists():
                self._may_go_on()
                self.tell.say(f"[{size.name}] building {path.name}")
                with self.tell.progress("tensors") as update:
                    build(
                        path, size.layers, size.width, drafter_alone, drafter_alone, size.type, self.plan.seed,
                        size.source, progress=update,
                    )  # fmt: skip  # what is built, then how
        self._check(size, model)
        return model, sidecar if head == "misaligned" else None

    def _environment(self) -> dict[str, Any]:
        """What ``environment.json`` says, or will say. Raises :class:`TracekitError` where that is not of this machine,
        build and settings: timings of two are no campaign.
        """
        path = self.folder / "environment.json"
        threads = Settings(threads=self.threads).threads
        now = surroundings() | {"threads": threads, "gpu_layers": self.gpu_layers, "models": {}}
        if not path.exists():
            return now
        try:
            known = json.loads(path.read_text("utf-8"))
            pairs = [(name, known[name], now[name]) for name in _SAME if name in known]  # an older file has fewer
            pairs += [("devices", *(_told(of["devices"]) for of in (known, now)))]
            pairs += [("environment", *(of["machine"].get("environment", {}) for of in (known, now)))]
            known["models"].keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TracekitError(f"{path}: not JSON, or not of a campaign ({error}); remove it to look again") from None
        for name, was, now_is in pairs:
            if was != now_is:
                raise TracekitError(
                    f"{self.folder}: the campaign began with {name} {was}, here it would go on with {now_is}; "
                    "choose another folder with -o, or give --force to start again"
                )
        return known

    def _check(self, size: Size, model: Path) -> None:
        """Note where the model lies in ``environment.json``; refuse to go on where it should be on a GPU and is not."""
        path, known = self.folder / "environment.json", self._environment()
        if size.name not in known["models"]:
            facts = examine(model, self.gpu_layers)
            if self.plan.require_gpu:
                demand_gpu(known | {"model": facts})
            known["models"][size.name] = facts
            with beside.written(path) as file:
                file.write(json.dumps(known, indent=2) + "\n")

    def _study(self, size: Size, studied: Studied) -> Finding:
        name, slots = f"{size.name}-{studied.name}", studied.slots
        if found := kept(self.folder, name):  # no model is needed
            return found
        settings = self._settings(size, n_slots=slots, kv_unified=slots > 1)
        study = Study(self.folder, name, *self._ready(size, studied.head), settings, self.plan.workload(slots))
        finding = conduct(study, self.tell, self._may_go_on)
        self._weigh(self.folder / f"{name}.duckdb")
        return finding

    def _calibrate(self, size: Size, wanted: Surface) -> None:
        path = self.folder / f"{size.name}-calibration.duckdb"
        if complete(path):
            return
        self._may_go_on()
        model, _ = self._ready(size, "aligned")
        plan = wanted.plan
        self.tell.say(
            f"[{size.name}] calibrating: slots {plan.slots}, contexts {plan.contexts}, up to {plan.n_max} drafts"
        )
        settings = wanted.settings(self._settings(size))
        sweep = surface.Sweep(plan.n_max, self.plan.seed)
        with recording(self.tell, "decodes", model, None, settings, trace=path, probe=sweep) as (engine, update):
            surface.calibrate(engine, sweep, plan, progress=update)
        self._weigh(path)

    def _record(self, size: Size, live: Live) -> None:
        path = self.folder / f"{size.name}-{live.name}.duckdb"
        if complete(path):
            return
        self._may_go_on()
        model, sidecar = self._ready(size, live.head)
        self.tell.say(
            f"[{size.name}] recording live: {live.policy}, {counted(live.slots, 'slot')}, context {live.context}"
        )
        settings = self._settings(size, n_slots=live.slots, n_ctx=live.context)
        made = model, parse_one(live.policy), settings, sidecar
        with recording(self.tell, "tokens", *made, trace=path) as (engine, update):
            requests = self.plan.workload().requests("tune")
            record(engine, [_led_up_to(engine, r, live.room(r.max_tokens), requests) for r in requests], True, update)
        self._weigh(path)

    def _weigh(self, path: Path) -> None:
        if path.stat().st_size > MOST_BYTES:
            size = path.stat().st_size / 1e6
            self.tell.say(f"warning: {path} has {size:.0f} MB; fewer prompts or tokens make it less")


def _led_up_to(engine: Engine, request: Request, room: int, others: list[Request]) -> Request:
    """``request`` with other prompts before its own, so that there are ``room`` tokens; its own are no more."""
    own = engine.model.tokenize(request.prompt)
    before = [t for other in others if other is not request for t in engine.model.tokenize(other.prompt)[1:]]
    missing = room - len(own)
    filler = (before * (missing // len(before) + 1))[:missing] if before else []
    return replace(request, prompt=own[:1] + filler + own[1:])
