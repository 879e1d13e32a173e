"""What users write into recipes and options: YAML without surprises, and Python objects by their dotted path."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from weft.errors import WeftError, nearest


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, which takes the last of equal keys without a word: here they are refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                twice = f"the key '{key.value}' stands twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The value of a YAML text. Raises WeftError, beginning with `where`, for what is none, and for a key that stands
    twice."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-01 is no date
        raise WeftError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file, UTF-8 or UTF-16. Raises WeftError."""
    if not path.is_file():
        raise WeftError(f"{path}: no such file: check the path")
    return parse_yaml(path.read_bytes(), str(path))


def load_object(dotted: str, what: str) -> Callable[..., Any]:
    """The function or class behind `package.module:name` or `path/to/file.py:name`. Raises WeftError, beginning with
    `what` (the option that names it), if there is none."""
    place, colon, name = dotted.rpartition(":")
    if not colon:
        raise WeftError(f"{what}: '{dotted}' names no function: write file.py:name or package.module:name")
    if place.endswith(".py"):
        path = Path(place)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise WeftError(f"{what}: {path}: no such file: check the path")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)  # dataclasses look there for their module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # a module that the user's own imports
            raise WeftError(f"{what}: there is no module '{place}': check the name") from None
    found = getattr(module, name, None)
    if not callable(found):
        hint = nearest(name, [n for n in vars(module) if not n.startswith("_")], "check the name")
        raise WeftError(f"{what}: {place} has no function '{name}': {hint}")
    return found


def check_arguments(found: Callable[..., Any], args: dict[str, Any], what: str, given: int = 0) -> None:
    """Raise WeftError, beginning with `what`, for an argument that `found` does not take and for one that it lacks;
    `given` others are put before them."""
    signature = inspect.signature(found)
    known = signature.parameters
    unknown = [key for key in args if key not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        hint = nearest(unknown[0], known, f"it takes {', '.join(known) or 'none'}")
        raise WeftError(f"{what} has no argument '{unknown[0]}': {hint}")
    try:
        signature.bind(*[None] * given, **args)
    except TypeError as error:
        raise WeftError(f"{what}: {error}") from None
