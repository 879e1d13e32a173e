"""Families whose transformer reads packed tokens behind each other and sizes pictures by area: FLUX and Qwen-Image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor

from weft.errors import WeftError
from weft.models import flow
from weft.models.image.attention import gather_rows, patches, scatter_rows, unpatches
from weft.models.image.base import ImageFlow
from weft.sample import schedules
from weft.types import Batch, Condition

RESOLUTION = 1024


class PackedFlow(ImageFlow):
    """An `ImageFlow` of 2x2 packed latents; `options` is the family's dataclass, `resolution` the edge of a square."""

    resample: Any = Pillow.Resampling.LANCZOS
    options: Any

    def _measure(self, channels: int, patch: int, downsample: int, resolution: int | None) -> None:
        self.channels, self.patch, self.downsample = channels, patch, downsample
        self.multiple = downsample * patch
        self.resolution = RESOLUTION if resolution is None else resolution
        if self.resolution < 1 or self.resolution % self.multiple:
            raise WeftError(f"resolution {self.resolution} must be a multiple of {self.multiple}")

    def settings(self) -> dict[str, Any]:
        """The resolution and the options that are not the defaults."""
        fields = dataclasses.fields(self.options)
        changed = {f.name: getattr(self.options, f.name) for f in fields if getattr(self.options, f.name) != f.default}
        return ({"resolution": self.resolution} if self.resolution != RESOLUTION else {}) | {"options": changed}

    def resolution_of(self, size: flow.Size) -> int:
        """The edge of the square of the same area, rounded to what latents allow."""
        return max(1, round((size[0] * size[1]) ** 0.5 / self.multiple)) * self.multiple

    def arrange_rows(self, conditions: Sequence[Condition]) -> Batch:
        """`arrange`, with the references as one tensor of token rows [B, R, C p p] also where all shapes are equal."""
        batch = self.arrange(conditions)
        if batch["layout"] is None:
            columns = [patches(r, self.patch) for r in batch["references"]]
            batch["references"] = [torch.cat(columns, dim=1)] if columns else []
        return batch

    def pack(self, x: Tensor, batch: Batch) -> Tensor:
        """Tokens [B, N, C p p] of noisy latents x [B, C, H, W] and the references behind them."""
        rows = patches(x.to(batch["text"].device, batch["text"].dtype), self.patch)
        rows = torch.cat([rows, *batch["references"]], dim=1)
        return rows if batch["layout"] is None else gather_rows(rows, batch["layout"])

    def unpack(self, out: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """The output's tokens among `out` [B, N, C p p] as fp32 latents of x's shape; zero in the padding."""
        layout, grid = batch["layout"], (x.shape[2] // self.patch, x.shape[3] // self.patch)
        count = grid[0] * grid[1] if layout is None else layout.targets
        return unpatches(scatter_rows(out[:, :count].float(), layout), grid, self.patch)

    def time(self, sigma: Tensor, batch: Batch) -> Tensor:
        """Sigma [B] as the pipelines tell it: there and back through the scheduler's timesteps, with its rounding."""
        steps = self.scheduler.config.num_train_timesteps
        return sigma.to(batch["text"].device, torch.float32) * steps / steps

    def sigmas(self, steps: int, size: flow.Size) -> Tensor:
        """The pipelines' grid [steps + 1]: 1 ... 1/steps, shifted by the number of the output's tokens alone."""
        config = dict(self.scheduler.config)
        mu = schedules.dynamic_mu(self._tokens(size), config) if config.get("use_dynamic_shifting") else None
        return schedules.grid_from_config(config, steps, mu=mu, sigmas=schedules.linear_sigmas(steps))
