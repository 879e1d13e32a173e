"""FLUX.1 Kontext and DreamOmni2: ordered reference pictures in FLUX's transformer (arXiv 2506.15742, 2510.06679).

diffusers' `FluxTransformer2DModel` and `AutoencoderKL`, transformers' CLIP (its pooled vector only) and T5, unchanged.
Each input picture is encoded at its own size and stands behind the noisy tokens; where it stands in position space is
a layout (see `layouts.py`). With one picture and the released grid this is diffusers' `FluxKontextPipeline`, with
several DreamOmni2's (dvlab-research/DreamOmni2, pipeline_dreamomni2.py). Differences to the release: an edit has the
grid of its source (`parity` brings back the released rule, which is smaller for 4 of the 17 formats); positions are
fp32 (in bf16, columns beyond 256 fall together); pictures of a batch may differ in number and size; the adapters
`edit` and `generation` are switched by what a request asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.models import flow
from weft.models.image.attention_flux import adopt_flux
from weft.models.image.base import TEXTS_AT_ONCE
from weft.models.image.layouts import find_layout, picture_ids, text_ids
from weft.models.image.packed import PackedFlow
from weft.models.routing import Router, route_of
from weft.types import Batch, Condition

if TYPE_CHECKING:
    from weft.record import Record

KONTEXT_FORMATS = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
"""(width, height) of the pictures that FLUX.1 Kontext was trained on, all near one megapixel."""


@dataclass(frozen=True)
class FluxOptions:
    """Choices of a FLUX Kontext model.

    `layout`: where references stand (`layouts.LAYOUTS`). `parity`: sizes as the release's pipeline chooses them; of one
    that is asked for it takes the shape alone. `embedded_guidance`: the number a guidance-distilled transformer is
    told; not classifier-free guidance, which comes on top. `text_length`: longest T5 text in tokens.
    `reference_tokens`: the most tokens that a request's references (all pictures but the source) may have together;
    larger ones are scaled down alike.
    """

    layout: str = "dreamomni2"
    parity: bool = False
    embedded_guidance: float = 3.5
    text_length: int = 512
    reference_tokens: int | None = None

    def __post_init__(self) -> None:
        find_layout(self.layout)
        if self.embedded_guidance < 0:
            raise WeftError(f"embedded_guidance is {self.embedded_guidance:g}; it must not be negative (usual: 3.5)")
        if self.text_length < 1:
            raise WeftError(f"text_length is {self.text_length}; it must be at least 1 token")
        if self.reference_tokens is not None and self.reference_tokens < 1:
            raise WeftError(f"reference_tokens is {self.reference_tokens}; it must be at least 1")


class FluxKontext(PackedFlow):
    """A `weft.types.FlowModel` over the parts of a FLUX.1 Kontext folder; `weft.models.load` builds it.

    `parts`: `transformer`, `vae`, `text_encoder` and `tokenizer` (CLIP), `text_encoder_2` and `tokenizer_2` (T5),
    `scheduler`. `resolution` squared is the area of pictures: the formats of the release, scaled from 1024. If the
    adapters named in `routed` are loaded, each sample takes the one of its request (`weft.models.routing.route_of`).
    """

    name = "flux_kontext"
    pipeline: ClassVar[str] = "FluxKontextPipeline"
    optional_parts: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    steps, guidance = 28, 1.0

    def __init__(
        self,
        parts: dict[str, Any],
        *,
        options: FluxOptions | None = None,
        resolution: int | None = None,
        loss_config: flow.FlowLossConfig | None = None,
        device: torch.device | str | None = None,
        licence: str | None = None,
    ) -> None:
        transformer = adopt_flux(parts["transformer"])
        super().__init__(parts, transformer, loss_config=loss_config, device=device, licence=licence)
        self.options = options or FluxOptions()
        self.layout = find_layout(self.options.layout)
        downsample = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._measure(transformer.config.in_channels // 4, 2, downsample, resolution)
        self.axes = len(transformer.config.axes_dims_rope)
        self.router: Router | None = None

    def route(self, names: Sequence[str]) -> None:
        """Switch the loaded adapters `names` ("edit", "generation") by each sample's request from now on."""
        self.router = Router(self.transformer, names)

    def _anchor(self) -> Tensor:
        return self.transformer.transformer_blocks[0].attn.norm_q.weight

    # -- sizes

    def formats(self) -> list[flow.Size]:
        """The sizes (height, width) that pictures are brought to, at this model's resolution."""
        scale = self.resolution / 1024 / self.multiple
        scaled = [(max(1, round(h * scale)), max(1, round(w * scale))) for w, h in KONTEXT_FORMATS]
        return [(h * self.multiple, w * self.multiple) for h, w in dict.fromkeys(scaled)]

    def own_size(self, size: flow.Size) -> flow.Size:
        """The format of the nearest aspect ratio; between two equally near the narrower one, as in the release.

        The aspect is the picture's own, as in the release's programs (`resizeinput`); under `parity`, as in its
        pipeline and stock Kontext's, that of edges rounded down, which can choose another format for an odd size.
        """
        if self.options.parity:
            size = (max(1, size[0] // self.multiple), max(1, size[1] // self.multiple))
        aspect = size[1] / size[0]
        return min((abs(aspect - w / h), w, h, (h, w)) for h, w in self.formats())[-1]

    def output_size(self, inputs: Sequence[flow.Size], aligned: flow.Size | None) -> flow.Size:
        """The source's own format; with `parity` the release's rule applied to it, which rounds areas down again."""
        size = super().output_size(inputs, aligned)
        return self.asked_size(size) or size

    def asked_size(self, size: flow.Size) -> flow.Size | None:
        """Under `parity` the release's pipeline: only the shape of an asked size counts, its area is the model's own,
        edges rounded down (`max_area` in pipeline_dreamomni2.py). Raises WeftError for a size without an area."""
        if not self.options.parity:
            return None
        if min(size) <= 0:
            raise WeftError(f"size {size[0]}x{size[1]} (height x width) has no area")
        aspect, area = size[1] / size[0], self.resolution**2
        height, width = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        return height // self.multiple * self.multiple, width // self.multiple * self.multiple

    def input_sizes(self, inputs: Sequence[flow.Size], source: bool, output: flow.Size) -> list[flow.Size]:
        """Own formats, the source aligned with the output (except under `parity`), references within their budget."""
        sizes = [self.own_size(size) for size in inputs]
        if source and not self.options.parity:
            sizes[0] = output
        budget, first = self.options.reference_tokens, int(source)
        total = sum(self._tokens(size) for size in sizes[first:])
        if budget is None or total <= budget:
            return sizes
        if budget < len(sizes) - first:
            raise WeftError(f"reference_tokens is {budget}, less than one for each of {len(sizes) - first} references")
        scale, m = math.sqrt(budget / total), self.multiple
        small = [(max(m, int(h * scale) // m * m), max(m, int(w * scale) // m * m)) for h, w in sizes[first:]]
        while sum(self._tokens(size) for size in small) > budget:  # some edge could not go below one token
            k = max(range(len(small)), key=lambda i: self._tokens(small[i]))
            h, w = small[k]
            small[k] = (h - m, w) if h >= w else (h, w - m)
        return sizes[:first] + small

    # -- encoding

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """States of each text: `text` [L, C] of T5 (padding included, as in training) and `pooled` [P] of CLIP."""
        unique = list(dict.fromkeys(texts))
        states: list[dict[str, Tensor]] = []
        length = min(self.options.text_length, self.parts["tokenizer_2"].model_max_length)
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(unique), TEXTS_AT_ONCE):
                some = unique[start : start + TEXTS_AT_ONCE]
                short = self.tokenize("tokenizer", some, self.parts["tokenizer"].model_max_length, warn=False)
                pooled = self.parts["text_encoder"](short).pooler_output
                text = self.parts["text_encoder_2"](self.tokenize("tokenizer_2", some, length, warn=True))[0]
                states += [{"text": t, "pooled": p} for t, p in zip(text, pooled, strict=True)]
        table = dict(zip(unique, states, strict=True))
        return [dict(table[text]) for text in texts]

    def facts(self, record: Record) -> dict[str, Tensor]:
        """`source`: whether the first picture is one to be edited; `align`: of `record.meta["align_to"]`, if given.

        `align_to` lists for each input picture the earlier one (from 1) that it stays aligned with, 0 for none.
        """
        facts = {"source": torch.tensor(record.source is not None, dtype=torch.uint8)}
        align = record.meta.get("align_to")
        if align is not None:
            facts["align"] = torch.tensor([int(k or 0) for k in align], dtype=torch.int64)
        return facts

    # -- one step

    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        """The batch of one transformer call: `text`, `pooled`, `guidance`, positions, routes, and `ImageFlow.arrange`.

        A condition's own `guidance` (a number) takes the place of the model's embedded guidance.
        """
        batch = self.arrange_rows(conditions)
        lengths = {c.tensors["text"].shape[0] for c in conditions}
        if len(lengths) > 1:
            raise WeftError(f"texts of one batch differ in length ({sorted(lengths)} tokens); use one model for all")
        device, length, layout = self.device, lengths.pop(), batch["layout"]
        for name in ("text", "pooled"):
            batch[name] = torch.stack([c.tensors[name] for c in conditions]).to(device, self.dtype)
        own = self.options.embedded_guidance
        values = [float(c.tensors["guidance"]) if "guidance" in c.tensors else own for c in conditions]
        embeds = self.transformer.config.guidance_embeds
        batch["guidance"] = torch.tensor(values, device=device) if embeds else None
        aligned = [tuple(c.tensors["align"].tolist()) if "align" in c.tensors else () for c in conditions]
        texts = text_ids(self.layout, length, self.axes)
        ids = [
            torch.cat([texts, picture_ids(self.layout, target, grids, align, self.axes)])
            for target, grids, align in zip(batch["targets"], batch["grids"], aligned, strict=True)
        ]
        if layout is None and all(align == aligned[0] for align in aligned):
            batch["text_ids"], batch["picture_ids"] = ids[0][:length].to(device), ids[0][length:].to(device)
        else:  # see attention_flux.py
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
            batch["text_ids"], batch["picture_ids"] = texts[:0].to(device), padded.flatten(0, 1).to(device)
        batch["mask"] = None
        if layout is not None:
            ones = layout.image_mask.new_ones(len(conditions), 1, 1, length)
            batch["mask"] = torch.cat([ones, layout.image_mask], dim=-1)
        sources = [bool(c.tensors["source"]) if "source" in c.tensors else bool(c.references) for c in conditions]
        batch["routes"] = [route_of(s, len(c.references)) for s, c in zip(sources, conditions, strict=True)]
        return batch

    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Velocity [B, C, H, W] in fp32 of x [B, C, H, W] at sigma [B]; zero in the padding. One transformer call."""
        if self.router is not None:
            self.router.switch(batch["routes"])
        out = self.transformer(
            hidden_states=self.pack(x, batch),
            encoder_hidden_states=batch["text"],
            pooled_projections=batch["pooled"],
            timestep=self.time(sigma, batch),
            img_ids=batch["picture_ids"],
            txt_ids=batch["text_ids"],
            guidance=batch["guidance"],
            joint_attention_kwargs=None if batch["mask"] is None else {"attention_mask": batch["mask"]},
            return_dict=False,
        )[0]
        return self.unpack(out, x, batch)
