"""Load a policy file and give it parameters: the only way in, for shipped policies and a user's own alike."""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from tracekit.errors import TracekitError
from tracekit.policy.interface import NEVER, SCOPES, Now, Outcome, Scope

SHIPPED = Path(__file__).parent / "shipped"
_MOST = 1 << 53  # of a whole number: the simulator takes parameters as floats, which hold no larger ones exactly
_NUMBERS = int, float  # a union of them would be made anew, per token
REQUIRED = ("Params", "State", "begin", "decide", "learn")
_TAKES = {  # each function, as the engine calls it
    "begin": ("params",),
    "decide": ("params", "state", "now"),
    "learn": ("params", "state", "now", "seen"),
}


@dataclass(frozen=True)
class Rule:
    """A policy file, loaded: its functions, the types of its parameters and its search space."""

    name: str
    path: Path
    doc: str
    source: str
    Params: type
    State: type
    begin: Callable[[Any], Any]
    decide: Callable[[Any, Any, Any], tuple[int, float]]
    learn: Callable[[Any, Any, Any, Any], Any]
    types: Mapping[str, Any] = field(hash=False)  # of each parameter, in order: int, float, bool or Scope
    state_types: Mapping[str, type] = field(hash=False)  # of each field of State, in order: int, float or bool
    defaults: Mapping[str, Any] = field(hash=False)
    space: Mapping[str, str] = field(hash=False)

    def __repr__(self) -> str:
        return f"Rule({str(self.path)!r})"

    @property
    def sha256(self) -> str:
        """Identity of the file's source: evidence about a policy is evidence about this."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def blamed(self, error: BaseException) -> TracekitError | None:
        """What to tell the author where ``error`` comes out of this file; None for one from elsewhere."""
        line = _line_in(error, self.path)
        if line == "?" or not isinstance(error, Exception):
            return None
        return TracekitError(f"{self.path}, line {line}: {type(error).__name__}: {error}")

    def __call__(self, /, **params: Any) -> Policy:
        """The rule with these parameters, the rest at their defaults. Raises :class:`TracekitError` for a wrong one."""
        for key in params:
            if key not in self.types:
                near = difflib.get_close_matches(key, self.types, 1)
                if not self.types:
                    raise TracekitError(f"policy {self.name} takes no parameters; leave out {key}")
                raise TracekitError(
                    f"policy {self.name} has no parameter {key}; "
                    f"{f'did you mean {near[0]}? ' if near else ''}it has: {', '.join(self.types)}"
                )
        given = {k: convert(self.name, k, self.types[k], v) for k, v in params.items()}
        return Policy(self, self.Params(**{**self.defaults, **given}))


@dataclass(frozen=True)
class Policy:
    """A rule and its parameters: what the engine runs and the simulator replays."""

    rule: Rule
    params: Any

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule.name

    @property
    def is_off(self) -> bool:
        """Whether it is the shipped ``off``: it never drafts, and needs no MTP."""
        return self.rule.path == SHIPPED / "off.py"

    @property
    def scope(self) -> str:
        """How long the policy's state lives: ``request`` or ``engine``."""
        return getattr(self.params, "scope", "request")

    @property
    def label(self) -> str:
        """The policy as one writes it on the command line; parameters at their defaults are left out, but for n_max."""
        head = str(self.rule.path) if self.rule.path.parent != SHIPPED else self.rule.name
        given = self.params._asdict()
        changed = {k: v for k, v in given.items() if k == "n_max" or v != self.rule.defaults[k]}
        return head + (":" + ",".join(f"{k}={_text(v)}" for k, v in changed.items()) if changed else "")

    def begin(self) -> Any:
        """The rule's state at the start. Raises :class:`TracekitError` where it is none."""
        return self._state("begin", self.rule.begin(self.params))

    def learn(self, state: Any, now: Now, seen: Outcome) -> Any:
        """The rule's state after a verification; raises as :meth:`begin`."""
        return self._state("learn", self.rule.learn(self.params, state, now, seen))

    def _state(self, function: str, found: Any) -> Any:
        """``found`` with every field as its declared type, as the simulator has it: an int has no fraction."""
        kinds = self.rule.state_types
        try:
            return self.rule.State(*[kind(found[i]) for i, kind in enumerate(kinds.values())])
        except (TypeError, ValueError, IndexError, OverflowError):
            declared = ", ".join(f"{name}: {kind.__name__}" for name, kind in kinds.items())
            raise TracekitError(
                f"policy {self}: {function} returned {found!r}, which is no State; it has {declared}"
            ) from None

    def decide(self, state: Any, now: Now) -> tuple[int, float]:
        """The rule's decision under these parameters: a whole number of drafts, ``NEVER`` or more, and a probability.
        Raises :class:`TracekitError` where it is none.
        """
        decision = self.rule.decide(self.params, state, now)
        try:
            asked, p_min = decision
            if isinstance(asked, int) and asked >= NEVER and isinstance(p_min, _NUMBERS):
                return asked, p_min
        except (TypeError, ValueError):
            pass
        raise TracekitError(
            f"policy {self}: decide returned {decision!r}, which is no (n_draft, p_min): n_draft is a whole number, "
            f"0 or more (or NEVER, {NEVER}), p_min a number"
        )

    def row(self) -> list[float]:
        """The parameters as numbers, in the order of ``Params``: what the compiled simulator takes."""
        return [float(SCOPES.index(v)) if isinstance(v, str) else float(v) for v in self.params]

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"Policy({self.label!r})"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")


