"""Every model family under every method: two steps on tiny random models, from mixed requests, with an export."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import tiny_flux_folder, tiny_kontext_folder, tiny_qwen_edit_folder
from tiny_metaquery import tiny_metaquery_folder
from weft.models.load import FAMILIES, load
from weft.record import make_record
from weft.train import read_recipe
from weft.train.loop import Trainer
from weft.types import Score

FAMILY_NAMES = ("sd3_kontext", "metaquery", "flux_kontext", "qwen_image_edit")
METHODS = ("sft", "nft", "grpo")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder and options of each family's tiny model."""
    root = tmp_path_factory.mktemp("models")
    metaquery, vlm = tiny_metaquery_folder(root / "metaquery")
    return {
        "sd3_kontext": (tiny_kontext_folder(root / "kontext"), {}),
        "metaquery": (metaquery, {"vlm": str(vlm)}),
        "flux_kontext": (tiny_flux_folder(root / "flux"), {"reference_tokens": 12}),
        "qwen_image_edit": (tiny_qwen_edit_folder(root / "qwen"), {}),
    }


def requests():
    """Generation, edits of two shapes, and an edit with a reference, all with an answer."""

    def plain(k, width=64):
        return Image.new("RGB", (width, 64), (40 * k, 200 - 30 * k, 90))

    return [
        make_record("a red star", target=plain(1), id="g"),
        make_record("make it red", plain(2), target=plain(3), id="e"),
        make_record("make it blue", plain(3, 96), target=plain(4, 96), id="w"),
        make_record("use picture 2", plain(4), references=[plain(5, 96)], target=plain(5), id="m"),
    ]


def bright(batch):
    return [Score(float(np.asarray(image).mean()) / 255) for _, image in batch]


def recipe(folder, options, method, out):
    tree = {
        "model": {"path": str(folder), "options": options, "lora": {"rank": 2, "alpha": 4, "targets": ["attn.to_q"]}},
        "method": {"name": method},
        "data": [{"source": {"call": f"{__file__}:requests"}}],
        "optim": {"lr": 1e-3},
        "run": {"folder": str(out), "steps": 2, "batch_size": 4, "log_every": 1, "threads": 1},
    }
    if method == "sft":
        return tree
    tree["rollout"] = {"groups": 4, "group_size": 2, "batch": 8, "steps": 2, "updates": 1}
    tree["rollout"] |= {"kind": "flow_sde", "eta": 0.7} if method == "grpo" else {}
    tree["reward"] = {"scorers": [{"call": f"{__file__}:bright"}]}
    tree["run"]["batch_size"] = 8
    return tree


def test_every_family_is_here():
    assert {family.model.name for family in FAMILIES.values()} == set(FAMILY_NAMES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_two_steps_and_an_export(family, method, models, tmp_path):
    folder, options = models[family]
    trainer = Trainer(read_recipe(recipe(folder, options, method, tmp_path)), {}, lambda line: None)
    assert trainer.model.name == family
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    moved = [name for name, p in trainer.parameters.items() if not torch.equal(before[name], p)]
    assert moved and all("lora_" in name for name in moved)
    again = load(folder, device="cpu", options=options, lora=[str(tmp_path / "export")])
    condition = again.encode(requests()[3:])
    x = torch.zeros(1, again.channels, *(edge // again.downsample for edge in condition[0].size))
    with torch.no_grad():
        found = again.velocity(x, torch.tensor([0.5]), again.prepare(condition))
        expected = trainer.model.velocity(x, torch.tensor([0.5]), trainer.model.prepare(condition))
    assert torch.allclose(found, expected, atol=1e-5)
