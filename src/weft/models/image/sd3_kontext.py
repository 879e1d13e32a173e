"""UniPic2-SD3.5M-Kontext: one Stable Diffusion 3.5 transformer that generates and edits (arXiv 2509.04548).

diffusers' `SD3Transformer2DModel` and `AutoencoderKL` and transformers' text encoders, unchanged; what references
need is in `attention.py`. A stock SD3.5 folder is the same model without training on references. Differences to
the released pipeline (SkyworkAI/UniPic, UniPic-2/unipicv2/pipeline_stable_diffusion_3_kontext.py): references are
encoded to the posterior's mode, so an edit depends on its seed only; a sample may have several references of any
size; guidance and layer skipping always see the references.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.media import to_rgb
from weft.models import flow
from weft.models.image.attention import Layout, adopt, make_layout, patches
from weft.sample import schedules
from weft.sample.rollout import pad_latents
from weft.types import Batch, Condition, Draw, Example, Loss

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Record

logger = logging.getLogger("weft")

T5_LENGTH = 256
"""Longest T5 text in tokens (the pipeline's default); a tokenizer with a smaller limit lowers it."""
PIXELS_AT_ONCE = 16 * 512 * 512
"""Pictures pass the VAE in groups of at most this many pixels (and at least one picture)."""
TEXTS_AT_ONCE = 64


class UniPic2Kontext:
    """A `weft.types.FlowModel` over the parts of a released folder; `weft.models.load` builds it.

    `parts` maps folder names to modules, tokenizers and the scheduler: `transformer`, `vae`, `text_encoder`,
    `text_encoder_2`, `tokenizer`, `tokenizer_2`, `scheduler`, and optionally `text_encoder_3` with `tokenizer_3`.
    Without the third encoder its 256 tokens are zeros, as in diffusers. `resolution` is the longer edge at which
    pictures are encoded and made when a record names no size, `factor` what the shorter edge is rounded to.
    """

    name = "sd3_kontext"

    def __init__(
        self,
        parts: dict[str, Any],
        *,
        resolution: int | None = None,
        loss_config: flow.FlowLossConfig | None = None,
        device: torch.device | str | None = None,
        licence: str | None = None,
    ) -> None:
        self.parts = parts
        self.transformer: Any = adopt(parts["transformer"])
        self.vae: Any = parts["vae"]
        self.scheduler: Any = parts["scheduler"]
        self.loss_config = loss_config or flow.FlowLossConfig()
        self.licence = licence
        self.patch: int = self.transformer.config.patch_size
        self.channels: int = self.transformer.config.in_channels
        self.downsample: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.multiple = self.downsample * self.patch
        # The release edits at 512 although its transformer is configured for 1024.
        self.resolution = resolution or min(512, self.transformer.config.sample_size * self.downsample)
        self.factor = 32 if self.resolution >= 512 else self.multiple
        if self.resolution % self.multiple:
            raise WeftError(f"resolution {self.resolution} must be a multiple of {self.multiple}")
        self._device = torch.device(device) if device is not None else None  # where offloaded modules run
        self._empty: dict[str, Tensor] | None = None

    # -- the model as a whole

    @property
    def device(self) -> torch.device:
        """Where the networks run (with offloading: where they are brought to run)."""
        return self._device or self.transformer.pos_embed.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer's own weights."""
        return self.transformer.pos_embed.proj.weight.dtype

    @property
    def shift(self) -> float:
        """The static shift of the noise schedule."""
        return float(self.scheduler.config.shift)

    def modules(self) -> dict[str, nn.Module]:
        """The networks by folder name."""
        return {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}

    def to(self, device: torch.device | str) -> UniPic2Kontext:
        """Move every network; not for offloaded or quantised models."""
        for module in self.modules().values():
            module.to(device)
        self._device = None
        return self

    def save(self, folder: Path) -> None:
        """Write the released folder layout; it opens in `weft.models.load` and in plain diffusers."""
        from weft.models.weights import save_folder

        save_folder(self.parts, Path(folder))

    # -- encoding

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """States of each text: `text` [L, C] (CLIP pair beside each other, then T5) and `pooled` [P].

        Equal texts are encoded once. Penultimate CLIP states, no padding masks, as in diffusers' SD3 pipeline.
        """
        unique = list(dict.fromkeys(texts))
        states: list[dict[str, Tensor]] = []
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(unique), TEXTS_AT_ONCE):
                states += self._encode_text(unique[start : start + TEXTS_AT_ONCE])
        table = dict(zip(unique, states, strict=True))
        return [dict(table[text]) for text in texts]

    def _encode_text(self, texts: list[str]) -> list[dict[str, Tensor]]:
        clip, pooled = [], []
        length = self.parts["tokenizer"].model_max_length
        for suffix in ("", "_2"):
            ids = self._tokenize(f"tokenizer{suffix}", texts, length)
            out = self.parts[f"text_encoder{suffix}"](ids, output_hidden_states=True)
            clip.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        width = self.transformer.config.joint_attention_dim
        if self.parts.get("text_encoder_3") is None:
            long = clip[0].new_zeros(len(texts), T5_LENGTH, width)
        else:
            limit = min(T5_LENGTH, self.parts["tokenizer_3"].model_max_length)
            long = self.parts["text_encoder_3"](self._tokenize("tokenizer_3", texts, limit))[0]
        short = torch.cat(clip, dim=-1)
        short = nn.functional.pad(short, (0, width - short.shape[-1]))
        text, vector = torch.cat([short, long], dim=1), torch.cat(pooled, dim=-1)
        return [{"text": text[i], "pooled": vector[i]} for i in range(len(texts))]

    def _tokenize(self, name: str, texts: list[str], length: int) -> Tensor:
        tokenizer = self.parts[name]
        out = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        longest = "tokenizer_3" if self.parts.get("tokenizer_3") is not None else "tokenizer"
        if name == longest and bool((out.attention_mask[:, -1] == 1).any()):
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
        vae = self.vae.config
        for size, group in groups.items():
            for some in _portions(group, size):
                pixels = torch.from_numpy(np.stack([np.asarray(images[i]) for i in some])).permute(0, 3, 1, 2)
                x = (pixels.to(self.device).float() / 255 * 2 - 1).to(self.vae.dtype)
                with torch.autocast(self.device.type, enabled=False):
                    z = self.vae.encode(x).latent_dist.mode()
                z = (z.float() - (vae.shift_factor or 0.0)) * vae.scaling_factor
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

    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        """The batch of one transformer call: `text`, `pooled`, `sizes`, `valid` and where every token comes from.

        `valid` is a bool mask [B, 1, H, W] of the real latent cells, None if all outputs have one size. Add
        `skip_layers` (layer numbers) to leave these layers out, for skip-layer guidance.
        """
        if not conditions:
            raise WeftError("nothing to prepare: the list of conditions is empty")
        lengths = {c.tensors["text"].shape[0] for c in conditions}
        if len(lengths) > 1:
            raise WeftError(f"texts of one batch differ in length ({sorted(lengths)} tokens); use one model for all")
        sizes = [flow.check_size(c.size, self.multiple) for c in conditions]
        device, dtype = self.device, self.dtype
        batch: Batch = {
            "text": torch.stack([c.tensors["text"] for c in conditions]).to(device, dtype),
            "pooled": torch.stack([c.tensors["pooled"] for c in conditions]).to(device, dtype),
            "sizes": sizes,
            "valid": None,
            "references": None,
            "layout": None,
        }
        shapes = [tuple(tuple(r.shape[-2:]) for r in c.references) for c in conditions]
        for shape in (shape for row in shapes for shape in row):
            flow.check_size((shape[0] * self.downsample, shape[1] * self.downsample), self.multiple)
        if all(size == sizes[0] for size in sizes) and all(row == shapes[0] for row in shapes):
            columns = zip(*[c.references for c in conditions], strict=True)
            batch["references"] = [torch.stack(list(column)).to(device, dtype) for column in columns]
            # The layout is not needed, but its check of the position table is.
            self._layout(sizes[:1], shapes[:1], 1)
            return batch
        batch["layout"] = self._layout(sizes, shapes, lengths.pop()).to(device)
        batch["references"] = [self._rows(conditions).to(device, dtype)]
        if any(size != sizes[0] for size in sizes):
            grids = [torch.ones(1, h // self.downsample, w // self.downsample) for h, w in sizes]
            batch["valid"] = pad_latents(grids)[0].bool().to(device)
        return batch

    def _layout(self, sizes: Sequence[flow.Size], shapes: Sequence[tuple], text_length: int) -> Layout:
        targets = tuple((h // self.multiple, w // self.multiple) for h, w in sizes)
        references = tuple(tuple((h // self.patch, w // self.patch) for h, w in row) for row in shapes)
        return make_layout(targets, references, self.transformer.config.pos_embed_max_size, text_length)

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

    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Velocity [B, C, H, W] in fp32 of x [B, C, H, W] at sigma [B]; zero in the padding. One transformer call.

        The transformer is told the time 1000 sigma, as a float (not rounded to a training step).
        """
        text = batch["text"]
        times = sigma.to(text.device, torch.float32) * self.scheduler.config.num_train_timesteps
        return self.transformer(
            hidden_states=x.to(text.device, text.dtype),
            encoder_hidden_states=text,
            pooled_projections=batch["pooled"],
            timestep=times,
            references=batch["references"],
            layout=batch["layout"],
            skip_layers=batch.get("skip_layers"),
            return_dict=False,
        )[0].float()

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """The flow-matching loss with `loss_config`."""
        return flow.flow_matching_loss(self, examples, draw, self.loss_config)

    def sigmas(self, steps: int, size: tuple[int, int]) -> Tensor:
        """The grid [steps + 1] of the folder's scheduler; `size` (in pixels) only sets a dynamic shift."""
        config = dict(self.scheduler.config)
        tokens = (size[0] // self.multiple) * (size[1] // self.multiple)
        mu = schedules.dynamic_mu(tokens, config) if config.get("use_dynamic_shifting") else None
        return schedules.grid_from_config(config, steps, mu=mu)

    @torch.no_grad()
    def decode(self, latents: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
        """RGB pictures of clean latents [B, C, H, W]; each is cropped before decoding, so padding never shows."""
        from PIL import Image as Pillow

        groups: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(sizes):
            groups.setdefault(flow.check_size(size, self.multiple), []).append(i)
        out: dict[int, Image.Image] = {}
        for (height, width), group in groups.items():
            for some in _portions(group, (height, width)):
                z = latents[some, :, : height // self.downsample, : width // self.downsample].to(self.device).float()
                z = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
                with torch.autocast(self.device.type, enabled=False):
                    x = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
                pixels = (x.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
                for i, array in zip(some, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                    out[i] = Pillow.fromarray(array)
        return [out[i] for i in range(len(sizes))]


def _portions(group: list[int], size: tuple[int, int]) -> list[list[int]]:
    """The members of a group of equally large pictures, cut to what passes the VAE at once."""
    count = max(1, PIXELS_AT_ONCE // (size[0] * size[1]))
    return [group[start : start + count] for start in range(0, len(group), count)]
