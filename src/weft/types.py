"""The types that flow through a run: Record -> Condition -> Rollout -> Score, and the model protocols.

`Record` lives in `weft.record`. Tensors in shape comments: B samples, C channels, H x W latent cells, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from weft.errors import WeftError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from weft.record import Part, Record

Batch = dict[str, Any]
"""What `FlowModel.prepare` makes of a list of conditions and `FlowModel.velocity` eats at every step."""

Example = dict[str, "Tensor"]
"""One training record after its frozen encoders: flat, named tensors, so that it can be cached as safetensors."""


@dataclass(slots=True)
class Condition:
    """Everything about one record that does not depend on noise: computed once, shared by all samples of a group.

    `size` is the output's (height, width) in pixels. `tensors` holds the text states (SD3: `text` [L, C],
    `pooled` [P]). `references` are clean latents [C, h, w] in the order in which the instruction names them
    (the source first), each of its own size.
    """

    record_id: str
    size: tuple[int, int]
    tensors: dict[str, Tensor]
    references: list[Tensor] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class SkipLayers:
    """Skip-layer guidance as diffusers' SD3 pipeline has it: in the steps k with start T < k < stop T the guided
    velocity moves by `scale` times what the transformer's `layers` add to the positive one (Stability AI for SD3.5
    Medium: layers 7, 8, 9). Raises `WeftError` for no layers or a span that is none."""

    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self) -> None:
        if not self.layers:
            raise WeftError("skip-layer guidance without layers; name some, as (7, 8, 9)")
        if not 0 <= self.start < self.stop <= 1:
            span = f"from {self.start:g} to {self.stop:g}"
            raise WeftError(f"skip-layer guidance {span}: give shares of the steps, 0 <= start < stop <= 1")


@dataclass(slots=True)
class Rollout:
    """Generated outputs with what the training method declared that it needs, and no more.

    `latents` [B, C, H, W], zero-padded to the largest sample; `sizes` are (height, width) in pixels.
    `trajectory` and `log_probs` are present only if the method asked for them.
    """

    record_ids: list[str]
    group_ids: list[str]
    sizes: list[tuple[int, int]]
    latents: Tensor
    outputs: list[Any] = field(default_factory=list)
    sigmas: Tensor | None = None  # [T + 1]
    trajectory: Tensor | None = None  # [B, T + 1, C, H, W]
    log_probs: Tensor | None = None  # [B, T]


@dataclass(slots=True)
class Score:
    """A reward or a measurement: a value, or missing with a reason. A failure is never a number."""

    value: float | None
    parts: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("a missing Score needs a reason")


@dataclass(slots=True)
class Draw:
    """The coordinates of a training step's randomness: the loop's `seed` and `step`, and each sample's record id.

    A loss draws its noise through `weft.rng` with these, never from a global generator.
    """

    seed: int
    step: int
    record_ids: list[str]


@dataclass(slots=True)
class Loss:
    """Per-sample losses [B] in fp32 (the loop averages them, so batches accumulate exactly) and named metrics."""

    per_sample: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Trainable(Protocol):
    """What the loop needs of anything that it trains: a flow model, a VAE, a text encoder, a critic."""

    name: str

    def modules(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder on disk (`transformer`, `vae`, `text_encoder` ...)."""
        ...

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """Run the frozen encoders; one flat dict of CPU tensors per record. Deterministic, so cacheable."""
        ...

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """The supervised loss of one homogeneous batch (any gradient flows into `modules()`)."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model in its released folder layout."""
        ...


@runtime_checkable
class FlowModel(Trainable, Protocol):
    """A model that predicts a velocity `v = noise - x0` at sigma in [0, 1] (rectified flow).

    Latents of a batch are one tensor [B, C, H, W], zero-padded at the bottom and right to the largest sample;
    the batch from `prepare` knows the sizes. The padding of a velocity is zero.
    """

    multiple: int  # height and width in pixels must be multiples of this
    channels: int  # latent channels
    downsample: int  # pixels per latent cell

    def encode_text(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Text states of each instruction, e.g. `text` [L, C] and `pooled` [P]."""
        ...

    def encode_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Clean, normalised latents [C, h, w], deterministic (the posterior's mode), sizes may differ."""
        ...

    def encode(self, records: Sequence[Record], *, negative: str | None = None) -> list[Condition]:
        """Conditions of records; with `negative`, the same with this text in place of the instruction (for CFG)."""
        ...

    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        """Stack conditions of any sizes and reference counts into the tensors of one transformer call."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Velocity [B, C, H, W] of noisy latents x [B, C, H, W] at sigma [B]: exactly one transformer call."""
        ...

    def decode(self, latents: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
        """Pictures of clean latents [B, C, H, W], each cropped to its size in pixels."""
        ...

    def sigmas(self, steps: int, size: tuple[int, int]) -> Tensor:
        """The model's own inference grid [steps + 1] in fp32, from 1 (or its maximum) down to 0."""
        ...


@runtime_checkable
class TokenModel(Protocol):
    """A model that writes tokens: texts and movements in one sequence (`weft.models.motion.lm.MotionLM`).

    Its supervised loss is a `Trainable` of its own (`weft.models.motion.lm_training`); its rollout is
    `weft.sample.tokens.sample_tokens`.
    """

    name: str

    def modules(self) -> dict[str, nn.Module]:
        """The networks by the name of their folder on disk (`rvq`, `transformer`, `heads`)."""
        ...

    def respond(
        self, records: Sequence[Record], *, seeds: Sequence[int], options: Any = None
    ) -> list[list[Part]]:  # fmt: skip
        """What the assistant answers to each record's last user turn; answer k is a function of record and seed k."""
        ...

    def sampling(self, options: Any) -> Any:
        """The options in force (`weft.sample.tokens.Sampling`): the model's own where `options` has None."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model in its folder layout."""
        ...
