"""Every recipe in the repository trains for two steps when its model folder and its data are swapped for tiny ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tiny import tiny_flux_folder, tiny_kontext_folder, tiny_qwen_edit_folder
from tiny_metaquery import tiny_metaquery_folder
from tiny_motion import tiny_motion_folder
from weft.train import read_recipe
from weft.train.chain import is_chain
from weft.train.loop import Trainer
from weft.train.sizes import stage_sizes
from weft.types import Score

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
RECIPES = [path for path in FILES if "data" in yaml.safe_load(path.read_text(encoding="utf-8"))]


TASKS = ("generate", "edit", "multi_generate", "multi_edit")


def brightness(batch):
    """Stands for every scorer of a recipe."""
    return [Score(float(np.asarray(image).mean()) / 255) for _, image in batch]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family by a part of the real one's name."""
    root = tmp_path_factory.mktemp("model")
    metaquery, vlm = tiny_metaquery_folder(root / "metaquery")
    flux = tiny_flux_folder(root / "flux")
    motion = tiny_motion_folder(root / "motion")
    return {
        "motion": motion,
        "omnimogen": motion,
        "FLUX": flux,
        "tiny/omni": flux,
        "Qwen-Image-Edit": tiny_qwen_edit_folder(root / "qwen"),
        "metaquery": metaquery,
        "Qwen2.5-VL": vlm,
        "judge": vlm,
        "rewriter_init": vlm,
        "": tiny_kontext_folder(root / "kontext"),
    }


def tiny_source(source, group, graded=None, motion=False):
    """The embedded world in place of a real set; a source that is the world already keeps its own arguments."""
    if motion and source.get("kind") is not None:
        return {"call": "tiny_motion:corpus"}
    if source.get("call", "").startswith(("weft.world:", "weft.world.motions:", "weft.reward.graded:")):
        return {**source, "args": {**source.get("args", {}), "count": 4}}
    if graded:
        return {"call": graded, "args": {"count": 4}}
    task = group if group in TASKS else "generate" if "gen" in group else "edit"
    return {"call": "weft.world:records", "args": {"count": 4, "tasks": [task]}}


def shrunk(path, folders, out):
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["model"]["path"] = str(next(folder for name, folder in folders.items() if name in tree["model"]["path"]))
    args = tree.get("trainable_args", {})
    if "vlm" in args:
        args |= {"vlm": str(folders["Qwen2.5-VL"]), "dtype": "fp32", "resolution": 64}
        if args.get("conditioner") == "new":
            sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
            args |= {"queries": 4, "connector": sizes}
        if "transformer" in args:
            args["transformer"] = str(folders[""])
    args |= {key: 4096 for key in ("min_pixels", "max_pixels") if key in args}  # the world's pictures as they are
    if "target" in args:
        args |= {"target": "canonical", "fit": "none"}
    graded = None
    if tree.get("trainable", "").startswith("weft.reward."):
        compared = args.get("kind") == "ranking"
        graded = "weft.reward.preferences:attempts" if compared else "weft.reward.graded:records"
    motion = tree.get("trainable", "").startswith("weft.models.motion.")
    for item in tree["data"]:
        item["source"] = tiny_source(item["source"], item.get("batch_group", "edit"), graded, motion)
    for name in ("validate", "grid"):
        if tree.get(name):
            group = tree["data"][0].get("batch_group", "edit")
            tree[name] |= {"source": tiny_source(tree[name]["source"], group, graded, motion), "count": 2}
    if tree.get("grid"):
        tree["grid"]["steps"] = 2
    for stage in tree.get("stages", []):  # the tiny position table ends at 384 pixels
        if stage.pop("buckets", None) is not None:
            stage["size"], stage["aspects"], stage["multiple"] = 64, ["1:1", "3:2"], 16
        stage["size"] = min(stage.get("size", 64), 128)
        stage |= {key: small for key, small in (("batch_size", 2), ("accumulate", 1)) if key in stage}
    if tree.get("cache"):
        tree["cache"].pop("folder", None)  # in the run's own
    tree["run"] |= {"folder": str(out), "batch_size": 2, "accumulate": min(2, tree["run"].get("accumulate", 1))}
    tree["run"]["threads"] = 1
    if "rollout" in tree:
        tree["run"]["accumulate"] = 1
        tree["rollout"] |= {
            "groups": 2,
            "group_size": 2,
            "batch": 2,
            "updates": min(2, tree["rollout"].get("updates", 1)),
        }
        if "window" not in tree["rollout"]:
            tree["rollout"]["steps"] = 4
        tree["reward"]["scorers"] = [
            {**s, "call": f"{__file__}:brightness", "args": {}} for s in tree["reward"]["scorers"]
        ]
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_two_steps(path, folders, tmp_path):
    recipe = read_recipe(shrunk(path, folders, tmp_path))
    trainer = Trainer(recipe, {}, lambda line: None)
    before = {k: p.detach().clone() for k, p in trainer.parameters.items()}
    trainer.prepare_data()
    trainer.train_step()
    values = trainer.train_step()
    assert trainer.step == 2 and torch.isfinite(torch.tensor(values["loss"]))
    assert any(not torch.equal(before[k], p) for k, p in trainer.parameters.items())
    if recipe.validate is not None:
        assert all(torch.isfinite(torch.tensor(v)) for v in trainer.validate().values())
    trainer.save()
    if recipe.run.export:
        trainer.export()
        assert (tmp_path / "export" / "training.json").is_file()


