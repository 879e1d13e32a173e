"""Training: `run(recipe)` trains anything that implements `weft.types.Trainable`; `plan(recipe)` says what it costs;
`run_chain(file)` trains the runs that a file lists.

The room itself can be called: `weft.train("recipe.yaml", reward=...)` is `weft.train.run(...)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from weft.train.chain import run_chain
from weft.train.config import Recipe
from weft.train.loop import RunResult, run
from weft.train.plan import Plan, plan
from weft.train.preempt import Preempted
from weft.train.reading import read_recipe

__all__ = ["Plan", "Preempted", "Recipe", "RunResult", "plan", "read_recipe", "run", "run_chain"]


class _Room(ModuleType):
    def __call__(self, recipe: Any, overrides: Any = (), *, evaluators: Any = None, reward: Any = None) -> RunResult:
        return run(recipe, overrides, evaluators=evaluators, reward=reward)


sys.modules[__name__].__class__ = _Room
