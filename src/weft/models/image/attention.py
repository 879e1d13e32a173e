"""Reference pictures inside SD3's transformer: the one place that differs from diffusers.

UniPic 2.0 (arXiv 2509.04548; SkyworkAI/UniPic, UniPic-2/unipicv2/transformer_sd3_kontext.py) feeds the clean
latents of a reference through the same patch embedding as the noisy latents and lets both attend to each other.
No parameter is added. Here the picture tokens of a sample are its target's, then each reference's; every picture
gets its own centred window of the position table. Without rotary positions attention does not see the order, so
one reference of the target's size gives the released model's numbers.

Samples of one batch may differ in size and in number of references: tokens are then padded on the right and a
validity mask on the keys keeps the padding out of `attn` and `attn2` alike. The mask needs no query side (the
square mask with its diagonal forced true gives the same valid rows): a padded query also attends to the valid keys
only, there is always one (the text, the target), and nothing reads its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError

Grid = tuple[int, int]  # (rows, columns) of patches

MASKING_BACKENDS = frozenset(
    "native _native_cudnn _native_efficient _native_math flex xformers "
    "flash_varlen flash_varlen_hub _flash_varlen_3 _flash_3_varlen_hub sage_varlen".split()
)
"""Attention backends of diffusers that take a key mask; the others only run batches of equal shapes."""


def check_masking(backend: Any) -> None:
    """Raises WeftError if an attention backend (None: the default) takes no key mask."""
    name = None if backend is None else str(getattr(backend, "value", backend))
    if name is not None and name not in MASKING_BACKENDS:
        raise WeftError(
            f"attention backend {name!r} takes no mask, and this batch mixes sizes or reference counts; "
            "batch equal shapes or use attention_backend='native'"
        )


PLAIN_LENGTH = 512
"""Up to so many tokens `attend` may hold a whole attention map in training."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: Any, parallel: Any) -> Tensor:
    """Attention of query, key and value [B, S, heads, head_dim] through diffusers' dispatch, so that
    `set_attention_backend` reaches it. `mask` is a bool mask of the keys, broadcast to [B, heads, S, S].

    In bf16 on a CPU the backward pass of torch's fused attention takes several times as long as the products written
    out, so short sequences are trained without it, unless a backend is named.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    if mask is not None:
        check_masking(backend)
    short = query.dtype is torch.bfloat16 and query.device.type == "cpu" and key.shape[1] <= PLAIN_LENGTH
    if short and backend is None and parallel is None and torch.is_grad_enabled():
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel)


class JointAttention:
    """SD3's joint text-image attention (and, without text, `attn2`) with a mask on the picture keys.

    Without a mask it computes what `JointAttnProcessor2_0` of diffusers computes. It goes through diffusers'
    attention dispatch, so `set_attention_backend` reaches it.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, N, D]
        encoder_hidden_states: Tensor | None = None,  # [B, L, D]
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,  # [B, 1, 1, N] bool
        joint_mask: Tensor | None = None,  # [B, 1, 1, N + L] bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:  # [B, n, D] -> [B, n, heads, head_dim]
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states))
        mask = image_mask
        if encoder_hidden_states is not None:
            query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=1)
            key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=1)
            value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states))], dim=1)
            mask = joint_mask
        out = attend(query, key, value, mask, self._attention_backend, self._parallel_config)
        out = out.flatten(2).to(query.dtype)  # [B, N (+ L), D]
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


