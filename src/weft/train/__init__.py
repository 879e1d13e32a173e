"""Training: `run(recipe)` trains anything that implements `weft.types.Trainable`; `plan(recipe)` says what it costs."""

from __future__ import annotations

from weft.train.config import Recipe, read_recipe
from weft.train.loop import Preempted, RunResult, run

__all__ = ["Preempted", "Recipe", "RunResult", "read_recipe", "run"]