def convert(policy: str, key: str, kind: Any, value: Any) -> Any:
    """``value`` (a string, or a value from TOML or Python) as parameter ``key`` of ``kind``; raises
    :class:`TracekitError`.
    """
    text = str(value).strip().lower()
    if kind is Scope:
        if text in SCOPES:
            return text
        raise TracekitError(f"{policy}: {key}={value}: one of {', '.join(SCOPES)}")
    if kind is bool:
        if text in ("true", "1", "yes", "on"):
            return True
        if text in ("false", "0", "no", "off"):
            return False
        raise TracekitError(f"{policy}: {key}={value}: true or false")
    try:
        number = kind(text)
    except ValueError:
        raise TracekitError(f"{policy}: {key}={value}: not {'a whole number' if kind is int else 'a number'}") from None
    if kind is int and not 0 <= number <= _MOST:
        raise TracekitError(f"{policy}: {key}={value}: {'0 or more' if number < 0 else f'{_MOST} or less'}")
    if (key == "p_min" or key.endswith("_ratio")) and not 0 <= number <= 1:
        raise TracekitError(f"{policy}: {key}={value}: between 0 and 1")
    if number != number or number in (float("inf"), float("-inf")):
        raise TracekitError(f"{policy}: {key}={value}: not a finite number")
    return number


def shipped() -> list[Rule]:
    """Every policy that comes with tracekit, ``off`` and ``static`` first."""
    return [rule(name) for name in sorted(_names(), key=lambda n: (n not in ("off", "static"), n))]


@cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.py") if path.stem != "__init__"))


def rule(name_or_path: str | Path) -> Rule:
    """The policy called ``name_or_path``, or in that Python file. Raises :class:`TracekitError`."""
    text = str(name_or_path)
    if not text.endswith(".py"):
        if text not in (known := _names()):
            raise TracekitError(
                f"no policy {text!r}; shipped: {', '.join(known)}; or give a Python file (./mine.py) or a policy file "
                "(policy.toml)"
            )
        path = SHIPPED / f"{text}.py"
        return _load(path, text, path.read_text("utf-8"))
    path = Path(text)
    try:
        source = path.read_text("utf-8")
    except FileNotFoundError:
        raise TracekitError(f"{text}: no such policy file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TracekitError(f"{text}: cannot be read as UTF-8 text ({error})") from None
    return _load(path.resolve(), path.stem, source)


@cache
def _load(path: Path, name: str, source: str) -> Rule:
    module = _run(path, name, source)
    missing = [n for n in REQUIRED if not hasattr(module, n)]
    if missing:
        raise TracekitError(
            f"{path}: not a policy: {', '.join(missing)} missing; see `tracekit.policy.interface` for the five names"
        )
    for function, wanted in _TAKES.items():
        if getattr(getattr(module, function), "__globals__", None) is not vars(module):
            raise TracekitError(f"{path}: {function} must be a function written in this file, without decorators")
        taken = inspect.signature(getattr(module, function))
        try:
            taken.bind(*wanted)
        except TypeError:
            raise TracekitError(
                f"{path}: {function} takes {len(taken.parameters)} parameters, not {len(wanted)}: {', '.join(wanted)}"
            ) from None
    types, state_types = _types(path, module, "Params"), _types(path, module, "State")
    for key, kind in types.items():
        if kind not in (int, float, bool, Scope) or (kind is Scope) != (key == "scope"):
            raise TracekitError(
                f"{path}: parameter {key} must be int, float or bool (scope: tracekit.policy.interface.Scope)"
            )
        if key not in module.Params._field_defaults:
            raise TracekitError(f"{path}: parameter {key} needs a default")
    for key, kind in state_types.items():
        if kind not in (int, float, bool):
            raise TracekitError(f"{path}: field {key} of State must be int, float or bool")
    return Rule(
        name=name,
        path=path,
        doc=(module.__doc__ or "").strip(),
        source=source,
        Params=module.Params,
        State=module.State,
        begin=module.begin,
        decide=module.decide,
        learn=module.learn,
        types=types,
        state_types=state_types,
        defaults={k: convert(str(path), k, types[k], v) for k, v in module.Params._field_defaults.items()},
        space=_space(path, getattr(module, "SPACE", {}), types),
    )


def _types(path: Path, module: ModuleType, name: str) -> dict[str, Any]:
    """The declared type of each field of the named tuple ``name``."""
    of = getattr(module, name)
    if not hasattr(of, "_field_defaults"):
        raise TracekitError(f"{path}: {name} must be a typing.NamedTuple")
    try:
        hints = get_type_hints(of, vars(module))
    except Exception as error:  # annotations may be any text, and nobody has looked at it yet
        raise TracekitError(f"{path}: {name}: {type(error).__name__}: {error}") from None
    return {key: hints.get(key) for key in of._fields}


def _space(path: Path, space: Any, types: Mapping[str, Any]) -> dict[str, str]:
    """``SPACE`` with every list of values as the text that :func:`tracekit.policy.spec.expand` reads."""
    if not isinstance(space, Mapping) or not all(isinstance(v, str | list | tuple) for v in space.values()):
        raise TracekitError(f'{path}: SPACE must be a dict with "low..high/step", "1,2,4" or a list per parameter')
    unknown = [key for key in space if key not in types]
    if unknown:
        raise TracekitError(f"{path}: SPACE names {unknown[0]}, which is no parameter")
    return {k: v if isinstance(v, str) else ",".join(map(_text, v)) for k, v in space.items()}


def _run(path: Path, name: str, source: str) -> ModuleType:
    module = ModuleType(f"tracekit_policy_{name}")
    module.__file__ = str(path)
    try:
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # a user's file may raise anything; its author needs the line of it
        line = getattr(error, "lineno", None) or _line_in(error, path)
        raise TracekitError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    return module


def _line_in(error: BaseException, path: Path) -> int | str:
    trace, line = error.__traceback__, "?"
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
