"""The residual VQ autoencoder of motion features: MoMask's network and quantiser (Guo et al., arXiv 2312.00063).

Modules, state-dict names and arithmetic are those of EricGuo5513/momask-codes (models/vq/{encdec,resnet,quantizer,
residual_vq,model}.py), so its checkpoints give the same indices. What differs: clips of mixed length share a batch
under a mask, the codebooks' running sums and counts are saved, and noise is passed in, never drawn from a global
generator. F features, B clips, T frames, t = T / stride latent steps, L levels, K codes, C code width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
RESET_BELOW = 1.0
"""A code whose running count is below this is replaced by a latent of the batch."""


@dataclass(frozen=True, slots=True)
class RvqConfig:
    """The defaults are OmniMoGen's and MoMask's (run `rvq_nq6_dc512_nc512_noshare_qdp0.2`). `down` halvings of time."""

    features: int = 263
    levels: int = 6
    codes: int = 512
    code_width: int = 512
    width: int = 512
    down: int = 2
    depth: int = 3
    dilation: int = 3
    dropout: float = 0.2
    activation: str = "relu"
    shared: bool = False
    decay: float = 0.99

    def __post_init__(self) -> None:
        for name in ("features", "levels", "codes", "code_width", "width", "down", "depth", "dilation"):
            if getattr(self, name) < 1:
                raise WeftError(f"rvq.{name}: {getattr(self, name)} must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise WeftError(f"rvq.activation: {self.activation!r} is unknown; choose {', '.join(ACTIVATIONS)}")

    @property
    def stride(self) -> int:
        """Frames per latent step."""
        return 2**self.down


class ResidualUnit(nn.Module):
    """Pre-activation unit: act, conv k3 dilated, act, conv k1, dropout, plus input (models/vq/resnet.py)."""

    def __init__(self, config: RvqConfig, dilation: int) -> None:
        super().__init__()
        width, kind = config.width, ACTIVATIONS[config.activation]
        self.activation1, self.activation2 = kind(), kind()
        self.conv1 = nn.Conv1d(width, width, 3, 1, dilation, dilation)
        self.conv2 = nn.Conv1d(width, width, 1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.conv2(self.activation2(self.conv1(self.activation1(x)))))


class ResidualStack(nn.Module):
    """Units with dilations growth^(depth-1) ... growth, 1: the widest first."""

    def __init__(self, config: RvqConfig) -> None:
        super().__init__()
        self.model = nn.Sequential(*(ResidualUnit(config, config.dilation**k) for k in reversed(range(config.depth))))


def masked(layer: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One layer on x [B, C, T]; what lies behind a clip's end (mask [B, 1, T]) stays zero, as its own padding is.

    Every layer maps zero to zero but for its bias, so it is enough to clear after layers that look around or add.
    """
    if isinstance(layer, nn.Sequential):
        for inner in layer:
            x, mask = masked(inner, x, mask)
        return x, mask
    if isinstance(layer, ResidualStack):
        return masked(layer.model, x, mask)
    x = layer(x)
    if mask is not None and not isinstance(layer, nn.ReLU):
        if isinstance(layer, nn.Conv1d) and layer.stride[0] > 1:
            mask = mask[..., :: layer.stride[0]]
        elif isinstance(layer, nn.Upsample):
            mask = mask.repeat_interleave(2, -1)
        x = x * mask
    return x, mask


class Encoder(nn.Module):
    """[B, F, T] -> [B, C, t]."""

    def __init__(self, config: RvqConfig) -> None:
        super().__init__()
        width = config.width
        halve = [nn.Sequential(nn.Conv1d(width, width, 4, 2, 1), ResidualStack(config)) for _ in range(config.down)]
        first, last = nn.Conv1d(config.features, width, 3, 1, 1), nn.Conv1d(width, config.code_width, 3, 1, 1)
        self.model = nn.Sequential(first, nn.ReLU(), *halve, last)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return masked(self.model, x, mask)


class Decoder(nn.Module):
    """[B, C, t] -> [B, F, T]."""

    def __init__(self, config: RvqConfig) -> None:
        super().__init__()
        width = config.width
        double = [
            nn.Sequential(ResidualStack(config), nn.Upsample(scale_factor=2), nn.Conv1d(width, width, 3, 1, 1))
            for _ in range(config.down)
        ]
        first, last = nn.Conv1d(config.code_width, width, 3, 1, 1), nn.Conv1d(width, config.features, 3, 1, 1)
        self.model = nn.Sequential(first, nn.ReLU(), *double, nn.Conv1d(width, width, 3, 1, 1), nn.ReLU(), last)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return masked(self.model, x, mask)


