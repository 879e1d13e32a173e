"""Statistics of evaluations: every number comes with its interval, and the same data gives the same interval.

Values are per-record numbers (0/1 for success). Missing measurements are the caller's to name: a NaN is refused
here, because dropping it silently would change what the mean is a mean of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weft.errors import WeftError
from weft.rng import numpy_rng

Values = NDArray[np.float64]
CHUNK = 2**22  # resampled values held in memory at a time


@dataclass(slots=True, frozen=True)
class Interval:
    """An estimate with its confidence interval at `level` over `count` values."""

    value: float
    low: float
    high: float
    count: int
    level: float = 0.95

    def dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def bootstrap(
    values: ArrayLike,
    *,
    statistic: Callable[[Values], float] | None = None,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval (Efron 1979) of the mean, or of `statistic`, a function of a 1-d array.

    With `clusters` (a label for each value) whole clusters are resampled: for several samples of one prompt, which
    are not independent of one another. A resample for which `statistic` is NaN, does not exist, is left out.

    Raises:
        WeftError: no values, a value that is not finite, labels that do not match.
    """
    data = _values(values)
    _check_level(level)
    generator = numpy_rng(seed, "bootstrap")
    if clusters is not None:
        return _cluster_bootstrap(data, clusters, statistic, level, resamples, generator)
    estimate = float(data.mean()) if statistic is None else float(statistic(data))
    draws = np.empty(resamples)
    chunk = max(1, CHUNK // len(data))
    for start in range(0, resamples, chunk):
        stop = min(resamples, start + chunk)
        sampled = data[generator.integers(0, len(data), (stop - start, len(data)))]
        draws[start:stop] = sampled.mean(1) if statistic is None else [statistic(row) for row in sampled]
    return Interval(estimate, *_percentiles(draws, level), len(data), level)


def macro_mean(
    groups: Mapping[str, ArrayLike], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The unweighted mean of group means; records are resampled within their group (stratified bootstrap)."""
    if not groups:
        raise WeftError("a mean over groups needs at least one group")
    _check_level(level)
    parts = {name: _values(values) for name, values in groups.items()}
    draws = np.zeros(resamples)
    for name, part in parts.items():
        generator = numpy_rng(seed, "bootstrap", record=name)
        chunk = max(1, CHUNK // len(part))
        for start in range(0, resamples, chunk):
            stop = min(resamples, start + chunk)
            draws[start:stop] += part[generator.integers(0, len(part), (stop - start, len(part)))].mean(1) / len(parts)
    estimate = float(np.mean([part.mean() for part in parts.values()]))
    return Interval(estimate, *_percentiles(draws, level), sum(map(len, parts.values())), level)


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of first - second over the same records, resampled together: what they share cancels."""
    a, b = _values(first), _values(second)
    if len(a) != len(b):
        raise WeftError(f"paired values must be of the same records; got {len(a)} and {len(b)}")
    return bootstrap(a - b, level=level, resamples=resamples, seed=seed)


def difference(
    first: ArrayLike, second: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """mean(first) - mean(second) of different records, each resampled on its own; `count` is the smaller one's."""
    a, b = _values(first), _values(second)
    _check_level(level)
    draws = []
    for name, part in (("first", a), ("second", b)):
        generator = numpy_rng(seed, "bootstrap", record=name)
        rows = [part[generator.integers(0, len(part), len(part))].mean() for _ in range(resamples)]
        draws.append(np.array(rows))
    low, high = _percentiles(draws[0] - draws[1], level)
    return Interval(float(a.mean() - b.mean()), low, high, min(len(a), len(b)), level)


def wilson(successes: int, count: int, *, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927): of non-zero width also when all or none succeed."""
    if count < 1 or not 0 <= successes <= count:
        raise WeftError(f"{successes} successes of {count}: needs a positive count and 0 <= successes <= count")
    _check_level(level)
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / count
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    # At 0 and 1 the bound is exact; rounding must not push it past the estimate.
    return Interval(rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)), count, level)


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, ties sharing their mean rank.

    Raises:
        WeftError: fewer than two pairs, or one side constant (the correlation does not exist).
    """
    a, b = _values(first), _values(second)
    if len(a) != len(b) or len(a) < 2:
        raise WeftError(f"rank correlation needs two or more pairs; got {len(a)} and {len(b)} values")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise WeftError("rank correlation of a constant does not exist: all values of one side are equal")
    from scipy.stats import rankdata

    ranks_a, ranks_b = rankdata(a), rankdata(b)
    ranks_a -= ranks_a.mean()
    ranks_b -= ranks_b.mean()
    return float(np.clip(ranks_a @ ranks_b / math.sqrt((ranks_a @ ranks_a) * (ranks_b @ ranks_b)), -1.0, 1.0))


def pairwise_accuracy(scores: ArrayLike, truth: ArrayLike, groups: Sequence[Hashable]) -> Interval | None:
    """Share of the pairs of one group (candidates of one prompt) with different truth that the scores put in the right
    order; equal scores count one half. Groups are resampled; `count` is the number of pairs. None: there is no pair."""
    a, b = _values(scores), _values(truth)
    if len(a) != len(b):
        raise WeftError(f"{len(a)} scores for {len(b)} truths")
    right: list[float] = []
    owners: list[Hashable] = []
    for owner, index in _split(np.arange(len(a), dtype=np.float64), groups).items():
        rows = index.astype(int)
        above = b[rows][:, None] > b[rows][None]
        right += ((np.sign(a[rows][:, None] - a[rows][None])[above] + 1) / 2).tolist()
        owners += [owner] * int(above.sum())
    return bootstrap(right, clusters=owners) if right else None


def _values(values: ArrayLike) -> Values:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise WeftError(f"statistics need a non-empty list of numbers; got shape {list(data.shape)}")
    if not np.isfinite(data).all():
        raise WeftError(f"{int((~np.isfinite(data)).sum())} of {len(data)} values are not finite; drop and count them")
    return data


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise WeftError(f"confidence level is {level}; it must lie between 0 and 1")


def _percentiles(draws: Values, level: float) -> tuple[float, float]:
    low, high = np.nanpercentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _split(values: Values, groups: Sequence[Hashable]) -> dict[Hashable, Values]:
    if len(groups) != len(values):
        raise WeftError(f"{len(groups)} group labels for {len(values)} values")
    found: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        found.setdefault(group, []).append(float(value))
    return {group: np.array(part) for group, part in found.items()}


def _cluster_bootstrap(
    data: Values,
    clusters: Sequence[Hashable],
    statistic: Callable[[Values], float] | None,
    level: float,
    resamples: int,
    generator: np.random.Generator,
) -> Interval:
    parts = list(_split(data, clusters).values())
    if statistic is None:
        sums, counts = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
        draws, chunk = np.empty(resamples), max(1, CHUNK // len(parts))
        for start in range(0, resamples, chunk):
            stop = min(resamples, start + chunk)
            pick = generator.integers(0, len(parts), (stop - start, len(parts)))
            draws[start:stop] = sums[pick].sum(1) / counts[pick].sum(1)
        return Interval(float(data.mean()), *_percentiles(draws, level), len(data), level)
    picks = (generator.integers(0, len(parts), len(parts)) for _ in range(resamples))
    draws = np.array([statistic(np.concatenate([parts[k] for k in pick])) for pick in picks])
    return Interval(float(statistic(data)), *_percentiles(draws, level), len(data), level)
