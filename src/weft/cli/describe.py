"""`weft describe`: what a vision-language model says about pictures, or a motion model about a movement."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from weft.cli.options import QUIET, ModelOptions, Text, check_file, refuse
from weft.errors import WeftError

QUESTION = "Describe the picture."


@dataclass(kw_only=True)
class Describe:
    """Ask about a picture, or about several (--also), with a vision-language model (--vlm); or about a movement, with a
    motion model (--model). A MetaQuery model answers with the VLM that it reads with, whose weights it does not
    change."""

    file: Positional[Path]
    """The picture, or the movement (.bvh, .glb, .npz, .npy, .amc)."""
    question: Annotated[Positional[str | None], QUIET] = None
    """What is asked; default: "Describe the picture." or "Describe the motion."."""
    also: Annotated[list[Path], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = field(default_factory=list)
    """A further picture; can be repeated."""
    model: Text = None
    """The motion model that describes movements; default: tiny-motion. For pictures the same as --vlm."""
    lora: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="PATH")] = field(default_factory=list)
    """Its adapter, as `weft train` exports it."""
    vlm: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|URL", help_behavior_hint="")] = None
    """For pictures: a Qwen2.5-VL-class folder or hub id, a MetaQuery model, or the address of an OpenAI-compatible
    server."""
    vlm_model: Text = None
    """Its name on that server."""
    key_env: Text = None
    """The environment variable with the server's key."""
    device: Text = None
    """cpu, cuda, cuda:1, mps; default: the best that is here."""
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, QUIET] = None
    """Precision of the weights; default: fp32 on the CPU, bf16 on an accelerator."""
    max_tokens: int = 512
    """The longest answer."""

    def run(self) -> int:
        from weft.parts import kind_of

        if self.question is not None and not self.question.strip():
            raise WeftError("the question is empty; leave it out for a description")
        for path in (self.file, *self.also):
            check_file(path, "file")
        print(self._movement() if kind_of(self.file) == "motion" else self._pictures())
        return 0

    def _movement(self) -> str:
        from weft.motion.captions import QUESTION

        refuse(self, ("file", "question", "model", "lora", "device", "dtype"), "for movements")
        loading = ModelOptions(model=self.model, lora=self.lora, device=self.device, dtype=self.dtype)
        return loading.load_motion().describe(self.file, self.question or QUESTION)

    def _pictures(self) -> str:
        from weft.models.rewriter import open_vlm, vlm_licence
        from weft.record import Turn, image_part, text_part
        from weft.vlm.ask import Ask

        where = self.vlm or self.model
        if where is None:
            raise WeftError("pictures need --vlm: a folder, a hub id, or the address of an OpenAI-compatible server")
        allowed = ("file", "question", "also", "vlm", "vlm_model", "key_env", "device", "dtype", "max_tokens")
        if self.vlm is None:
            refuse(self, (*allowed, "model"), "for pictures")
        else:
            refuse(self, allowed, "for pictures with --vlm")
        parts = [image_part(path.absolute()) for path in (self.file, *self.also)]
        vlm = open_vlm(where, model=self.vlm_model, key_env=self.key_env, device=self.device, dtype=self.dtype)
        if licence := vlm_licence(where, self.vlm_model):
            print(f"licence of {where}: {licence}", file=sys.stderr)
        question = text_part(self.question or QUESTION)
        (reply,) = vlm.ask([[Turn("user", [*parts, question])]], Ask(max_tokens=self.max_tokens, top=0))
        if reply.error is not None:
            raise WeftError(f"{where} did not answer: {reply.error}")
        return reply.text.strip()
