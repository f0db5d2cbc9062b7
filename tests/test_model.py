"""The reference model: what ships, and that expansion changes its cost and not its function."""

from __future__ import annotations

import json
import os
from collections import Counter

import numpy as np
import pytest

from tracekit.engine import Engine
from tracekit.engine.context import Batch
from tracekit.errors import TracekitError
from tracekit.model import corpus
from tracekit.model.build import REFERENCE, build, inspect
from tracekit.model.prompt_sets import SETS, load
from tracekit.model.weights import open_gguf
from tracekit.policy.spec import parse_one

from .conftest import CATEGORIES, requests
from .test_cli import tracekit


def test_weights_ship_with_their_provenance():
    """At most 12 MB, and the file says what it was trained on, how, and how well."""
    assert REFERENCE.stat().st_size <= 12_000_000
    facts = inspect(REFERENCE)
    assert facts["n_layer_nextn"] == 1
    assert "standard library" in facts["notes"]["source"]
    assert "seed 0" in facts["notes"]["training"]
    assert facts["notes"]["loss"].count(":") > 10
    held_out = json.loads(facts["notes"]["held_out"])
    assert held_out["code"]["accepted_to_depth"][0] > held_out["prose"]["accepted_to_depth"][0]


def _logits(path, settings, tokens):
    with Engine(path, settings=settings) as engine:
        batch = Batch(len(tokens))
        batch.extend(tokens, 0, 0, True)
        engine._target.extract_hidden(True)
        engine._target.decode(batch)
        n = len(tokens)
        return engine._target.logits()[:n].copy(), engine._target.hidden()[:n].copy()


@pytest.mark.parametrize("name", ["deep", "wide"])
def test_expansion_keeps_the_function(models, settings, engine, name):
    """The expanded model gives the same logits and hidden states to float32's last bits, and the same greedy tokens."""
    tokens = engine.model.tokenize(requests()[0].prompt)[:120]
    (a, hidden_a), (b, hidden_b) = _logits(models["plain"], settings, tokens), _logits(models[name], settings, tokens)
    assert np.abs(a - b).max() < 2e-4
    assert np.abs(hidden_a - hidden_b[:, : hidden_a.shape[1]]).max() < 2e-4
    assert not hidden_b[:, hidden_a.shape[1] :].any()
    policy = parse_one("static:n_max=4")
    with Engine(models[name], policy, settings) as big:
        for request in requests():
            small_done, big_done = (e.generate(request.prompt, max_tokens=40, policy=policy) for e in (engine, big))
            assert big_done.tokens == small_done.tokens
            assert big_done.rounds == small_done.rounds


def test_depth_is_bit_for_bit(models, settings, engine):
    """Identity layers add nothing at all: the logits are the same bits."""
    tokens = engine.model.tokenize(requests()[1].prompt)[:64]
    assert (_logits(models["plain"], settings, tokens)[0] == _logits(models["deep"], settings, tokens)[0]).all()


def test_misaligned_drafter_is_never_right(models, settings):
    """The misaligned variant keeps the text and loses the drafts."""
    policy = parse_one("static:n_max=4")
    with Engine(models["plain"], policy, settings) as good, Engine(models["misaligned"], policy, settings) as bad:
        for request in requests():
            a, b = (e.generate(request.prompt, max_tokens=40) for e in (good, bad))
            assert a.tokens == b.tokens
            assert b.accepted <= 0.1 * b.drafted


