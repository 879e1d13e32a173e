"""What the image families share: moving, encoding and decoding pictures, and laying out batches of any shapes.

A family is a subclass in its own file: it says how its text is encoded, how its autoencoder is normalised, how it
sizes pictures, and what one call of its transformer looks like.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor, nn

from weft.errors import WeftError
from weft.media import to_rgb
from weft.models import flow
from weft.models.image.attention import make_layout, patches
from weft.models.tokenizers import warn_unknown
from weft.sample import schedules
from weft.sample.rollout import pad_latents
from weft.types import Batch, Condition, Draw, Example, Loss

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Record

logger = logging.getLogger("weft")

PIXELS_AT_ONCE = 16 * 512 * 512
"""Pictures pass the VAE in groups of at most this many pixels (and at least one picture)."""
TEXTS_AT_ONCE = 64


class ImageFlow(ABC):
    """The common half of a `weft.types.FlowModel` over the parts of a released folder.

    `parts` maps folder names to networks, tokenizers and the scheduler. `resolution` is the size in pixels, by the
    family's rule, at which pictures are encoded and made when a record names none.
    """

    name = "image_flow"
    pipeline: ClassVar[str]
    """The diffusers pipeline that a saved folder declares."""
    optional_parts: ClassVar[tuple[str, ...]] = ()
    resample: Any = Pillow.Resampling.BICUBIC
    """The filter with which pictures are resized."""
    sees: str = "raw"
    """Which pictures `states` gets: the "raw" ones, or the "inputs" at the size they are encoded at."""
    resident: ClassVar[tuple[str, ...]] = ()
    """Parts whose parameters are read outside their forward: never offloaded layer by layer."""
    whole: ClassVar[tuple[str, ...]] = ()
    """Parts that train whole also beside a LoRA, and lie in its file."""
    text_tensors: ClassVar[tuple[str, ...]] = ("text", "pooled")
    """The tensors of a condition that a cache may hold in 16 bits."""
    steps, guidance = 28, 3.5
    """Sampling defaults where the folder's `weft.json` names none; guidance is classifier-free."""

    multiple: int
    channels: int
    downsample: int
    patch: int
    resolution: int

    def __init__(
        self,
        parts: dict[str, Any],
        transformer: Any,
        *,
        loss_config: flow.FlowLossConfig | None,
        device: torch.device | str | None,
        licence: str | None,
    ) -> None:
        self.parts = parts
        self.transformer: Any = transformer
        self.vae: Any = parts["vae"]
        self.scheduler: Any = parts["scheduler"]
        self.loss_config = loss_config or flow.FlowLossConfig()
        self.licence = licence
        self.card: dict[str, Any] = {}  # what the folder's weft.json said
        self.brought: list[str] = []  # parts of `whole` that a LoRA's file has replaced
        self._device = torch.device(device) if device is not None else None  # where offloaded modules run
        self._empty: dict[str, Tensor] | None = None

    # -- the model as a whole

    @abstractmethod
    def _anchor(self) -> Tensor:
        """A weight of the transformer that no adapter and no quantisation replaces."""

    @property
    def device(self) -> torch.device:
        """Where the networks run (with offloading: where they are brought to run)."""
        return self._device or self._anchor().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer's own weights."""
        return self._anchor().dtype

    @property
    def shift(self) -> float:
        """The shift of the noise schedule at the model's own resolution."""
        return self.shift_of((self.resolution, self.resolution))

    def shift_of(self, size: flow.Size) -> float:
        """The shift of the noise schedule for outputs of `size` in pixels; static unless the scheduler says dynamic."""
        config = dict(self.scheduler.config)
        if not config.get("use_dynamic_shifting"):
            return float(config["shift"])
        return schedules.dynamic_shift(self._tokens(size), config)

    def _tokens(self, size: flow.Size) -> int:
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    def modules(self) -> dict[str, nn.Module]:
        """The networks by folder name."""
        return {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}

    def to(self, device: torch.device | str) -> Any:
        """Move every network; not for offloaded or quantised models."""
        for module in self.modules().values():
            module.to(device)
        self._device = None
        return self

    def save(self, folder: Path) -> None:
        """Write the released folder layout; it opens in `weft.models.load` and in plain diffusers."""
        from weft.models.weights import save_folder

        folder = save_folder(self.parts, Path(folder), pipeline=self.pipeline, optional=self.optional_parts)
        card = self.card | self.settings()
        if card:
            (folder / "weft.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """What `weft.json` has to say so that the saved folder opens as this model."""
        return {}

    def step_modules(self) -> tuple[str, ...]:
        """The networks that a training step runs, whether they train or not; the others only encode."""
        return ("transformer",)

    def example_facts(self) -> dict[str, Any]:
        """What examples depend on besides the networks that do not train, for the cache's fingerprint."""
        return {}

    # -- how the family sizes pictures; sizes are (height, width) in pixels

    @abstractmethod
    def own_size(self, size: flow.Size) -> flow.Size:
        """The size at which a picture of `size` is encoded."""

    def resolution_of(self, size: flow.Size) -> int:
        """The `resolution` at which the family's own pictures are as large as one of `size`."""
        return max(size)

    def output_size(self, inputs: Sequence[flow.Size], aligned: flow.Size | None) -> flow.Size:
        """The output's size where the record names none: that of the picture it is `aligned` with, else square."""
        return (self.resolution, self.resolution) if aligned is None else self.own_size(aligned)

    def asked_size(self, size: flow.Size) -> flow.Size | None:
        """The output's size where a record asks for `size` and the family makes another; None: it is taken as it is."""
        return None

    def input_sizes(self, inputs: Sequence[flow.Size], source: bool, output: flow.Size) -> list[flow.Size]:
        """The sizes at which input pictures are encoded; with a `source`, the first is aligned with the output."""
        return [output if source and k == 0 else self.own_size(size) for k, size in enumerate(inputs)]

    # -- encoding

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Text states of each instruction."""

    def states(self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> list[dict[str, Tensor]]:
        """Text states of each instruction beside its input pictures, which only VLM encoders look at."""
        return self.encode_text(texts)

    def facts(self, record: Record) -> dict[str, Tensor]:
        """Further small tensors of a record's condition."""
        return {}

    def tokenize(self, name: str, texts: list[str], length: int, warn: bool) -> Tensor:
        """Token ids [B, length] of the tokenizer `name`; with `warn`, says which texts are cut, and which words a small
        vocabulary lacks."""
        tokenizer = self.parts[name]
        if warn:
            warn_unknown(tokenizer, texts)
        out = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if warn and bool((out.attention_mask[:, -1] == 1).any()):
            for text in texts:
                count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
                if count > length:
                    logger.warning("a text has %d tokens, the model reads %d of them: %.60s ...", count, length, text)
        return out.input_ids.to(self.device)

    def empty_text(self) -> dict[str, Tensor]:
        """States of the empty text (for guidance and text dropout), encoded once and kept on the CPU."""
        if self._empty is None:
            self._empty = {name: tensor.cpu() for name, tensor in self.encode_text([""])[0].items()}
        return self._empty

    def without_text(self, condition: Condition) -> dict[str, Tensor]:
        """The tensors of a condition whose text is dropped in training."""
        return condition.tensors | self.empty_text()

    def _latents(self, pixels: Tensor) -> Tensor:
        """Normalised fp32 latents [B, C, h, w] of pixels [B, 3, H, W] in [-1, 1]: the posterior's mode."""
        z = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        return (z.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _pixels(self, latents: Tensor) -> Tensor:
        """The inverse of `_latents`."""
        z = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Normalised fp32 latents [C, h, w] of pictures: the posterior's mode. Equal sizes share a pass.

        Raises WeftError for sizes that are not multiples of `multiple`.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        images = [image if image.mode == "RGB" else to_rgb(image) for image in images]
        for i, image in enumerate(images):
            groups.setdefault(flow.check_size((image.height, image.width), self.multiple), []).append(i)
        out: dict[int, Tensor] = {}
        for size, group in groups.items():
            for some in portions(group, size):
                pixels = torch.from_numpy(np.stack([np.asarray(images[i]) for i in some])).permute(0, 3, 1, 2)
                x = pixels.to(self.device).float() / 255 * 2 - 1
                with torch.autocast(self.device.type, enabled=False):
                    z = self._latents(x)
                out |= dict(zip(some, z, strict=True))
        return [out[i] for i in range(len(images))]

    def encode(self, records: Sequence[Record], *, negative: str | None = None) -> list[Condition]:
        """Conditions of records; see `weft.models.flow.pictures` for the sizes."""
        return flow.encode_records(self, records, negative)

    def with_text(self, conditions: Sequence[Condition], text: str) -> list[Condition]:
        """The same conditions with another text, sharing the references: negatives without a second encoding."""
        states = self.encode_text([text])[0]
        return [Condition(c.record_id, c.size, c.tensors | states, c.references) for c in conditions]

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """One cacheable training example per record; see `weft.models.flow.encode_examples`."""
        return flow.encode_examples(self, records)

    # -- one step

    def arrange(self, conditions: Sequence[Condition], table: int | None = None, text_length: int = 0) -> Batch:
        """The part of a batch that says where every picture token comes from: `sizes`, `valid`, `references`, `layout`.

        If all samples have the same shapes, `layout` is None and `references` are latents [B, C, h, w], the k-th of
        all samples; otherwise there is a layout (see `attention.make_layout` for `table` and `text_length`) and
        `references` is one tensor [B, R, C p p] of patch rows, padded on the right. `valid` is a bool mask
        [B, 1, H, W] of the real latent cells, None if all outputs have one size.
        """
        if not conditions:
            raise WeftError("nothing to prepare: the list of conditions is empty")
        sizes = [flow.check_size(c.size, self.multiple) for c in conditions]
        device, dtype = self.device, self.dtype
        shapes = [tuple((int(r.shape[-2]), int(r.shape[-1])) for r in c.references) for c in conditions]
        for h, w in (shape for row in shapes for shape in row):
            flow.check_size((h * self.downsample, w * self.downsample), self.multiple)
        targets = tuple((h // self.multiple, w // self.multiple) for h, w in sizes)
        grids = tuple(tuple((h // self.patch, w // self.patch) for h, w in row) for row in shapes)
        batch: Batch = {"sizes": sizes, "valid": None, "layout": None, "targets": targets, "grids": grids}
        if all(size == sizes[0] for size in sizes) and all(row == shapes[0] for row in shapes):
            columns = zip(*[c.references for c in conditions], strict=True)
            batch["references"] = [torch.stack(list(column)).to(device, dtype) for column in columns]
            make_layout(targets[:1], grids[:1], table, text_length)  # for its check of the position table
            return batch
        batch["layout"] = make_layout(targets, grids, table, text_length).to(device)
        batch["references"] = [self._rows(conditions).to(device, dtype)]
        if any(size != sizes[0] for size in sizes):
            masks = [torch.ones(1, h // self.downsample, w // self.downsample) for h, w in sizes]
            batch["valid"] = pad_latents(masks)[0].bool().to(device)
        return batch

    def _rows(self, conditions: Sequence[Condition]) -> Tensor:
        """Reference patches of each sample [B, R, C p p], padded on the right."""
        width = self.channels * self.patch**2
        rows = [
            torch.cat([patches(r[None].float(), self.patch)[0] for r in c.references])
            if c.references
            else torch.zeros(0, width)
            for c in conditions
        ]
        device = next((row.device for row in rows if row.numel()), None)
        return nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True)

    @abstractmethod
    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        """The batch of one transformer call."""

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Velocity [B, C, H, W] in fp32 of x [B, C, H, W] at sigma [B]; zero in the padding."""

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """The flow-matching loss with `loss_config`."""
        return flow.flow_matching_loss(self, examples, draw, self.loss_config)

    def sigmas(self, steps: int, size: flow.Size) -> Tensor:
        """The grid [steps + 1] of the folder's scheduler; `size` (in pixels) only sets a dynamic shift."""
        config = dict(self.scheduler.config)
        mu = schedules.dynamic_mu(self._tokens(size), config) if config.get("use_dynamic_shifting") else None
        return schedules.grid_from_config(config, steps, mu=mu)

    @torch.no_grad()
    def decode(self, latents: Tensor, sizes: Sequence[flow.Size]) -> list[Image.Image]:
        """RGB pictures of clean latents [B, C, H, W]; each is cropped before decoding, so padding never shows."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(sizes):
            groups.setdefault(flow.check_size(size, self.multiple), []).append(i)
        out: dict[int, Image.Image] = {}
        for (height, width), group in groups.items():
            for some in portions(group, (height, width)):
                z = latents[some, :, : height // self.downsample, : width // self.downsample].to(self.device).float()
                with torch.autocast(self.device.type, enabled=False):
                    x = self._pixels(z)
                pixels = (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
                for i, array in zip(some, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                    out[i] = Pillow.fromarray(array)
        return [out[i] for i in range(len(sizes))]


def portions(group: list[int], size: flow.Size) -> list[list[int]]:
    """The members of a group of equally large pictures, cut to what passes the VAE at once."""
    count = max(1, PIXELS_AT_ONCE // (size[0] * size[1]))
    return [group[start : start + count] for start in range(0, len(group), count)]
