"""What all flow families share: sizing pictures, records to conditions, examples, and the flow-matching loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image as Pillow
from torch import Tensor

from weft import rng
from weft.errors import WeftError
from weft.sample import schedules
from weft.sample.rollout import pad_latents
from weft.types import Condition, Draw, Example, FlowModel, Loss

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Part, Record

Size = tuple[int, int]  # (height, width) in pixels


class FlowFamily(FlowModel, Protocol):
    """A flow model that says how its family sizes pictures and reads texts (`weft.models.image.base.ImageFlow`)."""

    resolution: int
    resample: Any
    sees: str

    def own_size(self, size: Size) -> Size: ...

    def output_size(self, inputs: Sequence[Size], aligned: Size | None) -> Size: ...

    def asked_size(self, size: Size) -> Size | None: ...

    def input_sizes(self, inputs: Sequence[Size], source: bool, output: Size) -> list[Size]: ...

    def states(self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> list[dict[str, Tensor]]: ...

    def facts(self, record: Record) -> dict[str, Tensor]: ...


def check_size(size: Size, multiple: int) -> Size:
    """`size` itself, or a WeftError that names the nearest sizes with edges that are multiples of `multiple`."""
    height, width = (int(edge) for edge in size)
    if height <= 0 or width <= 0 or height % multiple or width % multiple:

        def near(edge: int, up: int) -> int:
            return max(multiple, (edge // multiple + (up if edge % multiple else 0)) * multiple)

        raise WeftError(
            f"size {height}x{width} (height x width): both must be multiples of {multiple}; nearest valid sizes are "
            f"{near(height, 0)}x{near(width, 0)} and {near(height, 1)}x{near(width, 1)}"
        )
    return height, width


def fit_longer_edge(size: Size, longer: int, factor: int = 32) -> Size:
    """The size whose longer edge is exactly `longer`, the other scaled alike and rounded to `factor`.

    `fix_longer_edge` of SkyworkAI/UniPic, UniPic-2/scripts; 640x480 at 512 -> 512x384. Python's rounding (half to
    even). Where the shorter edge would vanish the release crashes; here a WeftError says so.
    """
    height, width = size
    if min(size) <= 0:
        raise WeftError(f"a picture of {width}x{height} pixels has no area")
    shorter = round(min(size) * (longer / max(size)) / factor) * factor
    if shorter == 0:
        raise WeftError(
            f"a picture of {width}x{height} (width x height) is too narrow: at a longer edge of {longer} its shorter "
            f"edge rounds to 0 (multiples of {factor}); crop it so that one edge is less than {2 * longer // factor} "
            "times the other"
        )
    return (shorter, longer) if width >= height else (longer, shorter)


def cover(image: Image.Image, size: Size, resample: Any = Pillow.Resampling.BICUBIC) -> Image.Image:
    """The picture scaled until it covers `size`; if the aspect differs, it is first cropped around its centre, by whole
    pixels (of an odd number the one more on the right or below: PKU-YuanGroup/UniWorld-V2, PromptImageDataset)."""
    height, width = size
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    w, h = max(1, round(width / scale)), max(1, round(height / scale))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((width, height), resample)


def stretch(image: Image.Image, size: Size, resample: Any = Pillow.Resampling.BICUBIC) -> Image.Image:
    """The picture resized to `size`, as the releases do."""
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), resample)


def framed(model: Any, record: Record) -> Record:
    """The record with its source and mask in memory, cut to the `meta["size"]` that `pictures` cuts the source to: so
    that a scorer compares the output with what was edited, as the public loaders do (PKU-YuanGroup/UniWorld-V2,
    scripts/train_nft_kontext.py). The record itself where nothing is cut: no size, no source, a family that stretches.
    """
    asked, source, mask = record.meta.get("size"), record.source, record.mask
    rule = getattr(model, "asked_size", None)
    if asked is None or source is None or rule is None or rule(tuple(asked)) is not None:
        return record
    raw, size = record.load(source), (int(asked[0]), int(asked[1]))

    def cut(part: Part) -> Part:
        if part is source:
            return replace(part, path=None, value=cover(raw, size, model.resample))
        if part is mask:
            hard = Pillow.Resampling.NEAREST
            return replace(part, path=None, value=cover(record.load(part).resize(raw.size, hard), size, hard))
        return part

    if raw.size == size[::-1]:
        return record
    return replace(record, turns=[replace(turn, parts=[cut(part) for part in turn.parts]) for turn in record.turns])


@dataclass(frozen=True)
class Pictures:
    """A record's pictures: the output's size, the inputs (source first) as they come and as they are encoded."""

    size: Size
    raw: list[Image.Image]
    inputs: list[Image.Image]
    target: Image.Image | None


def pictures(model: FlowFamily, record: Record, *, target: bool = False) -> Pictures:
    """Output size and input pictures (with `target` also the target) at the sizes that they are encoded at.

    The output's size is `record.meta["size"]` ([height, width]) if given: then target and source cover it exactly,
    centre-cropped (a source that is encoded at a size of its own is stretched to that). Otherwise the family's rule
    sizes the source, or the target if there is no source; a pure generation is square. References always keep their
    own aspect, sized by the family's rule. A family may make another size of the one that is asked for (`asked_size`)
    and stretch the source as ever; what trains is as asked.
    """
    goal = record.target if target else None
    if target and goal is None:
        raise WeftError(f"record {record.id!r} has no target picture to learn from; add an assistant turn with one")
    raw = [record.load(part) for part in record.inputs]
    answer = None if goal is None else record.load(goal)
    shapes = [(image.height, image.width) for image in raw]
    asked, source = record.meta.get("size"), record.source is not None
    other = None if asked is None or target else model.asked_size(tuple(asked))
    explicit = asked is not None and other is None
    if other is not None:
        size = other
    elif asked is not None:
        size = check_size(tuple(asked), model.multiple)
    else:
        aligned = shapes[0] if source else None if answer is None else (answer.height, answer.width)
        size = model.output_size(shapes, aligned)
    place = cover if explicit else stretch
    sizes = model.input_sizes(shapes, source, size)
    inputs = [
        (place if source and k == 0 and own == size else stretch)(image, own, model.resample)
        for k, (image, own) in enumerate(zip(raw, sizes, strict=True))
    ]
    return Pictures(size, raw, inputs, None if answer is None else place(answer, size, model.resample))


def encode_records(model: FlowFamily, records: Sequence[Record], negative: str | None = None) -> list[Condition]:
    """Conditions of records: all texts in one pass, all pictures in one pass. With `negative`, its text for all."""
    sized = [pictures(model, record) for record in records]
    latents = iter(model.encode_images([image for p in sized for image in p.inputs]))
    texts = [_text(record) if negative is None else negative for record in records]
    return [
        Condition(record.id, p.size, tensors | model.facts(record), [next(latents) for _ in p.inputs])
        for record, p, tensors in zip(records, sized, _states(model, texts, sized), strict=True)
    ]


def _states(model: FlowFamily, texts: Sequence[str], sized: Sequence[Pictures]) -> list[dict[str, Tensor]]:
    return model.states(texts, [p.raw if model.sees == "raw" else p.inputs for p in sized])


def _text(record: Record) -> str:
    text = record.instruction
    if not text.strip():
        raise WeftError(f"record {record.id!r} has an empty instruction; say what to make or to change")
    return text


def encode_examples(model: FlowFamily, records: Sequence[Record]) -> list[Example]:
    """Training examples of records, on the CPU: `target`, `reference.K` (fp32 latents), `text` ..., `task` (bytes)."""
    sized = [pictures(model, record, target=True) for record in records]
    latents = iter(model.encode_images([image for p in sized for image in (*p.inputs, p.target) if image is not None]))
    texts = [_text(record) for record in records]
    examples = []
    for record, p, tensors in zip(records, sized, _states(model, texts, sized), strict=True):
        *references, target = [next(latents) for _ in (*p.inputs, p.target)]
        condition = Condition(record.id, p.size, tensors | model.facts(record), references)
        examples.append(example_of(condition, target, record.task))
    return examples


def example_of(condition: Condition, target: Tensor, task: str) -> Example:
    """Flat, named CPU tensors of a condition and its clean target latents [C, h, w]; the inverse of `condition_of`."""
    example = {name: tensor.cpu() for name, tensor in condition.tensors.items()}
    example |= {f"reference.{k}": latent.float().cpu() for k, latent in enumerate(condition.references)}
    return example | {"target": target.float().cpu(), "task": torch.tensor(list(task.encode()), dtype=torch.uint8)}


def condition_of(example: Example, record_id: str, downsample: int) -> Condition:
    """The condition inside an example; its size is the target's, `downsample` pixels per latent cell."""
    height, width = example["target"].shape[-2:]
    count = sum(name.startswith("reference.") for name in example)
    own = {name: t for name, t in example.items() if name not in ("target", "task") and "." not in name}
    references = [example[f"reference.{k}"] for k in range(count)]
    return Condition(record_id, (height * downsample, width * downsample), own, references)


