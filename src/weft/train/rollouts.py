"""One epoch of rollouts: which requests, their samples and seeds, the pictures, and the scores that arrive meanwhile.

Everything is a function of (seed, epoch) and of the weights, so an epoch that was interrupted is made again exactly.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.errors import WeftError
from weft.models.flow import framed
from weft.record import Record
from weft.reward.advantage import group_key
from weft.reward.mix import Mixture
from weft.rng import normal, numpy_rng, seed_of
from weft.sample.rollout import sample_flow
from weft.train.feed import Feed
from weft.train.geometry import RolloutRecipe, window_at
from weft.train.parallel import Processes
from weft.types import Condition, Score

ENCODE_AT_ONCE = 16


@dataclass(slots=True)
class Sample:
    """One output of an epoch. `index` counts the samples of all processes; `window` is its steps with noise.

    Filled while the epoch is made (None before): `condition`, with guidance `negative`; by the rollout `sigmas`
    [T + 1], `x0` [C, h, w] (the final latent), and if the method keeps them `states` [n + 1, C, h, w] and `log_probs`
    [n] of the n steps in the window, all fp32 tensors on the CPU.
    """

    index: int
    id: str
    group: str
    seed: int
    record: Record
    window: tuple[int, int]
    condition: Any = None
    negative: Any = None
    sigmas: Any = None
    x0: Any = None
    states: Any = None
    log_probs: Any = None
    advantage: float = 0.0


@dataclass(slots=True)
class Epoch:
    """An epoch's samples of all processes (in one order everywhere), and the batches of this process."""

    number: int
    name: str  # of the batch group
    samples: list[Sample] = field(default_factory=list)
    batches: list[list[Sample]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)  # of all samples, by index
    seconds: dict[str, float] = field(default_factory=dict)
    cuts: int = 0  # batches of all processes so far


def plan_epoch(
    feed: Feed, recipe: RolloutRecipe, processes: Processes, seed: int, number: int, banned: Collection[str]
) -> Epoch:
    """The samples of epoch `number`: distinct requests from the sampler; banned ones, and those that cannot be read,
    are replaced by others, and left out where the data have no others. Raises WeftError if all are banned, or too many
    cannot be read."""
    name, records = feed.requests(number)
    keys = ["" if record is None else group_key(record) for record in records]
    spare = [i for i, key in enumerate(keys) if not key or key in banned]
    for place, (key, record) in zip(spare, others(feed, seed, number, {*keys, *banned}, len(spare)), strict=False):
        records[place], keys[place] = record, key
    requests = [(k, r) for k, r in zip(keys, records, strict=True) if r is not None and k not in banned]
    if not requests:
        raise WeftError(
            f"epoch {number}: all {len(banned)} requests are banned as settled: the run is done; end it at this step, "
            f"give it harder requests, or another filter"
        )
    epoch = Epoch(number, name)
    add_samples(epoch, recipe, processes, seed, requests)
    return epoch


def others(feed: Feed, seed: int, number: int, known: Collection[str], count: int) -> Iterator[tuple[str, Record]]:
    """Up to `count` more requests that could stand in epoch `number`, by group key, none of the `known`."""
    if count < 1:
        return
    known = set(known)
    rows = feed.rows_like(number)
    for row in numpy_rng(seed, "replace", number).permutation(len(rows)):
        record = feed.request(number, rows[int(row)])
        key = "" if record is None else group_key(record)
        if record is not None and key not in known:
            known.add(key)
            yield key, record
            count -= 1
            if count == 0:
                return


def add_samples(
    epoch: Epoch, recipe: RolloutRecipe, processes: Processes, seed: int, requests: Sequence[tuple[str, Record]]
) -> list[list[Sample]]:
    """Add a group of samples for each (group key, record); returns this process's new batches.

    All processes get equally many, of `rollout.batch` samples or (after a refill, which need not divide) fewer.
    """
    count: dict[str, int] = {}
    added: list[Sample] = []
    for key, record in requests:
        for _ in range(recipe.group_size):
            k = count[key] = count.get(key, -1) + 1
            own = seed_of(seed, "rollout", epoch.number, key, k)
            added.append(Sample(len(epoch.samples) + len(added), f"{record.id}/{k}", key, own, record, (0, 0)))
    pieces = math.ceil(len(added) / (recipe.batch * processes.size)) * processes.size
    chunks = [[added[i] for i in part] for part in np.array_split(np.arange(len(added)), pieces)] if added else []
    for number, chunk in enumerate(chunks, epoch.cuts):
        for sample in chunk:
            sample.window = window_at(recipe, seed, epoch.number, number)
    epoch.cuts += pieces
    epoch.samples += added
    own_batches = chunks[processes.rank :: processes.size]
    epoch.batches += own_batches
    return own_batches


def encode_batches(feed: Feed, recipe: RolloutRecipe, batches: Sequence[Sequence[Sample]]) -> None:
    """Conditions of the samples: every request once, shared by its group. Their records become those that were encoded:
    scorers see the same source."""
    own = [sample for batch in batches for sample in batch]
    records = {sample.group: sample.record for sample in own}
    records = {group: framed(feed.trainable, record) for group, record in records.items()}
    conditions: dict[str, Condition] = {}
    negatives: dict[str, Condition] = {}
    groups = list(records)
    for start in range(0, len(groups), ENCODE_AT_ONCE):
        some = groups[start : start + ENCODE_AT_ONCE]
        part = [records[g] for g in some]
        conditions |= dict(zip(some, feed.conditions(part), strict=True))
        if recipe.guidance > 1:
            negatives |= dict(zip(some, feed.conditions(part, negative=recipe.negative), strict=True))
    for sample in own:
        sample.record = records[sample.group]
        sample.condition, sample.negative = conditions[sample.group], negatives.get(sample.group)


