"""The two small networks beside the language model: residual levels within a step, and residual levels afterwards.

N rows, B movements, T latent steps, L levels, K codes a level, D the language model's width, d the head's own.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.media import atomic_write
from weft.models.weights import read_json


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """`kind`: depth or residual; `source` is D."""

    kind: str
    source: int
    levels: int
    codes: int
    width: int = 256
    layers: int = 2
    heads: int = 4


class _Head(nn.Module):
    """What both share: a condition, one embedding and one output matrix a level, pre-norm transformer layers."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        if config.levels < 2:
            raise WeftError(f"a {config.kind} head with {config.levels} level: it is for two levels or more")
        self.config = config
        d, upper = config.width, config.levels - 1
        self.condition = nn.Linear(config.source, d)
        self.embed = nn.Embedding(upper * config.codes, d)  # of levels 0 .. L-2
        self.place = nn.Parameter(torch.randn(upper, d) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, config.heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(d)
        self.out = nn.Parameter(torch.randn(upper, config.codes, d) * 0.02)  # of levels 1 .. L-1
        nn.init.normal_(self.embed.weight, std=0.02)

    def embedded(self, codes: Tensor) -> Tensor:
        """Codes [..., l] of levels 0 .. l-1 -> [..., l, d]; -1 is a zero."""
        first = torch.arange(codes.shape[-1], device=codes.device) * self.config.codes
        return self.embed(codes.clamp_min(0) + first) * (codes >= 0)[..., None]


class DepthTransformer(_Head):
    """Level l + 1 of a step from the language model's state and the levels up to l (arXiv 2203.01941, section 3.2)."""

    def forward(self, state: Tensor, codes: Tensor) -> Tensor:
        """Logits [N, l, K] of levels 1 .. l from states [N, D] and codes [N, l] of levels 0 .. l-1."""
        count = codes.shape[1]
        x = self.condition(state)[:, None] + self.embedded(codes) + self.place[:count]
        mask = torch.full((count, count), -math.inf, device=x.device, dtype=x.dtype).triu(1)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return torch.einsum("nld,lkd->nlk", self.norm(x), self.out[:count])


class ResidualPredictor(_Head):
    """One level of a whole movement from all levels below it (MoMask's residual transformer, arXiv 2312.00063, section
    3.3), told what the movement is by the language model's states instead of a text vector."""

    def forward(self, state: Tensor, codes: Tensor, level: int, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, K] of `level` >= 1 from states [B, T, D] and codes [B, T, level]; `mask` [B, T] is inside."""
        x = self.condition(state) + self.embedded(codes[..., :level]).sum(-2) + self.place[level - 1]
        x = x + sinusoids(x.shape[1], x.shape[2]).to(x)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=None if mask is None else ~mask)
        return self.norm(x) @ self.out[level - 1].t()

    @torch.no_grad()
    def complete(self, state: Tensor, base: Tensor) -> Tensor:
        """All levels [B, T, L] of base codes [B, T], each the likeliest given those below."""
        codes = base[..., None]
        for level in range(1, self.config.levels):
            codes = torch.cat([codes, self(state, codes, level).argmax(-1, keepdim=True)], -1)
        return codes


KINDS: dict[str, type[_Head]] = {"depth": DepthTransformer, "residual": ResidualPredictor}


def sinusoids(count: int, width: int) -> Tensor:
    """Fixed positions [count, width] (Vaswani et al. 2017, section 3.5)."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(count)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def make_head(config: HeadConfig) -> _Head:
    """A head with random weights."""
    return KINDS[config.kind](config)


def save_head(head: _Head, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors; the weights as `dtype` if given."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().to(dtype or v.dtype).contiguous() for k, v in head.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    with atomic_write(folder / "config.json") as handle:
        handle.write((json.dumps(asdict(head.config), indent=2, sort_keys=True) + "\n").encode())


def load_head(folder: Path) -> _Head:
    """What `save_head` wrote, in fp32. Raises WeftError for a broken folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        head = make_head(HeadConfig(**read_json(folder / "config.json")))
        head.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    except (OSError, TypeError, KeyError, SafetensorError, RuntimeError) as error:
        raise WeftError(f"{folder}: cannot be read ({str(error).splitlines()[0][:200]}); export it again") from error
    return head
