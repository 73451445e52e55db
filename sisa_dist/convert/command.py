"""How the conversion tools end: what the user can mend is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from sisa_dist.config import UserError


def run(app: typer.Typer, argv: Sequence[str] | None, *, name: str) -> int:
    """The exit code of `app` with the arguments `argv` (None: the process's own)."""
    try:
        app(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:  # no file of the user's: ours to mend, with its traceback
            raise
        message = f"{error.filename}: {error.strerror}: mend or name another path"
    print(f"{name}: {message}", file=sys.stderr)
    return 2
