"""Reading LoRAs as they are published: diffusers' and peft's files, other trainers', DreamOmni2's two folders."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.errors import WeftError
from weft.models.adapt import load_whole
from weft.models.routing import ROUTES
from weft.models.weights import _guard, from_hub, is_hub_id

logger = logging.getLogger("weft")

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""diffusers' and peft's names of a LoRA's weights: what is read where a folder holds other files, too."""
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
"""What stands before a layer's name: peft's, diffusers', ComfyUI's."""
HALVES = (
    (".lora_down.", ".lora_A."),
    (".lora_up.", ".lora_B."),
    (".lora.down.", ".lora_A."),
    (".lora.up.", ".lora_B."),
    (".default.weight", ".weight"),
)
"""Other names of a LoRA's two halves, and the adapter's name that peft leaves out of its files."""
CONVERTERS = {
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
}
"""diffusers' classes that know other trainers' keys for a transformer."""


def load_lora(transformer: Any, path: Path, name: str, beside: Sequence[str] = ()) -> None:
    """Add a LoRA (a safetensors file, or a folder with one) as adapter `name`, at the strength of its file.

    diffusers' and peft's layouts, those of other trainers as far as diffusers converts them for this transformer, and
    a training checkpoint of Edit-R1 (its `lora` inside). How strongly it then acts is set by
    `transformer.set_adapters(names, weights)`. Weights for text encoders are left out, with a warning. Weights of the
    parts `beside` are not the transformer's, and left to the caller. Raises WeftError if there is no such file, it was
    made for another transformer, or holds more than a LoRA.
    """
    import safetensors.torch

    file = lora_file(path)
    found = _guard(file, lambda: safetensors.torch.load_file(file))
    found = {key: value for key, value in found.items() if key.partition(".")[0] not in beside}
    state = _plain(found)
    layers = {layer for layer, _ in transformer.named_modules()}
    if not any(key.partition(".lora_")[0] in layers for key in state):
        state = _plain(_convert(transformer, found, file))
    texts = [key for key in state if key.startswith(("text_encoder", "lora_te"))]
    if texts:
        logger.warning("%s: its %d weights for text encoders are left out", file, len(texts))
    state = _at_strength({key: value for key, value in state.items() if key not in texts}, file)
    if not any(".lora_" in key for key in state):
        raise WeftError(f"{file}: no LoRA weights for the transformer in it")
    other = [key for key in state if ".lora_" not in key]
    if other:
        raise WeftError(f"{file}: {len(other)} of its weights are no LoRA of the transformer, the first is {other[0]}")
    state = {f"transformer.{key}": value for key, value in state.items()}
    _check_base(transformer, state, file)
    metadata = _lora_config(file)
    load = partial(transformer.load_lora_adapter, state, prefix="transformer", adapter_name=name, metadata=metadata)
    with warnings.catch_warnings():  # peft warns about a second adapter, which is what is asked for here
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        _guard(file, load)


def lora_file(path: Path) -> Path:
    """The safetensors file of a LoRA: `path` itself, or the one in that folder. Raises WeftError if there is none."""
    if not path.is_dir():
        if not path.is_file():
            raise WeftError(f"no LoRA at {path}; give a .safetensors file or a folder with one")
        return path
    files: list[Path] = []
    for folder in (path, path / "lora"):
        named = [folder / name for name in FILES if (folder / name).is_file()]
        files = files or named or sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise WeftError(f"{path}: a LoRA folder must hold exactly one *.safetensors file, found {len(files)}")
    return files[0]


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys as LAYER.lora_A.weight, LAYER.lora_B.weight and LAYER.alpha, whichever way their file puts it."""
    out = {}
    for key, value in state.items():
        for prefix in PREFIXES:
            key = key.removeprefix(prefix)
        for theirs, ours in HALVES:
            key = key.replace(theirs, ours)
        out[key] = value
    return out


def _convert(transformer: Any, state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """What diffusers makes of another trainer's keys, alphas included."""
    import diffusers.loaders

    name = CONVERTERS.get(type(transformer).__name__)
    if name is None:
        return state
    converter: Any = getattr(diffusers.loaders, name)
    if name != "FluxLoraLoaderMixin":
        return _guard(file, lambda: converter.lora_state_dict(dict(state)))
    found, alphas = _guard(file, lambda: converter.lora_state_dict(dict(state), return_alphas=True))
    return found | (alphas or {})


