"""Batches of different shapes inside FLUX's transformer: what diffusers' attention processor does not take.

`FluxAttnProcessor` rotates all samples by one table of positions. A mixed batch has other positions in every sample
and padding behind its pictures; here the table may be [B, S, D], and a mask on the keys keeps the padding out. Rows
of equal shapes go the stock way, operation by operation, so they give the stock numbers to the last bit.

The transformer's own forward stays as it is: it makes its rotary table from one list of positions, so a mixed batch
hands it the positions of all samples end to end as `img_ids` (and none as `txt_ids`), and the processor folds the
table back to [B, S, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.models.image.attention import attend


class FluxJointAttention:
    """diffusers' `FluxAttnProcessor` with a rotary table and a key mask for each sample; backends as there."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, N, D]
        encoder_hidden_states: Tensor | None = None,  # [B, L, D]
        attention_mask: Tensor | None = None,  # [B, 1, 1, L + N] bool
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # each [L + N, head_dim] or [B (L + N), head_dim]
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = (
            to(hidden_states).unflatten(-1, (-1, attn.head_dim)) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            q, k, v = (
                to(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim))
                for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            query = torch.cat([attn.norm_added_q(q), query], dim=1)
            key = torch.cat([attn.norm_added_k(k), key], dim=1)
            value = torch.cat([v, value], dim=1)
        if image_rotary_emb is not None:
            cos, sin = (fold(table, *query.shape[:2]) for table in image_rotary_emb)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        out = attend(query, key, value, attention_mask, self._attention_backend, self._parallel_config)
        out = out.flatten(2, 3).to(query.dtype)  # [B, L + N, D]
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        text, image = out[:, :length].contiguous(), out[:, length:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def fold(table: Tensor, batch: int, length: int) -> Tensor:
    """A rotary table [S, D] as [1, S, 1, D], or one of all samples end to end [B S, D] as [B, S, 1, D]."""
    if table.shape[0] == length:
        return table[None, :, None]
    return table.reshape(batch, length, 1, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [B, S, heads, head_dim], pairs of neighbouring channels, in fp32 (arXiv 2104.09864)."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos.to(x.device) + turned.float() * sin.to(x.device)).to(x.dtype)


def adopt_flux(transformer: Any) -> Any:
    """Give a stock `FluxTransformer2DModel` processors for mixed batches, in place, and return it.

    Class, configuration, parameters and forward stay the stock ones. Raises WeftError for another transformer, or
    one with fused projections.
    """
    if not hasattr(transformer, "single_transformer_blocks") or not hasattr(transformer, "x_embedder"):
        raise WeftError(f"{type(transformer).__name__} is not a FLUX transformer")
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise WeftError("the transformer's projections are fused; call unfuse_qkv_projections first")
    transformer.set_attn_processor(FluxJointAttention())
    return transformer
