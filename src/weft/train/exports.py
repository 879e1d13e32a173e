"""The trained model in a folder of its own, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from weft.errors import WeftError
from weft.models.adapt import save_lora
from weft.train.config import Recipe
from weft.train.setup import make_trainable
from weft.types import Trainable


def write_export(
    folder: Path, recipe: Recipe, model: Trainable, trained: dict[str, nn.Module], facts: dict[str, Any]
) -> Path:
    """Write `folder`/export: the whole model with its trained modules as they are (LoRA: the adapter file), and
    `facts` as training.json. An older export is replaced. Returns its folder. Raises WeftError on a full disk."""
    final = folder / "export"
    temporary = folder / f".export-{os.getpid()}"
    try:
        if recipe.model.lora is not None:
            save_lora(trained, temporary)
        elif recipe.cache is not None and recipe.cache.drop_encoders:
            whole = make_trainable(recipe, torch.device("cpu"))
            for name, module in trained.items():
                whole.modules()[name].load_state_dict(module.state_dict())
            whole.save(temporary)
        else:
            model.save(temporary)
        (temporary / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WeftError(f"could not write {final}: {error}; the checkpoints are intact, make room") from error
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    return final
