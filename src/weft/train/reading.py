"""From YAML to a checked recipe. Unknown keys fail, naming the file and the nearest known key."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from weft.errors import WeftError, nearest
from weft.settings import parse_yaml, read_yaml
from weft.train.config import ModelRecipe, Recipe, SourceRecipe


def build(kind: Any, value: Any, where: str, file: str = "recipe") -> Any:
    """`value` (plain YAML data) as `kind` (a dataclass, a basic type, list, dict, Literal or Optional of these).

    Raises WeftError that names the file and the dotted key.
    """
    if dataclasses.is_dataclass(kind):
        if type(value) is kind:
            return value
        if not isinstance(value, dict):
            raise WeftError(f"{file}: {where or 'the recipe'}: expected a mapping, found {value!r}")
        hints = get_type_hints(kind)
        known = [f.name for f in dataclasses.fields(kind)]
        for key in value:
            if key not in known:
                dotted = f"{where}.{key}" if where else str(key)
                raise WeftError(f"{file}: unknown key '{dotted}': {nearest(key, known)}")
        parts = {k: build(hints[k], v, f"{where}.{k}" if where else k, file) for k, v in value.items()}
        return kind(**parts)  # type: ignore[operator]
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return build(option, value, where, file)
            except WeftError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if value not in args:
            raise WeftError(f"{file}: {where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin in (list, tuple):  # tuples are of one type and any length, as `tuple[str, ...]`
        if not isinstance(value, (list, tuple)):
            raise WeftError(f"{file}: {where}: expected a list, found {value!r}")
        return origin(build(args[0], v, f"{where}[{i}]", file) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise WeftError(f"{file}: {where}: expected a mapping, found {value!r}")
        return {str(k): build(args[1], v, f"{where}.{k}", file) for k, v in value.items()}
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 4e-5 as a string
        except ValueError:
            pass
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise WeftError(f"{file}: {where}: expected {getattr(kind, '__name__', kind)}, found {value!r}")


def override(tree: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=c` (values are YAML; list items by number, `data.0.weight=2`) to a copy of the plain recipe."""
    tree = yaml.safe_load(yaml.safe_dump(tree))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise WeftError(f'override "{assignment}" is not of the form key.subkey=value')
        node: Any = tree
        keys = path.strip().split(".")
        for i, key in enumerate(keys):
            last = i == len(keys) - 1
            if isinstance(node, list):
                if not key.isdigit() or int(key) >= len(node):
                    raise WeftError(f'override "{assignment}": "{key}" is not an index below {len(node)}')
                index: Any = int(key)
            elif isinstance(node, dict):
                index = key
                if not last and node.get(key) is None:
                    node[key] = {}
            else:
                raise WeftError(f'override "{assignment}": "{".".join(keys[:i])}" has no keys')
            if last:
                node[index] = parse_yaml(text, f'override "{assignment}"')
            else:
                node = node[index]
    return tree