@dataclass(slots=True)
class Layout:
    """Where every token of a mixed batch comes from; made once per batch by `make_layout`.

    `rows` counts, per sample, the cells of the padded target grid and then the reference patches, in order.
    """

    source: Tensor  # [B, N] index into `rows`; padding points at row 0
    position: Tensor  # [B, N] index into the flattened position table
    targets: int  # the largest number of target tokens: the first tokens of every sample
    grid: Grid  # of the padded target
    back: Tensor | None  # [B, grid cells] token of each target cell, `targets` for padding; None: all cells are full
    image_mask: Tensor  # [B, 1, 1, N] bool, which tokens are real
    joint_mask: Tensor  # [B, 1, 1, N + L] bool, the same with the text behind, all valid

    def to(self, device: torch.device) -> Layout:
        back = None if self.back is None else self.back.to(device)
        return Layout(
            self.source.to(device),
            self.position.to(device),
            self.targets,
            self.grid,
            back,
            self.image_mask.to(device),
            self.joint_mask.to(device),
        )


@lru_cache(maxsize=1024)
def window(rows: int, columns: int, table: int) -> Tensor:
    """Indices [rows * columns] of the centred window in a flattened table x table position table.

    Raises WeftError if the window does not fit.
    """
    if rows > table or columns > table:
        raise WeftError(
            f"a picture of {rows} x {columns} patches does not fit the position table of {table} x {table}; "
            "make it smaller"
        )
    top, left = (table - rows) // 2, (table - columns) // 2
    row, column = torch.arange(top, top + rows), torch.arange(left, left + columns)
    return (row[:, None] * table + column).flatten()


@lru_cache(maxsize=256)
def make_layout(
    targets: tuple[Grid, ...], references: tuple[tuple[Grid, ...], ...], table: int | None, text_length: int
) -> Layout:
    """The layout (on the CPU) of a batch whose samples have these grids of patches.

    `table` is the edge of the position table, None for models with rotary positions, whose `position` stays zero.
    """
    height, width = max(h for h, _ in targets), max(w for _, w in targets)
    cells, batch = height * width, len(targets)
    counts = [h * w + sum(a * b for a, b in refs) for (h, w), refs in zip(targets, references, strict=True)]
    length, most = max(counts), max(h * w for h, w in targets)
    source, position = torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length, dtype=torch.long)
    back = torch.full((batch, cells), most)
    for i, ((h, w), refs) in enumerate(zip(targets, references, strict=True)):
        own = (torch.arange(h)[:, None] * width + torch.arange(w)).flatten()  # the target's cells in the padded grid
        back[i, own] = torch.arange(h * w)
        source[i, : h * w] = own
        source[i, h * w : counts[i]] = torch.arange(cells, cells + counts[i] - h * w)
        if table is not None:
            position[i, : counts[i]] = torch.cat([window(a, b, table) for a, b in ((h, w), *refs)])
    valid = torch.arange(length) < torch.tensor(counts)[:, None]
    joint = torch.cat([valid, torch.ones(batch, text_length, dtype=torch.bool)], dim=1)
    full = all(grid == targets[0] for grid in targets)
    return Layout(
        source, position, most, (height, width), None if full else back, valid[:, None, None], joint[:, None, None]
    )


def gather_rows(rows: Tensor, layout: Layout) -> Tensor:
    """Tokens [B, N, C] of a mixed batch from the patch rows of the padded target grid and the references."""
    return rows.gather(1, layout.source[..., None].expand(-1, -1, rows.shape[-1]))


def scatter_rows(x: Tensor, layout: Layout | None) -> Tensor:
    """Target tokens [B, targets, C] back at their cells of the padded grid, zero in the padding."""
    if layout is None or layout.back is None:
        return x
    x = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1)
    return x.gather(1, layout.back[..., None].expand(-1, -1, x.shape[2]))


