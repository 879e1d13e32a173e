"""The one exception for what a user can cause and mend."""

from __future__ import annotations

import sys
from collections.abc import Callable


class WeftError(ValueError):
    """Bad input, configuration or environment: the message is one line with the number and the fix.

    The command line prints it and exits with status 2; anything else is a bug and keeps its traceback.
    """


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a module's own command (`python -m weft.models.build ...`): 0, or 2 after a WeftError's line."""
    try:
        work()
    except WeftError as error:
        print(f"weft: {error}", file=sys.stderr)
        return 2
    return 0
