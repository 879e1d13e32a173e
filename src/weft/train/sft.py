"""Supervised fine-tuning: the model's own loss on examples, and the held-out loss at fixed noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weft.errors import WeftError
from weft.train.config import build
from weft.types import Draw, Example, FlowModel, Loss, Trainable


class Sft:
    """The supervised method. For flow models `options` are those of `weft.models.flow.FlowLossConfig`."""

    def __init__(self, model: Trainable, options: dict[str, Any], file: str = "recipe") -> None:
        self.model = model
        self.is_flow = isinstance(model, FlowModel)
        self.options: Any = None
        if self.is_flow:
            from weft.models.flow import FlowLossConfig

            self.options = build(FlowLossConfig, options, "method.options", file)
        elif options:
            raise WeftError(f"{file}: method.options: {type(model).__name__} takes its options in trainable_args")

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Per-sample losses [B] of a homogeneous batch."""
        if not self.is_flow:
            return self.model.loss(examples, draw)
        from weft.models.flow import flow_matching_loss

        return flow_matching_loss(self.model, examples, draw, self.options)  # type: ignore[arg-type]

    @torch.no_grad()
    def held_out(
        self, examples: Sequence[Example], ids: Sequence[str], sigmas: Sequence[float], seed: int, batch: int
    ) -> dict[str, float]:
        """Mean loss of fixed examples with fixed noise: at each sigma for a flow model, plain otherwise."""
        from collections import defaultdict

        sums: dict[str, float] = defaultdict(float)
        for start in range(0, len(examples), batch):
            part, names = examples[start : start + batch], list(ids[start : start + batch])
            draw = Draw(seed, 0, names)
            if not self.is_flow:
                result = self.model.loss(part, draw)
                sums["loss"] += float(result.per_sample.sum())
                for key, value in result.metrics.items():
                    sums[key] += value * len(part)
                continue
            from weft.models.flow import flow_matching_loss

            for sigma in sigmas:
                fixed = [sigma] * len(part)
                result = flow_matching_loss(self.model, part, draw, self.options, sigma=fixed)  # type: ignore[arg-type]
                sums[f"loss@{sigma:g}"] += float(result.per_sample.sum())
        means = {key: value / len(examples) for key, value in sums.items()}
        if self.is_flow:
            means["loss"] = sum(means[f"loss@{s:g}"] for s in sigmas) / len(sigmas)
        return means
