"""Post-training end to end on a tiny model: both methods through the one loop, exact resume, refusals, masks, bans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny import tiny_kontext_folder
from weft.errors import WeftError
from weft.record import make_record
from weft.reward import Mixture, ScorerConfig
from weft.sample.rollout import sample_flow
from weft.train import Preempted, read_recipe, run
from weft.train.checkpoint import newest, read_checkpoint
from weft.train.geometry import RolloutRecipe, check_geometry
from weft.train.loop import Trainer
from weft.types import Score

HERE = __file__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_kontext_folder(tmp_path_factory.mktemp("model") / "tiny")


def requests(count=6, sizes=1):
    """Edits of plain pictures, of one or of two sizes."""
    shapes = [(64, 64), (96, 64)][:sizes]
    return [
        make_record(f"make it {w}", Image.new("RGB", shapes[i % sizes], (40 * i, 200 - 30 * i, 90)), id=f"r{i}")
        for i, w in zip(range(count), "red blue green small big dotted".split() * 9, strict=False)
    ]


def bright(batch):
    """The mean of a picture: a reward that a model can raise in a few steps."""
    return [Score(float(np.asarray(image).mean()) / 255, {"red": 0.5}) for _, image in batch]


def dark(batch):
    return [Score(1 - s.value) for s in bright(batch)]


def level(batch, value=0.5):
    return [Score(value) for _ in batch]


def sometimes(batch):
    """Missing for two requests, and for single samples of others."""
    out = []
    for i, (score, (record, _)) in enumerate(zip(bright(batch), batch, strict=True)):
        gone = record.id in ("r0", "r1") or i == 1
        out.append(Score(None, reason="the judge is away") if gone else score)
    return out


LORA = {"rank": 4, "alpha": 8, "targets": ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2"]}


def recipe(folder, out, method="nft", options=None, **sections):
    tree = {
        "model": {"path": str(folder), "lora": LORA},
        "method": {"name": method, "options": options or {}},
        "rollout": {"groups": 2, "group_size": 4, "batch": 4, "steps": 3, "updates": 2},
        "reward": {"scorers": [{"call": f"{HERE}:bright"}]},
        "data": [{"source": {"call": f"{HERE}:requests"}}],
        "optim": {"lr": 1e-3},
        "run": {"folder": str(out), "steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 4, "threads": 1},
    }
    if method == "grpo":
        tree["rollout"] |= {"kind": "flow_sde", "eta": 0.7}
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return tree


def quiet(line):
    pass


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def trained(out):
    found = read_checkpoint(newest(Path(out)))
    return {f"{f}:{k}": v for f, group in found.tensors.items() for k, v in group.items()}


def same(a, b):
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


# -- both methods run -------------------------------------------------------------------------------------------------

VARIANTS = {
    "nft": ("nft", {}, {}),
    "nft-full-old": (
        "nft",
        {"old": {"flat": 0, "rate": 0.2, "hold": 0.5}, "norm_guard": 0.1},
        {"model": {"lora": None}},
    ),
    "nft-sde-sizes": ("nft", {"kl": 0}, {"rollout": {"kind": "dance_sde", "eta": 0.3, "solver": "dpmpp_2m_release"}}),
    "grpo": ("grpo", {}, {}),
    "grpo-full-exact": ("grpo", {"kl_form": "exact", "norm_guard": 0.1}, {"model": {"lora": None}}),
    "grpo-guided": ("grpo", {"kl_form": "velocity"}, {"rollout": {"guidance": 3.0}}),
    "grpo-fast-cps": ("grpo", {"kl": 0, "clip": 1e-5}, {"rollout": {"kind": "cps", "eta": 0.8, "window": {"size": 1}}}),
    "grpo-mix": (
        "grpo",
        {"guard": True},
        {"rollout": {"steps": 4, "solver": "dpmpp_2m", "window": {"size": 2, "move": "progressive", "every": 1}}},
    ),
    "grpo-dance": (
        "grpo",
        {
            "kl": 0,
            "timesteps": "random",
            "timestep_fraction": 0.7,
            "advantage": {"std": "group", "ddof": 1, "eps": 1e-8},
        },
        {
            "rollout": {
                "kind": "dance_sde", "eta": 0.3, "same_latent": True, "steps": 4, "inner_epochs": 2,
                "window": {"size": 3, "move": "fixed"},
            }
        },
    ),
}  # fmt: skip


SLOW = ("nft-full-old", "grpo-full-exact", "grpo-dance", "nft-sde-sizes")


@pytest.mark.parametrize("name", [pytest.param(v, marks=pytest.mark.long) if v in SLOW else v for v in VARIANTS])
def test_every_variant_trains_logs_and_exports(name, folder, tmp_path):
    method, options, sections = VARIANTS[name]
    sizes = 2 if name.endswith("sizes") else 1
    data = [{"source": {"call": f"{HERE}:requests", "args": {"sizes": sizes}}}]
    result = run(recipe(folder, tmp_path, method, options, data=data, **sections), say=quiet)
    rows = log(tmp_path)
    assert len(rows) == 4 and all(np.isfinite(row["loss"]) for row in rows)
    assert rows[0]["reward"] == rows[0]["reward/bright"] and rows[0]["reward/bright/red"] == 0.5
    assert rows[0]["reward_group_std"] > 0 and rows[0]["reward_missing"] == 0 and rows[0]["groups"] == 2
    assert {"seconds/encode", "seconds/rollout", "seconds/decode", "seconds/reward"} <= set(rows[0])
    if method == "grpo":
        # a replay in another batch is the rollout up to fp32 rounding
        assert rows[0]["ratio_error_first"] < 2e-6, rows[0]["ratio_error_first"]
        assert any(key.startswith("log_prob_gap@") for key in rows[0])
        # flow_sde's and cps's first noise level carries no information at some seeds; the second update has moved on
        assert rows[1]["ratio_error"] > 0
    else:
        assert rows[1]["old_distance"] > 0 or "old" in options
    if options.get("kl", 1) or options.get("norm_guard"):
        assert rows[-1]["kl"] > 0 and 0.5 < rows[-1]["velocity_norm"] < 1.5
    assert (result.export / "training.json").is_file()


def test_a_python_reward_and_a_mixture_replace_the_recipes(folder, tmp_path):
    tree = recipe(folder, tmp_path / "a", reward=None)
    assert run(tree, reward=bright, say=quiet).last["reward/bright"] > 0
    mixture = Mixture([ScorerConfig("light", bright), ScorerConfig("shade", dark, watch=True)])
    last = run(recipe(folder, tmp_path / "b", reward=None), reward=mixture, say=quiet).last
    assert last["gap/shade"] == pytest.approx(last["reward/light"] - last["reward/shade"])
    assert last["rank/shade"] == pytest.approx(-1)
    with pytest.raises(WeftError, match="both"):
        run(recipe(folder, tmp_path / "c"), reward=bright, say=quiet)
    with pytest.raises(WeftError, match="neither"):
        run(recipe(folder, tmp_path / "d", reward=None), say=quiet)


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nft", "grpo"])
def test_resume_anywhere_within_an_epoch_is_the_uninterrupted_run(method, folder, tmp_path):
    options = {"old": {"flat": 1, "rate": 0.2, "hold": 0.5}} if method == "nft" else {"reference": "start"}
    sections = {"run": {"steps": 5, "ema": {}}, "rollout": {"updates": 2, "inner_epochs": 2, "batch": 4}}
    sections["run"] = {**recipe(folder, tmp_path / "whole")["run"], **sections["run"]}
    run(recipe(folder, tmp_path / "whole", method, options, **sections), say=quiet)
    whole = trained(tmp_path / "whole")
    for stop in (1, 3, 4):
        out = tmp_path / f"stop{stop}"
        tree = recipe(folder, out, method, options, **sections)
        tree["run"] |= {"folder": str(out)}
        first = Trainer(read_recipe(tree), {}, quiet)
        for _ in range(stop):
            first.train_step()
        first.save()
        assert ("rollouts" in read_checkpoint(newest(out)).tensors) == (stop != 4)
        run(tree, say=quiet)
        assert not same(whole, trained(out)), stop
    assert any(k.startswith(f"policy_{'old' if method == 'nft' else 'start'}:") for k in whole)


def test_a_signal_during_rollouts_saves_the_last_step_and_continues_exactly(folder, tmp_path):
    run(recipe(folder, tmp_path / "whole"), say=quiet)
    tree = recipe(folder, tmp_path / "stopped", reward=None)
    calls = []

    def reward(batch):
        calls.append(len(batch))
        if len(calls) == 3:  # the first batch of the second epoch
            trainer.stop = 15
        return bright(batch)

    trainer = Trainer(read_recipe(tree), {}, quiet, reward)
    with pytest.raises(Preempted):
        trainer.run()
    assert newest(tmp_path / "stopped").name == "step-000002"
    tree["reward"] = recipe(folder, tmp_path)["reward"]
    tree["run"]["allow_changes"] = True
    run(tree, say=quiet)
    assert not same(trained(tmp_path / "whole"), trained(tmp_path / "stopped"))


# -- what is trained on -----------------------------------------------------------------------------------------------


def test_missing_scores_mask_their_samples_and_drop_small_groups(folder, tmp_path):
    rollout = {"groups": 6, "group_size": 2, "batch": 4, "updates": 1}
    said = []
    tree = recipe(folder, tmp_path, rollout=rollout, reward={"scorers": [{"call": f"{HERE}:sometimes"}]})
    run(tree, ["run.steps=1", "run.batch_size=2"], say=said.append)
    row = log(tmp_path)[0]
    # two requests are never judged; of the others, batches of 4 lose their second sample
    assert row["groups"] == 6 and 0 < row["reward_missing"] < 1 and row["groups_dropped"] >= 2
    assert row["samples_trained"] <= 12 - 4 and row["samples"] if "samples" in row else True
    assert any("without a reward" in line and "away" in line for line in said)


def test_nothing_to_learn_from_changes_no_weight_and_ends_the_run(folder, tmp_path):
    flat = {"scorers": [{"call": f"{HERE}:level", "args": {"value": 0.99}}]}
    tree = recipe(folder, tmp_path / "even", "grpo", reward=flat, rollout={"updates": 1, "patience": 2})
    trainer = Trainer(read_recipe(tree), {}, quiet)
    before = {k: p.detach().clone() for k, p in trainer.parameters.items()}
    values = trainer.train_step()
    assert values["reward_zero_std"] == 1 and values["samples"] == 0 and trainer.step == 1
    assert all(torch.equal(before[k], p) for k, p in trainer.parameters.items())
    with pytest.raises(WeftError, match="2 epochs in a row"):
        trainer.train_step()
    away = {"scorers": [{"call": f"{HERE}:nowhere"}]}
    with pytest.raises(WeftError, match="nowhere"):
        run(recipe(folder, tmp_path / "x", reward=away), say=quiet)
    crash = {"scorers": [{"call": f"{HERE}:crash"}]}
    with pytest.raises(WeftError, match=r"not one of 8 samples has a reward: crash: ZeroDivisionError in test_online"):
        run(recipe(folder, tmp_path / "y", reward=crash), say=quiet)


def crash(batch):
    return [Score(1 / 0)]


def test_filters_drop_groups_and_bans_last(folder, tmp_path):
    good = {"scorers": [{"call": f"{HERE}:good"}]}
    options = {"filter": {"rule": "release_mask"}}
    tree = recipe(folder, tmp_path / "mask", options=options, reward=good, rollout={"groups": 6, "updates": 1})
    run(tree, ["run.steps=1"], say=quiet)
    row = log(tmp_path / "mask")[0]
    assert row["groups_filtered"] == 3 and row["samples_trained"] == 12
    options = {"filter": {"rule": "ban"}}
    tree = recipe(folder, tmp_path / "ban", options=options, reward=good, rollout={"groups": 3, "updates": 1})
    run(tree, ["run.steps=5"], say=quiet)
    rows = log(tmp_path / "ban")
    assert rows[-1]["groups_banned"] == 3
    # the banned requests are replaced: by then nothing but the other three is sampled
    assert rows[-1]["reward_group_std"] > 0.1 and rows[-1]["groups"] == 3
    state = read_checkpoint(newest(tmp_path / "ban")).state["method"]
    assert len(state["banned"]) == 3


def test_a_ban_lasts_when_the_data_have_no_other_requests(folder, tmp_path):
    """Four of six requests are wanted and three are settled: what cannot be replaced is left out, not sampled again."""
    banning = {"filter": {"rule": "ban"}}
    reward = {"scorers": [{"call": f"{HERE}:good"}]}
    rollout = {"groups": 4, "updates": 1}
    run(recipe(folder, tmp_path / "few", options=banning, reward=reward, rollout=rollout), ["run.steps=5"], say=quiet)
    last = log(tmp_path / "few")[-1]
    assert last["groups_banned"] == 3 and last["groups"] == 3 and last["reward_group_std"] > 0.1
    all_settled = {"scorers": [{"call": f"{HERE}:level", "args": {"value": 0.95}}]}
    tree = recipe(folder, tmp_path / "none", options=banning, reward=all_settled, rollout=rollout | {"patience": 9})
    with pytest.raises(WeftError, match="all 6 requests are banned as settled"):
        run(tree, ["run.steps=5"], say=quiet)


def good(batch):
    """Requests of even number are settled; the others are wildly mixed."""
    out = []
    for i, (record, _) in enumerate(batch):
        settled = int(record.id[1:]) % 2 == 0
        out.append(Score(0.95 if settled else float(i % 2)))
    return out


def test_the_update_uses_the_advantages_of_its_own_samples(folder, tmp_path):
    trainer = Trainer(read_recipe(recipe(folder, tmp_path)), {}, quiet)
    first, second = trainer.method.batch(0), trainer.method.batch(1)
    assert len(first.examples) == len(second.examples) == 4 * int(3 * 0.99) == first.count
    ids = {item.sample.id for item in first.examples} | {item.sample.id for item in second.examples}
    assert len(ids) == 8, "each sample is in one update"
    rewards = {}
    for fed in (first, second):
        for item in fed.examples:
            s = item.sample
            picture = trainer.model.decode(s.x0[None], [s.condition.size])[0]
            rewards.setdefault(s.group, {})[s.advantage] = bright([(s.record, picture)])[0].value
    for table in rewards.values():  # within a group the order of advantages is that of the rewards
        values = [table[a] for a in sorted(table)]
        assert values == sorted(values) and len(values) == 4
    assert len(list(first.cut())) == 2 and all(len(part) == 4 for part, _ in first.cut())


def test_the_watched_scorers_gap_raises_an_alarm(folder, tmp_path):
    said = []
    reward = {"scorers": [{"call": f"{HERE}:bright"}, {"call": f"{HERE}:dark", "watch": True}], "alarm": -1.0}
    run(recipe(folder, tmp_path, reward=reward), ["run.steps=1"], say=said.append)
    assert any(line.startswith("ALARM") for line in said)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "sections", "message"),
    [
        ("grpo", {}, {"rollout": {"kind": "ode", "eta": 0.0}}, "ODE rollout have none"),
        ("grpo", {}, {"rollout": {"eta": 0.0}}, "eta"),
        ("grpo", {}, {"rollout": {"kind": "cps", "window": {"size": 3, "range": [0, 3]}}}, "without noise"),
        ("grpo", {"timestep_fraction": 1.0}, {"rollout": {"kind": "cps"}}, "without noise"),
        ("grpo", {}, {"model": {"lora": {**LORA, "dropout": 0.1}}}, "drops out 0.1"),
        ("grpo", {"timestep_fraction": 0.5}, {"rollout": {"window": {"size": 1}}}, "its 1 steps are trained"),
        ("grpo", {"reference": "off"}, {"model": {"lora": None}}, "LoRA"),
        ("grpo", {"clip": 0}, {}, "clip"),
        ("grpo", {"klform": "exact"}, {}, "kl_form"),
        ("nft", {"old": "linear"}, {}, "linear_to_0_5"),
        ("nft", {"beta": 0}, {}, "beta"),
        ("nft", {"timestep_fraction": 0.1}, {}, "is none"),
        ("nft", {"advantage": {"clip": 0}}, {}, "advantage.clip"),
        ("nft", {"advantage": {"min_valid": 5}}, {}, "min_valid is 5, but a group has 4"),
        ("nft", {}, {"rollout": {"eta": 0.7}}, "eta is 0.7, but the ode kind adds no noise"),
        ("nft", {}, {"rollout": {"solver": "dpm2"}}, "solver.*dpmpp_2m"),
        ("nft", {}, {"rollout": {"guidance": 0.0}}, "guidance"),
        ("nft", {}, {"rollout": {"negative": "blurred"}}, "not used at rollout.guidance 1"),
        ("nft", {}, {"rollout": {"batch": 3}}, "do not divide into batches of 3.*set rollout.batch to"),
        ("nft", {}, {"rollout": {"updates": 3}}, "8 samples.*3 updates; set rollout.updates to"),
        ("nft", {}, {"rollout": {"group_size": 1}}, "fewer than 2"),
        ("nft", {}, {"rollout": {"groups": 8}}, "only 6 records"),
        ("nft", {}, {"rollout": {"window": {"size": 2}}}, "needs noise"),
        ("grpo", {}, {"rollout": {"window": {"size": 9}}}, "do not fit"),
        ("nft", {}, {"run": {"batch_size": 5, "steps": 4, "folder": "x"}}, "an update has 4 samples"),
        ("nft", {}, {"run": {"accumulate": 2, "steps": 4, "folder": "x"}}, "accumulate"),
        ("nft", {}, {"rollout": None}, "needs a rollout section"),
        ("sft", {}, {}, "takes no reward"),
        ("ppo", {}, {}, "there is no method"),
        ("nft", {}, {"reward": {"scorers": [{"call": f"{HERE}:level", "args": {"valu": 1}}]}}, "did you mean"),
    ],
)
def test_impossible_recipes_are_refused_at_the_start(method, options, sections, message, folder, tmp_path):
    tree = recipe(folder, tmp_path, method, options, **sections)
    tree["run"]["folder"] = str(tmp_path)
    with pytest.raises(WeftError, match=message):
        Trainer(read_recipe(tree), {}, quiet)


def test_geometry_over_processes():
    rollout = RolloutRecipe(groups=24, group_size=12, batch=9, updates=1)
    check_geometry(rollout, 3, 8, 100)  # 288 = 4 x 72
    with pytest.raises(WeftError, match=r"24 groups x 12 = 288 samples .* batches of 9 on 10 processes \(90 at once\)"):
        check_geometry(rollout, 3, 10, 100)
    with pytest.raises(WeftError, match="multiple of 7"):
        check_geometry(rollout, 3, 7, 100)


# -- it learns --------------------------------------------------------------------------------------------------------


def grey(latents, sizes):
    """A decoder that shows what is learned: level = the mean of the first latent channel."""
    levels = (127.5 + 80 * latents[:, 0].mean((1, 2))).clamp(0, 255).round().to(torch.uint8).tolist()
    return [Image.new("RGB", (w, h), (v, v, v)) for v, (h, w) in zip(levels, sizes, strict=True)]


def measured(model):
    conditions = [c for c in model.encode(requests(4)) for _ in range(4)]
    rollout = sample_flow(model, conditions, seeds=list(range(16)), steps=3)
    return float(np.mean([s.value for s in bright([(None, p) for p in grey(rollout.latents, rollout.sizes)])]))


@pytest.mark.parametrize("goal", ["bright", "dark"])
@pytest.mark.parametrize("method", ["nft", "grpo"])
def test_a_clear_reward_goes_up(method, goal, folder, tmp_path):
    options = {"old": "copy", "kl": 0} if method == "nft" else {"kl": 0, "clip": 1e-2}
    reward = {"scorers": [{"call": f"{HERE}:{goal}"}]}
    tree = recipe(folder, tmp_path, method, options, model={"lora": None}, optim={"lr": 2e-3}, reward=reward)
    tree["rollout"] |= {"group_size": 8, "batch": 16, "updates": 1}
    tree["run"] |= {"steps": 7, "batch_size": 16}
    trainer = Trainer(read_recipe(tree), {}, quiet)
    trainer.model.decode = grey
    before = measured(trainer.model)
    for _ in range(7):
        trainer.train_step()
    gain = measured(trainer.model) - before
    assert gain > 0.15 if goal == "bright" else gain < -0.15, (before, gain)


def test_checkpoints_hold_the_adapter_and_the_old_policy_only(folder, tmp_path):
    run(recipe(folder, tmp_path), ["run.steps=2"], say=quiet)
    path = newest(tmp_path)
    model, old = load_file(path / "model.safetensors"), load_file(path / "policy_old.safetensors")
    assert set(model) == set(old) and all("lora_" in key for key in model)
    assert not (path / "rollouts.safetensors").exists(), "an epoch's end needs no rollouts"
