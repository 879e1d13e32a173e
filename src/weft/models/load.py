"""Open a model: a zoo name, a folder in diffusers layout, or a hub id."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import weft
from weft.errors import WeftError
from weft.models.image.flux_kontext import FluxKontext, FluxOptions
from weft.models.image.metaquery import MetaQueryOptions, UniPic2MetaQuery
from weft.models.image.qwen_image_edit import QwenFirstOptions, QwenImageEdit, QwenImageEditFirst, QwenOptions
from weft.models.image.sd3_kontext import UniPic2Kontext
from weft.models.lora import add_adapters, add_loras, find_adapters, lora_names
from weft.models.memory import preset_for
from weft.models.weights import (
    FLUX,
    QWEN_EDIT,
    SD3,
    Parts,
    from_hub,
    is_hub_id,
    licence_notes,
    load_parts,
    read_index,
    read_json,
)
from weft.models.weights import METAQUERY as METAQUERY_PARTS


@dataclass(frozen=True)
class Family:
    """How a family is opened: its class, the parts of its folder, what `options` it takes, and for the memory the
    parts that a plain `quantization` means and the order in which a picture passes the networks."""

    model: Any  # the subclass of ImageFlow
    parts: Parts
    options: type | None
    quantized: tuple[str, ...]
    order: tuple[str, ...]
    beside: Callable[..., dict[str, Any]] | None = None
    """Reads parts that lie elsewhere: (folder, options, dtype, quantization, device_map) -> parts."""


def _vlm_parts(
    folder: Path, options: Any, dtype: torch.dtype, configs: Mapping[str, Any], place: Any
) -> dict[str, Any]:
    from weft.models.image.metaquery_parts import vlm_parts

    return vlm_parts(folder, options, dtype, configs.get("vlm"), place)


UNIPIC2 = Family(
    UniPic2Kontext,
    SD3,
    None,
    ("transformer", "text_encoder_3"),
    ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"),
)
KONTEXT = Family(
    FluxKontext,
    FLUX,
    FluxOptions,
    ("transformer", "text_encoder_2"),
    ("text_encoder", "text_encoder_2", "transformer", "vae"),
)
METAQUERY = Family(
    UniPic2MetaQuery,
    METAQUERY_PARTS,
    MetaQueryOptions,
    ("transformer", "vlm"),
    ("vlm", "conditioner", "transformer", "vae"),
    _vlm_parts,
)
QWEN = Family(
    QwenImageEdit,
    QWEN_EDIT,
    QwenOptions,
    ("transformer", "text_encoder"),
    ("text_encoder", "transformer", "vae"),
)
FAMILIES = {
    "StableDiffusion3Pipeline": UNIPIC2,
    "StableDiffusion3KontextPipeline": UNIPIC2,
    "FluxKontextPipeline": KONTEXT,
    "DreamOmni2Pipeline": KONTEXT,
    "UniPic2MetaQueryPipeline": METAQUERY,
    "QwenImageEditPlusPipeline": QWEN,
    "QwenImageEditPipeline": dataclasses.replace(QWEN, model=QwenImageEditFirst, options=QwenFirstOptions),
}
"""Families by the pipeline class that a folder's index declares."""
MOTION = ("OmniMoGenPipeline",)
"""The same for models of movement: see `weft.models.motion.lm`."""
TRANSFORMERS = {"SD3Transformer2D": "StableDiffusion3Pipeline", "FluxTransformer2D": "FluxKontextPipeline"}
"""The same by the beginning of the transformer's class, for releases without an index."""
INNER = "UniPic2-Metaquery"
"""Where Skywork/UniPic2-Metaquery-Flash keeps its parts."""
HALF_COPIES = ("*.bin", "*.fp16.*", "*.fp16-*")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    name_or_folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    lora: Sequence[str | tuple[str, float]] = (),
    adapters: str | Path | Mapping[str, str] | None = None,
    attention_backend: str | None = None,
    tiling: bool = False,
    slicing: bool = False,
    offload: str = "none",
    quantization: str | dict[str, str] | None = None,
    resolution: int | None = None,
    options: Mapping[str, Any] | None = None,
    vram: int | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> Any:
    """The model in a zoo entry, a folder in diffusers layout, or a hub repository (needs a network).

    Its family is the one that `model_index.json` declares (`FAMILIES`); it is a `weft.types.FlowModel`.

    `device`: None takes CUDA, then MPS, then the CPU. `dtype`: None is fp32 on the CPU and bf16 elsewhere.
    `lora`: "path" or "path:0.8", or pairs; they add up. `adapters`: LoRAs that are switched by the request, as
    {"edit": path, "generation": path} or the folder of a DreamOmni2 release; None takes those in the model's own
    folder. `attention_backend`: a name of diffusers' `set_attention_backend`, for the transformer. `tiling`, `slicing`:
    of the VAE. `offload`: "none", "model" (one network at a time on the device) or "sequential" (one layer at a time),
    by accelerate. `quantization`: "4bit" (NF4) or "8bit" for the largest parts, or a dict of part name to one of them,
    by bitsandbytes (extra `quant`). `resolution`: size in pixels, by the family's rule, of pictures whose record names
    none. `vram`: offload, quantization, tiling and slicing as a GPU of 16, 24, 48 or 80 GiB needs them
    (`weft.models.memory.preset`). `files`: weights of a network that lie in one file, in their authors' layout or
    diffusers', as {"transformer": "flux1-kontext-dev.safetensors"}; the rest is the folder's. `options`: the family's
    own, e.g. those of `weft.models.image.flux_kontext.FluxOptions`; they and the resolution have their defaults in the
    folder's `weft.json`.
    Raises WeftError if the model is unknown or broken, or an option cannot be honoured here.
    """
    folder = find_model(str(name_or_folder))
    if makes_motion(folder):
        given = {"adapters": adapters, "attention_backend": attention_backend, "quantization": quantization,
                 "resolution": resolution, "options": options, "vram": vram, "files": files or None,
                 "tiling": tiling or None,
                 "slicing": slicing or None, "offload": None if offload == "none" else offload}  # fmt: skip
        for option, value in given.items():
            if value is not None:
                raise WeftError(f"{option}: {name_or_folder} makes movements and has no such option; leave it out")
        from weft.models.motion.load import load as load_motion

        return load_motion(folder, device=device, dtype=dtype, lora=lora)
    target = pick_device(device)
    kind = pick_dtype(dtype, target)
    if vram is not None:
        if offload != "none" or quantization is not None:
            raise WeftError("vram chooses offload and quantization: leave these out, or leave out vram")
        found = preset_for(folder, vram, options, files)
        offload, quantization = found.offload, found.quantization
        tiling, slicing = tiling or found.tiling, slicing or found.slicing
    if offload not in ("none", "model", "sequential"):
        raise WeftError(f"offload {offload!r} is unknown; choose none, model or sequential")
    if offload != "none" and target.type == "cpu":
        raise WeftError(f"offload={offload!r} needs an accelerator to offload from; here is only the CPU")
    family = family_of(folder)
    card = read_json(folder / "weft.json")
    wanted = make_options(family, {**card.get("options", {}), **(options or {})})
    configs = quantization_configs(quantization, kind, target, family)
    place = {"": target} if configs else None
    parts = load_parts(folder, family.parts, dtype=kind, quantization=configs, device_map=place, files=files)
    if family.beside is not None:
        parts |= family.beside(folder, wanted, kind, configs, place)
    arguments: dict[str, Any] = {} if wanted is None else {"options": wanted}
    model: Any = family.model(
        parts,
        resolution=card.get("resolution") if resolution is None else resolution,
        licence=licence_notes([name_or_folder, getattr(wanted, "vlm", ""), *lora_names(adapters, lora)]),
        device=target if offload != "none" else None,
        **arguments,
    )
    model.card = {key: value for key, value in card.items() if key != "parts"}  # a saved model has all of its own
    add_adapters(model, adapters, folder)
    add_loras(model, lora)
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
        _offload(model, offload, target, family.order, skip=set(configs))
    return model


