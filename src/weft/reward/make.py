"""Scorers by name: those that ship, and the user's own."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from weft.errors import WeftError
from weft.settings import check_arguments, load_object

SCORERS = {
    "judge": "weft.reward.judge:Judge",
    "clip": "weft.reward.scorers.clip:CLIPScore",
    "pickscore": "weft.reward.scorers.clip:PickScore",
    "hpsv2": "weft.reward.scorers.clip:HPSv2",
    "consistency": "weft.reward.scorers.consistency:Consistency",
    "geneval": "weft.reward.scorers.geneval:GenEval",
    "ocr": "weft.reward.scorers.ocr:TextScore",
    "critic": "weft.reward.scorers.critic:Critic",
    "oracle": "weft.reward.graded:truth",
}


def make_scorer(call: str, args: dict[str, Any], what: str = "scorer") -> Any:
    """A scorer by its name or dotted path. A class is built with `args`; a function is called with the batch and them.

    Raises WeftError, beginning with `what`, for a name that is not known, and for arguments that do not fit.
    """
    if call not in SCORERS and ":" not in call:
        raise WeftError(f"{what} {call!r} is unknown: use {', '.join(SCORERS)}, or your own as file.py:name")
    found = load_object(SCORERS.get(call, call), what)
    if inspect.isclass(found):
        check_arguments(found, args, f"{what} {call}")
        return found(**args)
    check_arguments(found, args, f"{what} {call}", given=1)
    return functools.partial(found, **args) if args else found
