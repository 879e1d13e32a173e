"""Put a trained model beside another with which it has parts in common: 16 bits, one copy of each part.

    python -m weft.models.share runs/tiny/omni_base/export tiny-kontext src/weft/zoo/tiny-omni \\
        --adapter edit=runs/tiny/omni_edit/export --adapter generation=runs/tiny/omni_generation/export

Parts that are the same in the other folder are left out and named in `weft.json`, under `parts`; `weft export` writes
a folder that holds everything again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from weft.errors import WeftError, exit_status
from weft.models.load import family_of, find_model
from weft.models.lora import ADAPTERS
from weft.models.weights import load_parts, read_json, save_folder


def share(
    model: str | Path,
    other: str | Path,
    out: str | Path,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    card: Mapping[str, object] | None = None,
) -> Path:
    """Write the model in fp16 to `out`, without what the folder or zoo name `other` holds as well, and return the path.

    `adapters` are routed LoRAs ("edit", "generation": folders or files), put beside it in fp16; `card` adds to the
    model's `weft.json` (`steps`, `guidance`). Raises WeftError if `out` exists or an adapter cannot be read.
    """
    folder, theirs, out = find_model(str(model)), find_model(str(other)), Path(out)
    if out.exists():
        raise WeftError(f"{out} exists; give a new folder, or remove it first")
    family = family_of(folder)
    parts = load_parts(folder, family.parts, dtype=torch.float16)
    known = {digest(theirs / name): name for name in sorted(p.name for p in theirs.iterdir() if p.is_dir())}
    save_folder(parts, out, torch.float16, pipeline=family.model.pipeline, optional=family.model.optional_parts)
    places: dict[str, str] = {}
    for name, part in parts.items():
        twin = known.get(digest(out / name)) if isinstance(part, nn.Module) else None
        if twin is not None:
            for file in (out / name).iterdir():
                file.unlink()
            (out / name).rmdir()
            places[name] = os.path.relpath(theirs / twin, out)
    for name, path in (adapters or {}).items():
        _adapter(name, Path(path), out)
    facts = {**read_json(folder / "weft.json"), **(card or {})} | ({"parts": places} if places else {})
    (out / "weft.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return out


def digest(folder: Path) -> str:
    """What a part is: its weights in fp16 and its configuration, without where, when and how it was stored."""
    import safetensors.torch

    config = read_json(folder / "config.json")
    facts = {k: v for k, v in config.items() if not k.startswith("_") and "dtype" not in k and "version" not in k}
    found = hashlib.sha256(json.dumps(facts | {"class": config.get("_class_name")}, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in sorted(safetensors.torch.load_file(file).items()):
            half = tensor.half() if tensor.is_floating_point() else tensor
            found.update(f"{key}{tuple(half.shape)}".encode())
            found.update(half.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _adapter(name: str, path: Path, out: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    if name not in ADAPTERS:
        raise WeftError(f"adapter {name!r} is unknown; name them {' and '.join(ADAPTERS)}")
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise WeftError(f"adapter {name}: there is no {file}; give the export folder of a LoRA run")
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key).half() for key in opened.keys()}
        metadata = opened.metadata()
    place = out / ADAPTERS[name][0]
    place.mkdir()
    save_file(tensors, place / file.name, metadata=metadata)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: MODEL OTHER OUT [--adapter NAME=PATH ...] [--steps N] [--guidance X]."""
    parser = argparse.ArgumentParser(prog="python -m weft.models.share", description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("other")
    parser.add_argument("out")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    options = parser.parse_args(argv)
    card = {key: value for key in ("steps", "guidance") if (value := getattr(options, key)) is not None}

    def work() -> None:
        pairs = dict(item.split("=", 1) for item in options.adapter if "=" in item)
        if len(pairs) != len(options.adapter):
            raise WeftError("--adapter: write NAME=PATH, each name once, as edit=runs/tiny/omni_edit/export")
        print(share(options.model, options.other, options.out, adapters=pairs, card=card))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
