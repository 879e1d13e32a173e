"""Advantages, group filters and mixtures: parity with the public code, and what happens to rewards that are missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weft.errors import WeftError
from weft.record import Record, Turn, image_part, make_record, text_part
from weft.reward import AdvantageConfig, FilterConfig, Mixture, ScorerConfig, advantages, group_key, group_stats
from weft.reward import keep_groups as keep
from weft.reward.advantage import normalised, optimality
from weft.reward.filter import banned
from weft.reward.mix import spearman, weight_at
from weft.types import Score

GOLDEN = json.loads((Path(__file__).parent / "golden" / "online.json").read_text())
NAN = float("nan")


def picture(level: int = 100) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


# -- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", ["global", "group"])
def test_advantages_are_those_of_the_public_trackers(std):
    g = GOLDEN["advantages"]
    found = normalised(np.array(g["rewards"]), g["prompts"], AdvantageConfig(std=std))
    np.testing.assert_allclose(found, g[std], rtol=0, atol=1e-12)


def test_filters_are_those_of_the_public_code():
    g = GOLDEN["advantages"]
    stats = group_stats(g["rewards"], g["prompts"])
    for i, prompt in enumerate(g["prompts"]):
        assert stats[prompt].std == pytest.approx(g["std"][i], abs=1e-12)
        assert stats[prompt].mean == pytest.approx(g["mean"][i], abs=1e-12)
    mask = keep(stats, FilterConfig("release_mask"))
    assert [mask[p] for p in g["prompts"]] == g["release_mask"]
    assert banned(stats, FilterConfig("ban")) == g["banned"] == ["sea"]
    paper = keep(stats, FilterConfig("paper"))
    assert [k for k, kept in paper.items() if not kept] == g["banned"]  # the same condition
    assert len(set(map(str, (mask, paper)))) == 2, "the rules must differ on these rewards"


def test_normalised_mixing_is_mixgrpos():
    g = GOLDEN["mixgrpo"]
    names = ["a", "b"]
    scorers = [ScorerConfig(n, lambda batch: [], weight=w) for n, w in zip(names, g["weights"], strict=True)]
    mixture = Mixture(scorers, "normalised")
    scores = [Score(None, {"a": a, "b": b}, "later") for a, b in zip(g["a"], g["b"], strict=True)]
    keys = [str(i // g["group"]) for i in range(len(scores))]
    config = AdvantageConfig(std="group", ddof=1, eps=1e-8, clip=100)
    found = mixture.advantages(mixture.mixed(scores, 0), keys, 0, config)
    np.testing.assert_allclose(found, g["advantages"], rtol=0, atol=1e-12)


# -- properties -----------------------------------------------------------------------------------------------------

rewards = st.lists(st.floats(-10, 10, allow_nan=False, width=32), min_size=4, max_size=24)


@settings(max_examples=60, deadline=None)
@given(rewards, st.sampled_from(["global", "group", "none"]), st.integers(1, 4))
def test_advantages_are_centred_bounded_and_do_not_depend_on_order(values, std, groups):
    keys = [str(i % groups) for i in range(len(values))]
    config = AdvantageConfig(std=std)
    found = advantages(values, keys, config)
    raw = normalised(np.array(values), keys, config)
    for key in set(keys):
        own = np.array(keys) == key
        if own.sum() >= 2:
            assert abs(raw[own].sum()) < 1e-6 * max(1, np.abs(raw[own]).max())
        else:
            assert np.isnan(found[own]).all()
    assert np.nanmax(np.abs(found), initial=0) <= config.clip
    turned = advantages(values[::-1], keys[::-1], config)[::-1]
    np.testing.assert_allclose(found, turned, atol=1e-6)
    r = optimality(found[~np.isnan(found)], config.clip)
    assert ((r >= 0) & (r <= 1)).all()


@settings(max_examples=40, deadline=None)
@given(rewards, st.data())
def test_a_missing_reward_is_as_if_the_sample_were_not_there(values, data):
    keys = [str(i % 2) for i in range(len(values))]
    gone = data.draw(st.sets(st.integers(0, len(values) - 1), max_size=len(values) - 1))
    with_gaps = [NAN if i in gone else v for i, v in enumerate(values)]
    found = advantages(with_gaps, keys)
    kept = [i for i in range(len(values)) if i not in gone]
    alone = advantages([values[i] for i in kept], [keys[i] for i in kept])
    np.testing.assert_array_equal(found[kept], alone)
    assert np.isnan(found[list(gone)]).all()


def test_a_group_with_too_few_rewards_is_dropped_but_counts_in_the_global_deviation():
    values, keys = [0.0, 1.0, 5.0, NAN], ["a", "a", "b", "b"]
    found = advantages(values, keys)
    assert np.isnan(found[2:]).all()
    scale = np.std([0.0, 1.0, 5.0]) + 1e-4
    np.testing.assert_allclose(found[:2], [-0.5 / scale, 0.5 / scale])
    assert np.isnan(advantages(values, keys, AdvantageConfig(min_valid=3))).all()


def test_advantage_modes():
    values, keys = [0.0, 1.0, 2.0], ["a"] * 3
    got = {m: advantages(values, keys, AdvantageConfig(mode=m)).tolist() for m in ("binary", "one_only")}
    assert got == {"binary": [-1, 0, 1], "one_only": [0, 0, 1]}
    assert min(advantages(values, keys, AdvantageConfig(mode="positive_only"))) == 0
    assert max(advantages(values, keys, AdvantageConfig(mode="negative_only"))) == 0


def test_infinite_rewards_and_wrong_lengths_are_refused():
    for wrong in ({"mode": "postive_only"}, {"std": "batch"}):
        with pytest.raises(WeftError, match="is unknown; choose one of"):
            AdvantageConfig(**wrong)
    with pytest.raises(WeftError, match="infinite"):
        advantages([1.0, math.inf], ["a", "a"])
    with pytest.raises(WeftError, match="group keys"):
        advantages([1.0, 2.0], ["a"])


def test_group_keys_tell_pictures_apart_and_join_equal_requests():
    a = make_record("make it blue", picture(1), id="a")
    same = make_record("make it blue", picture(1), id="b")
    other = make_record("make it blue", picture(2), id="a")
    text = make_record("make it red", picture(1), id="a")
    assert group_key(a) == group_key(same)
    assert len({group_key(r) for r in (a, other, text)}) == 3
    target = make_record("make it blue", picture(1), id="a", target=picture(9))
    assert group_key(a) == group_key(target), "the answer is not part of the request"
    cat, dog = (second_turn("make it red", after=picture(k)) for k in (1, 2))
    assert group_key(cat) != group_key(dog), "what the assistant made before is the source of the next request"


def second_turn(instruction, after):
    turns = [Turn("user", [text_part("draw")]), Turn("assistant", [image_part(after)])]
    return Record("t", "edit", [*turns, Turn("user", [text_part(instruction)])])


# -- mixtures -------------------------------------------------------------------------------------------------------


def constant(value):
    return lambda batch: [Score(value) for _ in batch]


def total(mixture, batch=2, step=0):
    pairs = [(make_record("x", id=str(i)), picture()) for i in range(batch)]
    return mixture.mixed(mixture.score(pairs), step)


def test_sum_product_scale_and_watch():
    scorers = [
        ScorerConfig("a", constant(0.5), weight=2.0),
        ScorerConfig("b", constant(26.0), scale=1 / 26, offset=1.0),
        ScorerConfig("truth", constant(0.1), watch=True),
    ]
    assert total(Mixture(scorers)).total.tolist() == [3.0, 3.0]
    assert total(Mixture(scorers, "product")).total.tolist() == [0.5, 0.5]  # 0.5^2 * 2
    assert total(Mixture(scorers)).parts["truth"].tolist() == [0.1, 0.1]


def test_weights_move_with_the_step():
    points = [[0, 0.0], [100, 1.0]]
    assert [weight_at(points, s) for s in (0, 25, 100, 900)] == [0, 0.25, 1, 1]
    mixture = Mixture([ScorerConfig("a", constant(1.0)), ScorerConfig("b", constant(10.0), weight=points)])
    assert total(mixture, step=50).total.tolist() == [6.0, 6.0]
    with pytest.raises(WeftError, match="rising"):
        Mixture([ScorerConfig("a", constant(1.0), weight=[[5, 1.0], [5, 2.0]])])
    with pytest.raises(WeftError, match="rising"):
        Mixture([ScorerConfig("a", constant(1.0), weight=[0.2, 1.0])])


def broken(batch):
    raise RuntimeError("no connection")


@pytest.mark.parametrize(
    ("scorer", "reason"),
    [
        (broken, "no connection"),
        (constant(math.nan), "nan"),
        (constant(math.inf), "inf"),
        (lambda batch: [Score(None, reason="judge is away") for _ in batch], "judge is away"),
        (lambda batch: [Score(1.0)], "1 scores for 2"),
        (lambda batch: [0.5 for _ in batch], "float"),
        (lambda batch: [Score("good") for _ in batch], "good"),
        (lambda batch: [Score(torch.ones(2)) for _ in batch], "tensor"),
    ],
)
def test_a_failure_is_missing_and_never_a_number(scorer, reason):
    mixed = total(Mixture([ScorerConfig("good", constant(1.0)), ScorerConfig("bad", scorer)]))
    assert np.isnan(mixed.total).all() and np.isnan(mixed.parts["bad"]).all()
    assert all(reason in r for r in mixed.reasons.values()) and len(mixed.reasons) == 2
    assert mixed.parts["good"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(1), torch.tensor(0.5)], ids=lambda n: type(n).__name__)
def test_numbers_of_numpy_and_torch_become_floats_that_travel(number):
    made = Mixture([ScorerConfig("a", lambda batch: [Score(number, {"part": number, "none": None}) for _ in batch])])
    pairs = [(make_record("x"), picture())]
    scores = made.score(pairs)
    assert json.loads(json.dumps(scores[0].parts)) == {"a": float(number), "a/part": float(number)}
    assert made.mixed(scores, 0).total.tolist() == [float(number)]


def test_an_even_group_is_exactly_even():
    """The mean of twelve times 0.1 is not 0.1: its rounding must not pass for a spread."""
    values, keys = [0.1] * 12 + [0.2, 0.9], ["even"] * 12 + ["b"] * 2
    assert np.std(values[:12]) != 0
    assert group_stats(values, keys)["even"].std == 0.0
    for std in ("global", "group", "none"):
        assert advantages(values, keys, AdvantageConfig(std=std, eps=1e-8))[:12].tolist() == [0.0] * 12


def test_a_failing_scorer_of_weight_zero_masks_nothing():
    mixture = Mixture(
        [ScorerConfig("good", constant(1.0)), ScorerConfig("later", broken, weight=[[10, 0.0], [20, 1.0]])]
    )
    assert total(mixture, step=0).total.tolist() == [1.0, 1.0]
    assert np.isnan(total(mixture, step=15).total).all()


def test_impossible_mixtures_are_refused():
    with pytest.raises(WeftError, match="one name"):
        Mixture([ScorerConfig("a", broken), ScorerConfig("a", broken)])
    with pytest.raises(WeftError, match="no scorer"):
        Mixture([ScorerConfig("a", broken, watch=True)])
    with pytest.raises(WeftError, match="negative"):
        total(Mixture([ScorerConfig("a", constant(-1.0))], "product"))
    with pytest.raises(WeftError, match="every weight is 0"):
        total(Mixture([ScorerConfig("a", constant(1.0), weight=0.0)]))


def test_rank_correlation():
    a = np.array([1.0, 2.0, NAN, 4.0, 5.0])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert math.isnan(spearman(a, np.zeros(5)))
