"""How the conversion tools end: what the user can mend is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from sisa_dist.config import UserError


def run(app: typer.Typer, argv: Sequence[str] | None, *, name: str) -> int:
    """The exit code of `app` with the arguments `argv` (None: the process's own). Warnings of ours are lines too."""

    def say(warning: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"{name}: {warning}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = say  # type: ignore[assignment]
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
