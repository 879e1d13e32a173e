"""Makes rvq.safetensors by running MoMask's own quantiser on weights that `weights` makes from their names.

    python tests/golden/make_rvq.py PATH_OF_MOMASK_CODES        (needs einops, as that repository does)

The numbers are those of EricGuo5513/momask-codes, commit 94a6636c9c463b7a9414c3401a6f1b67e6c51824: models/vq/model.py
(RVQVAE), models/vq/vq_trainer.py (losses). Its random draws are replaced by given ones: `gumbel_noise`, and the two
of quantisation dropout; dropout in the residual units is switched off.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor

from weft.models.motion.rvq import RvqConfig
from weft.rng import generator

CONFIG = RvqConfig(features=263, levels=4, codes=32, code_width=12, width=16, down=2, depth=3, dropout=0.0)
STEPS = ((6, 32, 3), (6, 32, 3), (6, 32, 1), (5, 28, 0))  # clips, frames, last level in use


def weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """A tensor for each name, a function of the name alone; codebooks are scaled down level by level."""
    made = {}
    for name, shape in shapes.items():
        scale = 1.0 / max(1, int(torch.tensor(shape[1:]).prod())) ** 0.5 if len(shape) > 1 else 0.1
        if "codebook" in name:
            scale = 0.2 * 0.6 ** int(name.split(".")[2])
        made[name] = torch.randn(shape, generator=generator(5, "golden/rvq", record=name)) * scale
    return made


def clips(count: int, frames: int, step: int) -> Tensor:
    return torch.randn((count, frames, 263), generator=generator(7, "golden/clips", step))


def gumbel(rows: int, step: int) -> Tensor:
    u = torch.rand((CONFIG.levels, rows, CONFIG.codes), generator=generator(9, "golden/gumbel", step))
    return -torch.log((-torch.log(u.clamp_min(1e-20))).clamp_min(1e-20))


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    import models.vq.quantizer as quantizer
    import models.vq.residual_vq as residual
    from models.vq.model import RVQVAE

    args = SimpleNamespace(
        mu=CONFIG.decay, num_quantizers=CONFIG.levels, shared_codebook=False, quantize_dropout_prob=0.2
    )

    def model() -> torch.nn.Module:
        made = RVQVAE(args, 263, CONFIG.codes, CONFIG.code_width, CONFIG.code_width, CONFIG.down, 2, CONFIG.width,
                      CONFIG.depth, CONFIG.dilation)  # fmt: skip
        made.load_state_dict(weights({k: v.shape for k, v in made.state_dict().items()}))
        for unit in made.modules():
            if isinstance(unit, torch.nn.Dropout):
                unit.p = 0.0
        return made

    out: dict[str, Tensor] = {}
    net = model().eval()
    with torch.no_grad():
        index, _ = net.encode(clips(3, 40, 100))
        out["index"], out["decoded"] = index, net.forward_decoder(index)[:, :8]
        partial = index.clone()
        partial[:, ::2, 2:] = -1
        out["decoded_partial"] = net.forward_decoder(partial)[:, :8]

    net = model().train()
    smooth = torch.nn.SmoothL1Loss()
    for step, (count, frames, cut) in enumerate(STEPS):
        noise = iter(gumbel(count * frames // 4, step))
        quantizer.gumbel_noise = lambda t, noise=noise: next(noise)
        residual.random = SimpleNamespace(random=lambda: 0.0)
        residual.randrange = lambda low, high, cut=cut: cut
        net.zero_grad()
        x = clips(count, frames, step)
        y, commit, perplexity = net(x)
        recon, explicit = smooth(y, x), smooth(y[..., 4:67], x[..., 4:67])
        loss = recon + 0.5 * explicit + 0.02 * commit
        loss.backward()
        out[f"{step}.losses"] = torch.stack([loss, recon, explicit, commit, perplexity]).detach()
        for name in ("encoder.model.0.bias", "encoder.model.4.bias", "decoder.model.0.weight"):
            out[f"{step}.grad.{name}"] = dict(net.named_parameters())[name].grad.clone()
        for level, layer in enumerate(net.quantizer.layers):
            if level <= max(c for _, _, c in STEPS[: step + 1]):
                out[f"{step}.codebook.{level}"] = layer.codebook.clone()
                out[f"{step}.sum.{level}"], out[f"{step}.count.{level}"] = layer.code_sum, layer.code_count
    tensors = {k: v.detach().clone().contiguous() for k, v in out.items()}
    save_file(tensors, Path(__file__).with_name("rvq.safetensors"))


if __name__ == "__main__":
    main()
