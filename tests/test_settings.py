"""What users write: YAML that says what it says, and objects that are where the path says."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import WeftError
from weft.settings import check_arguments, load_object, parse_yaml, read_yaml
from weft.train.reading import read_recipe


@pytest.mark.parametrize(
    "text",
    ["[1", "a: b: c", "a: 1\na: 2", "a: {b: 1, b: 3}", "2024-13-01", "!!python/name:os.system", "a: \x07", "[" * 3000],
    ids=["open", "colons", "twice", "twice below", "no date", "object", "control", "deep"],
)  # fmt: skip
def test_yaml_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(WeftError, match="^here: not valid YAML: ") as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_yaml_that_can(tmp_path: Path) -> None:
    assert parse_yaml("[1, {a: 2, 3: x}]", "here") == [1, {"a": 2, 3: "x"}]
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}", "here") == {"a": {"b": 1}, "c": {"b": 2}}
    for coding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "r.yaml").write_bytes("a: é\r\nb: 2\r\n".encode(coding))
        assert read_yaml(tmp_path / "r.yaml") == {"a": "é", "b": 2}
    (tmp_path / "r.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(WeftError, match=r"r\.yaml: not valid YAML"):
        read_yaml(tmp_path / "r.yaml")


def test_a_recipe_does_not_take_the_last_of_two(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("run: {steps: 3}\nmodel: {path: x}\nrun: {seed: 1}\n")
    with pytest.raises(WeftError, match="'run' stands twice.* line 3"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(WeftError, match=r'^override "run.steps=\[1": not valid YAML'):
        read_recipe({"model": {"path": "x"}}, ["run.steps=[1"])


def test_objects_by_their_path(tmp_path: Path) -> None:
    mine = tmp_path / "mine_settings.py"
    mine.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Own:\n    rate: float = 1.0\n\nnumber = 3\n"
    )
    assert load_object(f"{mine}:Own", "method.name")().rate == 1.0
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_package_anywhere\n")
    with pytest.raises(ModuleNotFoundError):  # the user's own bug keeps its traceback
        load_object(f"{broken}:f", "call")
    for dotted, message in (
        ("weft.errors", "names no function"),
        ("no_such_package.sub:f", "there is no module 'no_such_package.sub'"),
        ("weft.nothing:f", "there is no module 'weft.nothing'"),
        ("gone.py:f", "gone.py: no such file"),
        (f"{mine}:number", "has no function 'number'"),
        ("weft.errors:WeftEror", "did you mean 'WeftError'"),
    ):
        with pytest.raises(WeftError, match=f"^call: .*{message}"):
            load_object(dotted, "call")


def test_arguments_are_named_before_the_call() -> None:
    def made(batch: list[int], gain: float = 1.0, *, model: str) -> None: ...

    check_arguments(made, {"model": "x"}, "scorer made", given=1)
    for args, message in (
        ({"modle": "x"}, " has no argument 'modle': did you mean 'model'"),
        ({"model": "x", "colour": 2}, " has no argument 'colour': it takes batch, gain, model"),
        ({}, ": missing a required .*argument: 'model'"),
        ({"model": "x", "batch": 2}, ": multiple values for argument 'batch'"),
    ):
        with pytest.raises(WeftError, match=f"^scorer made{message}"):
            check_arguments(made, args, "scorer made", given=1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"call": "weft.world:records", "task": "edit"}, "task does nothing with call"),
        ({"call": "weft.world:records", "options": {"count": 3}}, "options does nothing with call"),
        ({"kind": "jsonl", "path": "a.jsonl", "args": {"root": "b"}}, "args does nothing with kind jsonl"),
        ({"kind": "python", "path": "a.py:f", "args": {"n": 1}}, "args does nothing with kind python"),
    ],
)
def test_what_a_source_would_not_read_is_refused(source: dict[str, object], message: str) -> None:
    with pytest.raises(WeftError, match=rf"data\[0\]\.source\.{message}; remove it"):
        read_recipe({"model": {"path": "x"}, "data": [{"source": source}]})


def test_a_python_source_is_a_call() -> None:
    given = {"kind": "python", "path": "weft.world:records", "options": {"count": 3}}
    recipe = read_recipe(read_recipe({"model": {"path": "x"}, "data": [{"source": given}]}), ["run.seed=1"])
    assert recipe.data[0].source.call == "weft.world:records" and recipe.data[0].source.args == {"count": 3}
