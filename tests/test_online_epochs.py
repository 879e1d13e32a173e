"""Epochs: refilled groups and their exact resume, what is logged without an anchor, watched shares, plans."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from test_online import HERE, good, log, quiet, recipe, same, trained
from tiny import tiny_kontext_folder
from weft.errors import WeftError
from weft.models.flow import cover, framed
from weft.record import make_record
from weft.reward import Mixture, ScorerConfig
from weft.reward.advantage import group_key
from weft.reward.mix import some
from weft.rng import numpy_rng
from weft.train import plan, read_recipe, run
from weft.train.checkpoint import newest, read_checkpoint
from weft.train.geometry import RolloutRecipe
from weft.train.loop import Trainer
from weft.train.policy import Policies
from weft.train.rollouts import Sample, encode_batches
from weft.types import Score

REFILL = {"groups": 3, "group_size": 4, "batch": 4, "updates": 2, "refill": 2}
MASK = {"filter": {"rule": "release_mask"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_kontext_folder(tmp_path_factory.mktemp("model") / "tiny")


def tree(folder, out, **rollout):
    """Three of six requests are settled and filtered; an epoch of three meets some of these first."""
    reward = {"scorers": [{"call": f"{HERE}:good"}]}
    return recipe(folder, out, options=MASK, reward=reward, rollout={**REFILL, **rollout})


def test_idle_groups_are_refilled_until_enough_teach(folder, tmp_path):
    trainer = Trainer(read_recipe(tree(folder, tmp_path)), {}, quiet)
    first = trainer.train_step()
    trainer.train_step()
    second = trainer.train_step()
    assert first["groups_refilled"] > 0 and first["groups"] == 3 + first["groups_refilled"]
    # the data hold exactly three requests that teach, and two rounds of three requests find them all
    assert first["samples_trained"] == second["samples_trained"] == 12
    samples = trainer.method.epoch.samples
    assert len({s.group for s in samples}) == len(samples) / 4, "a refill takes other requests"
    assert len({s.seed for s in samples}) == len(samples)
    without = Trainer(read_recipe(tree(folder, tmp_path, refill=0)), {}, quiet).train_step()
    assert without["groups"] == 3 and without["samples_trained"] < 12


def test_a_refill_ends_when_the_data_do(folder, tmp_path):
    flat = {"scorers": [{"call": f"{HERE}:level", "args": {"value": 0.99}}]}
    row = Trainer(read_recipe(tree(folder, tmp_path, refill=9) | {"reward": flat}), {}, quiet).train_step()
    assert row["groups"] == 6 and row["samples_trained"] == 0


def test_refills_that_need_not_divide_are_cut_evenly(folder, tmp_path):
    """One refilled group of four in batches of six: its window is one, its scores find their samples."""
    given = tree(folder, tmp_path, kind="flow_sde", eta=0.7, batch=6, window={"size": 1})
    trainer = Trainer(read_recipe(given), {}, quiet)
    trainer.train_step()
    epoch = trainer.method.epoch
    assert len(epoch.samples) > 12
    assert [len({s.window for s in batch}) for batch in epoch.batches] == [1] * len(epoch.batches)
    assert sum(map(len, epoch.batches)) == len(epoch.samples) == len(epoch.scores)
    assert [s.index for batch in epoch.batches for s in batch] == list(range(len(epoch.samples)))


@pytest.mark.slow
def test_resume_within_a_refilled_epoch_is_the_uninterrupted_run(folder, tmp_path):
    run(tree(folder, tmp_path / "whole"), say=quiet)
    stopped = tree(folder, tmp_path / "stopped")
    first = Trainer(read_recipe(stopped), {}, quiet)
    for _ in range(3):
        first.train_step()
    assert len(first.method.epoch.samples) > 12
    first.save()
    saved = read_checkpoint(newest(tmp_path / "stopped"))
    assert len(saved.state["method"]["scores"]) == len(first.method.epoch.samples)
    run(stopped, say=quiet)
    assert not same(trained(tmp_path / "whole"), trained(tmp_path / "stopped"))
    # other data would plan other groups: refused, not guessed
    state = saved.state["method"]
    state["scores"].pop()
    again = Trainer(read_recipe(stopped), {}, quiet)
    with pytest.raises(WeftError, match="the data have changed"):
        again.method.load(3, saved.tensors, state)


def test_a_signal_while_refilling_leaves_a_whole_epoch_to_be_made_again(folder, tmp_path):
    calls = []

    def reward(batch):
        calls.append(len(batch))
        if len(calls) == 4:  # of the first epoch's three batches, and one of a refill
            trainer.stop = 15
        return good(batch)

    trainer = Trainer(read_recipe(tree(folder, tmp_path) | {"reward": None}), {}, quiet, reward)
    assert trainer.train_step() == {} and trainer.step == 0
    assert trainer.method.epoch is None and trainer.method.state()["scores"] is None


# -- precision --------------------------------------------------------------------------------------------------------


def test_policies_do_not_share_autocasts_copies_of_their_weights():
    layer = torch.nn.Linear(8, 8)
    policies = Policies({"layer": layer}, {"layer.weight": layer.weight}, old=True, start=False)
    policies.copies["old"]["layer.weight"].mul_(-1)
    x = torch.ones(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        with torch.no_grad(), policies.using("old"):
            old = layer(x)
        after = layer(x)
    assert torch.equal(before, after) and not torch.equal(before, old)
    after.float().sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["nft", "grpo"])
def test_bf16_sees_the_distance_between_policies_that_fp32_sees(method, folder, tmp_path):
    rows = {}
    for precision in ("fp32", "bf16"):
        given = recipe(folder, tmp_path / precision, method, {"kl": 0.1, "reference": "start"}, optim={"lr": 5e-3})
        trainer = Trainer(read_recipe(given, [f"run.precision={precision}"]), {}, quiet)
        trainer.train_step()
        rows[precision] = trainer.train_step()
    for key in ["kl", *(["old_distance"] if method == "nft" else [])]:
        assert rows["bf16"][key] == pytest.approx(rows["fp32"][key], rel=0.5), key


# -- monitoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nft", "grpo"])
def test_a_run_without_an_anchor_still_looks_at_the_reference_once_an_epoch(method, folder, tmp_path):
    run(recipe(folder, tmp_path, method, {"kl": 0}), say=quiet)
    rows = log(tmp_path)
    assert [("kl" in row, "velocity_norm" in row) for row in rows] == [(True, True), (False, False)] * 2
    assert rows[0]["kl"] == 0 and rows[0]["velocity_norm"] == 1, "the LoRA has not moved"
    assert rows[2]["kl"] > 0 and rows[2]["velocity_norm"] != 1
    if method == "nft":
        run(recipe(folder, tmp_path / "anchored", method, {"kl": 1e-12}), ["run.steps=1"], say=quiet)
        assert log(tmp_path / "anchored")[0]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-5)


def test_an_epochs_rewards_are_logged_whichever_steps_are(folder, tmp_path):
    """Two updates an epoch and a line every second step: no line falls on the step that the epoch begins with."""
    run(recipe(folder, tmp_path), ["run.log_every=2"], say=quiet)
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["epoch"] for row in rows] == [0, 1] and all(row["reward_group_std"] > 0 for row in rows)
    parts = ("encode", "rollout", "decode", "reward", "reward_wait", "update")
    assert all(row[f"seconds/{part}"] >= 0 for row in rows for part in parts)
    assert all(row["seconds/update"] > 0 for row in rows)


def test_scorers_see_the_source_as_it_was_cut(tmp_path):
    """A photo of 60 x 40 at a stage of 32 x 32 is edited as its middle square: that is what the output is beside."""
    rng = numpy_rng(0, "photo")
    photo, mask, other = (Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(3))
    photo.save(tmp_path / "photo.png")
    asked = make_record("make it red", "photo.png", mask=mask, references=[other], size=(32, 32), root=tmp_path)
    family = SimpleNamespace(asked_size=lambda size: None, resample=Image.Resampling.LANCZOS)
    seen = []

    def conditions(records):
        seen.extend(records)
        return [f"condition of {record.id}" for record in records]

    feed = SimpleNamespace(trainable=family, conditions=conditions)
    samples = [Sample(k, f"{k}", "group", k, asked, (0, 0)) for k in range(2)]
    encode_batches(feed, RolloutRecipe(), [samples])
    assert len(seen) == 1 and all(sample.record is seen[0] for sample in samples)
    middle = photo.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(seen[0].load(seen[0].source)), np.asarray(middle))
    assert seen[0].load(seen[0].mask).size == (32, 32)
    assert seen[0].references[0] is asked.references[0] and asked.source.path == "photo.png"
    assert group_key(seen[0]) != group_key(asked) and samples[0].group == "group", "groups keep their keys"
    family.asked_size = lambda size: (48, 32)  # stretched as a whole, nothing is cut
    assert framed(family, asked) is asked
    del asked.meta["size"]
    family.asked_size = lambda size: None
    assert framed(family, asked) is asked


@pytest.mark.parametrize("width, height", [(61, 40), (40, 61), (63, 64), (31, 7), (45, 45)])
def test_photos_are_cut_as_in_the_public_loader(width, height):
    """The statements of UniWorld-V2's PromptImageDataset on sizes whose rest is odd."""
    photo = Image.fromarray(numpy_rng(1, "photo").integers(0, 256, (height, width, 3), dtype=np.uint8))
    least = min(photo.size)
    left, top = (width - least) // 2, (height - least) // 2
    public = photo.crop((left, top, left + least, top + least)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(cover(photo, (32, 32), Image.Resampling.LANCZOS)), np.asarray(public))


