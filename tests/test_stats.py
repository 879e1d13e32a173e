"""Intervals that cover, are deterministic and refuse what they cannot answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from weft.errors import WeftError
from weft.evals import stats

numbers = st.lists(st.floats(-1e3, 1e3, allow_nan=False, width=32), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(numbers)
def test_bootstrap_brackets_the_mean_and_stays_within_the_data(values: list[float]) -> None:
    interval = stats.bootstrap(values, resamples=400)
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert interval.value == pytest.approx(np.mean(values))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert interval == stats.bootstrap(values, resamples=400)
    assert interval.count == len(values)


@settings(max_examples=30, deadline=None)
@given(numbers, st.floats(-50, 50), st.floats(0.1, 9))
def test_bootstrap_moves_with_the_data(values: list[float], shift: float, scale: float) -> None:
    before = stats.bootstrap(values, resamples=200)
    after = stats.bootstrap([scale * v + shift for v in values], resamples=200)
    for name in ("value", "low", "high"):
        assert getattr(after, name) == pytest.approx(scale * getattr(before, name) + shift, rel=1e-6, abs=1e-6)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = stats.bootstrap(generator.random(100) < 0.7, resamples=400, seed=trial)
        hits += interval.low <= 0.7 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_bootstrap_agrees_with_scipy() -> None:
    data = np.random.default_rng(3).exponential(size=80)
    theirs = scipy_stats.bootstrap((data,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    ours = stats.bootstrap(data, resamples=4000)
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)


def test_bootstrap_of_another_statistic_and_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.arange(101.0)
    median = stats.bootstrap(data, statistic=lambda row: float(np.median(row)), resamples=300)
    assert median.value == 50 and 30 < median.low < 50 < median.high < 70
    whole = stats.bootstrap(data, resamples=300)
    monkeypatch.setattr(stats, "CHUNK", 7 * len(data))
    assert stats.bootstrap(data, resamples=300) == whole  # memory must not change the numbers


def test_clusters_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 10)
    values = np.repeat(generator.random(30), 10)
    naive, honest = stats.bootstrap(values), stats.bootstrap(values, clusters=clusters.tolist())
    assert honest.high - honest.low > 2 * (naive.high - naive.low)
    assert honest.value == naive.value
    general = stats.bootstrap(values, clusters=clusters.tolist(), statistic=lambda row: float(row.mean()))
    assert (general.low, general.high) == pytest.approx((honest.low, honest.high))


def test_macro_mean() -> None:
    # A group counts once however many records it has.
    macro = stats.macro_mean({"a": [1.0] * 400, "b": [0, 0, 0, 1]})
    assert macro.value == pytest.approx(0.625)
    assert macro.low < 0.625 < macro.high and macro.count == 404


def test_paired_difference_cancels_what_records_share() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(size=300) * 10
    a, b = hard + 0.2 + generator.normal(size=300) * 0.1, hard
    paired, loose = stats.paired_difference(a, b), stats.difference(a, b)
    assert paired.low > 0.15 and paired.high < 0.25
    assert loose.value == pytest.approx(paired.value) and loose.low < 0 < loose.high
    assert stats.paired_difference(b, b) == stats.Interval(0.0, 0.0, 0.0, 300)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_wilson_equals_scipy(count: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, count))
    ours = stats.wilson(successes, count)
    theirs = scipy_stats.binomtest(successes, count).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1 and ours.low < ours.high


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_spearman_equals_scipy_and_ignores_monotone_maps(pairs: list[tuple[int, int]]) -> None:
    a, b = map(list, zip(*pairs, strict=True))
    if len(set(a)) == 1 or len(set(b)) == 1:
        with pytest.raises(WeftError, match="constant"):
            stats.spearman(a, b)
        return
    value = stats.spearman(a, b)
    assert value == pytest.approx(scipy_stats.spearmanr(a, b).statistic, abs=1e-9)
    assert stats.spearman([x**3 for x in a], b) == pytest.approx(value, abs=1e-12)
    assert stats.spearman(b, a) == pytest.approx(value, abs=1e-12)


def test_pairwise_accuracy() -> None:
    one = [0, 0, 0]
    assert stats.pairwise_accuracy([1, 2, 3], [10, 20, 30], one).value == 1  # type: ignore[union-attr]
    assert stats.pairwise_accuracy([3, 2, 1], [10, 20, 30], one).value == 0  # type: ignore[union-attr]
    tied = stats.pairwise_accuracy([5, 5, 5], [1, 2, 2], one)
    assert tied and tied.value == 0.5 and tied.count == 2  # the pair of equal truth is not asked
    grouped = stats.pairwise_accuracy([1, 2, 9, 8], [0, 1, 0, 1], groups=["p", "p", "q", "q"])
    assert grouped and grouped.value == 0.5 and grouped.count == 2  # across groups nothing is compared
    assert (grouped.low, grouped.high) == (0, 1)  # groups are resampled, not pairs
    assert stats.pairwise_accuracy([1, 2], [3, 3], [0, 0]) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=20))
def test_pairwise_accuracy_is_kendalls_count_and_of_reversed_scores_its_complement(
    rows: list[tuple[int, int, int]],
) -> None:
    scores, truth, groups = map(list, zip(*rows, strict=True))
    forward = stats.pairwise_accuracy(scores, truth, groups)
    backward = stats.pairwise_accuracy([-s for s in scores], truth, groups)
    pairs = [(a, b) for a in rows for b in rows if a[2] == b[2] and a[1] > b[1]]
    if not pairs:
        assert forward is backward is None
        return
    assert forward and backward and forward.count == len(pairs)
    assert forward.value == pytest.approx(np.mean([(np.sign(a[0] - b[0]) + 1) / 2 for a, b in pairs]))
    assert forward.value + backward.value == pytest.approx(1)
    assert 0 <= forward.low <= forward.value <= forward.high <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.bootstrap([]), "non-empty"),
        (lambda: stats.bootstrap([1.0, float("nan")]), "1 of 2 values are not finite"),
        (lambda: stats.bootstrap([1.0], level=95), "between 0 and 1"),
        (lambda: stats.bootstrap([1, 2], clusters=["a"]), "1 group labels for 2 values"),
        (lambda: stats.paired_difference([1], [1, 2]), "1 and 2"),
        (lambda: stats.wilson(3, 2), "3 successes of 2"),
        (lambda: stats.macro_mean({}), "at least one group"),
        (lambda: stats.spearman([1], [1]), "two or more pairs"),
    ],
)
def test_refusals_say_the_number(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(WeftError, match=message):
        call()
