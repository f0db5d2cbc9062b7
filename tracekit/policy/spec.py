"""Policies as people write them: ``fallback:n_max=8,min_ratio=0.5..0.9/0.05,static:n_max=1,2,4,off``.

``name:key=value,key=value``; a comma then starts the next policy (it has no ``=``, or a ``:`` before it) or another
value of the same key (it is a number, a truth value or a scope). ``low..high/step`` is a range, both ends included.
Several values sweep: every combination is one policy. A name that ends in ``.py`` is a policy of one's own, in
``.toml`` a policy file.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path

from tracekit.errors import TracekitError
from tracekit.policy import file
from tracekit.policy.interface import SCOPES
from tracekit.policy.rule import Policy, Rule, rule

MOST = 200_000  # values of a range, policies of a sweep or a search
_NUMBER = r"[-+]?[\d.][\d.eE+-]*(\.\.[-+\d.eE]+/[-+\d.eE]+)?"
_VALUE = re.compile(rf"{_NUMBER}|true|false|yes|no|on|{'|'.join(SCOPES)}", re.IGNORECASE)

PolicyLike = Policy | Rule | file.PolicyFile | str | Path


def parse(text: str) -> list[Policy]:
    """Every policy that ``text`` names, sweeps expanded, in order. Raises :class:`TracekitError` for what it cannot
    read.
    """
    found: list[Policy] = []
    for name, values in _split(text):
        if name.endswith(".toml") and values:
            raise TracekitError(f"{name} says its own {next(iter(values))}; edit the file, or write the policy out")
        found.extend([file.read(name).policy] if name.endswith(".toml") else sweep(rule(name), values))
    if not found:
        raise TracekitError("no policy given; try off, static:n_max=4 or fallback")
    return found


def parse_one(text: str) -> Policy:
    """The one policy that ``text`` names; raises :class:`TracekitError` where it sweeps."""
    found = parse(text)
    if len(found) != 1:
        raise TracekitError(f"{text}: names {len(found)} policies; one is wanted here")
    return found[0]


def policy_of(given: PolicyLike) -> Policy:
    """The policy that ``given`` is, holds or names; a rule's with its defaults. Raises :class:`TracekitError`."""
    if isinstance(given, str):
        return parse_one(given)
    if isinstance(given, Path):
        given = file.read(given) if given.suffix == ".toml" else rule(given)
    found = given() if isinstance(given, Rule) else getattr(given, "policy", given)
    if not isinstance(found, Policy):
        raise TracekitError(f"{given!r}: not a policy; try 'off', 'static:n_max=4' or 'fallback'")
    return found


def sweep(of: Rule, values: Mapping[str, str]) -> list[Policy]:
    """Every combination of ``values`` (lists and ranges as in :func:`expand`) for one rule. Raises
    :class:`TracekitError` for more than 200,000.
    """
    lists = [expand(of.name, key, text) for key, text in values.items()]
    if (size := math.prod(map(len, lists))) > MOST:
        raise TracekitError(
            f"policy {of.name}: {size:,} combinations; {MOST:,} at most: widen a step or drop a parameter"
        )
    return [of(**dict(zip(values, combination, strict=True))) for combination in itertools.product(*lists)]


def expand(policy: str, key: str, text: str) -> list[str]:
    """``0.5..0.9/0.1`` or ``1,2,4`` as single values; raises :class:`TracekitError` for a range that goes nowhere."""
    values: list[str] = []
    for part in str(text).split(","):
        if ".." not in part:
            values.append(part)
            continue
        try:
            ends, step_text = part.split("/")
            low_text, high_text = ends.split("..")
            low, high, step = float(low_text), float(high_text), float(step_text)
        except ValueError:
            raise TracekitError(f"{policy}: {key}={part}: a range is low..high/step") from None
        if not (step > 0 and high >= low and math.isfinite(high - low)):
            raise TracekitError(f"{policy}: {key}={part}: low..high/step needs high >= low and step > 0")
        count = int(min((high - low) / step + 1e-9, MOST)) + 1
        if count > MOST:
            raise TracekitError(f"{policy}: {key}={part}: more than {MOST} values; widen the step")
        values.extend(f"{low + i * step:.10g}" for i in range(count))
    return values


def _split(text: str) -> list[tuple[str, dict[str, str]]]:
    policies: list[tuple[str, dict[str, str]]] = []
    key = None
    for part in (p.strip() for p in text.split(",")):
        head, colon, rest = part.rpartition(":")
        if key is not None and not colon and "=" not in part and _VALUE.fullmatch(part):
            policies[-1][1][key] += "," + part
            continue
        if colon or "=" not in part:
            name = head if colon else part
            if not name:
                raise TracekitError(f"{text!r}: a policy is name or name:key=value,key=value")
            policies.append((name, {}))
            key, part = None, rest if colon else ""
        if part:
            key, equals, value = (x.strip() for x in part.partition("="))
            if not equals or not key or not value or not policies:
                raise TracekitError(f"{text!r}: {part!r} is not key=value; write name:key=value, as in static:n_max=4")
            if key in policies[-1][1]:
                raise TracekitError(f"{text!r}: {key} is given twice")
            policies[-1][1][key] = value
    return policies
