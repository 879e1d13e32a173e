"""Runs after one another: each starts from the weights of the one before; all tasks are measured after each."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from test_online import HERE, bright, dark, quiet, recipe
from tiny import tiny_kontext_folder
from weft.errors import WeftError
from weft.train import read_recipe
from weft.train.loop import Trainer
from weft.train.stages import run_stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_kontext_folder(tmp_path_factory.mktemp("model") / "tiny")


def two(folder, tmp_path, **sections):
    return [
        recipe(folder, tmp_path / name, "grpo", {"kl": 0.04}, reward=None, **sections) | {"method": {"name": "grpo"}}
        for name in ("edit", "generate")
    ]


def test_two_stages_continue_one_adapter_and_measure_both_tasks(folder, tmp_path):
    seen = []

    def measure(model, step):
        seen.append(step)
        return {
            "size": sum(float(p.detach().abs().sum()) for n, p in model.transformer.named_parameters() if "lora_B" in n)
        }

    stages = two(folder, tmp_path)
    for tree in stages:
        tree["run"]["steps"] = 2
    results = run_stages(stages, evaluators={"edits": measure, "scenes": measure}, rewards=[bright, bright], say=quiet)
    assert len(results) == 2 and seen == [2] * 4
    table = json.loads((tmp_path / "stages.json").read_text())
    assert [row["stage"] for row in table] == [1, 2]
    assert all({"edits/size", "scenes/size"} <= set(row) for row in table)
    assert table[1]["edits/size"] > table[0]["edits/size"] > 0  # the second stage moved on from the first one's weights
    # a finished chain is not trained again
    again = run_stages(stages, evaluators={"edits": measure, "scenes": measure}, rewards=[bright, bright], say=quiet)
    assert seen == [2] * 4 and [r.step for r in again] == [2, 2]
    assert again[1].last["edits/size"] == table[1]["edits/size"]


@pytest.mark.slow
def test_without_evaluators_every_stage_is_measured_by_all_rewards_on_held_out_requests(folder, tmp_path):
    """As the command line runs PDTR: the recipes are all it has."""
    stages = two(folder, tmp_path)
    for tree, goal in zip(stages, ("bright", "dark"), strict=True):
        tree["run"]["steps"] = 2
        tree["reward"] = {"scorers": [{"call": f"{HERE}:{goal}"}]}
        tree["grid"] = {"source": {"call": f"{HERE}:requests"}, "count": 3, "steps": 2}
    run_stages(stages, say=quiet)
    first, second = json.loads((tmp_path / "stages.json").read_text())
    for row in (first, second):
        assert row["edit/reward"] + row["generate/reward"] == pytest.approx(1) and row["edit/missing"] == 0
        assert row["edit/bright"] == row["edit/reward"]
    assert first["edit/reward"] != second["edit/reward"]


def test_full_weights_continue_from_the_exported_folder(folder, tmp_path):
    stages = two(folder, tmp_path, model={"lora": None})
    for tree in stages:
        tree["run"]["steps"] = 1
        tree["rollout"]["updates"] = 1
    stages[1]["optim"] = {"lr": 0.0}  # a stage that changes nothing shows what it started from
    results = run_stages(stages, rewards=[bright, dark], say=quiet)
    a, b = (load_file(r.export / "transformer" / "diffusion_pytorch_model.safetensors") for r in results)
    assert all(torch.equal(a[k], b[k]) for k in a)
    start = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(a[k], start[k]) for k in a)


@pytest.mark.slow
def test_an_adapter_starts_from_an_export_of_the_same_shape_only(folder, tmp_path):
    tree = recipe(folder, tmp_path / "a")
    tree["run"]["steps"] = 1
    first = Trainer(read_recipe(tree), {}, quiet)
    first.train_step()
    export = first.export()
    tree = recipe(folder, tmp_path / "b")
    tree["model"]["lora"] = {**tree["model"]["lora"], "start": str(export)}
    second = Trainer(read_recipe(tree), {}, quiet)
    assert all(torch.equal(p, second.parameters[k]) for k, p in first.parameters.items())
    for change, message in (
        ({"rank": 8}, "another rank"),
        ({"alpha": 4}, "lora_alpha 8"),
        ({"targets": ["attn.to_q"]}, "other layers"),
        ({"start": str(tmp_path)}, "there is no"),
    ):
        tree["model"]["lora"] = {
            **tree["model"]["lora"],
            "start": str(export),
            "targets": first.recipe.model.lora.targets,
        }
        tree["model"]["lora"] |= {"rank": 4, "alpha": 8} | change
        with pytest.raises(WeftError, match=message):
            Trainer(read_recipe(tree), {}, quiet)


def test_stages_that_do_not_fit_are_refused(folder, tmp_path):
    stages = two(folder, tmp_path)
    with pytest.raises(WeftError, match="1 rewards for 2 stages"):
        run_stages(stages, rewards=[bright], say=quiet)
    with pytest.raises(WeftError, match="give each its own"):
        run_stages([stages[0], stages[0]], rewards=[bright, dark], say=quiet)
    stages[1]["model"] = {**stages[1]["model"], "lora": None}
    with pytest.raises(WeftError, match="all stages train a LoRA"):
        run_stages(stages, rewards=[bright, dark], say=quiet)
