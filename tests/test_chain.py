"""One file of several runs: DreamOmni2's joint training, from the same records to a folder that edits and rewrites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden.make_dreamomni2 import picture
from tiny import tiny_flux_folder
from tiny_metaquery import tiny_qwen_folder
from weft.cli.main import main
from weft.errors import WeftError
from weft.models.load import load
from weft.models.rewriter import open_rewriter
from weft.record import make_record, write_records
from weft.train import read_recipe, run_chain
from weft.train.chain import gather, is_chain, read_chain

JOINT = Path(__file__).resolve().parents[1] / "recipes" / "dreamomni2" / "joint.yaml"
RUNS = ("rewriter", "edit", "generation")


def quiet(line: str) -> None:
    pass


def records(source: bool):
    standard = "[instruction]: red, [caption]: a red star" if source else "a red star"
    for k in range(2):
        references = [picture(64, 64, k + 1), picture(64, 64, k + 2)][: 1 if source else 2]
        own = picture(64, 64, k) if source else None
        target, meta = picture(64, 64, k + 3), {"standard": standard}
        yield make_record("make it red", own, references=references, target=target, id=f"{source}{k}", meta=meta)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, list[str]]:
    """A tiny FLUX folder, and what makes the committed recipe one of two steps on tiny models."""
    root = tmp_path_factory.mktemp("joint")
    flux, vlm = tiny_flux_folder(root / "flux"), tiny_qwen_folder(root / "vlm")
    for name, source in (("edit", True), ("generation", False)):
        write_records(root / f"{name}.jsonl", list(records(source)))
    changes = ["run.steps=2", "run.batch_size=2", "run.accumulate=1", "run.threads=1", "run.precision=fp32"]
    changes += ["run.trackers=[jsonl]", "run.validate_every=0", "run.grid_every=0", "optim.warmup=0"]
    changes += [f"runs.0.model.path={vlm}", "runs.0.trainable_args.fit=none"]
    changes += [f"runs.0.data.{k}.source.path={root}/{name}.jsonl" for k, name in enumerate(RUNS[1:])]
    for k, name in enumerate(RUNS[1:], 1):
        changes += [f"runs.{k}.model.path={flux}", f"runs.{k}.model.dtype=fp32", f"runs.{k}.stages=[{{size: 64}}]"]
        changes += [f"runs.{k}.model.lora.rank=2", f"runs.{k}.data.0.source.args.path={root}/{name}.jsonl"]
        changes += [f"runs.{k}.optim.lr=0.01"]
    return flux, changes


@pytest.mark.slow
def test_joint_training_ends_in_a_folder_that_edits_and_rewrites(small, tmp_path, capsys):
    flux, changes = small
    out = tmp_path / "joint"
    assert main(["train", str(JOINT), *changes, "-o", str(out)]) == 0
    assert capsys.readouterr().out.split()[-3:] == [str(out / name / "export") for name in RUNS]
    facts = [json.loads((out / name / "export" / "training.json").read_text()) for name in RUNS]
    assert [fact["step"] for fact in facts] == [2, 2, 2]
    assert all(fact["recipe"]["model"]["lora"]["start"] is None for fact in facts[1:])  # two adapters, not one

    model = load(flux, device="cpu", adapters=out)
    assert model.router.names == ("edit", "generation")
    assert open_rewriter(out, fit="none", max_tokens=2, device="cpu").vlm.model.config.model_type == "qwen2_5_vl"
    own, base = (
        open_rewriter(p, device="cpu").vlm.model.state_dict() for p in (out, facts[0]["recipe"]["model"]["path"])
    )
    assert any((own[key] - base[key]).abs().max() > 0 for key in own)

    before = (out / "edit" / "export" / "training.json").stat().st_mtime_ns
    results = run_chain(JOINT, [*changes, f"folder={out}"], say=quiet)  # nothing is left to do
    assert [r.step for r in results] == [2, 2, 2]
    assert (out / "edit" / "export" / "training.json").stat().st_mtime_ns == before
    assert (out / "edit_lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_runs_of_the_committed_recipe_share_their_records():
    chain, (rewriter, edit, generation) = read_chain(JOINT)
    assert is_chain(JOINT) and not chain.continues
    for k, adapter in enumerate((edit, generation)):
        source = adapter.data[0].source
        assert source.args["path"] == rewriter.data[k].source.path
        assert source.call == "weft.models.rewriter_training:standardised"
        assert adapter.validate.source.args == adapter.grid.source.args
        assert adapter.run.folder == f"runs/dreamomni2/{RUNS[k + 1]}"
    assert rewriter.trainable_args["target"] == "standard"


def test_what_does_not_fit_is_said_before_the_first_run(small, tmp_path, capsys):
    with pytest.raises(WeftError, match="lists several runs; start it with weft train"):
        read_recipe(JOINT)
    for change, message in (
        (["runs.3.run.steps=1"], "there are 3 runs, the last is runs.2"),
        (["runs.1.run.export=false"], "edit.yaml: run.export is off, so there is nothing to put at edit_lora"),
        (["runs.1.run.stepz=1"], "unknown key 'run.stepz'"),
    ):
        with pytest.raises(WeftError, match=message):
            read_chain(JOINT, change)
    with pytest.raises(WeftError, match="generation.yaml: .*missing.jsonl"):
        run_chain(
            JOINT, [*small[1], f"folder={tmp_path}/x", f"runs.2.data.0.source.args.path={tmp_path}/missing.jsonl"]
        )
    assert not (tmp_path / "x").exists()
    for text, message in (
        ("folder: x\nruns: []", "at least one run"),
        ("runs: [{recipe: a.yaml}]", "needs a folder"),
        ("folder: x\nruns: [{recipe: a.yaml}, {recipe: b/a.yaml}]", "names of their own"),
        ("folder: x\nruns: [{recipe: a.yaml, export: ../b}]", "without folders"),
        ("folder: x\nruns: [{recipe: a.yaml, set: {run.folder: y}}]", "run.folder is x/a; set folder"),
        ("folder: x\nruns: [{recipe: a.yaml}]", "a.yaml does not exist"),
        ("folder: x\nruns: [{recipes: a.yaml}]", "unknown key 'runs"),
    ):
        (tmp_path / "chain.yaml").write_text(text)
        with pytest.raises(WeftError, match=message):
            read_chain(tmp_path / "chain.yaml")


def test_the_plan_is_that_of_every_run(small, capsys):
    _, changes = small
    assert main(["plan", str(JOINT), *changes]) == 0
    said = capsys.readouterr().out
    assert [said.count(f"{name}.yaml\nsteps") for name in RUNS] == [1, 1, 1]


def test_a_newer_export_takes_the_place_of_the_older(tmp_path):
    for text in ("one", "two"):
        (tmp_path / text).mkdir()
        (tmp_path / text / text).write_text(text)
        gather(tmp_path / text, tmp_path / "place")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "place", "two"]
