"""``tracekit`` on the command line: errors become one line and exit code 2, never a traceback."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line and exit."""
    from tracekit.cli.app import app
    from tracekit.errors import TracekitError, interrupted

    _hold_streams()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what Typer makes of Ctrl-C
            print("tracekit: interrupted", file=sys.stderr)
        sys.stdout.flush()
    except TracekitError as error:
        print(f"tracekit: error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader has gone at the last moment (Typer ends with 1 before that)
        _forget_output()
        code = 1
    except OSError as error:
        print(f"tracekit: error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        _forget_output()
        code = 2
    except Exception as error:
        if interrupted(error):
            sys.exit(_asked_to_end())
        if not hasattr(error, "format_message"):  # click's usage errors have one
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        where = getattr(getattr(error, "ctx", None), "command_path", "tracekit")
        print(f"tracekit: error: {error.format_message()} (see `{where} --help`)", file=sys.stderr)
        code = 2
    sys.exit(code or 0)


def _hold_streams() -> None:
    """See to it that no file gets the number of a standard stream that is closed, which libraries print to; without
    standard output there is nothing to do.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest that is free is what is opened next
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")
    if sys.stdout is None:
        print("tracekit: error: standard output is closed; send it to a file, or to /dev/null", file=sys.stderr)
        sys.exit(2)
    if hasattr(sys.stdout, "reconfigure"):  # not a notebook's
        sys.stdout.reconfigure(errors="replace")  # a model writes what it likes, and not every terminal has it


def _asked_to_end() -> int:
    """The exit code after a signal that another library has swallowed, which is said if it was Ctrl-C."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        return 128 + signal.SIGTERM
    print("tracekit: interrupted", file=sys.stderr)
    return 130


def _terminated(*_: object) -> None:
    """Asked to end: traces are closed and what is temporary is deleted on the way out; asked again, at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.write(sys.stderr.fileno(), b"tracekit: terminated\n")
    sys.exit(128 + signal.SIGTERM)


def _forget_output() -> None:
    """Nobody reads it, or it cannot be written: keep the interpreter's last flush quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
