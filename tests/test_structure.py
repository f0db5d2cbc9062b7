"""The shape of the code: imports go one way, files stay small, everything public says what it is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tracekit

ROOT = Path(tracekit.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))

# what each part of the package may import from the others: trace <- policy <- replay <- tune; trace, policy <- engine
MAY_IMPORT = {
    "errors": set(),
    "beside": {"errors"},
    "words": set(),
    "trace": {"errors"},
    "policy": {"errors", "beside"},
    "model": {"errors", "beside"},
    "folders": set(),
    "replay": {"errors", "folders", "trace", "policy"},
    "tune": {"errors", "words", "trace", "policy", "replay"},
    "engine": {"errors", "words", "trace", "policy"},
    "testing": {"errors", "policy", "replay"},
    "report": {"errors", "beside", "words", "trace", "policy", "replay", "tune", "verify"},
    "verify": {"errors", "beside", "words", "trace", "policy", "replay", "engine"},
    "study": {"errors", "words", "trace", "policy", "replay", "tune", "engine", "model", "verify"},
    "demo": {"errors", "engine", "model", "study"},
    "plans": {"errors", "policy", "engine", "model", "study"},
    "campaign": {"errors", "beside", "words", "policy", "engine", "model", "study", "plans"},
    "api": {"errors", "trace", "policy", "replay", "tune", "report"},
    "cli": {"errors", "trace", "policy", "replay", "tune", "report", "engine", "model", "verify", "study", "demo"}
    | {"plans", "campaign", "folders", "beside", "words"},
    "__main__": {"errors", "cli"},
    "__init__": set(),
}


def part(path: Path) -> str:
    """The part of the package a file belongs to."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """No part imports one that it does not rest on, whichever way it is written; no import is relative."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} imports {'.' * node.level}{node.module or ''}"
            names = [f"tracekit.{a.name}" for a in node.names] if node.module == "tracekit" else [node.module]
        for name in names:
            if name.startswith("tracekit."):
                other = name.split(".")[1]
                assert other == part(path) or other in MAY_IMPORT[part(path)], (
                    f"{path.relative_to(ROOT)} imports {name}"
                )
    assert part(path) in MAY_IMPORT


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    """At most 400 lines: a file has one reason to exist."""
    assert len(path.read_text().splitlines()) <= 400


def test_llama_cpp_is_imported_in_one_place():
    """llama-cpp-python, and its interface that is not public, are behind one file."""
    users = [p for p in FILES if re.search(r"^\s*(from|import) llama_cpp", p.read_text(), re.MULTILINE)]
    assert [p.relative_to(ROOT).as_posix() for p in users] == ["engine/lib.py"]


@pytest.mark.parametrize(
    "module",
    [
        "tracekit",
        "tracekit.api",
        "tracekit.tune.evidence",
        "tracekit.report.tables",
        "tracekit.cli.app",
        "tracekit.testing",
    ],
)
def test_analysis_needs_no_engine(module):
    """Analysis, replay, tuning and the command line import without llama-cpp-python, gguf or torch."""
    heavy = {"llama_cpp", "gguf", "torch", "tokenizers"}
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy():
    """`tracekit --help` answers at once: nothing heavy is imported before a verb runs."""
    heavy = ("polars", "numpy", "duckdb", "numba", "altair", "scipy", "pydantic")
    code = f"import sys; from tracekit.cli.app import app; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_everything_ruff_says():
    """The linter is content: docstrings on everything public, sorted imports, no dead names."""
    result = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT.parent)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_everything_is_formatted():
    """The formatter would change nothing."""
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", str(ROOT.parent)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
