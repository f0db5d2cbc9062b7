"""The one exception that users see: what is wrong, where, and what to do about it, in one line."""

from __future__ import annotations


class TracekitError(Exception):
    """A mistake in the input or the environment. The command line prints it on one line and exits with code 2."""


class EngineMissing(TracekitError):
    """The live engine was asked for where llama-cpp-python is not installed, or is another version."""


def interrupted(error: BaseException) -> bool:
    """Whether ``error`` is what DuckDB makes of Ctrl-C, or of a signal whose handler raises, during a query."""
    return isinstance(error, RuntimeError) and str(error) == "Query interrupted"
