"""The one exception for what a user can cause and mend."""

from __future__ import annotations


class WeftError(ValueError):
    """Bad input, configuration or environment: the message is one line with the number and the fix.

    The command line prints it and exits with status 2; anything else is a bug and keeps its traceback.
    """
