"""`weft train` and `weft plan`: a recipe and its overrides."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from weft.cli.options import QUIET
from weft.cli.shipped import find_recipe

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")]


@dataclass
class Train:
    """Run a recipe. It writes checkpoints, a JSONL log and picture grids into its folder, and continues from the last
    checkpoint when it is started again. Overrides look like run.steps=100 optim.lr=1e-3."""

    recipe: Positional[str]
    """A YAML file, or the name of a recipe that ships with weft, such as tiny/kontext."""
    overrides: Positional[Overrides] = ()
    """Values that replace the recipe's."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="")] = None
    """The folder of the run; the same as run.folder=OUT (of a recipe that lists several runs, folder=OUT)."""
    evaluate: Annotated[Literal["world", "motion-world"] | None, QUIET] = None
    """Measure success on the embedded world, of pictures or movements, every run.evaluate_every steps."""

    def run(self) -> int:
        path = find_recipe(self.recipe)
        from weft.evals.motion_world import motion_world_evaluator
        from weft.evals.world import world_evaluator
        from weft.train import run, run_chain
        from weft.train.chain import is_chain

        evaluators: dict[str, Any] = {}
        if self.evaluate:
            evaluators[self.evaluate] = world_evaluator() if self.evaluate == "world" else motion_world_evaluator()
        if is_chain(path):
            overrides = [*self.overrides, *([f"folder={self.out}"] if self.out else [])]
            results = run_chain(path, overrides, evaluators=evaluators or None)
        else:
            overrides = [*self.overrides, *([f"run.folder={json.dumps(str(self.out))}"] if self.out else [])]
            results = [run(path, overrides, evaluators=evaluators or None)]
        for result in results:
            print(result.export or result.folder)
        return 0


@dataclass
class Plan:
    """What a recipe would cost, without running it: steps, forwards, tokens, time, memory."""

    recipe: Positional[str]
    """A YAML file, or the name of a recipe that ships with weft."""
    overrides: Positional[Overrides] = ()
    """Values that replace the recipe's."""

    def run(self) -> int:
        path = find_recipe(self.recipe)
        from weft.train import plan
        from weft.train.chain import chain_plan, is_chain

        print(chain_plan(path, self.overrides) if is_chain(path) else plan(path, list(self.overrides)))
        return 0
