"""Fitting a model into a GPU's memory: which of diffusers' means a number of GiB asks for."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import WeftError

PRESETS = (16, 24, 48, 80)
SHARE = 0.8
"""What weights may take of the memory; the rest is for activations, the decoder and the allocator."""
FOUR_BIT = 0.3
"""Size of NF4 weights against 16 bits: a quarter, their scales, and the layers that stay in 16 bits."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Arguments of `weft.models.load.load`."""

    offload: str = "none"
    quantization: dict[str, str] | None = None
    tiling: bool = False
    slicing: bool = False


def weight_bytes(place: Path) -> float:
    """Bytes of a part's weights in 16 bits, from the headers of its folder's safetensors files (without copies in
    fp16), or of its single file."""
    count = 0
    for path in [place] if place.is_file() else place.glob("*.safetensors"):
        if ".fp16" in path.name:
            continue
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for side in entry["shape"]:
                    size *= side
                count += size
    return 2.0 * count


def preset(vram: int, sizes: dict[str, float], quantized: Sequence[str]) -> Preset:
    """What a GPU of `vram` GiB needs for parts of these `sizes` (bytes in 16 bits).

    In this order: all parts on the GPU; one part at a time; the same with as many of the `quantized` parts in 4 bits
    as must be, largest first; one layer at a time. Pictures are decoded in tiles and one by one on 24 GiB and less.
    Raises WeftError for another number.
    """
    if vram not in PRESETS:
        raise WeftError(f"vram {vram}: choose one of {', '.join(map(str, PRESETS))} (GiB)")
    room, small = SHARE * vram * 2**30, vram <= 24
    if sum(sizes.values()) <= room:
        return Preset(tiling=small, slicing=small)
    if max(sizes.values()) <= room:
        return Preset("model", None, small, small)
    bits: dict[str, str] = {}
    for part in sorted((name for name in quantized if name in sizes), key=lambda name: -sizes[name]):
        bits[part] = "4bit"
        # a quantised part stays where it was read to, so the largest of the others must fit beside it
        stay = FOUR_BIT * sum(sizes[name] for name in bits)
        if stay + max((size for name, size in sizes.items() if name not in bits), default=0.0) <= room:
            return Preset("model", bits, small, small)
    return Preset("sequential", None, small, small)


def preset_for(
    folder: Path,
    vram: int,
    options: Mapping[str, Any] | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> Preset:
    """The preset of a model folder opened with the family's `options` and single `files`. Parts that lie elsewhere (a
    MetaQuery model's VLM) are counted with it."""
    from weft.models.load import family_of
    from weft.models.weights import part_folder

    family = family_of(folder)
    places = {name: part_folder(folder, name) for name in family.order}
    places |= {name: Path(file) for name, file in (files or {}).items()}
    sizes = {name: weight_bytes(path) for name, path in places.items() if path.exists()}
    if "vlm" in family.order and "vlm" not in sizes:
        from weft.models.image.metaquery_parts import find_vlm
        from weft.models.weights import read_json

        card = {**read_json(folder / "weft.json").get("options", {}), **(options or {})}
        sizes["vlm"] = weight_bytes(find_vlm(str(card.get("vlm", "")), folder))
    return preset(vram, sizes, family.quantized)
