"""Open a motion model folder: `load(folder)` is what `weft.load_motion` and `weft.models.load.load` call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from weft.errors import WeftError
from weft.models.motion.codec import load_codec
from weft.models.motion.heads import load_head
from weft.models.motion.lm import MotionLM, make_options
from weft.models.weights import read_json


def load(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    lora: Sequence[str | tuple[str, float]] = (),
) -> MotionLM:
    """The model in a folder that `MotionLM.save` (or `weft.models.motion.build`) wrote, or of the zoo, in eval mode.

    `device`: None takes CUDA, then MPS, then the CPU. `dtype` is the transformer's: None is fp32 on the CPU and bf16
    elsewhere; quantiser and head stay fp32. `lora`: adapters of the transformer as `weft.train` exports them
    ("path"); their new token rows and a head trained beside them are taken, too. Raises WeftError for a folder that
    lacks a part or does not fit together.
    """
    from weft.models.load import find_model, pick_device, pick_dtype
    from weft.models.lora import split_weight

    folder = find_model(str(folder))
    target = pick_device(device)
    card = read_json(folder / "weft.json")
    if "tokens" not in card:
        raise WeftError(f"{folder}: weft.json has no 'tokens': not a motion model; see weft.models.motion.build")
    codec = load_codec(folder, device=target)
    head = load_head(folder / "heads").to(target).eval() if (folder / "heads").is_dir() else None
    model = MotionLM(
        codec, load_tokenizer(folder), load_transformer(folder, pick_dtype(dtype, target)).to(target),
        make_options(card["tokens"]), head,
    )  # fmt: skip
    if len(lora) > 1:
        raise WeftError(f"lora: {len(lora)} adapters; a motion model takes one")
    for item in lora:
        path, weight = split_weight(item)
        add_adapter(model, path, weight)
    return model


def load_tokenizer(folder: Path):  # type: ignore[no-untyped-def]
    """The extended tokenizer."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer").is_dir():
        raise WeftError(f"{folder}: no folder 'tokenizer'; export the model again")
    try:
        return AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise WeftError(f"{folder}/tokenizer: cannot be read ({str(error).splitlines()[0][:200]})") from error


def load_transformer(folder: Path, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """The causal LM in eval mode."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    path = folder / "transformer"
    if not path.is_dir():
        raise WeftError(f"{folder}: no folder 'transformer'; export the model again")
    logging.disable_progress_bar()
    try:
        found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        return found.eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeftError(f"{path}: cannot be read ({str(error).splitlines()[0][:200]})") from error


def add_adapter(model: MotionLM, path: Path, weight: float) -> None:
    """Put an exported LoRA (with its token rows and head) on the model, at its own strength.

    Raises WeftError for another weight than 1 (token rows have no strength) or an adapter of another model.
    """
    from weft.models.adapt import load_adapter, load_whole

    if weight != 1:
        raise WeftError(f"lora {path}: weight {weight:g}; the new token rows have no strength, so it must be 1")
    load_adapter(model.transformer, "transformer", path)
    if model.head is not None:
        load_whole(model.head, "heads", path)
