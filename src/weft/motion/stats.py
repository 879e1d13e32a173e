"""Means and standard deviations of motion features: three kinds, which are three types.

Feeding features normalised with one kind to a network trained with another silently ruins its scores, so each kind
is a class of its own and says so in its file:

* `DatasetStats`: HumanML3D's Mean.npy and Std.npy, one deviation per block (cal_mean_variance.ipynb).
* `GeneratorStats`: what MoMask's networks take; deviations of root and contacts divided by `feat_bias` 5.
* `EvaluatorStats`: what the text-to-motion evaluator takes (its `meta`), made on other data with `feat_bias` 25; it
  cannot be derived from the others and comes from its own files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from weft.errors import WeftError
from weft.media import atomic_write
from weft.motion.skeleton import layout_of


@dataclass(frozen=True)
class _Stats:
    """`mean` and `std`, [263] or [251] float32. Raises `WeftError` for another shape or a deviation not above 0."""

    mean: np.ndarray
    std: np.ndarray
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float32))
        layout_of(self.mean.shape[-1] if self.mean.ndim == 1 else -1)
        if self.std.shape != self.mean.shape or not np.isfinite(self.mean).all() or not (self.std > 0).all():
            raise WeftError(f"{self.kind} statistics: need a finite mean and positive std of one shape")

    def normalise(self, features: np.ndarray) -> np.ndarray:
        """(features - mean) / std over the last axis."""
        return (features - self.mean) / self.std

    def restore(self, normalised: np.ndarray) -> np.ndarray:
        """The inverse of `normalise`."""
        return normalised * self.std + self.mean

    def save(self, path: str | Path) -> None:
        """One JSON file that names the kind."""
        text = json.dumps({"kind": self.kind, "mean": self.mean.tolist(), "std": self.std.tolist()})
        with atomic_write(path) as handle:
            handle.write(text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote. Raises `WeftError` for statistics of another kind, so that they cannot be mixed up."""
        try:
            found = json.loads(Path(path).read_text())
            kind, mean, std = found["kind"], found["mean"], found["std"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeftError(f"{path}: no statistics that can be read ({error}): write them with save()") from error
        if kind != cls.kind:
            raise WeftError(f"{path} holds {kind} statistics, {cls.kind} statistics are needed here")
        return cls(mean, std)

    @classmethod
    def from_npy(cls, mean: str | Path, std: str | Path) -> Self:
        """From the two .npy files in which releases ship them; the caller says by the class which kind they are."""
        from weft.motion.files.arrays import load_array

        return cls(load_array(mean), load_array(std))


@dataclass(frozen=True)
class GeneratorStats(_Stats):
    """Statistics of a generator's input: see `DatasetStats.for_generator`."""

    kind: ClassVar[str] = "generator"


@dataclass(frozen=True)
class EvaluatorStats(_Stats):
    """Statistics of the evaluator's input, from its own release."""

    kind: ClassVar[str] = "evaluator"


@dataclass(frozen=True)
class DatasetStats(_Stats):
    """Statistics of a dataset's features."""

    kind: ClassVar[str] = "dataset"

    def for_generator(self, feat_bias: float = 5.0) -> GeneratorStats:
        """MoMask's: root and contact deviations divided by `feat_bias`, which weighs them up in its losses."""
        std = self.std.copy()
        for name, block in layout_of(len(std)).blocks().items():
            if name.startswith("root") or name == "contacts":
                std[block] /= feat_bias
        return GeneratorStats(self.mean.copy(), std)


def dataset_stats(clips: Iterable[np.ndarray]) -> DatasetStats:
    """Mean per number, one deviation per block: the mean of its deviations (HumanML3D cal_mean_variance.ipynb).

    One pass in float64, so data need not fit in memory. Raises `WeftError` for no frames, NaN, or a block that never
    varies (its deviation would be 0: give more varied clips).
    """
    total = squares = None
    frames = 0
    for k, clip in enumerate(clips):
        values = np.asarray(clip, dtype=np.float64)
        if not np.isfinite(values).all():
            raise WeftError(f"clip {k}: NaN or infinity: leave it out")
        if total is None:
            total, squares = np.zeros(values.shape[-1]), np.zeros(values.shape[-1])
            shift = values[:1].mean(axis=0)
        total += (values - shift).sum(axis=0)
        squares += ((values - shift) ** 2).sum(axis=0)
        frames += len(values)
    if total is None or squares is None or not frames:
        raise WeftError("no frames: statistics need clips")
    mean = total / frames
    std = np.sqrt(np.maximum(squares / frames - mean**2, 0))
    for name, block in layout_of(len(std)).blocks().items():
        std[block] = std[block].mean()
        if not std[block][0] > 0:
            raise WeftError(f"the block '{name}' never varies over {frames} frames: give more varied clips")
    return DatasetStats(mean + shift, std)
