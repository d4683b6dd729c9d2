"""Errors as a user of the command line should see them: one message, no traceback, a telling exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "plainly"]

FAILED = 1
"""Exit code when the work itself failed: a full disk, training that diverged."""
BAD_INPUT = 2
"""Exit code when what was asked for cannot be done."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""

P = ParamSpec("P")
R = TypeVar("R")


def plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that expected errors end in one line on stderr.

    ``FARFIELD_TRACEBACK=1`` in the environment lets them through whole, for reports of bugs.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader (head, less) has seen enough. Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except (ValueError, TypeError, ModuleNotFoundError, OSError, ArithmeticError) as error:
            # TypeError: an option that a recipe does not take, or a word where it needs a number.
            if os.environ.get("FARFIELD_TRACEBACK"):
                raise
            typer.echo(f"error: {error}", err=True)
            bad_input = isinstance(error, ValueError | TypeError | FileNotFoundError | PermissionError)
            raise typer.Exit(BAD_INPUT if bad_input else FAILED) from error

    return run
