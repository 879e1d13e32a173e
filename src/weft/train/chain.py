"""Several recipes as one file: runs in order, what changes in each, and a folder where their exports lie together.

DreamOmni2's joint training (arXiv 2510.06679, section 3.2) is one: its VLM, then its two adapters, from the same
records (recipes/dreamomni2/joint.yaml).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import WeftError
from weft.train.config import Recipe
from weft.train.feed import open_source
from weft.train.loop import Evaluator, RunResult
from weft.train.reading import build, read_recipe, read_tree
from weft.train.stages import run_stages

OWN = re.compile(r"runs\.(\d+)\.(.+)", re.DOTALL)


@dataclass(slots=True)
class LinkRecipe:
    """One run: a `recipe` (a YAML file beside the chain's), the values that replace its own (`set`, by dotted key), and
    the name that its export has in the chain's folder, if others are to find it there (`export`)."""

    recipe: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    export: str | None = None


@dataclass(slots=True)
class Chain:
    """`runs` in order, in folders below `folder` named as their recipes. `continues`: each run starts from the weights
    that the one before has left (as stages of one model); otherwise they are of different models."""

    folder: str = ""
    runs: list[LinkRecipe] = field(default_factory=list)
    continues: bool = False


def is_chain(recipe: str | Path) -> bool:
    """Whether a YAML file lists runs instead of being one. Raises WeftError if it cannot be read."""
    return "runs" in read_tree(Path(recipe))


def read_chain(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Chain, list[Recipe]]:
    """A chain and its recipes, complete. Of the overrides `folder=...` is the chain's, `runs.1.key=value` the second
    run's, and `key=value` every run's. Raises WeftError for what does not exist or does not fit."""
    path = Path(path)
    chain: Chain = build(Chain, read_tree(path), "", str(path))
    common: list[str] = []
    own: list[list[str]] = [[] for _ in chain.runs]
    for text in overrides:
        match = OWN.fullmatch(text)
        if match is None and text.startswith("folder="):
            chain.folder = text.removeprefix("folder=")
        elif match is None:
            common.append(text)
        elif int(match[1]) < len(own):
            own[int(match[1])].append(match[2])
        else:
            raise WeftError(f'override "{text}": there are {len(own)} runs, the last is runs.{len(own) - 1}')
    if not chain.folder or not chain.runs:
        raise WeftError(f"{path}: a chain needs a folder and at least one run")
    names = [link.export for link in chain.runs if link.export is not None]
    taken = [*names, *(Path(link.recipe).stem for link in chain.runs)]
    if len(set(taken)) < len(taken) or any(name != Path(name).name for name in names):
        raise WeftError(f"{path}: exports and recipes need names of their own, without folders: {', '.join(taken)}")
    recipes = []
    for link, mine in zip(chain.runs, own, strict=True):
        if "run.folder" in link.set:
            raise WeftError(f"{path}: {link.recipe}: run.folder is {chain.folder}/{Path(link.recipe).stem}; set folder")
        changes = [f"{key}={json.dumps(value)}" for key, value in link.set.items()]
        place = f"run.folder={json.dumps(str(Path(chain.folder) / Path(link.recipe).stem))}"
        recipes.append(read_recipe(path.parent / link.recipe, [*changes, *common, *mine, place]))
    for link, recipe in zip(chain.runs, recipes, strict=True):
        if link.export is not None and not recipe.run.export:
            raise WeftError(f"{path}: {link.recipe}: run.export is off, so there is nothing to put at {link.export}")
    return chain, recipes


def run_chain(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    evaluators: dict[str, Evaluator] | None = None,
    rewards: Sequence[Any] | None = None,
    say: Callable[[str], None] = print,
) -> list[RunResult]:
    """Train the runs of a chain (see `read_chain`) and bring their exports together. What is complete is not repeated.
    `evaluators` and `rewards` are those of `run_stages`. Raises WeftError before the first run if a recipe is wrong or
    its records are not there."""
    chain, recipes = read_chain(path, overrides)
    for link, recipe in zip(chain.runs, recipes, strict=True):
        validate = recipe.validate if recipe.run.validate_every else None
        grid = recipe.grid if recipe.run.grid_every or recipe.rollout is not None else None
        for part in (*recipe.data, validate, grid):  # a missing file of the last run would be noticed days later
            if part is None:
                continue
            try:
                open_source(part.source)
            except (WeftError, OSError) as error:
                raise WeftError(f"{path}: {link.recipe}: {error}") from error
    results = run_stages(recipes, evaluators=evaluators, rewards=rewards, say=say, continues=chain.continues)
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes the first one writes
        for link, result in zip(chain.runs, results, strict=True):
            if link.export is not None and result.export is not None:
                say(f"{gather(result.export, Path(chain.folder) / link.export)}: of {result.folder}")
    return results


def gather(export: Path, place: Path) -> Path:
    """The files of an export at another place, in that of older ones: linked where the disk can, else copied."""
    beside = place.with_name(f".{place.name}-{os.getpid()}")
    shutil.copytree(export, beside, copy_function=_link)
    if place.exists():
        shutil.rmtree(place)
    os.replace(beside, place)
    return place


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def chain_plan(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """What each run of a chain will cost, one after another."""
    from weft.train.plan import plan

    chain, recipes = read_chain(path, overrides)
    pieces = [f"{link.recipe}\n{plan(recipe)}" for link, recipe in zip(chain.runs, recipes, strict=True)]
    return "\n\n".join(pieces)
