"""What a recipe will cost, before it runs: steps, forwards, tokens, parameters, time and memory.

Parameter counts and operations come from the real classes on the meta device, so nothing is loaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.models.adapt import add_lora
from weft.train.config import Recipe
from weft.train.feed import open_source
from weft.train.optim import is_hidden_matrix
from weft.train.plan_models import Networks, networks
from weft.train.plan_online import EpochPlan, epoch_plan
from weft.train.reading import read_recipe
from weft.train.setup import DTYPES, pick_device
from weft.train.sizes import stage_sizes

SUSTAINED = 2.5e14  # operations per second: bf16 on one data-centre GPU at about a quarter of its peak
PER_THREAD = 2e10  # fp32 on one CPU core


@dataclass(slots=True)
class StagePlan:
    """One stage: its steps, the mean (height, width) tokens, and operations of an average training sample."""

    steps: int
    batch: int
    size: tuple[int, int]
    tokens: float  # per sample, image and text stream
    flops: float  # per sample, forward alone


@dataclass(slots=True)
class Plan:
    """The estimate; `str(plan)` is the report."""

    steps: int
    samples: int
    forwards: int
    tokens: float
    flops: float
    parameters: dict[str, int]
    trained: int
    memory: dict[str, float]  # bytes
    seconds: float
    assumptions: list[str]
    stages: list[StagePlan] = field(default_factory=list)
    epoch: EpochPlan | None = None  # of a recipe with rollouts

    def __str__(self) -> str:
        total = sum(self.memory.values())
        lines = [
            f"steps       {self.steps:,} optimiser steps, {self.samples:,} samples, {self.forwards:,} forward passes",
            f"tokens      {self.tokens:.3g} through the trained networks",
            f"operations  {self.flops:.3g} floating-point operations",
            "parameters  " + ", ".join(f"{name} {count:,}" for name, count in self.parameters.items()),
            f"trained     {self.trained:,}",
            "memory      " + ", ".join(f"{k} {_gb(v)}" for k, v in self.memory.items()) + f"; together {_gb(total)}",
            f"time        {_hours(self.seconds)} on one device",
        ]
        for i, stage in enumerate(self.stages if len(self.stages) > 1 else []):
            h, w = stage.size
            lines.append(
                f"stage {i}     {stage.steps:,} steps of {stage.batch}, {h}x{w} px, {stage.tokens:,.0f} tokens a sample"
            )
        lines += self.epoch.lines() if self.epoch is not None else []
        return "\n".join([*lines, *(f"assumed     {line}" for line in self.assumptions)])


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def plan(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Plan:
    """Estimate a recipe's cost. With `plan.measure=true` the time is that of two real steps, else operations divided
    by an assumed rate (`plan.tflops`). Raises WeftError for a wrong recipe or an unknown model."""
    config = read_recipe(recipe, overrides)
    assumed: list[str] = []
    nets = networks(config, assumed)
    modules = nets.modules
    names = config.model.train or (["transformer"] if config.trainable is None else list(modules))
    for name in names:
        if name not in modules:
            raise WeftError(f'model.train: the model has no module "{name}", it has {", ".join(modules)}')
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    lora = config.model.lora
    if lora is not None:
        for name in (name for name in names if name not in nets.whole):
            with torch.device("meta"):
                add_lora(modules[name], rank=lora.rank, alpha=lora.alpha, targets=lora.targets, init=lora.init)
    trained = {f"{n}.{k}": p for n in names for k, p in modules[n].named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())

    references = _references(config, assumed)
    stages = _stages(config, nets, references)
    # a backward pass costs two forwards: one for inputs, one for weights (which LoRA hardly has)
    backward = (1 if lora is not None else 2) + (1 if _recomputes(config) else 0)
    epoch: EpochPlan | None = None
    if config.rollout is not None:
        epoch = epoch_plan(config, _records(config), lora is not None and not set(names) & set(nets.whole))
        samples, forwards = epoch.epochs * epoch.samples, epoch.epochs * epoch.calls
        flops, what = epoch.epochs * epoch.passes(backward) * stages[0].flops, "operations of rollouts and updates"
        tokens = epoch.epochs * epoch.passes(0) * stages[0].tokens
        assumed.append("operations and time: without encoders, decoder and rewards")
    else:
        samples = sum(s.steps * s.batch for s in stages)
        micro = [s.accumulate or config.run.accumulate for s in config.stages] or [config.run.accumulate]
        forwards = sum(s.steps * m for s, m in zip(stages, micro, strict=True))
        flops = (1 + backward) * sum(s.steps * s.batch * s.flops for s in stages)
        tokens, what = sum(s.steps * s.batch * s.tokens for s in stages), f"{1 + backward} x forward operations"
    if config.plan.measure:
        seconds = _measure(config)
        much = "that of one epoch" if epoch else "the mean of two steps of stage 0"
        assumed.append(f"time: {much}, measured here, for every step")
    elif flops == 0:
        seconds = float("nan")
        assumed.append("time: unknown for a model of your own; plan.measure=true times two steps")
    else:
        rate, why = _rate(config, sum(parameters[name] for name in names))
        seconds = flops / rate
        assumed.append(f"time: {what} at {rate / 1e12:g} TFLOP/s {why}")
    memory = _memory(config, nets, names, trained, stages, assumed)
    if epoch is not None:
        memory["old policy, reference"] = 4.0 * count * epoch.copies
    return Plan(
        config.run.steps, samples, forwards, tokens, flops, parameters, count, memory, seconds, assumed, stages, epoch
    )


def _records(config: Recipe) -> int | None:
    """How many records the data hold; None if they are not on this machine."""
    try:
        return sum(len(open_source(item.source)) for item in config.data)
    except (WeftError, OSError):
        return None


def _references(config: Recipe, assumed: list[str]) -> float:
    """Input pictures per sample, averaged over the groups' weights; counted in the first records if they are here."""
    total = sum(item.weight for item in config.data)
    mean, guessed = 0.0, False
    for item in config.data:
        try:
            source = open_source(item.source)
            records = [source[i] for i in range(min(8, len(source)))]
            count = sum(len(r.inputs) for r in records) / len(records)
        except (WeftError, OSError):
            count, guessed = (0.0 if "gen" in item.batch_group else 1.0), True
        mean += item.weight / total * count
    if guessed:
        assumed.append("data that are not here: one input picture in each sample, none in groups named gen...")
    return mean


