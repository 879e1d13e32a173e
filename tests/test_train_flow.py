"""Supervised training of the flow model itself: LoRA, stages, buckets, checkpointing, cache, pictures, plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny import tiny_kontext_folder
from weft.errors import WeftError
from weft.models.load import load
from weft.record import make_record
from weft.rng import normal
from weft.train import plan, read_recipe, run
from weft.train.checkpoint import newest, read_checkpoint
from weft.train.loop import Trainer
from weft.train.sizes import aspect_size, stage_sizes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_kontext_folder(tmp_path_factory.mktemp("model") / "tiny")


def mixed(count=8):
    """Edits of pictures of three shapes."""
    records = []
    for i in range(count):
        size = [(64, 64), (96, 64), (64, 96)][i % 3]
        pictures = [Image.new("RGB", size, (20 * i, 255 - 20 * i, 99 * k)) for k in range(2)]
        records.append(make_record("make it blue", pictures[0], target=pictures[1], task="edit", id=f"m{i}"))
    return records


MIXED = {"call": f"{__file__}:mixed", "args": {"count": 8}}


def world(**args):
    return {"call": "weft.world:records", "args": {"count": 6, **args}}


def recipe(folder, out, **sections):
    tree = {
        "model": {"path": str(folder)},
        "data": [
            {"source": world(tasks=["edit"]), "weight": 1, "batch_group": "edit"},
            {"source": world(tasks=["generate"]), "weight": 1, "batch_group": "generate"},
        ],
        "optim": {"lr": 1e-3},
        "run": {"folder": str(out), "steps": 4, "batch_size": 2, "checkpoint_every": 2, "ema": {}, "threads": 1},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return tree


def quiet(line: str) -> None:
    pass


def velocity(model):
    record = make_record("a red circle", Image.new("RGB", (64, 64), (9, 99, 199)))
    batch = model.prepare(model.encode([record]))
    with torch.no_grad():
        return model.velocity(normal((1, 16, 8, 8), 0, "x"), torch.tensor([0.7]), batch)


def test_only_the_transformer_learns_and_the_export_opens(folder, tmp_path):
    run(recipe(folder, tmp_path, optim={"name": "muon"}), say=quiet)
    before, after = load(folder, device="cpu"), load(tmp_path / "export", device="cpu")
    for name, module in before.modules().items():
        other = after.modules()[name].state_dict()
        same = all(torch.equal(v, other[k]) for k, v in module.state_dict().items())
        assert same == (name != "transformer"), name
    ema = load_file(newest(tmp_path) / "ema.safetensors")
    state = after.transformer.state_dict()
    assert all(torch.equal(v, state[k.removeprefix("transformer.")]) for k, v in ema.items())
    assert json.loads((tmp_path / "export" / "training.json").read_text())["weights"] == "ema"


def test_lora_saves_adapters_only_and_its_export_is_the_trained_model(folder, tmp_path):
    lora = {"rank": 4, "alpha": 8, "targets": ["attn.to_q", "attn.to_v", "ff.net.2"]}
    tree = recipe(folder, tmp_path, model={"lora": lora})
    trainer = Trainer(read_recipe(tree), {}, quiet)
    start = velocity(trainer.model)
    torch.testing.assert_close(start, velocity(load(folder, device="cpu")))  # B starts at zero
    trainer.run()
    checkpoint = read_checkpoint(newest(tmp_path))
    assert checkpoint.tensors["model"] and all("lora_" in k for group in checkpoint.tensors.values() for k in group)
    assert sum(f.stat().st_size for f in checkpoint.path.iterdir()) < 200_000
    with trainer.averaged():
        trained = velocity(trainer.model)
    assert (trained - start).abs().max() > 1e-4
    again = load(folder, device="cpu", lora=[str(tmp_path / "export")])
    torch.testing.assert_close(velocity(again), trained, rtol=1e-5, atol=1e-6)
    from diffusers import SD3Transformer2DModel

    plain = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    plain.load_lora_adapter(load_file(tmp_path / "export" / "pytorch_lora_weights.safetensors"), prefix="transformer")
    with pytest.raises(WeftError, match='no linear layer ends in "attn.nope"'):
        Trainer(read_recipe(recipe(folder, tmp_path / "x", model={"lora": {"targets": ["attn.nope"]}})), {}, quiet)


@pytest.mark.parametrize("ahead", [False, True])
def test_lora_resumes_bit_for_bit(folder, tmp_path, ahead):
    lora = {"model": {"lora": {"rank": 2, "targets": ["attn.to_q"]}}, "cache": {"ahead": ahead, "shard": 3}}
    run(recipe(folder, tmp_path / "a", **lora), say=quiet)
    first = Trainer(read_recipe(recipe(folder, tmp_path / "b", **lora)), {}, quiet)
    first.prepare_data()
    for _ in range(2):
        first.train_step()
    first.save()
    first.train_step()  # then killed: of what this step encoded, whole shards are on disk
    run(recipe(folder, tmp_path / "b", **lora), say=quiet)
    a, b = (read_checkpoint(newest(tmp_path / x)).tensors for x in "ab")
    assert all(torch.equal(a[f][k], b[f][k]) for f in a for k in a[f]) and a.keys() == b.keys()


def test_gradient_checkpointing_changes_nothing_but_memory(folder, tmp_path):
    gradients = []
    for enabled in (False, True):
        tree = recipe(folder, tmp_path, model={"gradient_checkpointing": enabled})
        trainer = Trainer(read_recipe(tree), {}, quiet)
        trainer.backward(trainer.feed.batch(0))
        gradients.append({k: p.grad for k, p in trainer.parameters.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key])


def test_accumulation_equals_the_large_batch_also_with_repeated_records(folder, tmp_path):
    one = {"data": [{"source": world(tasks=["edit"], count=3)}]}  # 4 samples a step of 3 records
    gradients = []
    for size, pieces in ((4, 1), (2, 2), (1, 4)):
        tree = recipe(folder, tmp_path, run={"batch_size": size, "accumulate": pieces}, **one)
        trainer = Trainer(read_recipe(tree), {}, quiet)
        fed = trainer.feed.batch(0)
        assert len(set(fed.ids)) == 4
        trainer.backward(fed)
        gradients.append({k: p.grad for k, p in trainer.parameters.items() if p.grad is not None})
    for other in gradients[1:]:
        for key, value in gradients[0].items():
            torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6)


def test_encoders_can_be_dropped(folder, tmp_path):
    """Same weights as with them, and the export is complete."""
    val = {"validate": {"source": world(split="val"), "count": 2}, "data": [{"source": world(tasks=["generate"])}]}
    dropout = {"method": {"options": {"text_dropout": 0.5}}}
    on = {"validate_every": 2, "precision": "fp32"}
    run(recipe(folder, tmp_path / "a", run=on, **val, **dropout), say=quiet)
    cache = {"ahead": True, "drop_encoders": True}
    trainer = Trainer(read_recipe(recipe(folder, tmp_path / "b", run=on, cache=cache, **val, **dropout)), {}, quiet)
    trainer.run()
    assert all(p.is_meta for p in trainer.model.modules()["vae"].parameters())
    for name in ("vae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        a, b = (load_file(tmp_path / x / "export" / name) for x in "ab")
        for key, value in a.items():  # batches of another size were encoded: equal to rounding
            torch.testing.assert_close(value, b[key], rtol=1e-4, atol=1e-5)
    logs = [[json.loads(x) for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in "ab"]
    held = [[row["val/loss@0.5"] for row in log if "val/loss" in row] for log in logs]
    assert held[0] == pytest.approx(held[1], rel=1e-4) and len(held[0]) == 2
    with pytest.raises(WeftError, match="only with cache.ahead"):
        read_recipe(recipe(folder, tmp_path, cache={"drop_encoders": True}))


def test_stages_and_buckets_set_the_sizes(folder, tmp_path):
    stages = [
        {"until_step": 2, "size": 32},
        {"size": 64, "aspects": ["1:1", "3:2", "2:3"], "multiple": 16, "batch_size": 3},
    ]
    data = [{"source": MIXED}]
    for cache in (None, {"ahead": True}):
        tree = recipe(folder, tmp_path, stages=stages, data=data, cache=cache, run={"steps": 8})
        trainer = Trainer(read_recipe(tree), {}, quiet)
        trainer.prepare_data()
        seen = set()
        for step in range(8):
            fed = trainer.feed.batch(step)
            shapes = {tuple(e["target"].shape[-2:]) for e in fed.examples}
            assert shapes == {tuple(e["reference.0"].shape[-2:]) for e in fed.examples} and len(shapes) == 1
            assert len(fed.examples) == (2 if step < 2 else 3)
            seen |= {(step >= 2, *shapes)}
        assert seen == {(False, (4, 4)), (True, (8, 8)), (True, (6, 10)), (True, (10, 6))}
        assert trainer.model.resolution == load(folder, device="cpu").resolution
        trainer.train_step()


def test_aspect_sizes():
    assert aspect_size(512, 4 / 3, 32) == (448, 576) and aspect_size(512, 16 / 9, 32) == (384, 672)
    tree = {"size": 512, "aspects": ["4x3"]}
    with pytest.raises(WeftError, match="width:height"):
        stage_sizes(read_recipe(recipe("m", "r", stages=[tree])).stages[0])


def test_the_held_out_loss_is_fixed_and_falls(folder, tmp_path):
    tree = recipe(
        folder,
        tmp_path,
        run={"steps": 12, "validate_every": 12, "batch_size": 4, "ema": None},
        validate={"source": world(split="val", count=5), "count": 5, "sigmas": [0.2, 0.8]},
    )
    trainer = Trainer(read_recipe(tree), {}, quiet)
    first = trainer.validate()
    assert set(first) == {"val/loss@0.2", "val/loss@0.8", "val/loss"} and first == trainer.validate()
    assert first["val/loss"] == pytest.approx((first["val/loss@0.2"] + first["val/loss@0.8"]) / 2)
    trainer.run()
    assert trainer.validate()["val/loss"] < first["val/loss"]


def test_picture_grids_are_drawn(folder, tmp_path):
    grid = {"source": world(tasks=["edit", "multi_edit"], references=[1, 2]), "count": 3, "steps": 2, "guidance": 2.0}
    run(recipe(folder, tmp_path, grid=grid, run={"steps": 2, "grid_every": 1}), say=quiet)
    sheets = sorted((tmp_path / "samples").iterdir())
    assert [p.name for p in sheets] == ["step-000001.png", "step-000002.png"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 4 * 64


def test_wrong_options_are_named(folder, tmp_path):
    with pytest.raises(WeftError, match="unknown key 'method.options.timesteps': did you mean 'timestep'"):
        Trainer(read_recipe(recipe(folder, tmp_path, method={"options": {"timesteps": "mode"}})), {}, quiet)
    with pytest.raises(WeftError, match="no module 'transformr': did you mean 'transformer'"):
        Trainer(read_recipe(recipe(folder, tmp_path, model={"train": ["transformr"]})), {}, quiet)
    with pytest.raises(WeftError, match="no argument 'cout': did you mean 'count'"):
        Trainer(read_recipe(recipe(folder, tmp_path, data=[{"source": {**MIXED, "args": {"cout": 3}}}])), {}, quiet)
    with pytest.raises(WeftError, match="at least one source"):
        read_recipe(recipe(folder, tmp_path, data=[]))
    with pytest.raises(WeftError, match="grid_every is set, but there is no grid section"):
        read_recipe(recipe(folder, tmp_path, run={"grid_every": 2}))
    with pytest.raises(WeftError, match="grid.negative is not used at grid.guidance 1; raise guidance or remove it"):
        read_recipe(recipe(folder, tmp_path, grid={"source": MIXED, "negative": "blurred"}))
    with pytest.raises(WeftError, match="grid.guidance is 0.5; it must be at least 1"):
        read_recipe(recipe(folder, tmp_path, grid={"source": MIXED, "guidance": 0.5}))
    stages = [{"until_step": 2, "size": 64}, {"size": 100}]
    with pytest.raises(WeftError, match=r"stages\[1\]: 100x100 \(height x width\): make both multiples of 16"):
        Trainer(read_recipe(recipe(folder, tmp_path, stages=stages)), {}, quiet)
    with pytest.raises(WeftError, match="stages end at step 3"):
        read_recipe(recipe(folder, tmp_path, stages=[{"until_step": 3}]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.clip=0", "optim.clip: 0.0 must be positive"),
        ("optim.lr=-1", "optim.lr: -1.0 must not be negative"),
        ("optim.lr=.nan", "optim.lr: nan must not be negative"),
        ("optim.betas=[0.9, 1]", "two numbers from 0 to 1"),
        ("run.ema={decay: 2}", "run.ema.decay: 2.0 is not from 0 to 1"),
        ("cache={batch: 0}", "cache.batch: 0 must be positive"),
        ("stages=[{size: [64]}]", r"stages\[0\]: \[\[64\]\]: a size is \[height, width\]"),
        ("stages=[{buckets: [[64, 64], [32]]}]", r"a size is \[height, width\]"),
        ("stages=[{buckets: [[64, 64]], size: 64}]", "buckets are the sizes; remove size and aspects"),
        ("stages=[{aspects: ['1:1']}]", r"stages\[0\].aspects: without a size they do nothing"),
        ("stages=[{size: 64, batch_size: 0}]", r"stages\[0\].batch_size: 0 must be positive"),
        ("data.0.source.limit=-1", r"data\[0\].source.limit: -1 must be positive"),
        ("trainable_args={x: 1}", "trainable_args do nothing without a trainable"),
        ("trainable=tests/toy.py:Toy", "model.dtype does nothing with a trainable"),
    ],
)
def test_numbers_that_cannot_be_and_options_without_effect_are_refused(tmp_path, change, message):
    tree = {"model": {"path": "m"}, "data": [{"source": {"kind": "jsonl", "path": "a.jsonl"}}]}
    read_recipe(tree)
    changes = [change] if "toy" not in change else [change, "model.dtype=bf16"]
    with pytest.raises(WeftError, match=message):
        read_recipe(tree, changes)


def test_overrides_and_yaml_numbers(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {path: m}\ndata: [{source: {kind: jsonl, path: a.jsonl}}]\noptim: {lr: 4e-5}\n")
    changes = ["data.0.weight=2.5", "run.ema.decay=0.5", "model.lora={rank: 3}", "optim.betas=[0.9, 0.95]"]
    recipe = read_recipe(file, changes)
    assert recipe.optim.lr == 4e-5 and recipe.data[0].weight == 2.5 and recipe.run.ema.decay == 0.5
    assert recipe.model.lora.rank == 3 and recipe.optim.betas == [0.9, 0.95]
    for wrong, message in [
        ("run.steps", "not of the form"),
        ("data.3.weight=1", "index below 1"),
        ("run.steps=many", "expected int, found 'many'"),
        ("optim.name=sgd", "'sgd' is not one of adamw, muon"),
        ("model.lora.rnk=3", "unknown key 'model.lora.rnk': did you mean 'rank'"),
    ]:
        with pytest.raises(WeftError, match=message):
            read_recipe(file, [wrong])


@pytest.mark.long
def test_plan_of_the_real_recipe():
    """Parameters of the public checkpoints, counted on the meta device; Flow-GRPO's adapter on it."""
    full = plan(ROOT / "recipes" / "unipic2" / "stage_b_kontext.yaml")
    assert full.parameters["transformer"] == full.trained == 2_243_171_520
    assert full.samples == 200_000 * 128 and full.forwards == 180_000 * 16 + 20_000 * 64
    # half of the samples have a second picture: cells * 1.5 + 77 + 256
    assert [s.tokens for s in full.stages] == [256 * 1.5 + 333, 1024 * 1.5 + 333, 4096 * 1.5 + 333]
    # by hand at 512 px, 1.5 pictures: image linears 340 w^2, text linears 279 w^2, joint and image-only attention
    w2, image, text = 1536**2, 1536, 333
    by_hand = 2 * (340 * image + 279 * text) * w2 + 4 * 1536 * (24 * (image + text) ** 2 + 13 * image**2)
    assert full.stages[1].flops == pytest.approx(by_hand, rel=0.05)
    assert full.memory["optimiser"] == 8 * full.trained
    adapters = plan(ROOT / "recipes" / "unipic2" / "lora_edit.yaml", ["plan.tflops=100"])
    assert adapters.trained == 18_776_064
    assert "18,776,064" in str(adapters) and "100 TFLOP/s (plan.tflops)" in str(adapters)


def test_plan_measures_a_tiny_run(folder, tmp_path):
    estimate = plan(recipe(folder, tmp_path / "never"), ["plan.measure=true"])
    assert estimate.seconds > 0 and estimate.parameters["transformer"] == 323_008
    assert not (tmp_path / "never").exists()
    with pytest.raises(WeftError, match="not on this machine"):
        plan(recipe(tmp_path / "nowhere", tmp_path))


def test_the_room_can_be_called():
    import weft

    with pytest.raises(WeftError, match="does not exist"):
        weft.train("no/such/recipe.yaml")
