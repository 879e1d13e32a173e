"""Open a model: a zoo name, a folder in diffusers layout, or a hub id."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import weft
from weft.errors import WeftError
from weft.models.image.sd3_kontext import UniPic2Kontext
from weft.models.weights import SD3_OPTIONAL, SD3_PARTS, licence_note, load_lora, load_sd3_parts, read_index

SD3_PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3KontextPipeline")
OFFLOAD_ORDER = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    name_or_folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    lora: Sequence[str | tuple[str, float]] = (),
    attention_backend: str | None = None,
    tiling: bool = False,
    slicing: bool = False,
    offload: str = "none",
    quantization: str | dict[str, str] | None = None,
    resolution: int | None = None,
) -> UniPic2Kontext:
    """The model in a zoo entry, a folder in diffusers layout, or a hub repository (needs a network).

    `device`: None takes CUDA, then MPS, then the CPU. `dtype`: None is fp32 on the CPU and bf16 elsewhere.
    `lora`: "path" or "path:0.8", or pairs; they add up. `attention_backend`: a name of diffusers'
    `set_attention_backend`, for the transformer. `tiling`, `slicing`: of the VAE. `offload`: "none", "model" (one
    network at a time on the device) or "sequential" (one layer at a time), by accelerate. `quantization`: "4bit"
    (NF4) or "8bit" for transformer and T5, or a dict of part name to one of them, by bitsandbytes (extra `quant`).
    `resolution`: longer edge in pixels of pictures whose record names no size.
    Raises WeftError if the model is unknown or broken, or an option cannot be honoured here.
    """
    folder = find_model(str(name_or_folder))
    target = _device(device)
    kind = _dtype(dtype, target)
    if offload not in ("none", "model", "sequential"):
        raise WeftError(f"offload {offload!r} is unknown; choose none, model or sequential")
    if offload != "none" and target.type == "cpu":
        raise WeftError(f"offload={offload!r} needs an accelerator to offload from; here is only the CPU")
    family = _family(folder)
    if family not in SD3_PIPELINES:
        raise WeftError(f"{folder}: model class {family!r} is not supported; supported: {', '.join(SD3_PIPELINES)}")
    configs = quantization_configs(quantization, kind, target)
    parts = load_sd3_parts(folder, dtype=kind, quantization=configs, device_map={"": target} if configs else None)
    model = UniPic2Kontext(
        parts,
        resolution=resolution,
        licence=licence_note(str(name_or_folder)),
        device=target if offload != "none" else None,
    )
    _add_loras(model, lora)
    if attention_backend is not None:
        _set_attention(model, attention_backend)
    if tiling:
        model.vae.enable_tiling()
    if slicing:
        model.vae.enable_slicing()
    if offload == "none":
        for name, module in model.modules().items():
            if name not in configs:  # a quantised part was placed when it was read
                module.to(target)
    else:
        _offload(model, offload, target, skip=set(configs))
    return model


def find_model(name: str) -> Path:
    """The folder of a zoo name, a path or a hub id; WeftError with what is known otherwise."""
    zoo = Path(weft.__file__).parent / "zoo"
    for path in (Path(name), zoo / name):
        if path.is_dir() and name:
            return path
    known = sorted(path.parent.name for path in zoo.glob("*/model_index.json"))
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    if not looks_like_hub:
        raise WeftError(f"no model {name!r}: not a folder and not in the zoo ({', '.join(known) or 'empty'})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Only the parts in safetensors: such repositories also hold single-file and half-precision copies of them.
    parts = ["model_index.json", "weft.json", *[f"{part}/*" for part in SD3_PARTS + SD3_OPTIONAL]]
    try:
        return Path(snapshot_download(name, allow_patterns=parts, ignore_patterns=["*.bin", "*.fp16.*", "*.fp16-*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise WeftError(f"no model {name!r}: no such folder or zoo entry, and the hub answered: {reason}") from error


def _family(folder: Path) -> str:
    """The pipeline class a folder declares; a release without an index is recognised by its transformer."""
    index = read_index(folder)
    if index:
        return str(index.get("_class_name"))
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        raise WeftError(f"{folder}: not a model folder (no model_index.json and no transformer/config.json)")
    name = json.loads(config.read_text(encoding="utf-8")).get("_class_name", "")
    return "StableDiffusion3Pipeline" if str(name).startswith("SD3Transformer2D") else str(name)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise WeftError(f"device {str(device)!r} is unknown; use cpu, cuda, cuda:0 or mps") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise WeftError(f"device {str(device)!r}: no CUDA device here (torch {torch.__version__}); use cpu")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise WeftError("device 'mps': not available here; use cpu")
    return wanted


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise WeftError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def quantization_configs(
    quantization: str | dict[str, str] | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """bitsandbytes configurations by part: diffusers' class for its networks, transformers' for the text encoders."""
    if quantization is None:
        return {}
    both = ("transformer", "text_encoder_3")
    wanted = dict.fromkeys(both, quantization) if isinstance(quantization, str) else quantization
    for part, bits in wanted.items():
        if part not in OFFLOAD_ORDER:
            raise WeftError(f"quantization of {part!r}: no such network; choose from {', '.join(OFFLOAD_ORDER)}")
        if bits not in ("4bit", "8bit"):
            raise WeftError(f"quantization {bits!r} of {part} is unknown; choose 4bit or 8bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise WeftError("quantization needs bitsandbytes; install it with: pip install 'weft[quant]'")
    if device.type == "cpu":
        raise WeftError("quantization needs an accelerator; here is only the CPU")
    from diffusers import BitsAndBytesConfig as DiffusersConfig
    from transformers import BitsAndBytesConfig as TransformersConfig

    configs: dict[str, Any] = {}
    for part, bits in wanted.items():
        make = TransformersConfig if part.startswith("text") else DiffusersConfig
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        configs[part] = make(**four) if bits == "4bit" else make(load_in_8bit=True)
    return configs


def _add_loras(model: UniPic2Kontext, lora: Sequence[str | tuple[str, float]]) -> None:
    names, weights = [], []
    for k, item in enumerate(lora):
        path, weight = item if isinstance(item, tuple) else (item, 1.0)
        head, _, tail = str(path).rpartition(":")
        if not isinstance(item, tuple) and head and not Path(path).exists():
            try:
                path, weight = head, float(tail)
            except ValueError as error:
                raise WeftError(f"LoRA {item!r}: {tail!r} is not a weight; write path or path:0.8") from error
        names.append(f"lora{k}")
        weights.append(float(weight))
        load_lora(model.transformer, Path(path), names[-1])
    if names:
        model.transformer.set_adapters(names, weights)


def _set_attention(model: UniPic2Kontext, backend: str) -> None:
    try:
        model.transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise WeftError(f"attention_backend {backend!r}: {str(error).strip().splitlines()[0]}") from error


def _offload(model: UniPic2Kontext, how: str, device: torch.device, skip: set[str]) -> None:
    """accelerate's hooks, in the order in which a picture passes the networks (as diffusers' pipelines do)."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    hook = None
    modules = model.modules()
    for name in OFFLOAD_ORDER:
        if name not in modules or name in skip:
            continue
        if how == "model":
            modules[name], hook = cpu_offload_with_hook(modules[name], device, prev_module_hook=hook)
        else:
            cpu_offload(modules[name], device, offload_buffers=len(modules[name]._parameters) > 0)