def read_recipe(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or a plain mapping, overrides applied and every value checked."""
    if isinstance(recipe, Recipe):
        if overrides:
            return read_recipe(dataclasses.asdict(recipe), overrides)
        return check(recipe, "recipe")
    if isinstance(recipe, dict):
        return check(build(Recipe, override(recipe, overrides), ""), "recipe")
    tree = read_tree(Path(recipe))
    if "runs" in tree:
        raise WeftError(f"{recipe}: lists several runs; start it with weft train, or weft.train.run_chain")
    return check(build(Recipe, override(tree, overrides), "", str(recipe)), str(recipe))


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises WeftError."""
    if not path.is_file():
        raise WeftError(f"recipe {path} does not exist")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise WeftError(f"{path}: a recipe is a mapping, found {type(tree).__name__}")
    return tree


def check(recipe: Recipe, file: str) -> Recipe:
    """What types cannot say. Raises WeftError."""

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise WeftError(f"{file}: {message}")

    def source(config: SourceRecipe, where: str) -> None:
        need((config.call is None) != (config.kind is None), f"{where}: give either call or kind")
        need(config.kind is None or config.path is not None, f"{where}.path: kind {config.kind} needs a path")
        need(config.limit is None or config.limit > 0, f"{where}.limit: {config.limit} must be positive")
        for name in ("path", "map", "task", "options") if config.call is not None else ("args",):
            have = "call" if config.call is not None else f"kind {config.kind}"
            need(not getattr(config, name), f"{where}.{name} does nothing with {have}; remove it")
        if config.kind == "python":
            config.call, config.args, config.options = config.path, config.options, {}
            config.kind = config.path = None

    run = recipe.run
    need(bool(recipe.data), "data: at least one source is needed")
    need(recipe.model.path is not None or recipe.trainable is not None, "model.path: name a model folder")
    for part, where, names in (
        (run, "run", ("steps", "batch_size", "accumulate", "keep", "log_every", "checkpoint_every")),
        (recipe.model.lora, "model.lora", ("rank",)),
        (recipe.optim, "optim", ("eps", "clip")),
        (recipe.cache, "cache", ("batch", "shard")),
        (recipe.validate, "validate", ("count", "batch_size")),
        (recipe.grid, "grid", ("count", "steps")),
        *((stage, f"stages[{i}]", ("batch_size", "accumulate", "multiple")) for i, stage in enumerate(recipe.stages)),
    ):
        for name in names:
            value = getattr(part, name, None)
            need(value is None or value > 0, f"{where}.{name}: {value} must be positive")
    for name in ("lr", "muon_lr", "weight_decay", "warmup"):
        value = getattr(recipe.optim, name)
        need(value >= 0, f"optim.{name}: {value} must not be negative")
    need(0 <= run.max_faults <= 1, f"run.max_faults: {run.max_faults} is not a share: give a number from 0 to 1")
    for i, item in enumerate(recipe.data):
        need(item.weight > 0, f"data[{i}].weight: {item.weight} must be positive; remove the source instead")
        source(item.source, f"data[{i}].source")
    for name in ("validate", "grid"):
        if getattr(recipe, name) is not None:
            source(getattr(recipe, name).source, f"{name}.source")
        else:
            need(getattr(run, f"{name}_every") == 0, f"run.{name}_every is set, but there is no {name} section")
    for name in ("grid", "rollout"):
        part = getattr(recipe, name)
        if part is not None:
            need(part.guidance >= 1, f"{name}.guidance is {part.guidance}; it must be at least 1 (1 = off)")
            idle = part.negative and part.guidance == 1
            need(not idle, f"{name}.negative is not used at {name}.guidance 1; raise guidance or remove it")
    last = 0
    for i, stage in enumerate(recipe.stages):
        final = i == len(recipe.stages) - 1
        need(stage.until_step is not None or final, f"stages[{i}].until_step: only the last stage may leave it out")
        if stage.until_step is not None:
            need(stage.until_step > last, f"stages[{i}].until_step: {stage.until_step} is not after {last}")
            last = stage.until_step
        pairs = [*(stage.buckets or []), *([stage.size] if isinstance(stage.size, list) else [])]
        need(all(len(p) == 2 and min(p) > 0 for p in pairs), f"stages[{i}]: {pairs}: a size is [height, width]")
        both = stage.buckets is not None and (stage.size is not None or stage.aspects is not None)
        need(not both, f"stages[{i}]: buckets are the sizes; remove size and aspects")
        need(stage.aspects is None or stage.size is not None, f"stages[{i}].aspects: without a size they do nothing")
    if recipe.stages and recipe.stages[-1].until_step is not None:
        need(last >= run.steps, f"stages end at step {last}, before run.steps {run.steps}: extend the last stage")
    if recipe.cache is not None and recipe.cache.drop_encoders:
        need(recipe.cache.ahead, "cache.drop_encoders: only with cache.ahead, or a record would find no encoder")
        need(recipe.grid is None, "cache.drop_encoders: grid pictures need the encoders; drop one of the two")
    betas = recipe.optim.betas
    need(len(betas) == 2 and all(0 <= b < 1 for b in betas), f"optim.betas: two numbers from 0 to 1, found {betas}")
    need(run.ema is None or 0 <= run.ema.decay <= 1, f"run.ema.decay: {run.ema and run.ema.decay} is not from 0 to 1")
    if recipe.validate is not None:
        sigmas = recipe.validate.sigmas
        need(bool(sigmas) and all(0 <= x <= 1 for x in sigmas), f"validate.sigmas: {sigmas}: give some from 0 to 1")
    if recipe.trainable is None:
        need(not recipe.trainable_args, "trainable_args do nothing without a trainable; remove them")
    else:
        for name in ("dtype", "attention_backend", "options"):
            idle = getattr(recipe.model, name) != getattr(ModelRecipe(), name)
            need(not idle, f"model.{name} does nothing with a trainable; see what its trainable_args offer")
    return recipe


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON/YAML data."""
    return dataclasses.asdict(recipe)
