"""UniPic2-SD3.5M-Kontext: one Stable Diffusion 3.5 transformer that generates and edits (arXiv 2509.04548).

diffusers' `SD3Transformer2DModel` and `AutoencoderKL` and transformers' text encoders, unchanged; what references
need is in `attention.py`. A stock SD3.5 folder is the same model without training on references. Differences to
the released pipeline (SkyworkAI/UniPic, UniPic-2/unipicv2/pipeline_stable_diffusion_3_kontext.py): references are
encoded to the posterior's mode, so an edit depends on its seed only; a sample may have several references of any
size; guidance and layer skipping always see the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.models import flow
from weft.models.image.attention import adopt
from weft.models.image.base import TEXTS_AT_ONCE, ImageFlow
from weft.types import Batch, Condition

T5_LENGTH = 256
"""Longest T5 text in tokens (the pipeline's default); a tokenizer with a smaller limit lowers it."""


class UniPic2Kontext(ImageFlow):
    """A `weft.types.FlowModel` over the parts of a released folder; `weft.models.load` builds it.

    `parts` maps folder names to modules, tokenizers and the scheduler: `transformer`, `vae`, `text_encoder`,
    `text_encoder_2`, `tokenizer`, `tokenizer_2`, `scheduler`, and optionally `text_encoder_3` with `tokenizer_3`.
    Without the third encoder its 256 tokens are zeros, as in diffusers. `resolution` is the longer edge at which
    pictures are encoded and made when a record names no size, `factor` what the shorter edge is rounded to:
    32, as in the release, or below 256 pixels what latents allow.
    """

    name = "sd3_kontext"
    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    optional_parts: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")

    def __init__(
        self,
        parts: dict[str, Any],
        *,
        resolution: int | None = None,
        loss_config: flow.FlowLossConfig | None = None,
        device: torch.device | str | None = None,
        licence: str | None = None,
    ) -> None:
        super().__init__(parts, adopt(parts["transformer"]), loss_config=loss_config, device=device, licence=licence)
        self.patch = self.transformer.config.patch_size
        self.channels = self.transformer.config.in_channels
        self.downsample = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.multiple = self.downsample * self.patch
        # The release edits at 512 although its transformer is configured for 1024.
        usual = min(512, self.transformer.config.sample_size * self.downsample)
        self.resolution = usual if resolution is None else resolution
        self.factor = 32 if self.resolution >= 256 else self.multiple
        if self.resolution < 1 or self.resolution % self.multiple:
            raise WeftError(f"resolution {self.resolution} must be a multiple of {self.multiple}")

    def _anchor(self) -> Tensor:
        return self.transformer.pos_embed.proj.weight

    def own_size(self, size: flow.Size) -> flow.Size:
        """Longer edge `resolution`, the other rounded to `factor`: the release's rule."""
        return flow.fit_longer_edge(size, self.resolution, self.factor)

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
        longest = "tokenizer_3" if self.parts.get("tokenizer_3") is not None else "tokenizer"
        return self.tokenize(name, texts, length, warn=name == longest)

    # -- one step

    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        """The batch of one transformer call: `text`, `pooled`, and what `ImageFlow.arrange` says."""
        lengths = {c.tensors["text"].shape[0] for c in conditions}
        if len(lengths) > 1:
            raise WeftError(f"texts of one batch differ in length ({sorted(lengths)} tokens); use one model for all")
        text_length = lengths.pop() if lengths else 0
        batch = self.arrange(conditions, self.transformer.config.pos_embed_max_size, text_length)
        for name in ("text", "pooled"):
            batch[name] = torch.stack([c.tensors[name] for c in conditions]).to(self.device, self.dtype)
        return batch

    def skipping(self, batch: Batch, layers: Sequence[int]) -> Batch:
        """The batch with these layers of the transformer left out, for skip-layer guidance. Raises WeftError."""
        count = len(self.transformer.transformer_blocks)
        if any(not 0 <= layer < count for layer in layers):
            raise WeftError(f"skip_layers {list(layers)}: the transformer has the layers 0 to {count - 1}")
        return batch | {"skip_layers": list(layers)}

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
