"""Batches of different shapes inside Qwen-Image's transformer: what diffusers' rotary table and processor do not take.

`QwenEmbedRope` makes one table, from the first sample's shapes, and `QwenDoubleStreamAttnProcessor2_0` masks texts
only. For a mixed batch the processor here gets every sample's own table and a mask that keeps the padding behind the
pictures out, both through the transformer's `attention_kwargs`. Equal shapes go the stock way and give the stock
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.models.image.attention import attend

Shape = tuple[int, int, int]  # frames, rows, columns of tokens
PIECE = 4096


def mixed_shapes(shapes: Sequence[Sequence[Shape]]) -> list[list[Shape]]:
    """Each sample's token shapes, filled up with padding to one number of tokens."""
    counts = [sum(rows * columns for _, rows, columns in sample) for sample in shapes]
    padded = []
    for sample, count in zip(shapes, counts, strict=True):
        rest = max(counts) - count
        padded.append([*sample, *((1, min(PIECE, rest - k), 1) for k in range(0, rest, PIECE))])
    return padded


def mixed_tables(
    transformer: Any, shapes: Sequence[Sequence[Shape]], text: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rotary tables that each sample would have alone, of pictures [B, N, D/2] and of `text` tokens [B, L, D/2]."""
    tables = [transformer.pos_embed([list(sample)], max_txt_seq_len=text, device=device) for sample in shapes]
    pictures = nn.utils.rnn.pad_sequence([own for own, _ in tables], batch_first=True, padding_value=1.0)
    return pictures, torch.stack([own for _, own in tables])


def _positions(
    self: Any, video_fhw: Any, device: torch.device | None = None, max_txt_seq_len: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`QwenEmbedRope.forward` of the first sample: what it computes anyhow, without its warning about the others."""
    return type(self).forward(self, video_fhw[:1], device=device, max_txt_seq_len=max_txt_seq_len)


class QwenJointAttention:
    """diffusers' `QwenDoubleStreamAttnProcessor2_0` with a rotary table and a picture mask for each sample."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, N, D]
        encoder_hidden_states: Tensor,  # [B, L, D]
        encoder_hidden_states_mask: Tensor | None = None,  # [B, L] bool
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # [N, D/2] and [L, D/2], complex
        tables: tuple[Tensor, Tensor] | None = None,  # in its place: [B, N, D/2] and [B, L, D/2]
        image_mask: Tensor | None = None,  # [B, N] bool
    ) -> tuple[Tensor, Tensor]:
        rotary = image_rotary_emb if tables is None else tables
        width = attn.inner_dim // attn.heads
        image = [to(hidden_states).unflatten(-1, (-1, width)) for to in (attn.to_q, attn.to_k, attn.to_v)]
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [to(encoder_hidden_states).unflatten(-1, (-1, width)) for to in added]
        for k, (own, other) in enumerate(((attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k))):
            image[k] = image[k] if own is None else own(image[k])
            text[k] = text[k] if other is None else other(text[k])
            if rotary is not None:
                image[k], text[k] = turn(image[k], rotary[0]), turn(text[k], rotary[1])
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        mask = None
        if encoder_hidden_states_mask is not None or image_mask is not None:
            size = len(hidden_states)
            texts = encoder_hidden_states_mask
            texts = hidden_states.new_ones(size, text[0].shape[1], dtype=torch.bool) if texts is None else texts
            images = image_mask
            images = hidden_states.new_ones(size, image[0].shape[1], dtype=torch.bool) if images is None else images
            mask = torch.cat([texts, images], dim=1)[:, None, None]
        out = attend(query, key, value, mask, self._attention_backend, self._parallel_config)
        out = out.flatten(2, 3).to(query.dtype)  # [B, L + N, D]
        length = encoder_hidden_states.shape[1]
        picture = attn.to_out[0](out[:, length:].contiguous())
        return attn.to_out[1](picture), attn.to_add_out(out[:, :length].contiguous())


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Rotary positions on x [B, S, heads, head_dim] by a complex table [S, head_dim/2] or [B, S, head_dim/2]."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table.unsqueeze(-2)).flatten(3).type_as(x)


def adopt_qwen(transformer: Any) -> Any:
    """Teach a stock `QwenImageTransformer2DModel` mixed batches, in place, and return it.

    Class, configuration, parameters and forward stay the stock ones. Raises WeftError for another transformer.
    """
    if not hasattr(transformer, "txt_norm") or not hasattr(transformer, "img_in"):
        raise WeftError(f"{type(transformer).__name__} is not a Qwen-Image transformer")
    transformer.set_attn_processor(QwenJointAttention())
    transformer.pos_embed.forward = MethodType(_positions, transformer.pos_embed)
    return transformer
