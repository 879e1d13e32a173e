"""Batches are pure functions of (seed, step): exact ratios, whole epochs, homogeneous groups and buckets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.sampler import Interleave, Sampler, Span, Stream
from weft.errors import WeftError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 400))
def test_every_prefix_keeps_the_ratio(weights, t):
    mix = Interleave(weights)
    sequence = [mix.at(i) for i in range(t)]
    for i, weight in enumerate(weights):
        assert mix.count(i, t) == sequence.count(i)
        assert abs(sequence.count(i) - t * weight / sum(weights)) <= 1
        assert mix.count(i, 3 * mix.period) * sum(weights) == 3 * mix.period * weight


def test_fractions_and_bad_weights():
    assert [Interleave([0.5, 1.5]).at(i) for i in range(4)].count(0) == 1
    with pytest.raises(WeftError, match="positive"):
        Interleave([1, 0])
    with pytest.raises(WeftError, match="rounder"):
        Interleave([1 / 997, 1 / 991, 1 / 983])


def test_an_epoch_is_a_permutation_and_epochs_differ():
    stream = Stream("a", 17, seed=3)
    epochs = [[stream.row(e * 17 + i) for i in range(17)] for e in range(3)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Stream("a", 17, seed=4).order(0).tolist() != epochs[0]
    with pytest.raises(WeftError, match="no records"):
        Stream("a", 0, seed=0)


def sampler(seed=0):
    return Sampler([10, 7, 23], [2, 1, 1], ["edit", "edit", "generate"], [Span(0, 4)], seed)


def test_batches_alternate_and_do_not_depend_on_history():
    mix = sampler()
    groups = Counter(mix.batch(step).group for step in range(400))
    assert groups == {"edit": 300, "generate": 100}
    forward = [mix.batch(step) for step in range(50)]
    fresh = sampler()
    assert [fresh.batch(step) for step in reversed(range(50))] == forward[::-1]
    for batch in forward:
        assert len(batch.rows) == 4
        assert {source for source, _ in batch.rows} <= ({0, 1} if batch.group == "edit" else {2})
    # within the group, records in the ratio 2 : 1, and every record once an epoch
    rows = [row for batch in forward if batch.group == "edit" for row in batch.rows]
    assert abs(Counter(s for s, _ in rows)[0] - 2 / 3 * len(rows)) <= 1
    assert Counter([r for s, r in rows if s == 0][:10]) == Counter(range(10))


def test_stages_continue_the_stream_with_another_batch_size():
    mix = Sampler([12], [1], ["all"], [Span(0, 2), Span(3, 4)], 5)
    rows = [r for step in range(5) for _, r in mix.batch(step).rows]  # 2 + 2 + 2 + 4 + 4
    assert sorted(rows[:12]) == list(range(12))
    assert [mix.batch(step).stage for step in range(5)] == [0, 0, 0, 1, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_buckets_are_homogeneous_and_leave_no_record_out(count, batch, kinds, seed):
    bucket_of = np.random.default_rng(seed).integers(0, kinds, count)
    stream = Stream("a", count, seed)
    sizes = np.bincount(bucket_of)
    per_epoch = int((-(-sizes // batch)).sum())
    for epoch in range(2):
        seen = set()
        for number in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            bucket, rows = stream.bucketed(number, batch, bucket_of)
            assert len(rows) == batch and {int(bucket_of[r]) for r in rows} == {bucket}
            seen |= set(rows)
        assert seen == set(range(count))


def test_a_bucketed_stage_names_its_bucket():
    buckets = {0: np.array([0, 1] * 5)}
    mix = Sampler([10], [1], ["all"], [Span(0, 2), Span(2, 3, buckets)], 0)
    assert mix.batch(1).bucket is None
    batch = mix.batch(7)
    assert batch.stage == 1 and {r % 2 for _, r in batch.rows} == {batch.bucket}


def test_a_stage_with_other_buckets_does_not_remember_those_of_the_stage_before():
    """A resumed run has not seen the earlier stage: it must make the same batches."""
    first, second = (np.random.default_rng(seed).integers(0, 3, 40) for seed in (0, 1))

    def mix():
        return Sampler([40], [1], ["all"], [Span(0, 4, {0: first}), Span(5, 4, {0: second})], 0)

    through = mix()
    assert [through.batch(step) for step in range(14)] == [mix().batch(step) for step in range(14)]