def task_of(example: Example) -> str:
    """The task name stored in an example."""
    return bytes(example["task"].tolist()).decode()


@dataclass(frozen=True)
class FlowLossConfig:
    """Options of the flow-matching loss.

    `timestep`: how sigma is drawn: `uniform_shifted` (uniform on the line, then the shift map), `logit_normal`
    (Stable Diffusion 3, arXiv 2403.03206, section 3.1: `mean`, `std`) or `mode` (same place: `scale`). The last two
    are the paper's densities of sigma itself, without a shift; diffusers' training scripts index the scheduler's
    shifted table with them, from the noisy end.
    `shift`: of `uniform_shifted`; None takes the model's own. `text_dropout`: share of the samples of
    `dropout_tasks` that are trained with the empty text, so that guidance has a negative; references stay.
    """

    timestep: str = "uniform_shifted"
    shift: float | None = None
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    text_dropout: float = 0.1
    dropout_tasks: tuple[str, ...] = ("generate",)

    def __post_init__(self) -> None:
        if self.timestep not in TIMESTEPS:
            raise WeftError(f"timestep {self.timestep!r} is unknown; choose one of {', '.join(TIMESTEPS)}")
        for kind, names in TIMESTEPS.items():
            for name in names:
                if kind != self.timestep and getattr(self, name) != getattr(FlowLossConfig, name):
                    raise WeftError(f"{name} is of timestep {kind}; it does nothing with {self.timestep}, remove it")
        if not 0 <= self.text_dropout <= 1:
            raise WeftError(f"text_dropout is {self.text_dropout}; it is a share between 0 and 1")


