"""The house itself: imports point downwards, nothing unsafe is called, one version, declared packages, fast import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import weft

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "weft"
FILES = sorted(PACKAGE.rglob("*.py"))
CONVERTER = PACKAGE / "models" / "foreign.py"

# Lower floors first. Rooms of one floor may not import each other, except on the ground floor and under the roof.
FLOORS = [
    {"record", "rows", "parts", "types", "media", "rng", "settings", "errors"},
    {"report"},
    {"motion"},
    {"world", "data", "vlm", "sample"},
    {"models"},
    {"reward"},
    {"train"},
    {"synth", "evals"},
    {"zoo"},
    {"cli", "tour", "tour_motion", "tour_omni", "tour_page", "app", "api", "api_motion", "__init__", "__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OPEN_FLOORS = {0, len(FLOORS) - 1}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, at any depth; names from `weft` count as modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            if node.module == "weft":
                yield from ((node.lineno, f"weft.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def upward(tree: ast.AST, path: Path) -> list[str]:
    """What in a file breaks the import rule."""
    here, found = room_of(path), []
    for line, module in imports(tree, path):
        words = module.split(".")
        if words[0] != "weft" or len(words) < 2 or words[1].startswith("__version"):
            continue
        there = words[1]
        if there not in FLOOR_OF:
            found.append(f"{path.name}:{line}: {module} is in no known room")
        elif there != here and not (
            FLOOR_OF[there] < FLOOR_OF[here] or FLOOR_OF[there] == FLOOR_OF[here] and FLOOR_OF[here] in OPEN_FLOORS
        ):
            found.append(f"{path.name}:{line}: {here} may not import {module}")
    return found


def unsafe(tree: ast.AST, path: Path) -> list[str]:
    """Calls and imports that can run foreign code."""
    found = []
    for line, module in imports(tree, path):
        if module.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"):
            found.append(f"{path.name}:{line}: imports {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{path.name}:{node.value.lineno}: {node.arg} is not False")
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "torch.load" and path == CONVERTER and "weights_only=True" in ast.unparse(node):
            continue  # the one reader of foreign checkpoints
        said = [word.arg for word in node.keywords]
        if re.search(r"(^|\.)Auto[A-Z]\w*\.from_pretrained$", name) and "trust_remote_code" not in said:
            found.append(f"{path.name}:{node.lineno}: {name} would ask whether to run foreign code")
        if name in ("eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"):
            found.append(f"{path.name}:{node.lineno}: calls {name}")
        if any(word.arg == "shell" and ast.unparse(word.value) == "True" for word in node.keywords):
            found.append(f"{path.name}:{node.lineno}: runs a shell")
    return found


def swallowed(tree: ast.AST, path: Path) -> list[str]:
    """Handlers of ImportError that go on without the module."""
    return [
        f"{path.name}:{node.lineno}: ImportError is swallowed"
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and node.type is not None
        and re.search(r"\b(ImportError|ModuleNotFoundError)\b", ast.unparse(node.type))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert room_of(path) in FLOOR_OF, f"{path}: a room that the house does not know"
    assert not upward(tree, path) + unsafe(tree, path) + swallowed(tree, path)
    assert len(text.splitlines()) <= 460, "a reader holds about 400 lines; split the file by what it is about"
    assert "__future__" in text or not text.strip() or path.name == "__init__.py"


def test_the_rules_can_fail() -> None:
    here = PACKAGE / "sample" / "x.py"
    code = """
import weft.models.load
from weft.world import records
from weft import train, rng
from weft.sample import kernels
import pickle, torch
try:
    import scipy
except ImportError:
    scipy = None
torch.load("x"); model.eval(); eval("1"); load(trust_remote_code=True); load(trust_remote_code=False)
AutoModel.from_pretrained("x"); transformers.AutoConfig.from_pretrained("x", trust_remote_code=False)
"""
    tree = ast.parse(code)
    assert [line.split(": ")[1].split()[-1] for line in upward(tree, here)] == [
        "weft.models.load",
        "weft.world",
        "weft.train",
    ]
    assert len(unsafe(tree, here)) == 5
    assert len(swallowed(tree, here)) == 1
    assert upward(ast.parse("import weft.evals.stats"), PACKAGE / "synth" / "x.py")
    assert not upward(ast.parse("import weft.cli.main"), PACKAGE / "tour.py")


def test_the_version_lives_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", weft.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    assert f"\nversion: {weft.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert version("weft") == weft.__version__
    others = [p for p in FILES if p.name != "__init__.py" and re.search(r"__version__ *=", p.read_text("utf-8"))]
    assert not others


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def normal(name: str) -> str:
    return re.split(r"[\[<>=!~; ]", name)[0].lower().replace("_", "-").replace(".", "-")


def test_what_is_imported_is_declared_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {normal(name) for name in project["dependencies"]}
    extras = {normal(name) for names in project["optional-dependencies"].values() for name in names}
    known = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image", "markupsafe": "jinja2"}
    for path in FILES:
        for line, module in imports(ast.parse(path.read_text("utf-8")), path):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top not in ("weft", "__future__"):
                name = normal(known.get(top, top))
                assert name in declared | extras, f"{path}:{line}: {top} is not in pyproject.toml"
    pinned = {normal(name) for name in pins()}
    dev = {normal(name) for name in project["optional-dependencies"]["dev"]}
    assert (declared | dev) <= pinned
    assert not [name for name, number in pins().items() if "+" in number], "no local parts such as +cpu"


def test_the_environment_is_the_tested_one() -> None:
    """What the tests prove, they prove for these versions."""
    for name in ("torch", "diffusers", "transformers", "peft", "huggingface_hub", "numpy", "pillow", "safetensors"):
        assert version(name).partition("+")[0] == pins()[name], f"{name}: make venv, or make pins after an upgrade"


def test_import_is_fast_and_lazy() -> None:
    """In processor time, so that a busy machine does not fail it."""
    code = (
        "import sys, time; start = time.process_time(); import weft; "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'tyro'} & set(sys.modules); "
        "print(time.process_time() - start, *heavy)"
    )
    seconds, *heavy = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 0.5
    assert not heavy, "import weft must import nothing heavy"


def test_public_names_resolve() -> None:
    for name in weft.__all__:
        assert getattr(weft, name) is not None
    assert set(weft.__all__) <= set(dir(weft))
    assert callable(weft.train), "weft.train(recipe) is a call, weft.train.run lives in the room"
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        weft.lood  # noqa: B018


def test_licence_and_typing_marker_ship() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (PACKAGE / "py.typed").is_file()
