"""The one exception for what a user can cause and mend."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class WeftError(ValueError):
    """Bad input, configuration or environment: the message is one line with the number and the fix.

    The command line prints it and exits with status 2; anything else is a bug and keeps its traceback.
    """


def nearest(name: object, known: Iterable[str], otherwise: str | None = None) -> str:
    """The fix for an unknown name: "did you mean 'x'?"; where nothing is like it, `otherwise` or "use one of ..."."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"use one of {', '.join(known)}" if otherwise is None else otherwise


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a module's own command (`python -m weft.models.build ...`): 0, or 2 after a WeftError's line."""
    try:
        work()
    except WeftError as error:
        print(f"weft: {error}", file=sys.stderr)
        return 2
    return 0
