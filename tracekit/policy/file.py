"""The policy file: a policy and the evidence for it, as TOML that people read and may write."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracekit import beside
from tracekit.errors import TracekitError
from tracekit.policy.rule import SHIPPED, Policy, rule

_KEYS = {"name": str, "file": str, "sha256": str, "params": dict}


@dataclass(frozen=True)
class PolicyFile:
    """A policy with its evidence (see :mod:`tracekit.policy.evidence`; None where a person wrote the file)."""

    policy: Policy
    evidence: Any = None

    def save(self, path: str | Path) -> Path:
        """Write the file, complete or not at all; returns its path. Raises :class:`TracekitError` where there is
        something that is no policy file.
        """
        import tomli_w

        path, r = Path(path), self.policy.rule
        check(path)
        head: dict[str, Any] = (
            {"name": r.name} if r.path.parent == SHIPPED else {"file": os.path.relpath(r.path, path.resolve().parent)}
        )
        content: dict[str, Any] = {"policy": head | {"sha256": r.sha256, "params": self.policy.params._asdict()}}
        if self.evidence is not None:
            content["evidence"] = self.evidence.model_dump(mode="json", exclude_none=True)
        try:
            with beside.written(path) as file:
                file.write(tomli_w.dumps(content))
        except OSError as error:
            raise TracekitError(f"{path}: {error.strerror}; choose another place with -o") from None
        return path


def check(path: Path) -> None:
    """Raise :class:`TracekitError` where no policy file can be: another ending, or something that is none."""
    if path.suffix != ".toml":
        raise TracekitError(f"{path}: a policy file ends in .toml")
    try:
        ours = not path.exists() or (path.is_file() and "policy" in tomllib.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise TracekitError(f"{path}: exists, and is no policy file; choose another name")


def read(path: str | Path) -> PolicyFile:
    """The policy in a TOML file. Raises :class:`TracekitError` naming the key that is wrong."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise TracekitError(f"{path}: no such policy file; `tracekit tune` writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TracekitError(f"{path}: not TOML ({error})") from None
    except OSError as error:
        raise TracekitError(f"{path}: {error.strerror}") from None
    unknown = [k for k in content if k not in ("policy", "evidence")]
    if unknown or "policy" not in content:
        raise TracekitError(
            f"{path}: {f'unknown table [{unknown[0]}]' if unknown else 'no table [policy]'}; a policy file "
            "has [policy] and [evidence]"
        )
    head = content["policy"]
    if not isinstance(head, dict):
        raise TracekitError(f"{path}: policy must be a table: [policy]")
    for key, value in head.items():
        if key not in _KEYS:
            raise TracekitError(f"{path}: unknown key policy.{key}; known: {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]):
            raise TracekitError(f"{path}: policy.{key} must be {'a table' if _KEYS[key] is dict else 'a text'}")
    if ("name" in head) == ("file" in head):
        raise TracekitError(f"{path}: [policy] needs name (a shipped policy) or file (a Python file), one of them")
    try:
        found = rule(head["name"] if "name" in head else path.parent / head["file"])
        policy = found(**head.get("params", {}))
    except TracekitError as error:
        raise TracekitError(f"{path}: {error}") from None
    if head.get("sha256", found.sha256) != found.sha256:
        raise TracekitError(
            f"{path}: policy {found.name} has changed since the file was written; tune again, or remove "
            "policy.sha256 to use it as it is now"
        )
    if "evidence" not in content:
        return PolicyFile(policy)
    from tracekit.policy.evidence import Evidence

    return PolicyFile(policy, Evidence.parse(path, content["evidence"]))
