"""`weft export`: weights for other tools."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from weft.cli.options import Text, parse_option


@dataclass(kw_only=True)
class Export:
    """Write a model with its LoRAs merged as a folder in the layout of its kind, or one LoRA, its strength folded in,
    as diffusers (a VLM's: peft) reads it. The result is opened again and compared with the original."""

    model: Positional[str]
    """A model of the zoo, of pictures or movements, a folder in diffusers layout, a VLM's folder, or a hub id."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write; it must not exist."""
    lora: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH[:SCALE]")] = field(
        default_factory=list
    )
    """An adapter and its strength; can be repeated."""
    what: Literal["model", "lora"] = "model"
    """The merged model, or the LoRA alone."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the written weights of a model."""
    device: Text = None
    """cpu, cuda, cuda:1, mps; default: the best that is here."""
    option: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = field(
        default_factory=list
    )
    """An option of the model's family, as vlm=FOLDER; can be repeated."""

    def run(self) -> int:
        from weft.models.export import export

        options = dict(parse_option(text) for text in self.option)
        done = export(
            self.model, self.out, lora=self.lora, what=self.what, dtype=self.dtype, device=self.device, options=options
        )
        print(done.path)
        print(f"opened again: what it answers differs by {done.difference:.2g} of its spread", file=sys.stderr)
        return 0
