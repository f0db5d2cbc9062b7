"""A GPU that hangs: a decode that never comes back, which only the end of the process ends.

While llama.cpp waits for the device Python handles no signal: Ctrl-C and SIGTERM do nothing, and a machine that nobody
watches would wait for ever.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

from tracekit.engine.context import Context
from tracekit.words import counted

LIMIT_S = 300  # many times what a decode on a GPU takes, the first included, for which CUDA may compile its kernels
LOOKS = 30  # within that time: while a process is stopped, or the machine sleeps, nobody looks


class Watch:
    """Looks, on a thread of its own until :meth:`close`, whether decodes of ``contexts`` come back. Where one has not
    for :data:`LIMIT_S` seconds it says which and aborts the process, as llama.cpp does after an error of CUDA's.
    """

    def __init__(self, contexts: Sequence[Context]):
        self._contexts = contexts
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="tracekit-watch", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        before, n_alike = [], 0
        while not self._closed.wait(LIMIT_S / LOOKS):
            now = [(context.n_begun, context.n_ended) for context in self._contexts]
            hangs = now == before and any(begun > ended for begun, ended in now)
            before, n_alike = now, n_alike + 1 if hangs else 0
            if n_alike == LOOKS:
                late = next(context for context in self._contexts if context.n_begun > context.n_ended)
                which = f"{counted(late.n_rows, 'row')} by the {'drafter' if late.drafts else 'target'}"
                print(
                    f"tracekit: error: a decode of {which} has not come back for {LIMIT_S:g} seconds: the GPU hangs; "
                    "this process ends, and a trace that was being recorded keeps what there was",
                    file=sys.stderr,
                    flush=True,
                )
                os.abort()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        if threading.current_thread() is not self._thread:  # where an engine that was forgotten is collected
            self._thread.join()
