"""Files that ship with weft beside its code: recipes and the tested versions, in a checkout and in a wheel."""

from __future__ import annotations

from pathlib import Path

import weft
from weft.errors import WeftError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """`weft/_recipes` in an installed package, `recipes` in a checkout."""
    installed = _PACKAGE / "_recipes"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "recipes"


def find_recipe(name: str) -> Path:
    """A path to a YAML file as it is, else a recipe that ships with weft: `tiny/kontext` is tiny/kontext.yaml.

    Raises:
        WeftError: there is no such recipe; the nearest or all known ones are named.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = recipes_folder()
    known = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    short = name.removeprefix("recipes/").removesuffix(".yaml").removesuffix(".yml")
    if short in known:
        return folder / f"{short}.yaml"
    if path.is_dir():
        raise WeftError(f"recipe {name} is a folder; name a YAML file in it")
    shipped = f"recipes that ship with weft: {', '.join(known) or 'none'}"
    raise WeftError(f"no recipe {name}: {nearest(short, known, shipped)}")


def tested_versions() -> dict[str, str]:
    """The versions of constraints.txt, by package name."""
    path = _PACKAGE / "_constraints.txt"
    path = path if path.is_file() else _PACKAGE.parents[1] / "constraints.txt"
    lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    return dict(line.split("==") for line in lines if line)


def zoo_models() -> dict[str, Path]:
    """The models that ship with weft, by name."""
    package = Path(weft.__file__).parent
    return {path.parent.name: path.parent for path in sorted(package.glob("zoo/*/model_index.json"))}


def picture_model(references: bool) -> str:
    """The model of a picture request that names none: tiny-kontext, with reference pictures tiny-omni if it ships."""
    return "tiny-omni" if references and "tiny-omni" in zoo_models() else "tiny-kontext"
