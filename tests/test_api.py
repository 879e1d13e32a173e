"""The Python face: a picture depends on its own seed and nothing else, and says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

import weft
from weft.api import Defaults, Model, Options
from weft.cli.options import SamplingOptions
from weft.errors import WeftError
from weft.record import make_record
from weft.sample.solvers import SOLVERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_kontext_folder

    return tiny_kontext_folder(tmp_path_factory.mktemp("api") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return weft.load(folder, device="cpu", resolution=64)


@pytest.fixture
def scene() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((64, 64))


def distance(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())


def test_one_picture_or_a_list(model: Model) -> None:
    one = model.generate("a red star", seed=3, steps=2)
    assert isinstance(one, Image.Image) and one.size == (64, 64)
    many = model.generate("a red star", seed=2, n=3, steps=2)
    assert isinstance(many, list) and [image.info["weft"]["seed"] for image in many] == [2, 3, 4]
    assert distance(one, many[1]) <= 1, "the k-th picture is that of seed + k alone"
    assert distance(many[0], many[1]) > 1
    assert isinstance(model.generate("a red star", n=1, steps=1), list)


def test_a_picture_says_how_it_was_made(model: Model, folder: Path, tmp_path: Path) -> None:
    from weft.media import read_metadata

    wanted = {"weft": weft.__version__, "model": str(folder), "instruction": "a red star", "seed": 5, "steps": 2}
    wanted |= {"guidance": 2.0, "negative": "blur"}
    image = model.generate("a red star", seed=5, steps=2, guidance=2.0, negative="blur")
    assert image.info["weft"] == wanted
    output = next(model.run([make_record("a red star")], seeds=[5], options=Options(2, 2.0, "blur")))
    assert output.metadata == wanted and distance(output.image, image) <= 1
    assert read_metadata(output.save(tmp_path / "a.png")) == wanted
    assert read_metadata(output.save(tmp_path / "b.png", metadata=False)) == {}


def test_a_negative_that_nothing_looks_at_is_refused(model: Model) -> None:
    """FLUX Kontext's default guidance is 1: its transformer is told a strength of its own."""
    with pytest.raises(WeftError, match="negative does nothing at guidance 1; give a guidance above 1"):
        model.generate("a red star", steps=1, guidance=1, negative="blur")


def test_what_a_picture_depends_on(model: Model, scene: Image.Image) -> None:
    options = {"seed": 1, "steps": 2}
    first = model.edit(scene, "make it red", **options)
    assert distance(first, model.edit(scene, "make it red", **options)) == 0
    assert distance(first, model.edit(scene, "make it blue", **options)) > 0
    assert distance(first, model.edit(scene.rotate(90), "make it red", **options)) > 0
    assert distance(first, model.edit(scene, "make it red", references=[scene], **options)) > 0
    assert distance(first, model.edit(scene, "make it red", **options, guidance=1)) > 0
    assert distance(first, model.edit(scene, "make it red", **options, negative="green")) > 0


def test_woven_pictures(model: Model, scene: Image.Image, tmp_path: Path) -> None:
    scene.save(tmp_path / "cloth.png")
    text = "give the star the material of {cloth.png}"
    image = model.edit(scene, weft.weave(text, root=tmp_path), steps=1)
    assert image.info["weft"]["instruction"] == "give the star the material of picture 2"


def test_solver_and_callback_reach_the_sampler(model: Model) -> None:
    seen: list[tuple[int, float]] = []
    latents: dict[int, Any] = {}

    def callback(flow: Any, step: int, time: Any, tensors: dict[str, Any]) -> None:
        assert flow is model.flow and list(tensors) == ["latents"]
        seen.append((step, float(time)))
        latents[len(seen)] = tensors["latents"].clone()

    record = make_record("a red star")
    for solver in ("euler", "ab2"):
        options = Options(steps=4, guidance=1, solver=solver, callback_on_step_end=callback)
        (output,) = model.run([record], seeds=[5], options=options)
        assert output.metadata.get("solver", "euler") == solver
    assert [step for step, _ in seen] == [0, 1, 2, 3] * 2 and seen[0][1] == 1000
    assert latents[1].equal(latents[5]) and not latents[4].equal(latents[8])
    with pytest.raises(WeftError, match="solver 'heun' is unknown"):
        list(model.run([record], options=Options(steps=1, solver="heun")))
    assert set(get_args(get_type_hints(SamplingOptions)["solver"])) == set(SOLVERS)
    assert SamplingOptions(solver="ab2").options().solver == "ab2"


def test_batches_and_order_change_nothing(model: Model, scene: Image.Image) -> None:
    records = [
        make_record("a red star", id="a"),
        make_record("make it red", scene, id="b"),
        make_record("make it red", scene, references=[scene], id="c"),
        make_record("a wide blue ring", size=(64, 96), id="d"),
    ]
    together = list(model.run(records, n=2, options=Options(steps=2, batch=8)))
    alone = list(model.run(records[::-1], n=2, options=Options(steps=2, batch=1)))
    assert [output.record.id for output in together] == list("aabbccdd")
    for output in together:
        other = next(o for o in alone if (o.record.id, o.seed) == (output.record.id, output.seed))
        assert distance(output.image, other.image) <= 1
    assert len({output.seed for output in together}) == 8
    assert together[-1].image.size == (96, 64)


def test_records_of_two_folders_may_share_an_object_id(model: Model) -> None:
    """Conditions are shared within a batch by record, never by id."""
    records = [make_record("a red star", id="same"), make_record("a blue ring", id="same")]
    first, second = model.run(records, seeds=[1, 1], options=Options(steps=1))
    assert distance(first.image, second.image) > 0


def test_defaults_are_the_models_own(folder: Path, tmp_path: Path) -> None:
    assert weft.load(folder).defaults == Defaults()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "weft.json").write_text(json.dumps({"steps": 3, "guidance": 1.0}))
    image = weft.load(copy).generate("a red star")
    assert (image.info["weft"]["steps"], image.info["weft"]["guidance"]) == (3, 1.0)
    (copy / "weft.json").write_text('{"steps": "many"}')
    with pytest.raises(WeftError, match="weft.json"):
        weft.load(copy)


def test_mistakes_are_named(model: Model, scene: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="empty"):
        model.generate(" ")
    with pytest.raises(WeftError, match="multiples of 16"):
        model.generate("a star", size=(63, 64))
    with pytest.raises(WeftError, match="nothing.png"):
        model.edit(tmp_path / "nothing.png", "make it red")
    with pytest.raises(WeftError, match="n is 0"):
        model.generate("a star", n=0)
    with pytest.raises(WeftError, match="1 seeds for 2 outputs"):
        list(model.run([make_record("a star")], n=2, seeds=[1]))
    for wrong in ({"steps": 0}, {"guidance": 0.5}, {"batch": 0}):
        with pytest.raises(WeftError, match=next(iter(wrong))):
            Options(**wrong)
    with pytest.raises(WeftError, match="no model 'tiny-nothing'"):
        weft.load("tiny-nothing")
