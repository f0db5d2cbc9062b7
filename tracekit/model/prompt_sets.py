"""Prompt files: JSON lines of ``{"id", "category", "prompt"}``, and the three sets that ship with the reference model.

``tune``, ``heldout`` and ``mixed`` come from the held-out part of the text (:mod:`tracekit.model.corpus`), a different
document for every prompt of a category: ``python -m tracekit.model.prompt_sets`` writes them again. Categories:
``code`` and ``prose`` to continue, ``repetitive`` (one snippet again and again), ``random`` (meaningless tokens), and
``mixed``, whose continuation changes between paragraphs and fenced code on its own. The set ``mixed`` is every
document of that category that the other two leave over, for a comparison within it.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from tracekit.errors import TracekitError

FOLDER = Path(__file__).parent / "prompts"
CATEGORIES = ("code", "prose", "repetitive", "random", "mixed")
SETS = {"tune": dict.fromkeys(CATEGORIES, 8), "heldout": dict.fromkeys(CATEGORIES, 4), "mixed": {"mixed": 15}}
_CHARACTERS = 480
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # what a terminal would obey, in tables


@dataclass(frozen=True)
class Prompt:
    """One prompt: ``category`` groups results (and is what "never slower" is promised for)."""

    id: str
    category: str
    prompt: str


def load(path: str | Path) -> list[Prompt]:
    """The prompts in a file, or in the shipped set of that name (``SETS``). Raises :class:`TracekitError` naming the
    line.
    """
    if not str(path):
        raise TracekitError(f"--prompts '': no name; give a file, or a shipped set: {', '.join(SETS)}")
    name = FOLDER / f"{path}.jsonl"
    file = name if str(path) in SETS else Path(path)
    try:
        lines = file.read_text("utf-8-sig").split("\n")  # not at U+2028 and the like, which JSON allows in strings
    except FileNotFoundError:
        raise TracekitError(f"{path}: no such prompts file; shipped sets: {', '.join(SETS)}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise TracekitError(f"{path}: not a text file of JSON lines ({error})") from None
    filled = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise TracekitError(f'{path}: no prompts; one JSON object per line: {{"prompt": "...", "category": "code"}}')
    if filled[0][1].lstrip().startswith("["):
        raise TracekitError(f"{path}: a JSON array; write one object per line, without [ ] and commas")
    prompts = [_parse(f"{path}, line {n}", line, n) for n, line in filled]
    seen: dict[str, int] = {}
    for (n, _), prompt in zip(filled, prompts, strict=True):
        if prompt.id in seen:
            raise TracekitError(f"{path}: id {prompt.id} is used twice, in lines {seen[prompt.id]} and {n}")
        seen[prompt.id] = n
    return prompts


def _parse(where: str, line: str, number: int) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, or more of it than Python reads
        raise TracekitError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise TracekitError(f'{where}: not an object; {{"prompt": "...", "category": "code"}} is')
    unknown = [k for k in row if k not in ("id", "category", "prompt")]
    if unknown:
        raise TracekitError(f"{where}: unknown key {unknown[0]}; known: id, category, prompt")
    for key in ("id", "category", "prompt"):
        if not isinstance(row.get(key, ""), str):
            raise TracekitError(f"{where}: {key} is not a string")
        if any("\ud800" <= c <= "\udfff" for c in row.get(key, "")):
            raise TracekitError(f"{where}: {key} holds half of a surrogate pair, which is no text")
        if key != "prompt" and (control := _CONTROL.search(row.get(key, ""))):
            raise TracekitError(f"{where}: {key} holds a control character, {control[0]!r}; leave it out")
    if not row.get("prompt"):
        raise TracekitError(f"{where}: prompt is missing or empty")
    return Prompt(row.get("id", f"line-{number}"), row.get("category", "all"), row["prompt"])


def build() -> dict[str, list[Prompt]]:
    """The shipped sets, made from the held-out documents of this Python's standard library with a fixed seed."""
    from tracekit.model import corpus

    documents = corpus.documents()
    held_out = [d for d in documents if d.held_out]
    trained_on = "\0".join(d.text for d in documents if not d.held_out)  # modules that are copies of others are in both
    rng = random.Random(20260)
    candidates: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for document in rng.sample(held_out, len(held_out)):
        if document.kind == "code" and (text := _code(document.text, rng)):
            candidates["code"].append(text)
            lines = [line for line in text.splitlines() if line.strip()]
            start = rng.randrange(max(1, len(lines) - 4))
            snippet = "\n".join(lines[start : start + rng.randint(2, 4)]) + "\n"
            candidates["repetitive"].append((snippet * 12)[: max(_CHARACTERS, 3 * len(snippet) + len(snippet) // 2)])
        elif document.kind == "prose" and len(document.text) > 2 * _CHARACTERS:
            start = document.text.find("\n\n", rng.randrange(len(document.text) - 2 * _CHARACTERS)) + 2
            candidates["prose"].append(document.text[start : start + _CHARACTERS])
        elif document.kind == "literate" and len(document.text) > 2 * _CHARACTERS:
            end = document.text.find("```\n", _CHARACTERS)
            candidates["mixed"].append(document.text[: end + 5])
    words = sorted({w for d in held_out for w in d.text.split() if w.isascii() and 2 < len(w) < 9})
    candidates["random"] = [" ".join(rng.choices(words, k=60)) for _ in range(40)]
    sets: dict[str, list[Prompt]] = {name: [] for name in SETS}
    for category, found in candidates.items():
        texts = [text for text in found if text not in trained_on]
        for name, counts in SETS.items():
            count = counts.get(category, 0)
            chosen, texts = texts[:count], texts[count:]
            sets[name] += [Prompt(f"{name}-{category}-{i:02d}", category, text) for i, text in enumerate(chosen, 1)]
    return sets


def _code(text: str, rng: random.Random) -> str:
    starts = [i for i in range(len(text) - 3 * _CHARACTERS) if text.startswith(("\ndef ", "\nclass ", "\n    def "), i)]
    if len(starts) < 3:
        return ""
    start = rng.choice(starts) + 1
    chosen = text[start : text.find("\n", start + _CHARACTERS) + 1]
    return "" if '"""' in chosen else chosen  # docstrings are prose


def main() -> None:
    """Write the sets into the package."""
    for name, prompts in build().items():
        path = FOLDER / f"{name}.jsonl"
        path.write_text("".join(json.dumps(asdict(p)) + "\n" for p in prompts), "utf-8")
        print(f"Wrote {path} ({len(prompts)} prompts)")


if __name__ == "__main__":
    main()
