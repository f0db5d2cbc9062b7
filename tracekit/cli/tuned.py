"""A policy that a person names, what it was tuned on, and where that is not what there is here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.cli import out
from tracekit.words import counted

if TYPE_CHECKING:
    from tracekit.policy.file import PolicyFile
    from tracekit.trace.store import TraceFile


def read(text: str) -> PolicyFile:
    """The one policy that ``text`` names, with its evidence where that is a policy file."""
    from tracekit.policy import file, spec

    return file.read(text) if text.endswith(".toml") else file.PolicyFile(spec.parse_one(text))


def warn(tuned: PolicyFile, text: str, model: Path, n_slots: int) -> None:
    """Say where ``model`` or the number of slots are not what ``tuned`` was tuned for."""
    from tracekit.engine.model import sha256_of

    e = tuned.evidence
    if e is None:
        return
    if sha256_of(model) != e.model_sha256:
        out.say(
            f"warning: {model} is not the file that {text} was tuned on (its hash differs); tune again for this model"
        )
    if n_slots != e.n_slots:
        out.say(f"warning: {text} was tuned for {counted(e.n_slots, 'slot')}, here it is {n_slots} (--parallel)")


def warn_of_settings(tuned: PolicyFile, text: str, here: Mapping[str, Any]) -> None:
    """Say where the device, or settings that acceptance or costs depend on, are not ``here`` as ``tuned`` was recorded
    with.
    """
    from tracekit.engine.provenance import device_name

    if tuned.evidence is None:
        return
    if tuned.evidence.device != device_name():
        out.say(f"warning: {text} was tuned on {tuned.evidence.device}, this is {device_name()}; record and tune here")
    if other := _unlike(tuned.evidence.recorded_with, here):
        out.say(f"warning: {text} rests on a trace recorded with {other}")


def warn_of_times(times: TraceFile, model: Path, here: Mapping[str, Any]) -> None:
    """Say where the times of a trace are not those of ``model`` and the settings ``here``, on this device."""
    from tracekit.engine.model import sha256_of
    from tracekit.engine.provenance import device_name
    from tracekit.trace.store import recorded_with

    found, last = [], times.runs.row(-1, named=True)
    if last["model_sha256"] != sha256_of(model):
        found.append("of another model (its hash differs)")
    if last["device"] != device_name():
        found.append(f"of {last['device']}, this is {device_name()}")
    recorded = {name: value for name, value in recorded_with(times, times).items() if name in here}
    if other := _unlike(recorded, here):
        found.append(f"recorded with {other}")
    if found:
        out.say(f"warning: the times in {times.path} are {'; '.join(found)}: errors are no fault of the prediction")


def _unlike(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value} (here {here.get(name)})" for name, value in recorded.items() if here.get(name) != value
    )
