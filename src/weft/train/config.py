"""The recipe: one tree of dataclasses. `weft.train.reading` makes it from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from weft.train.geometry import RewardRecipe, RolloutRecipe

Size = int | list[int]


@dataclass(slots=True)
class LoraRecipe:
    """Low-rank adapters on the trained modules; `targets` are name endings of linear layers. `start` continues an
    exported adapter of the same rank, alpha and layers (a folder or a safetensors file)."""

    rank: int = 32
    alpha: float = 64.0
    targets: list[str] = field(default_factory=lambda: ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"])
    init: Literal["gaussian", "default"] = "gaussian"
    dropout: float = 0.0
    start: str | None = None


@dataclass(slots=True)
class ModelRecipe:
    """What is trained. `path` is a folder or zoo name; `train` names modules (default: `transformer`, or for a
    `trainable` class all its modules). `dtype` is that of the frozen weights: trained ones are always fp32. `options`
    are the model family's own (see `weft.models.load`)."""

    path: str | None = None
    train: list[str] | None = None
    lora: LoraRecipe | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    attention_backend: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class SourceRecipe:
    """Where records come from: `call` (a dotted callable, `package.module:function` or `file.py:function`, called
    with `args`, returning a sequence of records), or `kind` and `path` as in `weft.data.sources` (whose kind
    `python` is the same as `call`)."""

    call: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None
    path: str | None = None
    map: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    task: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class DataRecipe:
    """One source. A batch holds records of one `batch_group` only; groups alternate in the ratio of their weights."""

    source: SourceRecipe = field(default_factory=SourceRecipe)
    weight: float = 1.0
    batch_group: str = "all"


@dataclass(slots=True)
class StageRecipe:
    """Resolution until `until_step` (exclusive; null: to the end). `size` alone: pictures become size x size (or
    [height, width]). With `aspects` ("4:3" = width:height) each record goes to the nearest bucket of that area, sides
    multiples of `multiple`; with `buckets` to the [height, width] nearest in aspect. Without any, pictures stay as
    they are."""

    until_step: int | None = None
    size: Size | None = None
    aspects: list[str] | None = None
    buckets: list[list[int]] | None = None
    multiple: int = 32
    batch_size: int | None = None
    accumulate: int | None = None


@dataclass(slots=True)
class OptimRecipe:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for the rest. `lr` is AdamW's."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_adjust: Literal["original", "match_rms_adamw"] = "original"
    muon_exclude: list[str] = field(default_factory=list)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Literal["matrices", "all"] = "matrices"  # what it applies to; matrices: all of two or more dimensions
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0  # steps, or a share of all steps when below 1 (rounded up)
    warmup_start: float = 1e-5  # the first step's share of lr
    final: float = 0.0  # the share of lr to which the schedule decays: the step after the last would have it
    clip: float | None = 1.0


@dataclass(slots=True)
class EmaRecipe:
    """Exponential moving average of the trained weights; with `warmup` decay(n) = min(decay, (1 + n) / (10 + n)),
    n counting the updates before this one from `start` (DiffusionNFT: 1). Only every so many updates, when n + 1 is a
    multiple of `every`, the average moves (flow_grpo: 8)."""

    decay: float = 0.999
    warmup: bool = True
    start: int = 0
    every: int = 1


@dataclass(slots=True)
class CacheRecipe:
    """Store of encoded examples. `ahead` encodes every record before step 0; `drop_encoders` then frees the frozen
    modules; `text_dtype` stores text states in 16 bits. An example is the same in every step, so nothing random may
    be in it."""

    folder: str | None = None  # default: <run folder>/cache
    ahead: bool = False
    drop_encoders: bool = False
    text_dtype: Literal["fp32", "bf16"] = "fp32"
    batch: int = 64
    shard: int = 1024


@dataclass(slots=True)
class RunRecipe:
    folder: str = "runs/default"
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    seed: int = 0
    checkpoint_every: int = 1000
    keep: int = 2
    log_every: int = 10
    validate_every: int = 0
    grid_every: int = 0
    evaluate_every: int = 0
    ema: EmaRecipe | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    threads: int | None = None
    max_faults: float = 0.02  # share of a source's records that are skipped if they cannot be used (broken pictures)
    prefetch: bool = False  # make the next batch in a thread while this one trains (without a cache)
    compile: bool = False
    export: bool = True
    allow_changes: bool = False  # resume although the recipe is not the checkpoint's
    trackers: list[str] = field(default_factory=lambda: ["jsonl"])


@dataclass(slots=True)
class ValidateRecipe:
    source: SourceRecipe = field(default_factory=SourceRecipe)
    count: int = 64
    batch_size: int = 16
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])


@dataclass(slots=True)
class GridRecipe:
    source: SourceRecipe = field(default_factory=SourceRecipe)
    count: int = 4
    steps: int = 20
    guidance: float = 1.0
    negative: str = ""


@dataclass(slots=True)
class MethodRecipe:
    """The method: sft, nft, grpo, or a dotted path to your own (see `weft.train.method`). Its `options` are checked by
    the method (for sft: those of the flow-matching loss)."""

    name: str = "sft"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class PlanRecipe:
    """For `plan` alone: time two real steps, or divide operations by this many 1e12 per second."""

    measure: bool = False
    tflops: float | None = None


@dataclass(slots=True)
class Recipe:
    model: ModelRecipe = field(default_factory=ModelRecipe)
    trainable: str | None = None
    trainable_args: dict[str, Any] = field(default_factory=dict)
    method: MethodRecipe = field(default_factory=MethodRecipe)
    rollout: RolloutRecipe | None = None  # of methods that sample (nft, grpo), with their reward
    reward: RewardRecipe | None = None
    data: list[DataRecipe] = field(default_factory=list)
    cache: CacheRecipe | None = None
    stages: list[StageRecipe] = field(default_factory=list)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)
    validate: ValidateRecipe | None = None
    grid: GridRecipe | None = None
    plan: PlanRecipe = field(default_factory=PlanRecipe)
