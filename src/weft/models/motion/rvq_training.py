"""Training the RVQ in the one loop: MoMask's losses (models/vq/vq_trainer.py) on windows of clips.

Per sample: recon(x, y) + `explicit` recon(positions) + `velocity` recon(their differences in time)
+ `commit` |latent - codes|^2. MoMask calls its second term "vel"; it is of positions. `velocity` and `root` are ours,
off by default: `root` is recon of the root's turning and going, and of their running sums in seconds, because small
errors that add up make a circle a spiral.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft import rng
from weft.errors import WeftError
from weft.models.load import find_model
from weft.models.motion.codec import load_codec
from weft.models.motion.rvq import Noise
from weft.motion.files import load_part
from weft.record import Part, Record
from weft.types import Draw, Example, Loss

PARTS = ("model_index.json", "weft.json", "tokenizer", "transformer", "heads")
RECON = {"l1_smooth": F.smooth_l1_loss, "l1": F.l1_loss}


class RvqTrainable:
    """Trains `rvq/` of a motion model folder on the movements of records.

    `window`: frames of the random window of each clip (a shorter clip is taken whole, under the mask). `dropout`: the
    chance that a step drops the levels above a drawn one (level 0 never). `temperature`: of the drawn choice of
    codes. `divide`: divide the straight-through gradient by the number of levels (the reference does not).
    `encoder=False` trains the decoder alone: movements keep their codes, so a language model of them stays valid.
    `whole`: the export is the folder with the trained quantiser in it, language model included, instead of the
    quantiser alone. With several micro-batches a step the averages take one step for each.
    """

    name = "rvq"
    synchronised = True  # codebooks are the same in every process: see `Codebook.update`

    def __init__(
        self,
        path: str | Path,
        *,
        window: int = 64,
        recon: str = "l1_smooth",
        explicit: float = 0.5,
        velocity: float = 0.0,
        root: float = 0.0,
        commit: float = 0.02,
        dropout: float = 0.2,
        temperature: float = 0.5,
        divide: bool = False,
        encoder: bool = True,
        whole: bool = False,
    ) -> None:
        self.source, self.complete = find_model(str(path)), whole
        self.codec = load_codec(self.source)
        self.rvq = self.codec.rvq
        if recon not in RECON:
            raise WeftError(f"recon {recon!r} is unknown; choose {' or '.join(RECON)}")
        if window < 1 or window % self.rvq.config.stride:
            raise WeftError(f"window {window}: must be a positive multiple of {self.rvq.config.stride} frames")
        self.window, self.recon = window, RECON[recon]
        self.weights = {"recon": 1.0, "explicit": explicit, "velocity": velocity, "root": root, "commit": commit}
        self.dropout, self.temperature, self.divide, self.encoder = dropout, temperature, divide, encoder
        if not encoder:
            self.rvq.encoder.requires_grad_(False)

    def modules(self) -> dict[str, nn.Module]:
        """The network, by its folder's name."""
        return {"rvq": self.rvq}

    def example_facts(self) -> dict[str, object]:
        """What else decides about an example: for the cache's key."""
        return {"heading": self.codec.heading, "mean": self.codec.stats.mean.tolist(),
                "std": self.codec.stats.std.tolist()}  # fmt: skip

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`motion`: the normalised features [T, F] of one of each record's movements, drawn by the record's id."""
        rows = self.codec.features([load_part(self._part(r), r.root, fps=None) for r in records])
        return [{"motion": torch.from_numpy(np.ascontiguousarray(row))} for row in rows]

    def _part(self, record: Record) -> Part:
        parts = [p for turn in record.turns for p in turn.parts if p.type == "motion"]
        if not parts:
            raise WeftError(f"record {record.id!r} has no movement for the RVQ to learn from")
        return parts[rng.seed_of(0, "movement", record=record.id) % len(parts)]

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Losses [B]; metrics are means over the batch, `joints_mm` the mean error of joints beside the root."""
        windows = [self._window(e["motion"], draw, i) for i, e in enumerate(examples)]
        lengths = [len(w) for w in windows]
        device = next(self.rvq.parameters()).device
        x = nn.utils.rnn.pad_sequence(windows, batch_first=True).to(device)  # [B, T, F]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder):
            z, mask = self.rvq.latents(x, lengths)
        keep = mask if mask is not None else torch.ones(z.shape[:2], dtype=torch.bool, device=device)
        steps = [n // self.rvq.config.stride for n in lengths]
        noise = self.noise(steps, draw) if torch.is_grad_enabled() and self.encoder else None
        found = self.rvq.quantizer(z[keep].float(), noise, self.temperature, self.divide)
        q = torch.zeros_like(z).masked_scatter(keep[..., None], found.rows.to(z.dtype))
        inside = torch.ones(x.shape[:2], device=device) if mask is None else frames_of(mask, self.rvq.config.stride)
        y, _ = self.rvq.decoder(q.transpose(1, 2), None if mask is None else mask[:, None].float())
        terms = self.terms(x, y.transpose(1, 2).float(), inside)
        rows = torch.zeros(z.shape[:2], device=device).masked_scatter(keep, found.commit)
        terms["commit"] = rows.sum(1) / keep.sum(1)
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(0)
        with torch.no_grad():
            metrics = {name: float(term.mean()) for name, term in terms.items()}
            frames = [v[inside > 0].float().cpu().numpy() for v in (x, y.transpose(1, 2))]
            metrics["joints_mm"] = self.codec.apart(*map(self.codec.stats.restore, frames))
            if noise is not None:
                metrics["perplexity"] = found.perplexity
        return Loss(total, metrics)

    def terms(self, x: Tensor, y: Tensor, inside: Tensor) -> dict[str, Tensor]:
        """Reconstruction terms [B] of features x and y [B, T, F]; `inside` [B, T] is 1 within a clip."""
        blocks = self.codec.layout.blocks()
        a, b = x[..., blocks["positions"]], y[..., blocks["positions"]]
        root = slice(0, blocks["positions"].start)
        moves = slice(0, blocks["root_height"].start)
        sums = [(v[..., moves] * inside[..., None]).cumsum(1) / self.codec.layout.fps for v in (y, x)]
        both = inside[:, 1:] * inside[:, :-1]

        def mean(error: Tensor, where: Tensor) -> Tensor:
            return (error.mean(-1) * where).sum(1) / where.sum(1).clamp_min(1)

        return {
            "recon": mean(self.recon(y, x, reduction="none"), inside),
            "explicit": mean(self.recon(b, a, reduction="none"), inside),
            "velocity": mean(self.recon(b.diff(dim=1), a.diff(dim=1), reduction="none"), both),
            "root": mean(self.recon(y[..., root], x[..., root], reduction="none"), inside)
            + mean(self.recon(sums[0], sums[1], reduction="none"), inside),
        }

    def _window(self, motion: Tensor, draw: Draw, index: int) -> Tensor:
        if len(motion) <= self.window:
            return motion
        if not torch.is_grad_enabled():
            return motion[: self.window]
        place = rng.numpy_rng(draw.seed, "window", draw.step, draw.record_ids[index], index)
        start = int(place.integers(0, len(motion) - self.window + 1))
        return motion[start : start + self.window]

    def noise(self, steps: Sequence[int], draw: Draw) -> Noise:
        """The draws of a step for samples of `steps` latent steps: a function of (seed, step, record id, sample)."""
        config = self.rvq.config
        gumbel = []
        for i, (count, record) in enumerate(zip(steps, draw.record_ids, strict=True)):
            source = rng.generator(draw.seed, "codes", draw.step, record, i)
            u = torch.rand((config.levels, count, config.codes), generator=source)
            gumbel.append(-torch.log((-torch.log(u.clamp_min(1e-20))).clamp_min(1e-20)))
        shape = (config.levels, config.codes, config.code_width)
        needed = sum(steps) < config.codes  # else every code has a row of its own to start from
        jitter = rng.normal(shape, draw.seed, "codebook", draw.step) if needed else torch.zeros(()).expand(shape)
        levels = rng.numpy_rng(draw.seed, "levels", draw.step)
        dropped = levels.random() < self.dropout
        cut = int(levels.integers(0, config.levels)) if dropped else config.levels - 1
        return Noise(torch.cat(gumbel, 1), jitter, cut)

    def save(self, folder: Path) -> None:
        """Write `rvq/` and `statistics.json`; with `whole`, beside copies of the folder's other parts."""
        if self.complete:
            for path in (self.source / name for name in PARTS):
                if path.is_dir():
                    shutil.copytree(path, folder / path.name)
                elif path.is_file():
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, folder)
        self.codec.save(Path(folder))


def frames_of(mask: Tensor, stride: int) -> Tensor:
    """Latent mask [B, t] to frames [B, T] in fp32."""
    return mask.repeat_interleave(stride, 1).float()