def _at_strength(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Without the alphas: LAYER.lora_B in fp32 times alpha / rank. Raises WeftError if another place says the alpha,
    too."""
    alphas = {key: value for key, value in state.items() if key.endswith(".alpha")}
    if alphas and _lora_config(file) is not None:
        raise WeftError(f"{file}: holds alphas, and its configuration another: take one of them out")
    out = {key: value for key, value in state.items() if key not in alphas}
    for key, alpha in alphas.items():
        layer = key.removesuffix(".alpha")
        if (down := out.get(f"{layer}.lora_A.weight")) is not None:
            for up in (f"{layer}.lora_B.weight", f"{layer}.lora_B.bias"):
                if up in out:
                    out[up] = out[up].float() * (float(alpha) / down.shape[0])
    return out


def _check_base(transformer: Any, state: dict[str, Tensor], file: Path) -> None:
    """Raises WeftError if a LoRA was made for another transformer."""
    layers = dict(transformer.named_modules())
    for key, value in state.items():
        name, _, half = key.removeprefix("transformer.").partition(".lora_")
        if half not in ("A.weight", "B.weight") or value.ndim != 2:
            continue
        layer = layers.get(name)
        if layer is None:
            raise WeftError(f"{file}: made for another base model: here is no layer {name}")
        layer = getattr(layer, "base_layer", layer)
        width = getattr(layer, "in_features" if half == "A.weight" else "out_features", None)
        own = value.shape[1 if half == "A.weight" else 0]
        if width is not None and own != width:
            raise WeftError(f"{file}: made for another base model: {name} is {own} wide there, {width} here")


ADAPTERS = {
    "edit": ("edit_lora", "DreamOmni2-7.6B-Edit-Lora.safetensors"),
    "generation": ("gen_lora", "DreamOmni2-7.6B-Gen-Lora.safetensors"),
}
"""Where the two adapters of DreamOmni2 lie in its release, and their names as single files."""
ADAPTER_FILES = tuple(place if "." in place else f"{place}/*" for places in ADAPTERS.values() for place in places)
"""What to fetch of a hub repository for them."""


def adapters_folder(name: str | Path) -> Path:
    """A folder with adapters, or that of a hub repository. Raises WeftError if it is neither."""
    if Path(name).exists() or not is_hub_id(str(name)):
        return Path(name)
    return from_hub(str(name), f"adapters {str(name)!r}: no such folder", ADAPTER_FILES)


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapters `edit` and `generation` in a folder of DreamOmni2's layout, or of single files; those it has."""
    found = {}
    for name, places in ADAPTERS.items():
        for path in (folder / place for place in places):
            if path.is_file() or (path.is_dir() and list(path.glob("*.safetensors"))):
                found[name] = path
                break
    return found


def _lora_config(file: Path) -> dict[str, Any] | None:
    """Rank and alpha of a LoRA: from the file's own header (diffusers) or the adapter_config.json beside it (peft)."""
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        header = (handle.metadata() or {}).get("lora_adapter_metadata")
    if header:
        config = {key.removeprefix("transformer."): value for key, value in json.loads(header).items()}
    elif file.with_name("adapter_config.json").is_file():
        config = json.loads(file.with_name("adapter_config.json").read_text(encoding="utf-8"))
    else:
        return None
    known = "r lora_alpha target_modules rank_pattern alpha_pattern use_rslora use_dora lora_bias".split()
    return {f"transformer.{key}": config[key] for key in known if config.get(key) is not None}


def add_adapters(model: Any, adapters: str | Path | Mapping[str, str] | None, folder: Path) -> None:
    """Load the routed adapters and hand them to the model's router."""
    if adapters is None:
        found = {name: str(path) for name, path in find_adapters(folder).items()}
        if not found:
            return
    elif isinstance(adapters, Mapping):
        found = dict(adapters)
    else:
        found = {name: str(path) for name, path in find_adapters(adapters_folder(adapters)).items()}
        if not found:
            raise WeftError(f"adapters: {adapters} has no edit_lora or gen_lora folder, nor DreamOmni2's single files")
    if not hasattr(model, "route"):
        raise WeftError(f"adapters: {model.name} does not switch adapters by request; use lora for ones always on")
    for name, item in found.items():
        if name not in ROUTES:
            raise WeftError(f"adapters: {name!r} is unknown; name them {' and '.join(ROUTES)}")
        path, weight = split_weight(item)
        load_lora(model.transformer, path, name)
        for module in model.transformer.modules():
            if weight != 1 and name in getattr(module, "lora_A", ()):
                module.set_scale(name, weight)
    model.route(list(found))


def split_weight(item: str | tuple[str, float]) -> tuple[Path, float]:
    """Path and weight of "path", "path:0.8" or a pair. Raises WeftError for a weight that is no finite number."""
    if isinstance(item, tuple):
        head, tail = map(str, item)
    else:
        head, _, tail = str(item).rpartition(":")
        if not head or Path(item).exists():
            return Path(item), 1.0
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise WeftError(f"LoRA {item!r}: {tail!r} is not a weight; write path or path:0.8")
    return Path(head), weight


def add_loras(model: Any, lora: Sequence[str | tuple[str, float]]) -> None:
    """Load LoRAs that are always on; they add up. A part that was trained whole beside one comes with it."""
    names, weights = [], []
    for k, item in enumerate(lora):
        path, weight = split_weight(item)
        names.append(f"lora{k}")
        weights.append(weight)
        load_lora(model.transformer, path, names[-1], model.whole)
        _bring(model, lora_file(path), weight)
    if names:
        model.transformer.set_adapters(names, weights)


def _bring(model: Any, file: Path, weight: float) -> None:
    """Replace the parts that were trained whole beside a LoRA. Raises WeftError for what cannot be added up."""
    for part in model.whole:
        if load_whole(model.modules()[part], part, file):
            if weight != 1:
                raise WeftError(f"{file}: weight {weight:g}; its {part} was trained whole and has no strength: give 1")
            if part in model.brought:
                raise WeftError(f"{file}: another LoRA has brought a {part} already; give one of the two")
            model.brought.append(part)


def lora_names(adapters: str | Path | Mapping[str, str] | None, lora: Sequence[str | tuple[str, float]]) -> list[Path]:
    """Where the adapters and LoRAs of a model come from."""
    routed = list(adapters.values()) if isinstance(adapters, Mapping) else [] if adapters is None else [str(adapters)]
    return [split_weight(item)[0] for item in (*routed, *lora)]
