"""Reading and writing the released folder layout: one sub-folder per part, safetensors and JSON only."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.models.licences import find_licence

SD3_PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
SD3_OPTIONAL = ("text_encoder_3", "tokenizer_3")


def from_hub(name: str, what: str, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """The files of a hub repository that match `allow` and not `ignore`, on this machine (needs a network at first).

    Raises WeftError with `what` and the hub's answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(allow), ignore_patterns=list(ignore)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise WeftError(f"{what}, and the hub answered: {_line(error)[:200]}") from error


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be a hub repository's."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def licence_note(name: str | Path) -> str | None:
    """What is known about the licence of a public checkpoint (`weft.models.licences`), as one line."""
    found = find_licence(name)
    return None if found is None else str(found)


def licence_notes(names: Sequence[str | Path]) -> str | None:
    """The same of all that a model is put together from: checkpoint, VLM, adapters."""
    notes = {Path(name).name: note for name in names if (note := licence_note(name)) is not None}
    lines = [f"with {name}: {note}" if k else note for k, (name, note) in enumerate(notes.items())]
    return "; ".join(lines) or None


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a model folder; {} where a release loads part by part and has none. WeftError if broken."""
    return read_json(folder / "model_index.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no such file. WeftError if it is broken."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeftError(f"{path}: not valid JSON ({_line(error)}); download or export the model again") from error
    if not isinstance(found, dict):
        raise WeftError(f"{path}: must be a JSON object; download or export the model again")
    return found


def part_folder(folder: Path, name: str) -> Path:
    """Where a part of a model folder lies: inside, or where `parts` in its `weft.json` says, relative to the folder.

    Models that share an autoencoder or a text encoder so keep one copy of it. Raises WeftError if it is not there.
    """
    shared = read_json(folder / "weft.json").get("parts", {})
    if not isinstance(shared, dict) or not all(isinstance(value, str) for value in shared.values()):
        raise WeftError(f'{folder / "weft.json"}: parts must map names to folders, as {{"vae": "../other/vae"}}')
    if name not in shared:
        return folder / name
    path = Path(os.path.normpath(folder / shared[name]))
    if not path.is_dir():
        raise WeftError(f"{folder}: its part {name} is kept in {path}, which is not there; get that model, too")
    return path


@dataclass(frozen=True)
class Parts:
    """What a released folder holds: the class (`library:Class`) reading each part, and which parts may be missing."""

    networks: dict[str, str]
    readers: dict[str, str]
    optional: tuple[str, ...] = ()


SD3 = Parts(
    {
        "transformer": "diffusers:SD3Transformer2DModel",
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModelWithProjection",
        "text_encoder_2": "transformers:CLIPTextModelWithProjection",
        "text_encoder_3": "transformers:T5EncoderModel",
    },
    {
        "scheduler": "diffusers:FlowMatchEulerDiscreteScheduler",
        "tokenizer": "transformers:AutoTokenizer",
        "tokenizer_2": "transformers:AutoTokenizer",
        "tokenizer_3": "transformers:AutoTokenizer",
    },
    SD3_OPTIONAL,
)
FLUX = Parts(
    {
        "transformer": "diffusers:FluxTransformer2DModel",
        "vae": "diffusers:AutoencoderKL",
        "text_encoder": "transformers:CLIPTextModel",
        "text_encoder_2": "transformers:T5EncoderModel",
    },
    {
        "scheduler": "diffusers:FlowMatchEulerDiscreteScheduler",
        "tokenizer": "transformers:AutoTokenizer",
        "tokenizer_2": "transformers:AutoTokenizer",
    },
)
QWEN_EDIT = Parts(
    {
        "transformer": "diffusers:QwenImageTransformer2DModel",
        "vae": "diffusers:AutoencoderKLQwenImage",
        "text_encoder": "transformers:Qwen2_5_VLForConditionalGeneration",
    },
    {
        "scheduler": "diffusers:FlowMatchEulerDiscreteScheduler",
        "tokenizer": "transformers:AutoTokenizer",
        "processor": "weft.vlm.processor:Processor",
    },
)
METAQUERY = Parts(
    {
        "transformer": "diffusers:SD3Transformer2DModel",
        "vae": "diffusers:AutoencoderKL",
        "conditioner": "weft.models.image.connector:StableDiffusion3Conditioner",
    },
    {"scheduler": "diffusers:FlowMatchEulerDiscreteScheduler"},
)


def load_sd3_parts(
    folder: Path, *, dtype: torch.dtype, quantization: dict[str, Any] | None = None, device_map: Any = None
) -> dict[str, Any]:
    """`load_parts` of an SD3 / SD3.5 / UniPic2-Kontext folder."""
    return load_parts(folder, SD3, dtype=dtype, quantization=quantization, device_map=device_map)


def load_parts(
    folder: Path,
    parts: Parts,
    *,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    device_map: Any = None,
    files: Mapping[str, str | Path] | None = None,
) -> dict[str, Any]:
    """The parts of a released folder by name, networks in eval mode.

    `quantization` maps part names to a ready configuration object (see `weft.models.load`); `files` names of
    diffusers' networks to single files with their weights, of which the folder then has the configuration alone. Raises
    WeftError that names the part which is missing, unreadable, incomplete or of other shapes than its configuration
    says.
    """
    index, files = read_index(folder), files or {}
    for name in files:
        if not parts.networks.get(name, "").startswith("diffusers:"):
            known = [part for part, kind in parts.networks.items() if kind.startswith("diffusers:")]
            raise WeftError(f"files: {name!r} is not read from a single file; {', '.join(known)} can be")
    order = [*parts.networks, *parts.readers]
    names = [n for n in order if n not in parts.optional or _has(folder, n, index)]
    places = {name: part_folder(folder, name) for name in names}
    missing = [name for name, path in places.items() if not path.is_dir()]
    if missing:
        raise WeftError(f"{folder}: no folder {missing[0]!r}; a model needs {', '.join(names)}")
    quantization = quantization or {}
    found: dict[str, Any] = {}
    for name in names:
        path = places[name]
        library, _, kind = (parts.networks.get(name) or parts.readers[name]).partition(":")
        cls = getattr(importlib.import_module(library), kind)
        if name in parts.networks:
            file = Path(files[name]) if name in files else None
            found[name] = _network(path, cls, dtype, quantization.get(name), device_map, file)
        else:
            found[name] = _guard(path, partial(cls.from_pretrained, path))
    return found


def _has(folder: Path, name: str, index: dict[str, Any]) -> bool:
    """Whether an optional part belongs to the folder: the index says so, or without one the folder is there."""
    if name in index:
        return bool(index[name] and index[name][0])
    return part_folder(folder, name).is_dir()


def _network(
    path: Path, kind: Any, dtype: torch.dtype, quantization: Any, device_map: Any, file: Path | None = None
) -> nn.Module:
    config = path / "config.json"
    if not config.is_file():
        raise WeftError(f"{path}: no config.json; download or export the model again")
    if file is not None:
        return _single(path, kind, dtype, quantization, device_map, file)
    if not list(path.glob("*.safetensors")):
        raise WeftError(f"{path}: no *.safetensors weights (pickled .bin and .pt files are not read)")
    # Named arguments only where set: both libraries warn about a quantisation configuration that is None.
    options: dict[str, Any] = {"quantization_config": quantization} if quantization is not None else {}
    if quantization is not None and device_map is not None:
        options["device_map"] = device_map
    # transformers 5 names the argument `dtype`, diffusers `torch_dtype`.
    options["dtype" if kind.__module__.startswith("transformers") else "torch_dtype"] = dtype
    _quiet()

    def load() -> Any:
        return kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)

    module, info = _guard(path, load)
    lost = sorted(info["missing_keys"])
    if lost:
        raise WeftError(f"{path}: {len(lost)} weights are missing, the first is {lost[0]}; download the model again")
    wrong = list(info.get("mismatched_keys", ()))
    if wrong:
        raise WeftError(f"{path}: weights do not have the shapes of config.json, the first is {wrong[0]}")
    return module.eval()


def _single(path: Path, kind: Any, dtype: torch.dtype, quantization: Any, device_map: Any, file: Path) -> nn.Module:
    """A network from one safetensors file, in its authors' layout or diffusers', by diffusers' conversion."""
    import safetensors.torch

    if not file.is_file() or file.suffix != ".safetensors":
        raise WeftError(f"{file}: no such .safetensors file (pickled files are not read)")
    options: dict[str, Any] = {"quantization_config": quantization} if quantization is not None else {}
    if quantization is not None and device_map is not None:
        options["device"] = device_map[""]
    state = _guard(file, lambda: safetensors.torch.load_file(file))
    try:
        module = kind.from_single_file(state, config=str(path), torch_dtype=dtype, **options)
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = f"diffusers finds no {kind.__name__} of the folder's configuration in it"
        raise WeftError(f"{file}: {why} ({_line(error)})") from error
    lost = sorted(name for name, weight in module.named_parameters() if weight.is_meta)
    if lost:
        raise WeftError(f"{file}: {len(lost)} weights of {path.name} are missing, the first is {lost[0]}")
    return module.eval()