def makes_motion(folder: Path) -> bool:
    """Whether a model folder is of a model of movement."""
    return (folder / "model_index.json").is_file() and read_index(folder).get("_class_name") in MOTION


def family_of(folder: Path) -> Family:
    """The family of a model folder. Raises WeftError if it is of none."""
    declared = _declared(folder)
    if declared not in FAMILIES:
        raise WeftError(f"{folder}: model class {declared!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[declared]


def make_options(family: Family, given: Mapping[str, Any]) -> Any:
    """The family's options object, None if it has none. Raises WeftError for an unknown name or a wrong type."""
    if family.options is None:
        if given:
            raise WeftError(f"options: {family.model.name} takes none, found {', '.join(given)}")
        return None
    defaults = {field.name: field.default for field in dataclasses.fields(family.options)}
    for key, value in given.items():
        if key not in defaults:
            raise WeftError(f"options: {family.model.name} has no {key!r}; it has {', '.join(defaults)}")
        default = defaults[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = number if isinstance(default, float) else isinstance(value, type(default))
        if not (fits or default is None and (value is None or number)):
            raise WeftError(f"options.{key}: {value!r} is not of the type of its default {default!r}")
    return family.options(**given)


def find_model(name: str) -> Path:
    """The folder of a zoo name, a path or a hub id; WeftError with what is known otherwise."""
    zoo = Path(weft.__file__).parent / "zoo"
    for path in (Path(name), zoo / name):
        if path.is_dir() and name:
            return _inner(path)
    known = sorted(path.parent.name for path in zoo.glob("*/model_index.json"))
    if not is_hub_id(name):
        raise WeftError(f"no model {name!r}: not a folder and not in the zoo ({', '.join(known) or 'empty'})")
    # Only the parts in safetensors: such repositories also hold single-file and half-precision copies of them.
    known_parts = {part for family in FAMILIES.values() for part in (*family.parts.networks, *family.parts.readers)}
    parts = ["model_index.json", "weft.json", *[f"{part}/*" for part in sorted(known_parts)]]
    parts += [f"{INNER}/{pattern}" for pattern in parts]
    return _inner(from_hub(name, f"no model {name!r}: no such folder or zoo entry", parts, HALF_COPIES))


def _inner(folder: Path) -> Path:
    """The folder itself, or the one that a release keeps its parts in."""
    return folder / INNER if (folder / INNER / "transformer" / "config.json").is_file() else folder


def _declared(folder: Path) -> str:
    """The pipeline class a folder declares; a release without an index is recognised by its transformer."""
    index = read_index(folder)
    if (folder / "conditioner" / "config.json").is_file():  # diffusers knows no class for the whole
        return "UniPic2MetaQueryPipeline"
    if index:
        return str(index.get("_class_name"))
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        if found := find_adapters(folder):
            raise WeftError(
                f"{folder}: holds adapters ({', '.join(found)}), not a model: load their base, for DreamOmni2 "
                "black-forest-labs/FLUX.1-Kontext-dev, and give this folder as adapters"
            )
        raise WeftError(f"{folder}: not a model folder (no model_index.json and no transformer/config.json)")
    name = str(read_json(config).get("_class_name", ""))
    return next((pipeline for start, pipeline in TRANSFORMERS.items() if name.startswith(start)), name)


def pick_device(device: str | torch.device | None) -> torch.device:
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


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise WeftError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def quantization_configs(
    quantization: str | dict[str, str] | None, dtype: torch.dtype, device: torch.device, family: Family = UNIPIC2
) -> dict[str, Any]:
    """bitsandbytes configurations by part: diffusers' class for its networks, transformers' for the text encoders."""
    if quantization is None:
        return {}
    wanted = dict.fromkeys(family.quantized, quantization) if isinstance(quantization, str) else quantization
    for part, bits in wanted.items():
        if part not in family.order:
            raise WeftError(f"quantization of {part!r}: no such network; choose from {', '.join(family.order)}")
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
        make = TransformersConfig if part.startswith(("text", "vlm")) else DiffusersConfig
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        configs[part] = make(**four) if bits == "4bit" else make(load_in_8bit=True)
    return configs


def _set_attention(model: Any, backend: str) -> None:
    try:
        model.transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise WeftError(f"attention_backend {backend!r}: {str(error).strip().splitlines()[0]}") from error


def _offload(
    model: Any, how: str, device: torch.device, order: Sequence[str] = UNIPIC2.order, skip: Collection[str] = ()
) -> None:
    """accelerate's hooks, in the order in which a picture passes the networks (as diffusers' pipelines do)."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    hook = None
    modules = model.modules()
    for name in order:
        if name not in modules or name in skip:
            continue
        if how == "sequential" and name in model.resident:
            modules[name].to(device)
        elif how == "model":
            modules[name], hook = cpu_offload_with_hook(modules[name], device, prev_module_hook=hook)
        else:
            cpu_offload(modules[name], device, offload_buffers=len(modules[name]._parameters) > 0)