def roll(
    model: Any,
    recipe: RolloutRecipe,
    epoch: Epoch,
    batches: Sequence[list[Sample]],
    mixture: Mixture,
    processes: Processes,
    *,
    seed: int,
    keep: Sequence[str],
    autocast: Callable[[], AbstractContextManager[Any]],
    stopped: Callable[[], bool],
) -> bool:
    """Make and score these batches of this process; then everybody knows all scores. False if a signal asked to stop.

    Scoring runs in threads of its own while the next batch is made; what is left after the last one is waited for.
    """
    waiting: list[tuple[list[Sample], Future[list[Score]]]] = []
    seconds = dict.fromkeys(("rollout", "decode", "reward_wait", "reward"), 0.0) | epoch.seconds
    with ThreadPoolExecutor(recipe.workers, thread_name_prefix="reward") as pool:
        for batch in batches:
            # all processes stop at the same batch
            if processes.sum(float(stopped()))[0]:
                pool.shutdown(cancel_futures=True)
                return False
            if not batch:
                continue
            started = time.perf_counter()
            latents = _sample(model, recipe, epoch, batch, seed, keep, autocast)
            seconds["rollout"] += time.perf_counter() - started
            started = time.perf_counter()
            pictures = model.decode(latents, [s.condition.size for s in batch])
            pairs = [(s.record, picture) for s, picture in zip(batch, pictures, strict=True)]
            seconds["decode"] += time.perf_counter() - started
            waiting.append((batch, pool.submit(_timed, mixture, pairs, seconds)))
        started = time.perf_counter()
        found = {s.index: score for batch, future in waiting for s, score in zip(batch, future.result(), strict=True)}
        seconds["reward_wait"] += time.perf_counter() - started
    epoch.scores += share_scores(found, range(len(epoch.scores), len(epoch.samples)), processes)
    epoch.seconds = seconds
    return True


def _timed(mixture: Mixture, pairs: list[Any], seconds: dict[str, float]) -> list[Score]:
    started = time.perf_counter()
    with torch.no_grad():
        scores = mixture.score(pairs)
    seconds["reward"] += time.perf_counter() - started
    return scores


def _sample(
    model: Any, recipe: RolloutRecipe, epoch: Epoch, batch: list[Sample], seed: int, keep: Sequence[str], autocast: Any
) -> Tensor:
    """Roll out one batch; fills its samples and returns the padded final latents."""
    conditions = [s.condition for s in batch]
    start, stop = batch[0].window
    initial = None
    if recipe.same_latent:
        shape = [
            (model.channels, h // model.downsample, w // model.downsample) for h, w in (c.size for c in conditions)
        ]
        initial = [normal(z, seed, "group latent", epoch.number, s.group) for z, s in zip(shape, batch, strict=True)]
    with autocast():
        result = sample_flow(
            model,
            conditions,
            seeds=[s.seed for s in batch],
            steps=recipe.steps,
            guidance=recipe.guidance,
            negative=[s.negative for s in batch] if recipe.guidance > 1 else None,
            solver=recipe.solver,
            kind=recipe.kind,
            eta=recipe.eta,
            window=(start, stop) if recipe.window is not None else None,
            keep=keep,
            init_latents=initial,
            group_ids=[s.group for s in batch],
        )
    for i, sample in enumerate(batch):
        h, w = (edge // model.downsample for edge in conditions[i].size)
        assert result.sigmas is not None
        sample.sigmas = (result.sigmas if result.sigmas.ndim == 1 else result.sigmas[i]).cpu().clone()
        sample.x0 = result.latents[i, :, :h, :w].float().cpu().clone()
        if result.trajectory is not None:
            sample.states = result.trajectory[i, start : stop + 1, :, :h, :w].float().cpu().clone()
        if result.log_probs is not None:
            sample.log_probs = result.log_probs[i, start:stop].float().cpu().clone()
    return result.latents


def share_scores(found: dict[int, Score], wanted: range, processes: Processes) -> list[Score]:
    """The scores of the `wanted` samples of all processes, by index."""
    lines = [json.dumps([i, s.value, s.parts, s.reason]) for i, s in found.items()]
    table: dict[int, Score] = {}
    for line in processes.gather(lines):
        i, value, parts, reason = json.loads(line)
        table[i] = Score(value, parts, reason)
    return [table[i] for i in wanted]


def buffer_tensors(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What a checkpoint within an epoch holds of the rollouts, by `<index>/<name>`."""
    found: dict[str, Tensor] = {}
    for sample in samples:
        for name in ("x0", "states", "log_probs", "sigmas"):
            value = getattr(sample, name)
            if value is not None:
                found[f"{sample.index}/{name}"] = value
    return found


def fill_buffer(epoch: Epoch, saved: dict[str, Tensor]) -> None:
    """The inverse of `buffer_tensors`, for this process's samples."""
    for batch in epoch.batches:
        for sample in batch:
            for name in ("x0", "states", "log_probs", "sigmas"):
                value = saved.get(f"{sample.index}/{name}")
                if value is not None:
                    setattr(sample, name, value)
