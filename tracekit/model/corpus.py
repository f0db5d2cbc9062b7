"""The reference model's text: the Python standard library, split by file into training and held-out documents.

Three kinds of document come out of the same sources, so that one small model has regimes to switch between:

* ``code``: a module without comments and docstrings, as ``ast.unparse`` prints it;
* ``prose``: the language reference that ships as ``pydoc_data.topics``, and long docstrings;
* ``literate``: a docstring as a paragraph, then its function as a fenced block, and so on: the
  regime changes every hundred tokens or so, inside one request;

and a small share of ``repeat`` documents (one snippet several times over) teaches it to copy.
A file is held out when the hash of its name says so, hence the split does not depend on order or machine.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 1 / 16
_SKIPPED_DIRS = {"site-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    """One document: ``kind`` (code, prose, literate, repeat), ``name`` (file or topic), ``text``, and its side of the
    split.
    """

    kind: str
    name: str
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Whether the file or topic ``name`` belongs to the held-out part (a hash of the name decides)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def documents(*folders: Path) -> list[Document]:
    """Every document of this Python's standard library, in a fixed order, then those of the Python sources in
    ``folders``.
    """
    found = _documents_in(Path(sysconfig.get_paths()["stdlib"]), _SKIPPED_DIRS)
    for topic, text in _topics().items():
        found.append(Document("prose", f"topics/{topic}", text, is_held_out(f"topics/{topic}")))
    for folder in folders:
        found += _documents_in(folder, {"__pycache__"})
    return found


def _documents_in(root: Path, skipped: set[str]) -> list[Document]:
    found: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            found += _documents_of(name, ast.parse(path.read_text("utf-8", errors="ignore")))
        except (SyntaxError, ValueError, RecursionError):  # the last: generated tables, nested too deep to walk
            continue
    return found


def _documents_of(name: str, tree: ast.Module) -> list[Document]:
    """Every document that one module makes."""
    found: list[Document] = []
    held_out = is_held_out(name)
    prose = [docstring for docstring in docstrings(tree) if len(docstring) > 400]
    if prose:
        found.append(Document("prose", name, "\n\n".join(prose), held_out))
    sections = literate_sections(tree)
    for start in range(0, len(sections), 6):
        found.append(Document("literate", f"{name}#{start}", "\n".join(sections[start : start + 6]), held_out))
    code = ast.unparse(_without_docstrings(tree))
    if len(code) > 400:
        found.append(Document("code", name, code, held_out))
    snippet = _snippet(name, code)
    if snippet:
        found.append(Document("repeat", name, snippet, held_out))
    return found


def digest(some: list[Document]) -> str:
    """A short hash of the documents' texts: the identity of a training set."""
    whole = hashlib.sha256()
    for document in some:
        whole.update(document.text.encode("utf-8", errors="surrogatepass"))
    return whole.hexdigest()[:16]


def docstrings(tree: ast.Module) -> list[str]:
    """Docstrings of a module, its classes and functions, cleaned of indentation."""
    return [text for node in ast.walk(tree) if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node))]


def literate_sections(tree: ast.Module) -> list[str]:
    """``paragraph + fenced code`` for every function with a real docstring, cut to 16 lines of code."""
    sections = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= 80 and len(node.body) >= 2:
                paragraph = "\n".join(text.split("\n")[:8]).strip()
                code = "\n".join(ast.unparse(_without_docstrings(copy.deepcopy(node))).splitlines()[:16])
                sections.append(f"{paragraph}\n\n```python\n{code}\n```\n")
    return sections


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _snippet(name: str, text: str) -> str:
    """A few lines of ``text`` repeated, chosen by the file's name; empty for a short file."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 60:
        return ""
    rng = random.Random(name)
    start, length = rng.randrange(len(lines) - 12), rng.randint(2, 6)
    return ("\n".join(lines[start : start + length]) + "\n") * rng.randint(4, 9)


def _topics() -> dict[str, str]:
    """The language reference as plain text, by topic; empty where ``pydoc_data`` is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {name: topics[name] for name in sorted(topics)}
