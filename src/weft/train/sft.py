"""Supervised fine-tuning: the model's own loss on examples, and the held-out loss at fixed noise levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.train.fed import Fed
from weft.train.method import Setting
from weft.train.reading import build
from weft.types import Draw, Example, FlowModel, Loss, Trainable


class Sft:
    """The supervised method. For flow models `options` are those of `weft.models.flow.FlowLossConfig`."""

    def __init__(self, setting: Setting, options: dict[str, Any]) -> None:
        if setting.reward is not None or setting.recipe.reward is not None or setting.rollout is not None:
            raise WeftError("method sft takes no reward and no rollout section; choose nft or grpo, or remove them")
        self.setting, self.options = setting, loss_options(setting.model, options, setting.file)

    def batch(self, step: int) -> Fed | None:
        """The examples of a step."""
        return self.setting.feed.batch(step)

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Per-sample losses [B] of a homogeneous batch."""
        if self.options is None:
            return self.setting.model.loss(examples, draw)
        from weft.models.flow import flow_matching_loss

        return flow_matching_loss(self.setting.model, examples, draw, self.options)

    def stepped(self, step: int) -> dict[str, float]:
        return {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Nothing but weights and the step counts."""

    def held_out(
        self, examples: Sequence[Example], ids: Sequence[str], sigmas: Sequence[float], seed: int, batch: int
    ) -> dict[str, float]:
        return held_out(self.setting.model, self.options, examples, ids, sigmas, seed, batch)


def loss_options(model: Trainable, options: dict[str, Any], file: str = "recipe") -> Any:
    """The options of a flow model's loss; None for any other trainable, which takes none. Raises WeftError."""
    if isinstance(model, FlowModel):
        from weft.models.flow import FlowLossConfig

        return build(FlowLossConfig, options, "method.options", file)
    if options:
        raise WeftError(f"{file}: method.options: {type(model).__name__} takes its options in trainable_args")
    return None


@torch.no_grad()
def held_out(
    model: Any,
    options: Any,
    examples: Sequence[Example],
    ids: Sequence[str],
    sigmas: Sequence[float],
    seed: int,
    batch: int,
) -> dict[str, float]:
    """Mean loss of fixed examples with fixed noise: at each sigma for a flow model, plain otherwise (no options)."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)  # a metric that a batch has nothing for is not 0 there
    for start in range(0, len(examples), batch):
        part, names = examples[start : start + batch], list(ids[start : start + batch])
        draw = Draw(seed, 0, names)
        if options is None:
            result = model.loss(part, draw)
            sums["loss"] += float(result.per_sample.sum())
            counts["loss"] += len(part)
            for key, value in result.metrics.items():
                sums[key] += value * len(part)
                counts[key] += len(part)
            continue
        from weft.models.flow import flow_matching_loss

        for sigma in sigmas:
            result = flow_matching_loss(model, part, draw, options, sigma=[sigma] * len(part))
            sums[f"loss@{sigma:g}"] += float(result.per_sample.sum())
    means = {key: value / counts.get(key, len(examples)) for key, value in sums.items()}
    if options is not None:
        means["loss"] = sum(means[f"loss@{s:g}"] for s in sigmas) / len(sigmas)
    return means