def _recomputes(config: Recipe) -> bool:
    """Whether activations are made again in the backward pass; a MetaQuery model is told so itself."""
    return config.model.gradient_checkpointing or bool(config.trainable_args.get("gradient_checkpointing"))


def _stages(config: Recipe, nets: Networks, references: float) -> list[StagePlan]:
    from weft.train.config import StageRecipe

    plans, start = [], 0
    for stage in config.stages or [StageRecipe()]:
        stop = stage.until_step if stage.until_step is not None else config.run.steps
        steps = max(0, min(stop, config.run.steps) - start)
        start = stop
        batch = (stage.batch_size or config.run.batch_size) * (stage.accumulate or config.run.accumulate)
        sizes = stage_sizes(stage)
        size = sizes[0] if sizes else (nets.resolution, nets.resolution)
        if nets.flops is None:
            plans.append(StagePlan(steps, batch, size, 0.0, 0.0))
            continue
        cells = size[0] * size[1] // nets.multiple**2
        whole, rest = int(references), references - int(references)
        low, high = (nets.flops(cells * (1 + k), k) for k in (whole, whole + 1))
        tokens = cells * (1 + references) + nets.text(references)
        plans.append(StagePlan(steps, batch, size, tokens, low + rest * (high - low)))
    return plans


def _rate(config: Recipe, size: int) -> tuple[float, str]:
    if config.plan.tflops is not None:
        return config.plan.tflops * 1e12, "(plan.tflops)"
    if config.run.device != "cpu" and (pick_device("auto").type == "cuda" or size > 100_000_000):
        return SUSTAINED, "(a data-centre GPU in bf16; set plan.tflops, or plan.measure=true)"
    threads = config.run.threads or torch.get_num_threads()
    return PER_THREAD * threads, f"({threads} CPU threads; set plan.tflops, or plan.measure=true)"


def _memory(
    config: Recipe,
    nets: Networks,
    names: Sequence[str],
    trained: dict[str, nn.Parameter],
    stages: list[StagePlan],
    assumed: list[str],
) -> dict[str, float]:
    modules, count, matrices = nets.modules, sum(p.numel() for p in trained.values()), 0
    if config.optim.name == "muon":
        for prefix in names:
            for name, owner in modules[prefix].named_modules():
                for key, p in owner.named_parameters(recurse=False):
                    full = f"{prefix}.{name}.{key}"
                    if p.requires_grad and is_hidden_matrix(full, owner, p, config.optim.muon_exclude):
                        matrices += p.numel()
    width = torch.finfo(DTYPES[config.model.dtype]).bits / 8
    dropped = config.cache is not None and config.cache.drop_encoders
    frozen = 0.0
    for name, module in modules.items():
        if name in names or not dropped:
            frozen += width * sum(p.numel() for p in module.parameters() if not p.requires_grad)
    memory = {
        "trained weights": 4.0 * count,
        "gradients": 4.0 * count,
        "optimiser": 8.0 * (count - matrices) + 4.0 * matrices,
        "EMA": 4.0 * count if config.run.ema is not None else 0.0,
        "frozen weights": frozen,
    }
    if nets.flops is not None:
        half = 2 if config.run.precision == "bf16" else 4
        micro = [s.batch_size or config.run.batch_size for s in config.stages] or [config.run.batch_size]
        per_layer = 2 if _recomputes(config) else 34
        layers = nets.layers + (17 if _recomputes(config) else 0)  # and one layer in full: 34 / 2
        peak = max(m * s.tokens for m, s in zip(micro, stages, strict=True))
        memory["activations"] = peak * nets.width * layers * per_layer * half / 2
        assumed.append(
            f"memory: {per_layer} x width values of 2 bytes a token and layer kept for the backward pass "
            f"(Korthikanti et al., 2022, without attention maps), {half // 2} x that in {config.run.precision}"
        )
    return memory


def _measure(config: Recipe) -> float:
    """Seconds of the whole run at the mean of two real steps, after one to warm up, or of the first epoch of rollouts.
    Leaves nothing behind."""
    import tempfile

    from weft.train.loop import Trainer

    with tempfile.TemporaryDirectory() as folder:
        tree = read_recipe(config, [f"run.folder={json.dumps(folder)}"])
        trainer = Trainer(tree, {}, lambda line: None)
        steps = 2 if config.rollout is None else config.rollout.steps_per_epoch
        if config.rollout is None:
            trainer.train_step()
        started = time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
        return (time.perf_counter() - started) / steps * config.run.steps