class Codebook(nn.Module):
    """K codes learned by exponential moving averages, not by gradients (models/vq/quantizer.py).

    `code_sum` [K, C] and `code_count` [K] are the running statistics, `ready` whether the codes were ever set; all are
    buffers and saved.
    """

    codebook: Tensor
    code_sum: Tensor
    code_count: Tensor
    ready: Tensor

    def __init__(self, config: RvqConfig) -> None:
        super().__init__()
        self.decay = config.decay
        self.register_buffer("codebook", torch.zeros(config.codes, config.code_width))
        self.register_buffer("code_sum", torch.zeros(config.codes, config.code_width))
        self.register_buffer("code_count", torch.zeros(config.codes))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def score(self, x: Tensor) -> Tensor:
        """Minus the squared distance of rows [N, C] to every code: [N, K], in the reference's order of operations."""
        codes = self.codebook.t()
        return -((x**2).sum(-1, keepdim=True) - 2 * torch.matmul(x, codes) + (codes**2).sum(0, keepdim=True))

    def choose(self, x: Tensor, temperature: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """The nearest code of each row, or with Gumbel `noise` [N, K] one drawn at `temperature`: [N]."""
        score = self.score(x)
        if noise is not None and temperature > 0:
            score = score / temperature + noise
        return score.argmax(-1)

    @torch.no_grad()
    def start(self, x: Tensor, jitter: Tensor) -> None:
        """Codes are the first K rows of the first batch, repeated with noise where there are fewer."""
        rows = fill(gathered(x, len(self.codebook)), jitter)
        self.codebook.copy_(rows)
        self.code_sum.copy_(rows)
        self.code_count.fill_(1.0)
        self.ready.fill_(True)

    @torch.no_grad()
    def update(self, x: Tensor, index: Tensor, jitter: Tensor) -> Tensor:
        """One step of the averages with rows x [N, C] that chose `index` [N]; returns the perplexity of the choice.

        Statistics are summed over the processes, and every process replaces unused codes by the same rows.
        """
        hot = F.one_hot(index, len(self.codebook)).to(x.dtype)  # [N, K]
        total, count = hot.t() @ x, hot.sum(0)
        if parallel():
            dist.all_reduce(total)
            dist.all_reduce(count)
        fresh = fill(gathered(x, len(self.codebook)), jitter)
        self.code_sum.copy_(self.decay * self.code_sum + (1.0 - self.decay) * total)
        self.code_count.copy_(self.decay * self.code_count + (1.0 - self.decay) * count)
        used = (self.code_count[:, None] >= RESET_BELOW).to(x.dtype)
        mean = self.code_sum / self.code_count[:, None].clamp_min(1e-20)  # only counts below the limit are clamped
        self.codebook.copy_(used * mean + (1 - used) * fresh)
        return perplexity(count)

    def adopt(self) -> None:
        """Statistics for codes that came without them (a MoMask checkpoint): as if each had long been used once a
        step, so that no code is thrown away in the first steps of further training."""
        weight = 1.0 / (1.0 - self.decay)
        self.code_count.fill_(weight)
        self.code_sum.copy_(self.codebook * weight)
        self.ready.fill_(True)


def perplexity(count: Tensor) -> Tensor:
    """exp of the entropy of code counts [K]: how many codes are in even use."""
    share = count / count.sum()
    return torch.exp(-(share * torch.log(share + 1e-7)).sum())


def parallel() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(x: Tensor, limit: int) -> Tensor:
    """The first rows of all processes, at most `limit`: the same in every process."""
    if not parallel():
        return x[:limit]
    parts: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x[:limit].detach().cpu())
    return torch.cat([part for part in parts if part is not None])[:limit].to(x)


