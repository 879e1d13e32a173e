"""Clips to codes and back: the feature extraction, the statistics and the RVQ network as one thing on disk.

folder/rvq/config.json, folder/rvq/model.safetensors, folder/statistics.json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.errors import WeftError
from weft.media import atomic_write
from weft.models.foreign import read_foreign
from weft.models.motion.rvq import Rvq, RvqConfig
from weft.models.weights import read_json
from weft.motion.clip import Motion, from_features
from weft.motion.features import HEADINGS, extract
from weft.motion.physics import mpjpe
from weft.motion.skeleton import Layout, layout_of
from weft.motion.stats import DatasetStats, GeneratorStats

FRAMES = 16384
"""Frames in one pass of the network, padding counted: bounds the memory of a large batch of clips."""


class Codec:
    """`rvq` with its `stats` and the `heading` rule of its features (`weft.motion.features.extract`).

    A clip of n frames gives n // stride latent steps of `stride` frames (what is left over is cut); a clip shorter
    than one step is held at its last pose. Codes are int64 tensors [t, L] on the CPU.
    """

    def __init__(self, rvq: Rvq, stats: GeneratorStats, heading: str = "humanml3d") -> None:
        if heading not in HEADINGS:
            raise WeftError(f"heading {heading!r} is unknown; choose {' or '.join(HEADINGS)}")
        if len(stats.mean) != rvq.config.features:
            raise WeftError(f"statistics of {len(stats.mean)} features for a network of {rvq.config.features}")
        self.rvq, self.stats, self.heading = rvq, stats, heading
        self.layout: Layout = layout_of(rvq.config.features)

    @property
    def config(self) -> RvqConfig:
        return self.rvq.config

    @property
    def steps_per_second(self) -> float:
        """Latent steps per second of movement."""
        return self.layout.fps / self.config.stride

    def features(self, clips: Sequence[Motion]) -> list[np.ndarray]:
        """Normalised features [T, F] of each clip, T a multiple of the stride.

        Features speak of a frame and the next, so each clip is first continued by one frame at its last speed: n
        frames give n rows. Features that a clip was read from are taken as they are, as MoMask does
        (`Motion.stored_by`).
        """
        prepared = []
        for clip in clips:
            if clip.layout.name != self.layout.name:
                raise WeftError(f"a clip on the {clip.layout.name} skeleton: the model is of {self.layout.name}")
            if self._stored(clip) is not None:
                continue
            joints = clip.resample(self.layout.fps).joints
            short = self.config.stride - len(joints)
            if short > 0:
                joints = np.concatenate([joints, np.repeat(joints[-1:], short, axis=0)])
            prepared.append(np.concatenate([joints, 2 * joints[-1:] - joints[-2:-1]]))
        made = iter(extract(prepared, layout=self.layout, heading=self.heading) if prepared else [])
        rows = [next(made) if (own := self._stored(clip)) is None else own for clip in clips]
        cut = [self.stats.normalise(row[: len(row) - len(row) % self.config.stride]) for row in rows]
        return [row.astype(np.float32, copy=False) for row in cut]

    def _stored(self, clip: Motion) -> np.ndarray | None:
        return clip.stored_by(self.heading) if len(clip) >= self.config.stride else None

    @torch.no_grad()
    def encode(self, clips: Sequence[Motion]) -> list[Tensor]:
        """Codes [t, L] of clips of any lengths, in masked batches of clips of like length."""
        rows = [torch.from_numpy(np.ascontiguousarray(row)) for row in self.features(clips)]
        found: list[Tensor | None] = [None] * len(rows)
        device = next(self.rvq.parameters()).device
        for part in batches([len(row) for row in rows], FRAMES):
            x = torch.nn.utils.rnn.pad_sequence([rows[i] for i in part], batch_first=True)
            index = self.rvq.encode(x.to(device), [len(rows[i]) for i in part]).cpu()
            for k, i in enumerate(part):
                found[i] = index[k, : len(rows[i]) // self.config.stride].clone()
        return [codes for codes in found if codes is not None]

    def decode(self, codes: Sequence[Tensor]) -> list[Motion]:
        """Clips of codes [t, L' <= L], stride frames a step, at the layout's frame rate."""
        return [from_features(row) for row in self._decoded(codes)]

    def joint_error(self, clips: Sequence[Motion]) -> float:
        """Mean distance in millimetres of joints from those that the clips' codes give back; see `apart`."""
        wanted = self.stats.restore(np.concatenate(self.features(clips)))
        return self.apart(wanted, np.concatenate(self._decoded(self.encode(clips))))

    def apart(self, a: np.ndarray, b: np.ndarray) -> float:
        """Mean distance in millimetres of the joints beside the root in features [n, F] of the dataset's units, on the
        reference skeleton, root path and heading taken as equal."""
        block = self.layout.blocks()["positions"]
        joints = [rows[:, block].reshape(len(rows), -1, 3) for rows in (a, b)]
        return (1000 if self.layout.unit == "m" else 1) * mpjpe(*joints, aligned=False)

    @torch.no_grad()
    def _decoded(self, codes: Sequence[Tensor]) -> list[np.ndarray]:
        """Features [T, F] of codes, in the dataset's units."""
        found: list[np.ndarray | None] = [None] * len(codes)
        device = next(self.rvq.parameters()).device
        for part in batches([len(c) * self.config.stride for c in codes], FRAMES):
            steps = [len(codes[i]) for i in part]
            levels = max(codes[i].shape[-1] for i in part)
            index = torch.full((len(part), max(steps), levels), -1)
            for k, i in enumerate(part):
                index[k, : steps[k], : codes[i].shape[-1]] = codes[i]
            x = self.rvq.decode(index.to(device), steps).float().cpu().numpy()
            for k, i in enumerate(part):
                found[i] = self.stats.restore(x[k, : steps[k] * self.config.stride])
        return [row for row in found if row is not None]

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write `rvq/` and `statistics.json`; floating-point weights as `dtype` if given."""
        from safetensors.torch import save_file

        (folder / "rvq").mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.rvq.state_dict().items()}
        if dtype is not None:
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        save_file(state, folder / "rvq" / "model.safetensors", metadata={"format": "pt"})
        facts = dataclasses.asdict(self.config) | {"heading": self.heading}
        with atomic_write(folder / "rvq" / "config.json") as handle:
            handle.write((json.dumps(facts, indent=2, sort_keys=True) + "\n").encode())
        self.stats.save(folder / "statistics.json")


def batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices grouped by like length, each group at most `limit` long with its padding (one clip at the least)."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > limit:
            groups.append([])
        groups[-1].append(i)
    return groups


def load_codec(folder: str | Path, *, device: str | torch.device = "cpu") -> Codec:
    """What `Codec.save` wrote, in fp32 and eval mode. Raises WeftError for what is missing or does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config, heading = read_config(folder / "rvq" / "config.json")
    rvq = Rvq(config)
    path = folder / "rvq" / "model.safetensors"
    try:
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
        rvq.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WeftError(f"{path}: cannot be read ({str(error).splitlines()[0][:200]}); export it again") from error
    return Codec(rvq.to(device).eval(), GeneratorStats.load(folder / "statistics.json"), heading)


def read_config(path: Path) -> tuple[RvqConfig, str]:
    """The network's configuration and the heading rule of `rvq/config.json`."""
    if not path.is_file():
        raise WeftError(f"{path}: no such file; a motion model needs rvq/config.json")
    return make_config(read_json(path), str(path))


def make_config(values: dict[str, Any], where: str) -> tuple[RvqConfig, str]:
    """The same of plain values. Raises WeftError for an unknown key or a wrong type."""
    values = dict(values)
    heading = str(values.pop("heading", "humanml3d"))
    known = {field.name: field.default for field in dataclasses.fields(RvqConfig)}
    for key, value in values.items():
        if key not in known:
            raise WeftError(f"{where}: unknown key {key!r}; known: {', '.join(known)}, heading")
        if type(value) is not type(known[key]) and not (isinstance(known[key], float) and isinstance(value, int)):
            raise WeftError(f"{where}: {key}: {value!r} is not of the type of its default {known[key]!r}")
    return RvqConfig(**values), heading


def momask_config(state: dict[str, Tensor]) -> RvqConfig:
    """The configuration that a MoMask state dict was trained with, from its shapes (dilation 3, ReLU, not shared)."""
    try:
        width, features, _ = state["encoder.model.0.weight"].shape
        codes, code_width = state["quantizer.layers.0.codebook"].shape
    except (KeyError, ValueError) as error:
        raise WeftError(f"not a MoMask RVQ checkpoint ({error} is missing): give its `vq_model`") from error
    down = sum(k.startswith("encoder.model.") and k.endswith(".0.weight") and k.count(".") == 4 for k in state)
    depth = sum(k.startswith("encoder.model.2.1.model.") and k.endswith(".conv1.weight") for k in state)
    levels = sum(k.endswith(".codebook") for k in state)
    return RvqConfig(features, levels, codes, code_width, width, down, depth)


def codec_of_momask(checkpoint: str | Path, mean: str | Path, std: str | Path) -> Codec:
    """A MoMask RVQ checkpoint (`net_best_fid.tar`) with the run's meta/mean.npy and meta/std.npy, as a codec.

    Those statistics are the generator's: already divided by MoMask's `feat_bias`.
    """
    state = read_foreign(checkpoint, "vq_model")
    rvq = Rvq(momask_config(state))
    rvq.load_momask(state)
    return Codec(rvq.eval(), GeneratorStats.from_npy(mean, std))


def codec_of_dataset(config: RvqConfig, stats: DatasetStats, heading: str, feat_bias: float = 5.0) -> Codec:
    """A new codec with random weights for a dataset."""
    return Codec(Rvq(config), stats.for_generator(feat_bias), heading)
