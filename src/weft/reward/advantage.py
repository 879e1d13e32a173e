"""From rewards to advantages within groups of samples of one request. Missing rewards (NaN) take no part in anything.

Sources: Flow-GRPO (arXiv 2505.05470; flow_grpo/stat_tracking.py), DiffusionNFT (arXiv 2509.16117, section 3.3),
DanceGRPO (arXiv 2505.07818), MixGRPO (arXiv 2507.21802).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from weft.errors import WeftError
from weft.record import Record

MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


@dataclass(frozen=True)
class AdvantageConfig:
    """A = (R - mean of its group) / (std + eps), then clipped to +-`clip`.

    `std`: "global" (of all valid rewards of the epoch), "group", or "none" (1: only centred). `ddof` 0 is the
    population's deviation (Flow-GRPO, DiffusionNFT), 1 the sample's (DanceGRPO, MixGRPO, with eps 1e-8).
    `min_valid`: a group with fewer rewards is dropped. `mode` reshapes clipped advantages as DiffusionNFT's
    `adv_mode` does: "positive_only" and "negative_only" cut one side, "one_only" is 1 above 0 and 0 else, "binary"
    the sign.
    """

    std: Literal["global", "group", "none"] = "global"
    ddof: int = 0
    eps: float = 1e-4
    clip: float = 5.0
    min_valid: int = 2
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"

    def __post_init__(self) -> None:
        for name, value, known in (("std", self.std, ("global", "group", "none")), ("mode", self.mode, MODES)):
            if value not in known:
                raise WeftError(f"advantage.{name} {value!r} is unknown; choose one of {', '.join(known)}")
        if not self.clip > 0:
            raise WeftError(f"advantage.clip is {self.clip}; it must be positive (usual: 5)")
        if self.ddof not in (0, 1):
            raise WeftError(f"advantage.ddof is {self.ddof}; it is 0 (population) or 1 (sample)")
        if self.min_valid < 2:
            raise WeftError(f"advantage.min_valid is {self.min_valid}; one reward has nothing to be compared with")


@dataclass(slots=True)
class GroupStats:
    """Rewards of one group: how many are valid, their mean and population deviation (NaN if there is none)."""

    key: str
    count: int
    valid: int
    mean: float
    std: float


def group_key(record: Record) -> str:
    """What makes two samples comparable: instruction, input media and output size. Equal requests share a group.

    The public code keys by the (tokenised) instruction alone, which merges one instruction on different pictures.
    """
    parts = [[p.type, p.role, p.digest(record.root)] for turn in record.turns if turn.role == "user"
             for p in turn.parts if p.type != "text"]  # fmt: skip
    source = record.source
    if source is not None and not any(part is source for part in record.request.parts):  # made in an earlier turn
        parts.append([source.type, "before", source.digest(record.root)])
    facts: list[Any] = [record.task, record.instruction, parts, record.meta.get("size")]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]


def group_stats(rewards: Sequence[float] | np.ndarray, keys: Sequence[str]) -> dict[str, GroupStats]:
    """Statistics of every group, in the order of first appearance; `rewards` [N], NaN = missing."""
    values, names = _checked(rewards, keys)
    found = {}
    for key in dict.fromkeys(keys):
        own = values[names == key]
        valid = own[~np.isnan(own)]
        mean, std = (float(valid.mean()), deviation(valid)) if len(valid) else (float("nan"), float("nan"))
        found[key] = GroupStats(key, len(own), len(valid), mean, std)
    return found


def advantages(
    rewards: Sequence[float] | np.ndarray, keys: Sequence[str], config: AdvantageConfig | None = None
) -> np.ndarray:
    """Clipped advantages [N] in fp64; NaN for a missing reward and throughout a group with too few valid ones.

    Groups dropped here still count in the global deviation, as filtered ones do in the public code.
    """
    config = config or AdvantageConfig()
    values, _ = _checked(rewards, keys)
    return reshape(clipped(normalised(values, keys, config), config.clip), config)


def normalised(values: np.ndarray, keys: Sequence[str], config: AdvantageConfig) -> np.ndarray:
    """(R - mean) / (std + eps) before clipping [N]; NaN as in `advantages`."""
    names = np.asarray(keys, dtype=object)
    out = np.full(len(values), np.nan)
    valid = ~np.isnan(values)
    overall = deviation(values[valid], config.ddof)
    for key in dict.fromkeys(keys):
        own = (names == key) & valid
        if own.sum() < config.min_valid:
            continue
        if config.std == "none":
            scale = 1.0
        else:
            scale = (overall if config.std == "global" else deviation(values[own], config.ddof)) + config.eps
        even = deviation(values[own]) == 0
        out[own] = 0.0 if even else (values[own] - values[own].mean()) / scale
    return out


def deviation(values: np.ndarray, ddof: int = 0) -> float:
    """The standard deviation; exactly 0 where all values are equal. Rounding of their mean would leave 1e-17, and an
    even group would pass for one that teaches something."""
    if len(values) <= ddof or (values == values[0]).all():
        return 0.0
    return float(values.std(ddof=ddof))


def clipped(values: np.ndarray, limit: float) -> np.ndarray:
    """Clamped to +-limit; NaN stays."""
    return np.clip(values, -limit, limit)


def reshape(values: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """The advantages of `config.mode`; NaN stays."""
    if config.mode == "positive_only":
        return np.clip(values, 0, config.clip)
    if config.mode == "negative_only":
        return np.clip(values, -config.clip, 0)
    if config.mode == "one_only":
        return np.where(np.isnan(values), np.nan, (values > 0).astype(np.float64))
    return np.sign(values) if config.mode == "binary" else values


def optimality(values: Any, clip: float) -> Any:
    """DiffusionNFT's optimality probability r = clamp(A / (2 clip) + 1/2, 0, 1) (train_nft_sd3.py).

    With the deviation in A this is the paper's r = 1/2 + 1/2 clip((R - mean) / Z, -1, 1) with Z = clip (std + eps),
    not Z = std: rewards of a few deviations stay inside [.2, .8].
    """
    return (values / clip / 2.0 + 0.5).clip(0, 1)


def _checked(rewards: Sequence[float] | np.ndarray, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(rewards, dtype=np.float64)
    if values.shape != (len(keys),):
        raise WeftError(f"{values.shape} rewards for {len(keys)} group keys; give one for each sample")
    if np.isinf(values).any():
        raise WeftError("a reward is infinite; a scorer must return finite numbers or a missing Score")
    return values, np.asarray(keys, dtype=object)