TIMESTEPS = {"uniform_shifted": ("shift",), "logit_normal": ("mean", "std"), "mode": ("scale",)}
"""How sigma is drawn, and the options of each."""


def sigmas_of(config: FlowLossConfig, shift: float | Sequence[float], u: Tensor) -> Tensor:
    """Training sigmas [B] at the uniform numbers u [B].

    `shift` is the model's, one or [B], used where the config names none.
    """
    if not isinstance(shift, (int, float)):
        return torch.cat([sigmas_of(config, own, u[i : i + 1]) for i, own in enumerate(shift)])
    if config.timestep == "logit_normal":
        return schedules.logit_normal(len(u), mean=config.mean, std=config.std, u=u)
    if config.timestep == "mode":
        return schedules.mode(len(u), scale=config.scale, u=u)
    return schedules.uniform_shifted(len(u), shift=shift if config.shift is None else config.shift, u=u)


class LossModel(Protocol):
    """What the loss needs of a flow model (see `weft.types.FlowModel`), its own shift, and how its text is dropped."""

    downsample: int

    def shift_of(self, size: Size) -> float: ...

    def prepare(self, conditions: Sequence[Condition]) -> dict: ...

    def velocity(self, x: Tensor, sigma: Tensor, batch: dict) -> Tensor: ...

    def without_text(self, condition: Condition) -> dict[str, Tensor]: ...


def flow_matching_loss(
    model: LossModel,
    examples: Sequence[Example],
    draw: Draw,
    config: FlowLossConfig | None = None,
    sigma: Sequence[float] | Tensor | None = None,
) -> Loss:
    """Rectified-flow loss: the mean of (v - (noise - x0))^2 over each sample's real cells, in fp32, per sample.

    x_sigma = (1 - sigma) x0 + sigma noise (arXiv 2209.03003; arXiv 2403.03206, equation 14). Noise, sigma and
    dropout of a sample are functions of (seed, step, record id, occurrence in the batch). `sigma` [B] fixes the
    times and turns text dropout off (for a held-out loss).
    """
    config = config or FlowLossConfig()
    if len(examples) != len(draw.record_ids):
        raise WeftError(f"{len(examples)} examples but {len(draw.record_ids)} record ids; they belong together")
    seen: Counter[str] = Counter()
    conditions, noises, uniform, dropped = [], [], [], 0
    for example, record in zip(examples, draw.record_ids, strict=True):
        where = (draw.step, record, seen[record])
        seen[record] += 1
        condition = condition_of(example, record, model.downsample)
        u, chance = torch.rand(2, generator=rng.generator(draw.seed, "time", *where), dtype=torch.float64).tolist()
        if sigma is None and chance < config.text_dropout and task_of(example) in config.dropout_tasks:
            condition.tensors = model.without_text(condition)
            dropped += 1
        uniform.append(u)
        conditions.append(condition)
        noises.append(rng.normal(tuple(example["target"].shape), draw.seed, "noise", *where))
    if sigma is None:
        shifts = [model.shift_of(c.size) for c in conditions]
        times = sigmas_of(config, shifts, torch.tensor(uniform, dtype=torch.float64))
    else:
        times = torch.as_tensor(sigma, dtype=torch.float32)
    batch = model.prepare(conditions)
    device = batch["text"].device
    x0, valid = pad_latents([example["target"].float() for example in examples])
    noise, _ = pad_latents(noises)
    x0, noise = x0.to(device), noise.to(device)
    t = times.to(device)[:, None, None, None]
    error = model.velocity((1 - t) * x0 + t * noise, times.to(device), batch).float() - (noise - x0)
    error = error.square().mean(1, keepdim=True)  # [B, 1, H, W]
    if valid is None:
        per_sample = error.flatten(1).mean(1)
    else:
        mask = valid.to(device)
        per_sample = (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
    return Loss(per_sample, {"sigma": float(times.mean()), "text_dropped": dropped / len(conditions)})
