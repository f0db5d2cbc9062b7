"""Join a policy with the simulator: compiled by Numba and cached on disk, or interpreted.

Two simulators can be joined: :mod:`tracekit.replay.kernel` (a request at a time) and :mod:`tracekit.replay.lockstep`
(several slots). Numba's cache looks at one file only, so the policy's source and the binding to the simulator are
written into one module whose name is the hash of everything that went into it: an edit anywhere makes a new module,
never a stale one.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tracekit.errors import TracekitError
from tracekit.folders import cache_folder
from tracekit.policy import interface
from tracekit.policy.rule import REQUIRED, Rule
from tracekit.replay import kernel

_BINDING = """

# ---- below: written by tracekit.replay.link ----
{njit}

{jitted}

@_njit
def params_of(row):
    return Params({params})

_policy_begin, _policy_decide, _policy_learn = begin, decide, learn

@_njit
def _fix(state):
    return State({state})

@_njit
def begin(params):
    return _fix(_policy_begin(params))

@_njit
def decide(params, state, now):
    asked, p_min = _policy_decide(params, state, now)
    if asked < -1:
        raise ValueError("decide returned fewer drafts than NEVER, -1")
    return asked, p_min

@_njit
def learn(params, state, now, seen):
    return _fix(_policy_learn(params, state, now, seen))

{parts}
run = _njit(walk_all, cache=True, nogil=True)
"""
_COMPILED = "from numba import njit as _njit"
_INTERPRETED = "def _njit(function, **options): return function"
_PLACE = "from tracekit.policy.shipped.off import Params, begin, decide, learn  # the policy\n"
_FAST = {"price": ", fastmath=True"}  # a sum of products: its order is free
_CASTS = {float: "float({})", bool: "{} != 0"}  # else a whole number; a scope is its place in SCOPES
_BOUND = {"run", "_njit", "_fix", "_policy_begin", "_policy_decide", "_policy_learn"}  # names of the binding


@cache
def compiled(rule: Rule, simulator: ModuleType = kernel) -> Callable[..., None]:
    """The compiled ``walk_all`` of ``simulator`` under a policy. Raises :class:`TracekitError`, when called, where
    Numba cannot compile the policy, or the policy raises anything.
    """
    import numba

    module = compiled_module(rule, simulator)

    def run(*arguments: Any) -> None:
        try:
            module.run(*arguments)
        except (numba.core.errors.NumbaError, numba.core.errors.UnsupportedBytecodeError) as error:
            raise TracekitError(_not_compiled(rule, str(error))) from None
        except Exception as error:  # the simulator itself raises nothing
            raise TracekitError(
                f"{rule.path}: in the simulator the policy raises {type(error).__name__}: {error}"
            ) from None

    return run


def _not_compiled(rule: Rule, message: str) -> str:
    """One line of Numba's many: the reason, and where in the policy, whose lines the joined module begins with."""
    n_lines = len(rule.source.splitlines())
    numbers = [n for n in map(int, re.findall(r"(?:, line |\.py \()(\d+)", message)) if n <= n_lines]
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith("Failed in")]
    lines = lines or [message]
    reason = re.sub(r",? (defined at|Raised from) .*", "", " ".join(lines[: 1 + lines[0].endswith(":")])).rstrip(".")
    return (
        f"{rule.path}{f', line {numbers[0]}' if numbers else ''}: cannot be compiled for the simulator ({reason}); "
        "use plain arithmetic on ints, floats and bools"
    )


@cache
def compiled_module(rule: Rule, simulator: ModuleType = kernel) -> ModuleType:
    """``simulator`` joined with a policy, its functions compiled when they are first called."""
    import numba

    return _module(rule, simulator, _COMPILED, numba.__version__)


@cache
def interpreted(rule: Rule, simulator: ModuleType = kernel) -> ModuleType:
    """The same module without Numba, as slow as Python: its ``run`` is the twin that tests and benchmarks compare
    with.
    """
    return _module(rule, simulator, _INTERPRETED, "")


def _module(rule: Rule, simulator: ModuleType, njit: str, version: str) -> ModuleType:
    source = Path(simulator.__file__).read_text()
    names, others = rule.decide.__globals__, {**vars(builtins), **vars(simulator)}
    for name in names:
        if name in _BOUND or (name in others and names[name] is not others[name] and not _is_own(name)):
            raise TracekitError(f"{rule.path}: the name {name} is the simulator's; choose another")
    functions = [name for name, value in names.items() if getattr(value, "__globals__", None) is names]
    binding = _BINDING.format(
        njit=njit,
        jitted="\n".join(f"{name} = _njit({name})" for name in functions),
        params=_casts(rule.types, "row"),
        parts="\n".join(f"{name} = _njit({name}{_FAST.get(name, '')})" for name in _helpers(source)),
        state=_casts(rule.state_types, "state"),
    )
    whole = rule.source + "\n\n" + source.replace(_PLACE, "") + binding
    identity = hashlib.sha256(
        "|".join((whole, *(Path(m.__file__).read_text() for m in (interface, kernel)), version, sys.version)).encode()
    ).hexdigest()[:16]
    try:
        return _import(f"tracekit_{rule.name}_{identity}", whole)
    except TracekitError:
        raise
    except Exception as error:  # it has run before, in its own place
        raise TracekitError(
            f"{rule.path}: joined with the simulator, in another folder, it raises {type(error).__name__}: {error}"
        ) from None


def _functions(source: str) -> list[str]:
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def _helpers(source: str) -> list[str]:
    """Functions of a simulator's ``source``, its own and the kernel's that it uses, but for the one that starts it."""
    imported = [
        name.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and node.module == kernel.__name__
        for name in node.names
        if callable(getattr(kernel, name.name))
    ]
    return [name for name in imported + _functions(source) if name not in ("params_of", "walk_all")]


def _is_own(name: str) -> bool:
    """Whether every policy has this name, or every module: the joined module has the policy's."""
    return name in REQUIRED or name.startswith("__")


def _casts(types: Mapping[str, Any], of: str) -> str:
    """The numbers in ``of`` as the types that parameters or fields of the state are declared with."""
    return ", ".join(_CASTS.get(kind, "int({})").format(f"{of}[{i}]") for i, kind in enumerate(types.values()))


def _import(name: str, source: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    folder = cache_folder("kernels")
    path = folder / f"{name}.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with tempfile.NamedTemporaryFile(
                "w", dir=folder, suffix=".partial", delete=False, encoding="utf-8"
            ) as file:
                file.write(source)
            os.replace(file.name, path)
    except OSError as error:
        raise TracekitError(f"{folder}: {error.strerror}; set TRACEKIT_CACHE to a folder that can be written") from None
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
