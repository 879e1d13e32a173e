"""What a recipe will cost, before it runs: steps, forwards, tokens, parameters, time and memory.

Parameter counts and operations come from the real classes on the meta device, so nothing is loaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.models.adapt import add_lora
from weft.train.config import Recipe, read_recipe
from weft.train.feed import open_source, stage_sizes
from weft.train.optim import is_hidden_matrix
from weft.train.setup import DTYPES, make_trainable, pick_device

# Stable Diffusion 3.5 Medium, which UniPic2-SD3.5M-Kontext shares; used when the checkpoint is not on this machine.
SD35_MEDIUM: dict[str, dict[str, Any]] = {
    "transformer": {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
    },
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "projection_dim": 1280, "hidden_act": "gelu",
    },
    "text_encoder_3": {
        "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip
SD35_NAMES = ("stable-diffusion-3.5-medium", "UniPic2-SD3.5M-Kontext")
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
    if config.rollout is not None:
        raise WeftError(
            f"plan knows supervised runs only; to see what method {config.method.name} costs here, train with "
            f"run.steps={config.rollout.steps_per_epoch} and read seconds/* in the log"
        )
    assumed: list[str] = []
    modules = _modules(config)
    names = config.model.train or (["transformer"] if config.trainable is None else list(modules))
    for name in names:
        if name not in modules:
            raise WeftError(f'model.train: the model has no module "{name}", it has {", ".join(modules)}')
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    lora = config.model.lora
    if lora is not None:
        for name in names:
            with torch.device("meta"):
                add_lora(modules[name], rank=lora.rank, alpha=lora.alpha, targets=lora.targets, init=lora.init)
    elif config.trainable is None:
        for name in names:
            modules[name].requires_grad_(True)
    trained = {f"{n}.{k}": p for n in names for k, p in modules[n].named_parameters() if p.requires_grad}
    count = sum(p.numel() for p in trained.values())

    references = _references(config, assumed)
    stages = _stages(config, modules, references)
    samples = sum(s.steps * s.batch for s in stages)
    # a backward pass costs two forwards: one for inputs, one for weights (which LoRA hardly has)
    factor = 1 + (1 if lora is not None else 2) + (1 if config.model.gradient_checkpointing else 0)
    flops = factor * sum(s.steps * s.batch * s.flops for s in stages)
    micro = [(stage.accumulate or config.run.accumulate) for stage in (config.stages or [])] or [config.run.accumulate]
    forwards = sum(s.steps * m for s, m in zip(stages, micro, strict=True))
    if config.plan.measure:
        seconds = _measure(config)
        assumed.append("time: the mean of two steps of stage 0, measured here, for every step")
    elif flops == 0:
        seconds = float("nan")
        assumed.append("time: unknown for a model of your own; plan.measure=true times two steps")
    else:
        rate, why = _rate(config, sum(parameters[name] for name in names))
        seconds = flops / rate
        assumed.append(f"time: {factor} x forward operations at {rate / 1e12:g} TFLOP/s {why}")
    memory = _memory(config, modules, names, trained, stages, assumed)
    tokens = sum(s.steps * s.batch * s.tokens for s in stages)
    return Plan(config.run.steps, samples, forwards, tokens, flops, parameters, count, memory, seconds, assumed, stages)


def _modules(config: Recipe) -> dict[str, nn.Module]:
    """The model's networks on the meta device, from the folder's configurations."""
    if config.trainable is not None:
        return make_trainable(config, torch.device("cpu")).modules()
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import AutoConfig, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from weft.models.load import find_model

    path = str(config.model.path)
    known = next((name for name in SD35_NAMES if name in path), None)
    try:
        folder: Path | None = find_model(path) if Path(path).exists() or known is None else None
    except WeftError:
        raise WeftError(f"model.path: {path} is not on this machine and not a known size; give a folder") from None
    found: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name in SD35_MEDIUM:
            if folder is not None and not (folder / name / "config.json").is_file():
                continue
            values = SD35_MEDIUM[name] if folder is None else json.loads((folder / name / "config.json").read_text())
            if name in ("transformer", "vae"):
                kind: Any = SD3Transformer2DModel if name == "transformer" else AutoencoderKL
                found[name] = kind.from_config(values)
            elif name == "text_encoder_3":
                text: Any = T5Config(**values) if folder is None else AutoConfig.from_pretrained(folder / name)
                found[name] = T5EncoderModel(text)
            else:
                text = CLIPTextConfig(**values) if folder is None else AutoConfig.from_pretrained(folder / name)
                found[name] = CLIPTextModelWithProjection(text)
    for module in found.values():
        module.requires_grad_(False)
    return found


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


def _stages(config: Recipe, modules: dict[str, nn.Module], references: float) -> list[StagePlan]:
    from weft.train.config import StageRecipe

    plans, start = [], 0
    operations: Callable[[float], float] | None = None
    for stage in config.stages or [StageRecipe()]:
        stop = stage.until_step if stage.until_step is not None else config.run.steps
        steps = max(0, min(stop, config.run.steps) - start)
        start = stop
        batch = (stage.batch_size or config.run.batch_size) * (stage.accumulate or config.run.accumulate)
        sizes = stage_sizes(stage)
        transformer: Any = modules.get("transformer")
        if transformer is None or config.trainable is not None:
            plans.append(StagePlan(steps, batch, sizes[0] if sizes else (0, 0), 0.0, 0.0))
            continue
        vae: Any = modules["vae"]
        down = 2 ** (len(vae.config.block_out_channels) - 1)
        side = min(512, transformer.config.sample_size * down)
        size = sizes[0] if sizes else (side, side)
        h, w = size[0] // down, size[1] // down
        cells = h * w // transformer.config.patch_size**2
        text = _text_length(modules)
        operations = operations or _operations(transformer, text)
        whole, rest = int(references), references - int(references)
        low, high = (operations(cells * (1 + k)) for k in (whole, whole + 1))
        tokens = cells * (1 + references) + text
        plans.append(StagePlan(steps, batch, size, tokens, low + rest * (high - low)))
    return plans


def _text_length(modules: dict[str, nn.Module]) -> int:
    clip: Any = modules["text_encoder"]
    t5: Any = modules.get("text_encoder_3")
    return clip.config.max_position_embeddings + (256 if t5 is None or t5.config.d_model >= 1024 else 32)


def _operations(transformer: Any, text: int) -> Callable[[float], float]:
    """Operations of one forward of one sample as a function of its image tokens.

    Counted on the meta device at three small lengths: linear layers make them linear, attention quadratic, so that
    three points fix them for every length. References cost what as many tokens of the target would.
    """
    import numpy as np
    from torch.utils.flop_counter import FlopCounterMode

    config = transformer.config
    lengths, counts = (1, 2, 3), []
    for rows in lengths:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            transformer(
                hidden_states=torch.empty(1, config.in_channels, rows * config.patch_size, 16 * config.patch_size),
                encoder_hidden_states=torch.empty(1, text, config.joint_attention_dim),
                pooled_projections=torch.empty(1, config.pooled_projection_dim),
                timestep=torch.empty(1),
            )
        counts.append(float(counter.get_total_flops()))
    curve = np.polynomial.Polynomial.fit([16 * n for n in lengths], counts, 2).convert()
    return lambda tokens: float(curve(tokens))


def _rate(config: Recipe, size: int) -> tuple[float, str]:
    if config.plan.tflops is not None:
        return config.plan.tflops * 1e12, "(plan.tflops)"
    if config.run.device != "cpu" and (pick_device("auto").type == "cuda" or size > 100_000_000):
        return SUSTAINED, "(a data-centre GPU in bf16; set plan.tflops, or plan.measure=true)"
    threads = config.run.threads or torch.get_num_threads()
    return PER_THREAD * threads, f"({threads} CPU threads; set plan.tflops, or plan.measure=true)"


def _memory(
    config: Recipe,
    modules: dict[str, nn.Module],
    names: Sequence[str],
    trained: dict[str, nn.Parameter],
    stages: list[StagePlan],
    assumed: list[str],
) -> dict[str, float]:
    count = sum(p.numel() for p in trained.values())
    matrices = 0
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
    transformer: Any = modules.get("transformer")
    if transformer is not None and config.trainable is None:
        c = transformer.config
        hidden = c.num_attention_heads * c.attention_head_dim
        half = 2 if config.run.precision == "bf16" else 4
        micro = [s.batch_size or config.run.batch_size for s in config.stages] or [config.run.batch_size]
        per_layer = 2 if config.model.gradient_checkpointing else 34
        layers = c.num_layers + (17 if config.model.gradient_checkpointing else 0)  # and one layer in full: 34 / 2
        peak = max(m * s.tokens for m, s in zip(micro, stages, strict=True))
        memory["activations"] = peak * hidden * layers * per_layer * half / 2
        assumed.append(
            f"memory: {per_layer} x width values of 2 bytes a token and layer kept for the backward pass "
            f"(Korthikanti et al., 2022, without attention maps), {half // 2} x that in {config.run.precision}"
        )
    return memory


def _measure(config: Recipe) -> float:
    """Seconds of the whole run at the mean of two real steps, after one to warm up. Leaves nothing behind."""
    import tempfile

    from weft.train.loop import Trainer

    with tempfile.TemporaryDirectory() as folder:
        tree = read_recipe(config, [f"run.folder={json.dumps(folder)}"])
        trainer = Trainer(tree, {}, lambda line: None)
        trainer.train_step()
        started = time.perf_counter()
        for _ in range(2):
            trainer.train_step()
        return (time.perf_counter() - started) / 2 * config.run.steps
