"""What an edit left alone: PSNR and SSIM outside the edit mask, and execution x consistency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from weft.errors import WeftError
from weft.record import Record
from weft.reward.mix import Pair, Scorer, ScorerConfig, ask_scorer
from weft.settings import load_object
from weft.types import Score

SMALLEST_OUTSIDE = 0.02  # of the picture: less is too little to measure


class Consistency:
    """The mean of PSNR (scaled from `psnr_range` in dB to 0..1) and SSIM between source and output where the mask is
    black; CoCoEdit (arXiv 2602.14068) adds such a term to a judge's score. Parts: `psnr` in dB (100 at most), `ssim`.

    The mask is the record's (its white pixels may change), or that of `mask(record)` -> boolean [H, W] (a function, or
    its name as `file.py:name`). An output of another size is resized to the source's. Missing: without source, without
    mask, with less than 2 % outside it.
    """

    def __init__(
        self, mask: Callable[[Record], np.ndarray] | str | None = None, psnr_range: Sequence[float] = (10.0, 40.0)
    ) -> None:
        if len(psnr_range) != 2 or not psnr_range[0] < psnr_range[1]:
            raise WeftError(f"psnr_range {list(psnr_range)}: give two numbers of dB, the lower first")
        self.mask: Callable[[Record], np.ndarray] | None = load_object(mask, "mask") if isinstance(mask, str) else mask
        self.low, self.high = float(psnr_range[0]), float(psnr_range[1])

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        return [self._one(record, output) for record, output in batch]

    def _one(self, record: Record, output: Image.Image) -> Score:
        if record.source is None:
            return Score(None, reason="the record has no source to be consistent with")
        if self.mask is None and record.mask is None:
            return Score(None, reason="the record has no mask of what may change")
        try:
            source = record.load(record.source)
            changed = self._changed(record, source.size)
        except WeftError as error:
            return Score(None, reason=str(error))
        outside = ~changed
        if outside.mean() < SMALLEST_OUTSIDE:
            return Score(None, reason=f"only {outside.mean():.1%} of the picture is outside the mask")
        if output.size != source.size:
            output = output.resize(source.size, Image.Resampling.BICUBIC)
        a, b = (np.asarray(image.convert("RGB"), np.float64) / 255 for image in (source, output))
        psnr, ssim = psnr_where(a, b, outside), float(ssim_map(a, b)[outside].mean())
        scaled = min(max((psnr - self.low) / (self.high - self.low), 0.0), 1.0)
        return Score((scaled + ssim) / 2, {"psnr": psnr, "ssim": ssim})

    def _changed(self, record: Record, size: tuple[int, int]) -> np.ndarray:
        if self.mask is not None:
            picture = Image.fromarray(np.asarray(self.mask(record), bool).astype(np.uint8) * 255)
        else:
            assert record.mask is not None
            picture = record.load(record.mask).convert("L")
        return np.asarray(picture.resize(size, Image.Resampling.NEAREST)) > 127


def psnr_where(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """PSNR in dB of two pictures [H, W, C] in 0..1 over the pixels [H, W] of `where`; 100 for equal ones."""
    error = float(((a - b)[where] ** 2).mean())
    return min(100.0, -10 * math.log10(error)) if error > 0 else 100.0


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM [H, W] of two pictures [H, W, C] in 0..1, averaged over channels: Gaussian windows of sigma 1.5 cut at 11
    pixels, population statistics, K = (0.01, 0.03) (Wang et al. 2004)."""
    c1, c2 = 0.01**2, 0.03**2

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, sigma=(1.5, 1.5, 0), truncate=3.5)

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    ssim = ((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return ssim.mean(-1)


class ExecutionConsistency:
    """execution x (floor + (1 - floor) x consistency), as FIRM (arXiv 2603.12247) multiplies the two, so that returning
    the input earns nothing. `floor` 0.6 keeps 60 % of the execution where nothing else was kept."""

    def __init__(self, execution: Scorer, consistency: Scorer, floor: float = 0.6) -> None:
        if not 0 <= floor <= 1:
            raise WeftError(f"floor {floor} is not from 0 to 1")
        self.scorers = {"execution": execution, "consistency": consistency}
        self.floor = floor

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        found = {name: ask_scorer(ScorerConfig(name, scorer), batch) for name, scorer in self.scorers.items()}
        return [self._product(*both) for both in zip(found["execution"], found["consistency"], strict=True)]

    def _product(self, execution: Score, consistency: Score) -> Score:
        if execution.value is None or consistency.value is None:
            named = {"execution": execution, "consistency": consistency}
            return Score(None, reason="; ".join(f"{k}: {s.reason}" for k, s in named.items() if s.value is None))
        value = execution.value * (self.floor + (1 - self.floor) * consistency.value)
        return Score(value, {"execution": execution.value, "consistency": consistency.value})
