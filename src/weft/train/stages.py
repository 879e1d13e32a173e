"""Runs after one another, each from the weights that the last one left: PDTR of UniPic 2.0 (arXiv 2509.04548, section
3.2) is reinforcement on editing, then on generation, with both tasks measured after each stage.

    python -m weft.train.stages recipes/unipic2/pdtr_edit.yaml recipes/unipic2/pdtr_generate.yaml
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError, exit_status
from weft.media import atomic_write
from weft.models.flow import framed
from weft.reward.mix import averages
from weft.train.config import GridRecipe, Recipe
from weft.train.feed import open_source
from weft.train.grid import draw
from weft.train.loop import Evaluator, RunResult, run
from weft.train.online import make_mixture
from weft.train.reading import plain, read_recipe
from weft.train.sizes import sized, stage_sizes


def run_stages(
    recipes: Sequence[str | Path | dict[str, Any] | Recipe],
    overrides: Sequence[str] = (),
    *,
    evaluators: dict[str, Evaluator] | None = None,
    rewards: Sequence[Any] | None = None,
    say: Callable[[str], None] = print,
    continues: bool = True,
) -> list[RunResult]:
    """Train the stages in order and return their results; `overrides` go to all of them.

    If it `continues`, a stage starts from the export before it: its `model.path`, or with LoRA its `model.lora.start`
    (the base stays, and with it a reference of "off"). All `evaluators` (None: those of `held_out_rewards`) are called
    at the end of every stage and their numbers written to `stages.json` beside the run folders. `rewards` are those of
    `run`, one per stage. A stage that is complete is not repeated. Raises WeftError if the stages do not fit together.
    """
    configs = [read_recipe(recipe, overrides) for recipe in recipes]
    check_stages(configs, rewards, continues)
    if evaluators is None:
        evaluators = held_out_rewards(configs, rewards)
    results: list[RunResult] = []
    table: list[dict[str, Any]] = []
    for number, config in enumerate(configs):
        if results and continues:
            config = continued(config, configs[number - 1], results[-1])
        if evaluators and not config.run.evaluate_every:
            config.run.evaluate_every = config.run.steps
        say(f"stage {number + 1} of {len(configs)}: {config.method.name} in {config.run.folder}")
        done = _done(config)
        result = done or run(config, evaluators=evaluators, reward=rewards[number] if rewards else None, say=say)
        results.append(result)
        measured = {k: v for k, v in result.last.items() if evaluators and k.split("/")[0] in evaluators}
        table.append({"stage": number + 1, "folder": str(result.folder), "step": result.step, **measured})
        if int(os.environ.get("RANK", "0")) == 0:  # of several processes the first one measures and writes
            _record(Path(configs[0].run.folder).parent / "stages.json", table)
    return results


def held_out_rewards(configs: Sequence[Recipe], rewards: Sequence[Any] | None = None) -> dict[str, Evaluator]:
    """For each stage with a `grid` section an evaluator, named as its run folder: pictures for the grid's records, at
    the size of the stage's last part, and what its own reward says of them: `reward`, each scorer's mean, and `missing`
    (a share). So every stage is measured on the tasks of all."""
    return {
        Path(config.run.folder).name: _held_out(config, config.grid, rewards[k] if rewards else None)
        for k, config in enumerate(configs)
        if config.grid is not None and config.rollout is not None
    }


def _held_out(config: Recipe, grid: GridRecipe, reward: Any) -> Evaluator:
    mixture: Any = None

    def measure(model: Any, step: int) -> dict[str, float]:
        nonlocal mixture
        mixture = mixture or make_mixture(config.reward, reward, config.method.name)
        source = open_source(grid.source)
        records = [source[i] for i in range(min(grid.count, len(source)))]
        records = sized(records, stage_sizes(config.stages[-1]) if config.stages else None)
        records = [framed(model, record) for record in records]
        scores = mixture.score(list(zip(records, draw(model, grid, records), strict=True)))
        mixed = mixture.mixed(scores, config.run.steps)  # with the weights that the stage ends with
        return averages({"reward": mixed.total} | mixed.parts) | {"missing": float(np.isnan(mixed.total).mean())}

    return measure


def check_stages(configs: Sequence[Recipe], rewards: Sequence[Any] | None, continues: bool = True) -> None:
    """Raises WeftError for stages that cannot follow one another."""
    if rewards is not None and len(rewards) != len(configs):
        raise WeftError(f"{len(rewards)} rewards for {len(configs)} stages; give one for each (None: the recipe's)")
    folders = [Path(config.run.folder).resolve() for config in configs]
    for i, (config, folder) in enumerate(zip(configs, folders, strict=True), 1):
        if folder in folders[: i - 1]:
            raise WeftError(f"stage {i} has the run.folder {config.run.folder} of an earlier one; give each its own")
        if not continues:
            continue
        if i > 1 and (config.model.lora is None) != (configs[0].model.lora is None):
            raise WeftError(f"stage {i}: all stages train a LoRA, or all train full weights")
        if i < len(configs) and not config.run.export:
            raise WeftError(f"stage {i}: run.export is off, so the next stage has nothing to start from")


def continued(config: Recipe, before: Recipe, result: RunResult) -> Recipe:
    """The recipe of a stage with the weights of the one before."""
    assert result.export is not None  # checked before
    tree = plain(config)
    if config.model.lora is None:
        tree["model"]["path"] = str(result.export)
    else:
        if config.model.path != before.model.path:
            raise WeftError(f"stage models differ: {before.model.path} and {config.model.path}; a LoRA needs its base")
        tree["model"]["lora"]["start"] = str(result.export)
    return read_recipe(tree)


def _done(config: Recipe) -> RunResult | None:
    """The result of a stage that was finished before: its export says at which step it was made, of which recipe."""
    folder = Path(config.run.folder)
    facts = folder / "export" / "training.json"
    if not facts.is_file():
        return None
    found = json.loads(facts.read_text(encoding="utf-8"))
    if found["step"] != config.run.steps or found["recipe"] != plain(config):
        return None
    table = folder.parent / "stages.json"
    rows = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else []
    last: dict[str, Any] = next((row for row in rows if row["folder"] == str(folder)), {})
    return RunResult(folder, config.run.steps, folder / "export", last)


def _record(path: Path, table: list[dict[str, Any]]) -> None:
    """Rows of stages that come later in an interrupted chain stay until they are measured again."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    names = {row["folder"] for row in table}
    rows = table + [row for row in old if row["folder"] not in names]
    with atomic_write(path) as file:  # a torn table would stop the next start
        file.write(json.dumps(rows, indent=1).encode() + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser("python -m weft.train.stages", description="Train recipes after one another.")
    parser.add_argument("recipe", nargs="+", help="YAML files, in order; key=value among them overrides all of them")
    given = parser.parse_args(arguments).recipe
    return exit_status(lambda: run_stages([r for r in given if "=" not in r], [r for r in given if "=" in r]))


if __name__ == "__main__":
    sys.exit(main())