def test_code_is_easier_than_prose(engine):
    """Sampled at the demo's temperature, drafts are accepted clearly more often on code than on prose, and most on
    repetition.
    """
    from tracekit.engine import Sampling

    ratio = {}
    for category in CATEGORIES:
        prompts = [p.prompt for p in load("tune") if p.category == category]
        done = [
            engine.generate(p, max_tokens=64, sampling=Sampling(temp=0.7, seed=i), policy=parse_one("static:n_max=4"))
            for i, p in enumerate(prompts)
        ]
        ratio[category] = sum(d.accepted for d in done) / sum(d.drafted for d in done)
    assert ratio["code"] > 1.2 * ratio["prose"], ratio
    assert ratio["repetitive"] > ratio["code"], ratio
    assert ratio["random"] < ratio["code"], ratio


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"layers": 2}, "has 5 already"),
        ({"width": 512}, "exact only for 256, 1024, 4096"),
        ({"dtype": "int2"}, "one of f16, f32"),
        ({"source": __file__}, "not a GGUF file"),
        ({"source": "missing.gguf"}, "no such file"),
    ],
)
def test_bad_builds_get_one_clear_line(tmp_path, options, hint):
    """What cannot be built is refused, and no half-written file is left."""
    with pytest.raises(TracekitError, match=hint):
        build(tmp_path / "m.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_existing_model_is_not_overwritten(tmp_path):
    """Building onto a file that exists needs force."""
    path = build(tmp_path / "m.gguf")
    with pytest.raises(TracekitError, match="--force"):
        build(path)
    build(path, force=True)


def test_only_files_are_overwritten(tmp_path):
    """A pipe or a device, and a folder, are left as they are, with force as without it."""
    os.mkfifo(pipe := tmp_path / "pipe.gguf")
    for path in (pipe, tmp_path, "", "."):
        for force in (False, True):
            with pytest.raises(TracekitError, match="is no file; choose another name"):
                build(path, force=force)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_prompt_sets_come_from_the_held_out_text():
    """Every set has the categories it promises, no two a prompt in common, and none any from the training documents."""
    sets = {name: load(name) for name in SETS}
    for name, prompts in sets.items():
        assert Counter(p.category for p in prompts) == SETS[name]
    every = [p for prompts in sets.values() for p in prompts]
    assert len({p.prompt for p in every}) == len({p.id for p in every}) == len(every)
    training = "\0".join(d.text for d in corpus.documents() if not d.held_out and d.kind in ("code", "literate"))
    for prompt in every:
        if prompt.category in ("code", "mixed"):
            assert prompt.prompt not in training


def test_prompt_files_of_other_tools(tmp_path):
    """A byte-order mark, Windows line ends, and line separators inside a string are no mistakes."""
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n'.encode())
    assert [p.prompt for p in load(path)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("", "no prompts"),
        ("not json", "line 1: not JSON"),
        ('{"prompt": "a"}\n[1, 2]', "line 2: not an object"),
        ('{"prompt": ""}', "prompt is missing or empty"),
        ('{"prompt": 5}', "prompt is not a string"),
        ('{"prompt": "a", "colour": 1}', "unknown key colour"),
        ('{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}', "id x is used twice, in lines 1 and 2"),
        ('[{"prompt": "a"},\n{"prompt": "b"}]', "p.jsonl: a JSON array; write one object per line, without"),
        ('[\n  {"prompt": "a"}\n]\n', "p.jsonl: a JSON array; write one object per line, without"),
        ('\n[{"prompt": "a"}]', "p.jsonl: a JSON array; write one object per line, without"),
        ('{"prompt": "a", "category": "\\u001b[31mred"}', r"line 1: category holds a control character, '\\x1b'"),
        ('{"prompt": "a", "id": "one\\ntwo"}', r"line 1: id holds a control character, '\\n'; leave it out"),
        ("\xff\xfe", "not a text file|not JSON"),
        ('{"prompt": "\\ud83d"}', "line 1: prompt holds half of a surrogate pair"),
        ('{"prompt": ' * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_prompt_files_get_one_clear_line(tmp_path, content, hint):
    """The file, the line and the key are named."""
    path = tmp_path / "p.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(TracekitError, match=hint) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_what_was_expanded_expands_further(tmp_path):
    """`--source` takes any model that was written so: two expansions one after the other are one."""
    small, twice, once = (tmp_path / name for name in ("small.gguf", "twice.gguf", "once.gguf"))
    build(small, layers=6)
    tracekit("model", "build", "-o", twice, "--layers", 7, "--source", small)
    build(once, layers=7)
    assert [t.data.tobytes() for t in open_gguf(twice).tensors] == [t.data.tobytes() for t in open_gguf(once).tensors]
    missing = tracekit("model", "build", "-o", tmp_path / "x.gguf", "--source", tmp_path / "none.gguf", code=2)
    assert "none.gguf: no such file" in missing.stderr


def test_more_text_to_train_on(tmp_path):
    """A folder of Python sources adds its documents to those of the standard library; one that is no Python, or whose
    expressions are nested too deep to be walked, is left out.
    """
    (tmp_path / "python2.py").write_text("print 'no'\n" * 100)
    (tmp_path / "table.py").write_text("TABLE = " + " + ".join(f"x{i}" for i in range(20_000)))
    functions = "\n".join(f"def function_{i}(a, b):\n    return a + b * {i}\n" for i in range(40))
    (tmp_path / "module.py").write_text(functions)
    library = corpus.documents()
    more = corpus.documents(tmp_path)[len(library) :]
    assert {d.name for d in more} == {"module.py"}
    assert {d.kind for d in more} == {"code", "repeat"}