def fill(rows: Tensor, jitter: Tensor) -> Tensor:
    """K rows of N <= K: repeated, then moved by N(0, 0.01 / sqrt(C)); all K unmoved if there are enough."""
    count = len(jitter)
    if len(rows) == count:
        return rows
    many = rows.repeat((count + len(rows) - 1) // len(rows), 1)[:count]
    return many + jitter.to(rows) * (0.01 / rows.shape[-1] ** 0.5)


@dataclass(slots=True)
class Noise:
    """A training step's draws: `gumbel` [L, N, K], `jitter` [L, K, C], and the last level in use (`cut`)."""

    gumbel: Tensor
    jitter: Tensor
    cut: int


@dataclass(slots=True)
class Quantised:
    """`rows` [N, C] with straight-through gradients, `index` [N, L] (-1: level dropped), the squared error of each row
    averaged over the active levels [N], and the mean perplexity."""

    rows: Tensor
    index: Tensor
    commit: Tensor
    perplexity: float
    active: int


class ResidualQuantizer(nn.Module):
    """Every level quantises what the levels before it left over (models/vq/residual_vq.py)."""

    def __init__(self, config: RvqConfig) -> None:
        super().__init__()
        self.config = config
        one = Codebook(config) if config.shared else None
        self.layers = nn.ModuleList(one or Codebook(config) for _ in range(config.levels))

    def forward(
        self, rows: Tensor, noise: Noise | None = None, temperature: float = 0.5, divide: bool = False
    ) -> Quantised:
        """Quantise rows [N, C]. With `noise` it is a training step: choices are drawn, averages updated, levels above
        `noise.cut` left out.

        Each active level passes the gradient on, so it reaches the encoder times their number, as in the reference;
        `divide` divides by it.
        """
        residual, total = rows, torch.zeros_like(rows)
        indices: list[Tensor] = []
        errors: list[Tensor] = []
        spread: list[float] = []
        last = noise.cut if noise is not None else self.config.levels - 1
        for level, layer in enumerate(self.layers):
            assert isinstance(layer, Codebook)
            if level > last:
                indices.append(torch.full_like(indices[0], -1))
                continue
            x = residual  # its gradient is that of `rows`: what was taken off is constant
            if noise is None:
                index = layer.choose(x)
            else:
                if not bool(layer.ready):
                    layer.start(x.detach(), noise.jitter[level])
                index = layer.choose(x.detach(), temperature, noise.gumbel[level].to(x))
            code = F.embedding(index, layer.codebook)
            if noise is not None:
                spread.append(float(layer.update(x.detach(), index, noise.jitter[level])))
            errors.append((x - code).square().mean(-1))
            passed = x + (code - x).detach()  # in this order: the rounding is part of the next residual
            total = total + (passed / (last + 1) + (passed - passed / (last + 1)).detach() if divide else passed)
            residual = residual - passed.detach()
            indices.append(index)
        commit = torch.stack(errors).mean(0)
        used = sum(spread) / len(spread) if spread else 0.0
        return Quantised(total, torch.stack(indices, -1), commit, used, last + 1)

    def lookup(self, index: Tensor) -> Tensor:
        """Sum of the codes of indices [..., L' <= L]: [..., C]; -1 counts as zero, and so do missing last levels."""
        if index.shape[-1] > self.config.levels or bool((index >= self.config.codes).any() | (index < -1).any()):
            raise WeftError(
                f"codes: {index.shape[-1]} levels up to {int(index.max())}; "
                f"here are {self.config.levels} levels of {self.config.codes} codes"
            )
        total: Tensor | None = None
        for level in range(index.shape[-1]):
            book = self.layers[level].codebook
            assert isinstance(book, Tensor)
            one = F.embedding(index[..., level].clamp_min(0), book) * (index[..., level, None] >= 0)
            total = one if total is None else total + one
        assert total is not None
        return total


class Rvq(nn.Module):
    """Encoder, residual quantiser, decoder. State-dict names are MoMask's, plus the codebooks' statistics."""

    def __init__(self, config: RvqConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = ResidualQuantizer(config)

    def latents(self, x: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Latents [B, t, C] of normalised features [B, T, F], and their mask [B, t] if `lengths` (frames) are given.

        Raises WeftError for a length that is not a multiple of the stride: crop before.
        """
        stride = self.config.stride
        if x.shape[1] % stride or any(n % stride or not n for n in lengths or ()):
            raise WeftError(f"{x.shape[1]} frames: the quantiser takes multiples of {stride}, crop the clip")
        mask = frame_mask(lengths, x.shape[1], x.device)
        z, shorter = self.encoder(x.transpose(1, 2).float() * (1.0 if mask is None else mask), mask)
        return z.transpose(1, 2), None if shorter is None else shorter[:, 0] > 0

    @torch.no_grad()
    def encode(self, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Indices [B, t, L] of normalised features [B, T, F]; -1 behind a clip's end. Raises as `latents`."""
        z, mask = self.latents(x, lengths)
        keep = mask if mask is not None else torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        found = torch.full((*z.shape[:2], self.config.levels), -1, dtype=torch.long, device=z.device)
        found[keep] = self.quantizer(z[keep]).index
        return found

    def decode(self, index: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Normalised features [B, T, F] of indices [B, t, L' <= L]; `lengths` in latent steps. Zero behind the end."""
        mask = frame_mask(lengths, index.shape[1], index.device)
        z = self.quantizer.lookup(index).transpose(1, 2)
        x, _ = self.decoder(z if mask is None else z * mask, mask)
        return x.transpose(1, 2)

    def load_momask(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a MoMask checkpoint (its `vq_model`). Raises WeftError for other names or shapes."""
        own = self.state_dict()
        wanted = {k for k in own if not k.endswith(("code_sum", "code_count", "ready"))}
        odd = sorted(set(state) ^ wanted) or sorted(k for k in wanted if state[k].shape != own[k].shape)
        if odd:
            raise WeftError(f"not a checkpoint of this RVQ configuration: {odd[0]} differs; adapt the configuration")
        self.load_state_dict(own | {k: v.float() for k, v in state.items()})
        for layer in self.quantizer.layers:
            assert isinstance(layer, Codebook)
            layer.adopt()


def frame_mask(lengths: Sequence[int] | None, count: int, device: torch.device) -> Tensor | None:
    """[B, 1, count] in fp32, one inside each clip; None if no clip is shorter than `count`."""
    if lengths is None or all(n == count for n in lengths):
        return None
    inside = torch.arange(count) < torch.tensor(list(lengths))[:, None]
    return inside[:, None].float().to(device)
