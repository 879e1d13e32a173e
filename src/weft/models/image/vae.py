"""The picture autoencoder as a trainable: diffusers' `AutoencoderKL`, a reconstruction loss, measured latent scale.

The recipe follows latent diffusion (arXiv 2112.10752, section 3.1) without its adversarial part: on drawn pictures
the gradient term keeps edges and small patterns sharp at a fraction of the cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from weft import rng
from weft.errors import WeftError
from weft.models.flow import check_size, cover
from weft.types import Draw, Example, Loss

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Record

CALIBRATION = 512
"""How many of the latest training pictures `save` measures the latents on."""


class AutoencoderTrainable:
    """Trains the `vae` of a model folder (or a folder that is a VAE itself) on the records' pictures.

    The loss per sample is a weighted sum, all terms on values in [-1, 1]:
    `l1` |x - y| + `l2` (x - y)^2 + `edge` |dx - dy| (finite differences along both axes) + `kl` times the divergence
    of the posterior from N(0, 1) per latent value. The posterior is sampled in training; without gradients (held-out
    loss) its mode is decoded. `crop` trains on random squares of this side instead of whole pictures.
    `save` writes `vae/` with `scaling_factor` and `shift_factor` measured on the latest training pictures, so that
    (z - shift) * scale has mean 0 and deviation 1.

    `detail` > 0 weighs each place by 1 + `detail` times the local contrast of the picture (deviation in a 7 x 7 window,
    mean weight 1 per picture), so that small things count as much as large plain ones. `encoder=False` trains the
    decoder alone: latents and factors stay as they are, so models trained on them remain valid. `noise` is the
    deviation of what is then added to the latents in training, in units of theirs (flow models err a little).
    """

    name = "autoencoder"

    def __init__(
        self,
        path: str | Path,
        *,
        l1: float = 1.0,
        l2: float = 0.0,
        edge: float = 1.0,
        kl: float = 1e-3,
        detail: float = 0.0,
        encoder: bool = True,
        noise: float = 0.0,
        crop: int | None = None,
    ) -> None:
        from diffusers import AutoencoderKL

        folder = Path(path)
        if (folder / "vae" / "config.json").is_file():
            folder = folder / "vae"
        if not (folder / "config.json").is_file():
            raise WeftError(f"{path}: holds neither vae/config.json nor config.json; give a model or VAE folder")
        self.vae: Any = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
        self.weights = {"l1": l1, "l2": l2, "edge": edge, "kl": kl}
        self.detail, self.noise, self.train_encoder = detail, noise, encoder
        if noise and encoder:
            raise WeftError("noise is for encoder: false; with the encoder, the posterior's own noise is trained")
        if not encoder:
            for frozen in (self.vae.encoder, self.vae.quant_conv):
                if frozen is not None:
                    frozen.requires_grad_(False)
        self.downsample: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if crop is not None:
            check_size((crop, crop), self.downsample)
        self.crop = crop
        self._latest: deque[Tensor] = deque(maxlen=CALIBRATION)

    def modules(self) -> dict[str, nn.Module]:
        """The autoencoder, by its folder's name."""
        return {"vae": self.vae}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`picture`: one of each record's pictures as uint8 [3, H, W], at `meta["size"]` if the record names one.

        Sources, references and targets all pass through the autoencoder later, so which one is used is drawn, as a
        function of the record's id.
        """
        return [{"picture": to_bytes(self._picture(record))} for record in records]

    def _picture(self, record: Record) -> Image.Image:
        parts = [*record.inputs, *record.targets]
        if not parts:
            raise WeftError(f"record {record.id!r} has no picture for the autoencoder to learn from")
        image = record.load(parts[rng.seed_of(0, "picture", record=record.id) % len(parts)])
        size = record.meta.get("size")
        if size is not None:
            image = cover(image, (int(size[0]), int(size[1])))
        if self.crop is None:
            check_size((image.height, image.width), self.downsample)
        elif min(image.size) < self.crop:
            raise WeftError(f"record {record.id!r}: {image.width}x{image.height} is smaller than crop {self.crop}")
        return image

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Reconstruction loss of pictures of one size (or crops of any), and the metrics' means over the batch.

        `psnr` in dB of the clipped reconstruction; `std` of the posterior relative to that of the latents.
        """
        training = torch.is_grad_enabled()
        pictures = [example["picture"] for example in examples]
        if self.crop is not None:
            pictures = [crop_at(p, self.crop, draw, i) for i, p in enumerate(pictures)]
        if len({p.shape for p in pictures}) > 1:
            raise WeftError("a batch mixes pictures of several sizes; give the stage a size or the recipe a crop")
        if training:
            self._latest.extend(pictures)
        device = next(self.vae.parameters()).device
        x = from_bytes(torch.stack(pictures).to(device))  # [B, 3, H, W]
        with torch.set_grad_enabled(training and self.train_encoder):
            posterior = self.vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()  # [B, C, h, w]
        z = mean
        if training:
            deviation = (0.5 * logvar).exp() if self.train_encoder else self.noise / self.vae.config.scaling_factor
            z = mean + deviation * self._noise(mean, draw)
        y = self.vae.decode(z).sample.float()
        error, weight = x - y, contrast_weight(x, self.detail)
        terms = {
            "l1": (weight * error.abs()).flatten(1).mean(1),
            "l2": (weight * error.square()).flatten(1).mean(1),
            "edge": gradient(error),
            "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1),
        }
        total = torch.stack([factor * terms[name] for name, factor in self.weights.items()]).sum(0)
        with torch.no_grad():
            metrics = {name: float(term.mean()) for name, term in terms.items()}
            metrics["psnr"] = float(psnr(x, y).mean())
            metrics["std"] = float((0.5 * logvar).exp().mean() / mean.std().clamp_min(1e-8))
        return Loss(total, metrics)

    def _noise(self, like: Tensor, draw: Draw) -> Tensor:
        shape = tuple(like.shape[1:])
        drawn = [
            rng.normal(shape, draw.seed, "posterior", draw.step, record, i) for i, record in enumerate(draw.record_ids)
        ]
        return torch.stack(drawn).to(like.device)

    def save(self, folder: Path) -> None:
        """Write `folder/vae`, its latent scale measured if this object has trained (else as it was loaded)."""
        if self._latest and self.train_encoder:
            shift, scale = latent_scale(self.vae, self._latest)
            self.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
        self.vae.save_pretrained(Path(folder) / "vae")


