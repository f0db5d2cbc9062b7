"""Files that are there whole or not at all, whoever else writes them at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracekit import beside
from tracekit.errors import TracekitError
from tracekit.model.build import build
from tracekit.report import pictures


def test_a_file_that_should_not_be_written_is_refused(tmp_path):
    """Without a folder for it, where something else lies, over what the command reads, over any file unasked."""
    here, link, folder = tmp_path / "here", tmp_path / "link", tmp_path / "folder"
    here.write_text("mine")
    folder.mkdir()
    link.symlink_to(here)
    for path, force, others, says in (
        (tmp_path / "no" / "x", True, (), "is no folder; make it first"),
        (folder, True, (), "exists, and is no file"),
        (link, True, (None, here), "this command has another use for that file"),
        (here, False, (), "exists; choose another name or give --force"),
    ):
        with pytest.raises(TracekitError, match=f"^{path}: .*{says}"):
            beside.check_new(path, force, others)
    beside.check_new(here, True, (None, folder))
    beside.check_new(tmp_path / "new", False)


def test_text_that_is_written_twice_at_once_is_there_whole(tmp_path):
    """Each has a file of its own until it is whole; the last to end stays, and nothing else."""
    path = tmp_path / "policy.toml"
    with beside.written(path) as outer:
        outer.write("one, ")
        with beside.written(path) as inner:
            inner.write("two")
        assert path.read_text() == "two"
        outer.write("three")
    assert path.read_text() == "one, three"
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_could_not_be_written_leaves_what_was_there(tmp_path):
    """Where writing raises, the old file stays, and nothing beside it."""
    path = tmp_path / "policy.toml"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), beside.written(path) as file:
        file.write(f"{1 / 0}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path, exists):
    """What it leads to is written, also where that is not there yet."""
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "policy.toml", tmp_path / "link.toml"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    with beside.written(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert (target.read_text(), list(target.parent.iterdir())) == ("new", [target])


def test_a_model_that_is_built_twice_at_once_is_whole(tmp_path):
    """One build ends while another is under way: each leaves the same file, and nothing beside it."""
    path, inner = tmp_path / "model.gguf", []

    def again(done: int, total: int) -> None:
        if done == total // 2:
            inner.append(build(path).read_bytes())

    whole = build(path, progress=again).read_bytes()
    assert [whole] == inner
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_build_has_left_goes_with_the_next(tmp_path):
    """Gigabytes do not pile up beside a model; another model's stay."""
    left, other = tmp_path / "model.gguf.0a1b2c3d.partial", tmp_path / "other.gguf.0a1b2c3d.partial"
    left.write_bytes(b"GGUF")
    other.write_bytes(b"GGUF")
    path = build(tmp_path / "model.gguf")
    assert set(tmp_path.iterdir()) == {path, other}


def test_a_picture_that_is_drawn_twice_at_once_is_whole(tmp_path):
    """Each is drawn into a file of its own, in the format of its name."""
    path = tmp_path / "picture.svg"

    class Chart:
        def __init__(self, *before: Chart):
            self.before = before

        def save(self, file: str, format: str) -> None:
            for chart in self.before:
                pictures.save(chart, path)
            Path(file).write_text(f"{format} after {len(self.before)}")

    assert pictures.save(Chart(Chart()), path).read_text() == "svg after 1"
    assert list(tmp_path.iterdir()) == [path]