def test_a_watched_scorer_may_look_at_a_share():
    assert some(20, 0.05) == [0] and some(20, 0.25) == [0, 4, 8, 12, 16] and some(3, 1.0) == [0, 1, 2]
    assert some(2, 0.01) == [0] and some(0, 0.5) == []
    seen = []

    def second(batch):
        seen.append(len(batch))
        return [Score(0.25) for _ in batch]

    def first(batch):
        return [Score(k / 8) for k, _ in enumerate(batch)]

    mixture = Mixture([ScorerConfig("judge", first), ScorerConfig("truth", second, watch=True, share=0.25)])
    mixed = mixture.mixed(mixture.score([(None, None)] * 8), 0)
    assert seen == [2] and mixed.reasons == {}
    assert [v == 0.25 for v in mixed.parts["truth"]] == [k in (0, 4) for k in range(8)]
    for wrong in ({"share": 0.5}, {"share": 0.0, "watch": True}, {"share": 1.5, "watch": True}):
        with pytest.raises(WeftError, match="share"):
            Mixture([ScorerConfig("judge", first), ScorerConfig("truth", second, **wrong)])


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_counts_what_an_epoch_does(folder, tmp_path, monkeypatch):
    """The counts of forwards are those that a run makes (sample by sample), and of scorer calls."""
    cases = [
        ("nft", {}, {"steps": 4, "updates": 2}, {}),
        ("nft", {"kl": 0, "old": {"flat": 0, "rate": 0.5, "hold": 0.5}}, {"guidance": 2.0}, {"lora": None}),
        ("grpo", {"kl": 0.1}, {"guidance": 2.0, "inner_epochs": 2}, {}),
        ("grpo", {"kl": 0}, {"window": {"size": 2}, "steps": 4}, {"lora": None}),
    ]
    for k, (method, options, rollout, model) in enumerate(cases):
        given = recipe(folder, tmp_path / str(k), method, options, rollout=rollout, model=model)
        estimate = plan(given)
        epoch = estimate.epoch
        trainer = Trainer(read_recipe(given), {}, quiet)
        if method == "nft":
            trainer.method.objective.policies.old_is_default = False  # as from the second update on
        rows, calls = {True: 0, False: 0}, 0
        inner = trainer.model.velocity

        def velocity(x, sigma, batch, inner=inner, rows=rows):
            nonlocal calls
            calls += 1
            rows[torch.is_grad_enabled()] += len(x)
            return inner(x, sigma, batch)

        monkeypatch.setattr(trainer.model, "velocity", velocity)
        for _ in range(epoch.epochs and trainer.method.rollout.steps_per_epoch):
            trainer.train_step()
        doubled = method == "grpo" and trainer.method.rollout.guidance > 1
        assert rows[True] == epoch.graded * (2 if doubled else 1), (method, options)
        assert rows[False] == epoch.sampled + epoch.plain - (epoch.graded if doubled else 0), (method, options)
        assert calls == epoch.calls, (method, options)
        assert epoch.samples == 8 and epoch.batches == 2 and epoch.scorers == 1
        passes = epoch.passes(2 if trainer.recipe.model.lora is None else 1)
        assert estimate.flops == pytest.approx(epoch.epochs * passes * estimate.stages[0].flops)


@pytest.mark.slow
def test_plans_of_rollouts_read_well_and_refuse_with_numbers(folder, tmp_path):
    text = str(plan(recipe(folder, tmp_path)))
    assert "2 of 8 samples; in each 24 sample forwards in rollouts, 16 with and 32 without a gradient" in text
    assert "8 scores an epoch from 1 scorer in 2 requests; 16 in all" in text
    assert "old policy, reference" in text and "without encoders, decoder and rewards" in text
    with pytest.raises(WeftError, match="do not divide into batches of 3"):
        plan(recipe(folder, tmp_path), ["rollout.batch=3"])
    with pytest.raises(WeftError, match="is none"):
        plan(recipe(folder, tmp_path), ["method.options={timestep_fraction: 0.1}"])
    with pytest.raises(WeftError, match="mine.py:method"):
        plan(recipe(folder, tmp_path), ["method.name=mine.py:method"])
