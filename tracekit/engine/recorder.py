"""Recording: rows go into buffers on the generating thread and, every 0.9 s, from another to disk: into the trace's
journal, and with that into the trace when there are many, and at the end.

Recording never stops generation. When the disk is full or the file breaks, one message says so, and what follows is
not recorded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb

from tracekit.engine.gpu import GpuSensors
from tracekit.errors import TracekitError
from tracekit.trace.files import Replaced, first_line, free_path
from tracekit.trace.fold import fold, storable
from tracekit.trace.journal import Journal
from tracekit.trace.pending import Pending
from tracekit.trace.rows import GpuReading, RunEnd
from tracekit.trace.writer import Taken, TraceWriter

log = logging.getLogger("tracekit.engine")


class Recorder:
    """Writes one run into a new trace file; an :class:`~tracekit.engine.loop.Observer`.

    Raises :class:`~tracekit.errors.TracekitError` where the file exists and ``force`` is false; with it, what was there
    goes when the first steps are written, and comes back where there are none. ``interval_s``: seconds between entries
    in the journal. ``sensors(run, t_us)`` is asked before each what the GPUs are doing.
    ``journal_bytes``: the journal's size at which it is folded into the trace.
    """

    def __init__(
        self,
        path: str | Path,
        run: Mapping[str, Any],
        force: bool = False,
        interval_s: float = 0.9,
        sensors: Callable[[int, int], list[GpuReading]] | None = None,
        journal_bytes: int = 1 << 24,
    ):
        self._sensors = sensors or GpuSensors()
        self.run = run["run"]
        self.path = Path(path).resolve()  # the program may change its folder, and DuckDB goes where a link leads
        self.failed, self.cut_off, self._demanded = "", False, False
        self._journal_bytes = journal_bytes
        try:
            self._replaced = Replaced(self.path) if force else None
            self._writer, self._journal = self._begin(run)
        except (duckdb.Error, OSError) as error:
            raise TracekitError(f"{path}: cannot be written ({first_line(error)})") from None
        self._interval_s = interval_s
        self._pending = Pending(self.run)
        self.began, self.ended = self._pending.began, self._pending.ended
        self.stepped, self.verified, self.plain = self._pending.stepped, self._pending.verified, self._pending.plain
        self._nothing, self._left_out, self._writer_ns = True, False, 0
        self._process = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_until_stopped, name="tracekit-recorder", daemon=True)
        self._thread.start()

    def _begin(self, run: Mapping[str, Any]) -> tuple[TraceWriter, Journal]:
        writer = None
        try:
            writer = TraceWriter.create(self.path, run)
            return writer, Journal(self.path, run["trace_id"])
        except BaseException:
            if writer is not None:
                writer.discard()
            if self._replaced is not None:
                self._replaced.put_back()
            raise

    def _write_until_stopped(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._attempt(self._flush)

    def _flush(self) -> None:
        """Write what has come in."""
        if not self._pending:
            return
        began = time.thread_time_ns()
        entry = self._pending.take()
        entry, unfit = storable(entry._replace(gpu_readings=self._sensors(self.run, self._pending.wall_us)))
        if unfit and not self._left_out:
            self._left_out = True
            log.error("recording into %s leaves out what no trace can hold (%s)", self.path, unfit[0])
        self._journal.append(entry)
        self._nothing = self._nothing and not entry.steps  # a request alone replaces nothing
        if self._replaced is not None and entry.steps:
            self._replaced.remove()
            self._replaced = None
        if self._journal.n_bytes > self._journal_bytes:
            self._fold()
        self._writer_ns += time.thread_time_ns() - began

    def _fold(self) -> None:
        if fold(self._writer):
            raise ValueError("its journal is damaged")
        self._journal.clear()

    def _attempt(self, write: Callable[[], None]) -> None:
        """``write``, unless something has failed before; a failure is told, and remembered."""
        if self.failed:
            return
        try:
            write()
        except Exception as error:  # whatever it is, generation goes on
            self.failed = first_line(error)
            self.began = self.ended = self.stepped = self.verified = self.plain = _ignore
            self._pending = Pending(self.run)
            if not self._demanded:
                log.error(
                    "recording into %s stopped (%s); generation goes on, what was written is kept",
                    self.path,
                    self.failed,
                )

    def close(self, n_checked: int = 0, n_diverged: int = 0) -> None:
        """Write the rest and close the file; the counts are a probe's (see the table ``run_ends``). A run that was
        ``cut_off`` has no end.

        A recording without a step leaves no file behind, and one that should replace a trace and could write nothing
        leaves that. Another that failed leaves its journal, to be folded when the trace is opened. In a forked process
        nothing happens: the file is its parent's.
        """
        if os.getpid() != self._process:
            return
        self._stop.set()
        if threading.current_thread() is self._thread:  # an engine that was forgotten, collected amid writing
            threading.Thread(target=self.close, args=(n_checked, n_diverged), name="tracekit-recorder-end").start()
            return
        self._thread.join()
        self._attempt(self._flush)
        if self._nothing and (self._replaced is not None or not self.failed):
            with contextlib.suppress(OSError):
                self._discard()
            return
        self._attempt(self._fold)  # after the run, and no part of what recording it took
        spent = self._pending.wall_us, self._pending.record_us, self._writer_ns // 1000
        end = RunEnd(self.run, *spent, n_checked, n_diverged)
        self._attempt(lambda: self._writer.append({"run_ends": [] if self.cut_off else [end]}))
        self._attempt(self._writer.close)
        self._attempt(self._journal.remove)
        if self.failed:
            self._journal.close()
            with contextlib.suppress(duckdb.Error):
                self._writer.close()

    def _discard(self) -> None:
        self._journal.close()
        self._writer.discard()
        if self._replaced is not None:
            self._replaced.put_back()

    def demanding(self, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """``progress``, and :meth:`demand` before it. From now on that alone tells of a failure: who has asked for this
        calls :meth:`demand` after the end, too.
        """
        self._demanded = True

        def update(done: int, total: int) -> None:
            self.demand()
            progress(done, total)

        return update

    def demand(self) -> None:
        """Raise :class:`TracekitError` where recording has failed: for those who record to have the trace."""
        if self.failed:
            raise TracekitError(f"{self.path}: recording stopped ({self.failed}); what was written before is kept")


def _ignore(*_: object) -> None:
    """What a recorder that has failed does with rows."""


def record_beside(wanted: str | Path, run: Mapping[str, Any]) -> Recorder | None:
    """A recorder into ``wanted``, or the first free name after it, for recordings nobody watches: where none can be
    written, one message says so.
    """
    while True:
        try:
            return Recorder(free_path(wanted), run)
        except Taken:  # meanwhile, by another process
            continue
        except TracekitError as error:
            log.error("%s; nothing is recorded", error)
            return None
