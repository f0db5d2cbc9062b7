"""Which policies a search looks at: a grid from each policy file's SPACE (or a TOML of one's own), and refinements of
the best.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tracekit.errors import TracekitError
from tracekit.policy.rule import Policy, Rule, rule, shipped
from tracekit.policy.spec import MOST, expand, sweep


def default_space(n_slots: int = 1) -> dict[str, dict[str, str]]:
    """The search space of every shipped policy that has one, by policy name, for serving over ``n_slots``: without
    values of ``max_slots`` that can never be exceeded there, and without a policy that has no others.
    """
    found = {}
    for each in shipped():
        space = dict(each.space)
        if "max_slots" in space:
            fit = [v for v in expand(each.name, "max_slots", space["max_slots"]) if int(v) < n_slots]
            space = space | {"max_slots": ",".join(fit)} if fit else {}
        if space:
            found[each.name] = space
    return found


def read_space(path: str | Path) -> dict[str, dict[str, str]]:
    """A search space from TOML: a table per policy (name or Python file), a list or range per parameter. Raises
    :class:`TracekitError`.

    ::

        [static]
        n_max = "1..8/1"
        p_min = [0, 0.5, 0.8]
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise TracekitError(f"{path}: no such file; a search space is a TOML table per policy") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TracekitError(f"{path}: not TOML ({error})") from None
    except OSError as error:
        raise TracekitError(f"{path}: {error.strerror}; a search space is a TOML table per policy") from None
    if not tables:
        raise TracekitError(f"{path}: empty; a search space is a TOML table per policy")
    space = {}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise TracekitError(
                f'{path}: {name} is not a table; write [policy] and then key = "low..high/step" or a list'
            )
        known = str(path.parent / name) if name.endswith(".py") else name
        space[known] = {k: _text(v) for k, v in table.items()}
        try:
            _check(known, table, space[known])
        except TracekitError as error:
            raise TracekitError(f"{path}, [{name}]: {error}") from None
    return space


def _check(name: str, table: Mapping[str, object], values: Mapping[str, str]) -> None:
    if empty := next((key for key, value in table.items() if value == []), None):
        raise TracekitError(f"{empty} = []: no values; leave it out, or give some")
    sweep(rule(name), values)


def _text(value: object) -> str:
    values = value if isinstance(value, list) else [value]
    return ",".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)


def grid(space: Mapping[str, Mapping[str, str]], n_max: int, whole: bool = False) -> list[Policy]:
    """``off`` and every combination in ``space``, drafts longer than ``n_max`` left out, or refused where the ``whole``
    of it is wanted; simpler policies come first.

    Raises :class:`TracekitError` for an unknown policy or parameter, for one whose state outlives a request, or for
    more than 200,000 policies.
    """
    found: dict[Policy, None] = {rule("off")(): None}
    for name, values in space.items():
        every = sweep(rule(name), values)
        fit = [p for p in every if getattr(p.params, "n_max", 0) <= n_max]
        if shared := next((p for p in fit if p.scope == "engine"), None):
            raise TracekitError(
                f"policy {shared}: with scope=engine all requests are one queue, so that none of them tells whether "
                "it is safe on others; give it scope=request (`tracekit replay` shows what it does on these as it is)"
            )
        if not fit or (whole and len(fit) < len(every)):
            raise TracekitError(
                f"{'some' if fit else 'every'} {name} in the space drafts more than the {n_max} tokens that the trace "
                "has; lower its n_max, or record with a higher --n-max"
            )
        found |= dict.fromkeys(fit)
        if len(found) > MOST:
            raise TracekitError(f"the space has more than {MOST} policies, {name} among them; widen a step")
    return list(found)


def neighbours(
    of: Iterable[Policy], space: Mapping[str, Mapping[str, str]], n_max: int, fraction: float
) -> list[Policy]:
    """Policies a ``fraction`` of a grid step away from each of ``of``, in one parameter: what a refinement tries
    next.
    """
    found: dict[Policy, None] = {}
    for policy in of:
        values = next((v for k, v in space.items() if rule(k) is policy.rule), {})
        for key, text in values.items():
            for value in _beside(policy.rule, key, getattr(policy.params, key), text, fraction):
                changed = policy.params._asdict() | {key: value}
                if changed.get("n_max", 0) <= n_max:
                    found[policy.rule(**changed)] = None
    return list(found)


def _beside(of: Rule, key: str, value: float, text: str, fraction: float) -> list[float]:
    if of.types[key] not in (int, float):
        return []
    steps = sorted({float(v) for v in expand(of.name, key, text)})
    if len(steps) < 2:
        return []
    gap = min((b - a for a, b in itertools.pairwise(steps) if a <= value <= b), default=steps[1] - steps[0]) * fraction
    candidates = [value - gap, value + gap]
    if of.types[key] is int:
        candidates = [round(c) for c in candidates]
    return [round(c, 6) for c in candidates if steps[0] <= c <= steps[-1] and c != value]
