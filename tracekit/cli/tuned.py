"""A policy that a person names, and what it was tuned on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracekit.cli import out

if TYPE_CHECKING:
    from tracekit.policy.file import PolicyFile


def read(text: str) -> PolicyFile:
    """The one policy that ``text`` names, with its evidence where that is a policy file."""
    from tracekit.policy import file, spec

    return file.read(text) if text.endswith(".toml") else file.PolicyFile(spec.parse_one(text))


def warn(tuned: PolicyFile, text: str, model: Path, desc: str | None = None, n_slots: int | None = None) -> None:
    """Say where ``model`` or the number of slots are not what ``tuned`` was tuned for. With ``desc`` the model's
    description is compared, which takes no time; otherwise the file's hash.
    """
    from tracekit.engine.model import sha256_of

    e = tuned.evidence
    if e is None:
        return
    if desc is None and sha256_of(model) != e.model_sha256:
        out.say(
            f"warning: {model} is not the file that {text} was tuned on (its hash differs); tune again for this model"
        )
    if desc not in (None, e.model_desc):
        out.say(f"warning: {model} is {desc}, {text} was tuned on {e.model_desc}; tune again for this model")
    if n_slots not in (None, e.n_slots):
        out.say(f"warning: {text} was tuned for {e.n_slots} slots, these are {n_slots} (--parallel)")


def warn_of_settings(tuned: PolicyFile, text: str, here: Mapping[str, Any]) -> None:
    """Say which of the settings that acceptance or costs depend on are not ``here`` as ``tuned`` was recorded with."""
    recorded = tuned.evidence.recorded_with if tuned.evidence else {}
    other = [f"{name} {value} (here {here.get(name)})" for name, value in recorded.items() if here.get(name) != value]
    if other:
        out.say(f"warning: {text} rests on a trace recorded with {', '.join(other)}")