def patches(latents: Tensor, size: int) -> Tensor:
    """Latents [B, C, H, W] as rows of their patches [B, (H/size) (W/size), C size size]."""
    b, c, h, w = latents.shape
    x = latents.reshape(b, c, h // size, size, w // size, size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * size * size)


def unpatches(rows: Tensor, grid: Grid, size: int) -> Tensor:
    """The inverse of `patches`: rows [B, h w, C size size] of a grid as latents [B, C, h size, w size]."""
    x = rows.reshape(rows.shape[0], *grid, -1, size, size)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(rows.shape[0], -1, grid[0] * size, grid[1] * size)


def _embed(self: Any, x: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """Tokens [B, N, D] of a mixed batch: one convolution over all patches, laid side by side as a strip."""
    size, channels = self.config.patch_size, x.shape[1]
    rows = gather_rows(torch.cat([patches(x, size), rows], dim=1), layout)
    strip = rows.unflatten(-1, (channels, size, size)).permute(0, 2, 3, 1, 4).flatten(3)  # [B, C, size, N size]
    tokens = self.pos_embed.proj(strip).flatten(2).transpose(1, 2)
    return (tokens + self.pos_embed.pos_embed[0][layout.position]).to(tokens.dtype).contiguous()


def _forward(
    self: Any,
    hidden_states: Tensor,  # [B, C, H, W]
    encoder_hidden_states: Tensor | None = None,  # [B, L, C]
    pooled_projections: Tensor | None = None,  # [B, P]
    timestep: Tensor | None = None,  # [B]
    block_controlnet_hidden_states: list[Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    skip_layers: list[int] | None = None,
    references: list[Tensor] | None = None,
    layout: Layout | None = None,
) -> Any:
    """`SD3Transformer2DModel.forward` with references; without any it is the stock forward, argument by argument.

    With `layout` None, `references` are latents [B, C, h, w], the k-th of all samples; with a layout, `references`
    holds one tensor [B, R, C p p]: the patch rows of each sample's references, padded on the right.
    """
    if not references and layout is None:
        return type(self).forward(
            self,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            block_controlnet_hidden_states=block_controlnet_hidden_states,
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=return_dict,
            skip_layers=skip_layers,
        )
    if block_controlnet_hidden_states is not None or joint_attention_kwargs is not None:
        raise WeftError("ControlNet residuals and attention arguments do not go together with reference pictures")
    references = references or []
    size = self.config.patch_size
    if layout is None:
        rows, columns = hidden_states.shape[-2] // size, hidden_states.shape[-1] // size
        count = rows * columns
        x = torch.cat([self.pos_embed(hidden_states), *[self.pos_embed(reference) for reference in references]], dim=1)
        masks: dict[str, Tensor] | None = None
    else:
        (rows, columns), count = layout.grid, layout.targets
        x = _embed(self, hidden_states, references[0], layout)
        masks = {"image_mask": layout.image_mask, "joint_mask": layout.joint_mask}
    temb = self.time_text_embed(timestep, pooled_projections)
    text = self.context_embedder(encoder_hidden_states)
    for index, block in enumerate(self.transformer_blocks):
        if skip_layers is not None and index in skip_layers:
            continue
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            text, x = self._gradient_checkpointing_func(block, x, text, temb, masks)
        else:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=temb, joint_attention_kwargs=masks)
    x = self.proj_out(self.norm_out(x[:, :count], temb))  # token-wise, so only the target's are needed
    x = scatter_rows(x, layout)
    x = x.unflatten(2, (size, size, self.out_channels)).unflatten(1, (rows, columns))  # [B, h, w, p, q, C]
    x = x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, rows * size, columns * size)
    if not return_dict:
        return (x,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=x)


def adopt(transformer: Any) -> Any:
    """Teach a stock `SD3Transformer2DModel` to take references, in place, and return it.

    Class, configuration and parameters stay the stock ones: it saves, loads, shards and takes adapters as before.
    The forward is bound to the instance, as accelerate's hooks do, so hooks and compilation see one module call.
    Raises WeftError if the model has no croppable position table.
    """
    if not transformer.config.pos_embed_max_size:
        raise WeftError("the transformer's config has no pos_embed_max_size; this is not an SD3 transformer")
    transformer.set_attn_processor(JointAttention())
    transformer.forward = MethodType(_forward, transformer)
    return transformer