def to_bytes(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def from_bytes(pictures: Tensor) -> Tensor:
    """uint8 pictures as fp32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def crop_at(picture: Tensor, side: int, draw: Draw, index: int) -> Tensor:
    """A random square of a picture [3, H, W]; its place is a function of the draw and the sample."""
    place = rng.numpy_rng(draw.seed, "crop", draw.step, draw.record_ids[index], index)
    top, left = (int(place.integers(0, edge - side + 1)) for edge in picture.shape[1:])
    return picture[:, top : top + side, left : left + side]


def gradient(x: Tensor) -> Tensor:
    """Mean absolute finite differences of pictures [B, C, H, W], the sum over both axes: [B]."""
    across = (x[..., 1:] - x[..., :-1]).abs().flatten(1).mean(1)
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down


def contrast_weight(x: Tensor, detail: float, window: int = 7) -> Tensor | float:
    """1 + `detail` times the local deviation of pictures [B, C, H, W] in [-1, 1]: [B, 1, H, W], mean 1 per picture."""
    if detail == 0:
        return 1.0

    def local_mean(t: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(t, window, stride=1, padding=window // 2, count_include_pad=False)

    variance = local_mean(x.square()) - local_mean(x).square()
    weight = 1 + detail * variance.clamp_min(0).mean(1, keepdim=True).sqrt()
    return weight / weight.mean((1, 2, 3), keepdim=True)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB [B] of pictures in [-1, 1] (`y` is clipped); at most 100."""
    error = (x - y.clamp(-1, 1)).square().flatten(1).mean(1) / 4
    return -10 * error.clamp_min(1e-10).log10()


@torch.no_grad()
def latent_scale(vae: Any, pictures: Iterable[Tensor], batch: int = 32) -> tuple[float, float]:
    """(shift, scale) that give the posterior modes of uint8 pictures [3, H, W] mean 0 and deviation 1.

    One number each over all channels and cells, as Stable Diffusion 3's configuration has them; four decimals.
    """
    device = next(vae.parameters()).device
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for picture in pictures:
        by_shape.setdefault(tuple(picture.shape), []).append(picture)
    count, total, squares = 0, 0.0, 0.0
    with torch.autocast(device.type, enabled=False):
        for group in by_shape.values():
            for i in range(0, len(group), batch):
                x = from_bytes(torch.stack(group[i : i + batch]).to(device))
                z = vae.encode(x).latent_dist.mode().double()
                count, total, squares = count + z.numel(), total + float(z.sum()), squares + float(z.square().sum())
    if count == 0:
        raise WeftError("the latent scale needs at least one picture")
    mean = total / count
    deviation = max(squares / count - mean**2, 1e-12) ** 0.5
    return round(mean, 4), round(1 / deviation, 4)
