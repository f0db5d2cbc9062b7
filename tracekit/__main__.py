"""``tracekit`` on the command line: errors become one line and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit."""
    from tracekit.cli.app import app
    from tracekit.errors import TracekitError

    try:
        code = app(standalone_mode=False)
    except TracekitError as error:
        print(f"tracekit: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("tracekit: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # the reader has gone (`tracekit ... | head`); keep the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have one
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "tracekit")
        print(f"tracekit: error: {error.format_message()} (see `{where} --help`)", file=sys.stderr)
        code = 2
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