def test_only_descriptions_of_tiny_models_and_lists_of_runs_are_not_a_training():
    others = [path.name for path in FILES if path not in RECIPES and not is_chain(path)]
    assert all(name == "omni.yaml" or name.endswith("model.yaml") for name in others), others
    assert [path.name for path in FILES if is_chain(path)] == ["joint.yaml"]  # tests/test_chain.py


def test_the_published_numbers_of_stage_b():
    recipe = read_recipe(ROOT / "recipes" / "unipic2" / "stage_b_kontext.yaml")
    assert recipe.run.steps == 200_000 and recipe.run.batch_size * recipe.run.accumulate == 128
    assert all((s.batch_size or 8) * (s.accumulate or 16) == 128 for s in recipe.stages)
    o = recipe.optim
    assert (o.name, o.lr, o.betas, o.eps, o.weight_decay, o.schedule) == (
        "adamw",
        4e-5,
        [0.9, 0.95],
        1e-8,
        0.05,
        "cosine",
    )
    totals = {g: sum(d.weight for d in recipe.data if d.batch_group == g) for g in ("edit", "generate")}
    assert totals["edit"] == pytest.approx(totals["generate"])
    for stage in recipe.stages:
        for height, width in stage_sizes(stage):
            assert height % 32 == 0 and width % 32 == 0
            assert abs((height * width) ** 0.5 / stage.size - 1) < 0.07
    assert stage_sizes(recipe.stages[1])[:2] == [(512, 512), (448, 576)]


@pytest.mark.parametrize("path", [p for p in RECIPES if "rollout" in yaml.safe_load(p.read_text(encoding="utf-8"))])
def test_the_geometry_of_post_training_fits_on_one_and_on_eight_devices(path):
    from weft.train.geometry import check_geometry

    recipe = read_recipe(path)
    for processes in (1, 8):
        check_geometry(recipe.rollout, recipe.run.batch_size, processes, 10_000)


def test_pickscore_is_divided_by_26_once():
    """As in the public rewards: by the scorer, so that equal weights beside HPSv2 and CLIPScore mean what they say."""
    from weft.reward.scorers.clip import PickScore

    assert PickScore.divisor == 26.0
    for path in RECIPES:
        for scorer in yaml.safe_load(path.read_text(encoding="utf-8")).get("reward", {}).get("scorers", []):
            if scorer.get("name") == "pickscore":
                assert scorer.get("scale", 1.0) == 1.0, path


def test_every_reward_is_watched_by_something_that_is_not_trained_on():
    for path in RECIPES:
        scorers = yaml.safe_load(path.read_text(encoding="utf-8")).get("reward", {}).get("scorers", [])
        assert not scorers or any(s.get("watch") for s in scorers), path


def test_flow_grpo_averages_every_eighth_update():
    for name in ("fast_cps", "full", "guard", "mix"):  # update_step_interval=8 in scripts/train_sd3.py
        ema = read_recipe(ROOT / "recipes" / "flow_grpo" / f"{name}.yaml").run.ema
        assert (ema.decay, ema.start, ema.every) == (0.9, 1, 8), name


def test_the_published_numbers_of_edit_r1_and_pdtr():
    for name in ("kontext", "qwen_image_edit_2509"):
        recipe = read_recipe(ROOT / "recipes" / "edit_r1" / f"{name}.yaml")
        r, lora = recipe.rollout, recipe.model.lora
        assert (r.groups, r.group_size, r.steps, r.updates, r.guidance, r.kind) == (24, 12, 6, 1, 1.0, "ode")
        assert (lora.rank, lora.alpha, recipe.optim.lr, recipe.run.ema.decay) == (32, 64, 3e-4, 0.9)
    for name in ("edit", "generate"):
        recipe = read_recipe(ROOT / "recipes" / "unipic2" / f"pdtr_{name}.yaml")
        r = recipe.rollout
        assert (r.steps, r.group_size, r.eta, r.samples, r.updates) == (10, 16, 0.7, 256, 1)
        assert recipe.method.options["kl"] == 0.04 and recipe.optim.lr == 3e-4
