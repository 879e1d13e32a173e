"""`weft train` and `weft plan`: a recipe and its overrides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from weft.cli.shipped import find_recipe


@dataclass
class Train:
    """Run a recipe. It writes checkpoints, a JSONL log and picture grids into its folder, and continues from the last
    checkpoint when it is started again. Overrides look like run.steps=100 optim.lr=1e-3."""

    recipe: Positional[str]
    """A YAML file, or the name of a recipe that ships with weft, such as tiny/kontext."""
    overrides: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")]] = ()
    """Values that replace the recipe's."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="")] = None
    """The folder of the run; the same as run.folder=OUT."""

    def run(self) -> int:
        path = find_recipe(self.recipe)
        overrides = [*self.overrides, *([f"run.folder={self.out}"] if self.out else [])]
        from weft.train import run

        result = run(path, overrides)
        print(f"done: {result.folder}")
        return 0


@dataclass
class Plan:
    """What a recipe would cost, without running it: steps, forwards, tokens, time, memory."""

    recipe: Positional[str]
    """A YAML file, or the name of a recipe that ships with weft."""
    overrides: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")]] = ()
    """Values that replace the recipe's."""

    def run(self) -> int:
        path = find_recipe(self.recipe)
        from weft.train import plan

        print(plan(path, list(self.overrides)))
        return 0
