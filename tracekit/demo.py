"""The whole loop, once with an aligned and once with a misaligned drafter: build, record, tune, verify.

Every stage leaves a file, and a run that was stopped goes on with the first stage whose file is missing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from tracekit.engine import Settings
from tracekit.engine.settings import EXACT
from tracekit.errors import TracekitError
from tracekit.model.build import build, grown
from tracekit.study import Finding, Study, Teller, Workload, conduct, paths_of, remove

N_MAX = 8
HEADS = ("aligned", "misaligned")


@dataclass(frozen=True)
class Plan:
    """What the demo runs: ``layers`` and ``width`` (0: as it is) of the expanded model, and what is generated.

    ``dtype`` ``f32`` computes in float32 throughout, so that rounding does not depend on the width of a batch and
    tokens can be compared; ``f16`` is what one would serve.
    """

    layers: int
    width: int
    dtype: str
    threads: int
    workload: Workload

    @property
    def settings(self) -> Settings:
        """The engine's. Raises :class:`TracekitError` for values that cannot work."""
        return Settings(n_max=N_MAX, threads=self.threads, **(EXACT if self.dtype == "f32" else {}))

    def check(self) -> None:
        """Raise :class:`TracekitError` for what a stage would refuse."""
        grown(self.layers, self.width or None, self.dtype)
        self.workload.check(self.settings)


@dataclass(frozen=True)
class Story:
    """Both results, and the files that were written."""

    heads: list[Finding]
    files: list[Path]

    @property
    def frame(self) -> pl.DataFrame:
        """The arms of both heads in one frame, column ``head`` first."""
        return pl.concat([h.verdict.arms.select(pl.lit(f"{h.name} head").alias("head"), pl.all()) for h in self.heads])


def run(plan: Plan, folder: Path, tell: Teller, force: bool = False, resume: bool = False) -> Story:
    """The demo in ``folder``.

    Raises :class:`TracekitError` for a plan that cannot be run, before anything is written, and for a folder in use:
    ``force`` starts again there, ``resume`` goes on.
    """
    plan.check()
    _open(folder, plan, force, resume)
    heads = [_head(plan, folder, name, tell) for name in HEADS]
    return Story(heads, [path for h in heads for path in paths_of(folder, h.name)])


def _open(folder: Path, plan: Plan, force: bool, resume: bool) -> None:
    """Make ``folder`` ready: empty, emptied of an earlier demo's files, or as an earlier demo of this plan left it."""
    path = folder / "plan.json"
    if folder.exists() and not folder.is_dir():
        raise TracekitError(f"{folder}: a file; choose a folder with -o")
    if resume and not path.is_file() and not force:
        raise TracekitError(f"{folder}: no demo to go on with (no plan.json); leave out --resume to begin one")
    if folder.exists() and any(folder.iterdir()) and not force:
        if not resume:
            raise TracekitError(
                f"{folder}: not empty; choose another folder with -o, go on with --resume, or give --force"
            )
        if not path.is_file() or path.read_text() != _text(plan):
            raise TracekitError(f"{folder}: not of a demo with these options; give those it began with, or --force")
        return
    folder.mkdir(parents=True, exist_ok=True)
    models = [folder / f"{name}.gguf" for name in HEADS]
    ours = [*models, *(file for name in HEADS for file in paths_of(folder, name))]
    if not path.is_file() and (foreign := next((file for file in ours if file.exists()), None)):
        raise TracekitError(f"{foreign}: of no demo (there is no plan.json beside it); choose another folder with -o")
    remove(folder, HEADS)
    for model in models:
        model.unlink(missing_ok=True)
    path.write_text(_text(plan))


def _text(plan: Plan) -> str:
    return json.dumps(asdict(plan), indent=2) + "\n"


def _head(plan: Plan, folder: Path, name: str, tell: Teller) -> Finding:
    """Every stage for one drafter, those left out whose file is there."""
    model = folder / f"{name}.gguf"
    if not model.exists():
        tell.say(f"[{name}] building the reference model, expanded: the same function at a bigger model's cost")
        with tell.progress("tensors") as update:
            build(
                model, layers=plan.layers, width=plan.width or None, misaligned=name == "misaligned",
                dtype=plan.dtype, progress=update,
            )  # fmt: skip  # what is built, then how
    return conduct(Study(folder, name, model, None, plan.settings, plan.workload), tell)