def _guard(path: Path, load: Any) -> Any:
    """Run a loader of diffusers/transformers; what it cannot read becomes one line that names the part."""
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, (WeftError, torch.OutOfMemoryError)):
            raise
        raise WeftError(f"{path}: cannot be read ({_line(error)}); download or export the model again") from error


def _quiet() -> None:
    """No bars for loading weights: a tiny model draws five of them in a tenth of a second."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


INDEXED = {"Processor": ["transformers", "Qwen2VLProcessor"]}
"""What an index calls classes of weft's own, so that diffusers opens the folder."""


def save_folder(
    parts: dict[str, Any],
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    pipeline: str = "StableDiffusion3Pipeline",
    optional: Sequence[str] = (*SD3_OPTIONAL, "image_encoder", "feature_extractor"),
) -> Path:
    """Write `parts` as a diffusers folder with `model_index.json`; floating-point weights as `dtype` if given.

    The index declares the class `pipeline` and names the `optional` parts even where they are missing.

    Everything is written beside `folder` first and moved when complete, so a full disk loses nothing.
    """
    from diffusers import __version__

    _quiet()
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            keys = dict(part.named_parameters())
            if any("lora_" in key for key in keys):
                raise WeftError(f"{name} carries a LoRA; merge it or take it off before saving the model")
            if any(value.is_meta for value in keys.values()):
                raise WeftError(f"{name} is offloaded; load the model with offload='none' to save it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": __version__}
    for name in optional:
        index[name] = [None, None]
    try:
        for name, part in parts.items():
            if part is None:
                continue
            _save_part(part, draft / name, dtype)
            index[name] = INDEXED.get(type(part).__name__, [type(part).__module__.split(".")[0], type(part).__name__])
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (draft / "model_index.json").write_text(text, encoding="utf-8")
        if not folder.exists():
            draft.rename(folder)
            return folder
        for new in sorted(draft.iterdir(), key=lambda path: path.name == "model_index.json"):
            old = folder / new.name
            if old.is_dir():
                old.rename(draft / f".old-{new.name}")
            new.replace(old)
    except OSError as error:
        raise WeftError(f"{folder}: cannot be written ({_line(error)}); check space and rights") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _save_part(part: Any, path: Path, dtype: torch.dtype | None) -> None:
    part.save_pretrained(path)
    config = path / "config.json"
    if config.is_file():  # where the part was loaded from is this machine's own affair
        facts = json.loads(config.read_text(encoding="utf-8"))
        if facts.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if dtype is None or not isinstance(part, nn.Module):
        return
    import safetensors.torch

    for file in path.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
