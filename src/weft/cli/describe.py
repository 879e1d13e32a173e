"""`weft describe`: what a vision-language model says about pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from weft.cli.options import QUIET, Text, check_file
from weft.errors import WeftError

QUESTION = "Describe the picture."


@dataclass(kw_only=True)
class Describe:
    """Ask a vision-language model about a picture, or about several (--also). A MetaQuery model answers with the VLM
    that it reads with, whose weights it does not change."""

    picture: Positional[Path]
    """The picture."""
    question: Annotated[Positional[str], QUIET] = QUESTION
    """What is asked; default: "Describe the picture."."""
    also: Annotated[list[Path], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = field(default_factory=list)
    """A further picture; can be repeated."""
    vlm: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")]
    """A Qwen2.5-VL-class folder or hub id, a MetaQuery model, or the address of an OpenAI-compatible server."""
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
        from weft.models.rewriter import open_vlm
        from weft.record import Turn, image_part, text_part
        from weft.vlm.ask import Ask

        pictures = [self.picture, *self.also]
        for path in pictures:
            check_file(path, "picture")
        if not self.question.strip():
            raise WeftError("the question is empty; leave it out for a description")
        parts = [image_part(path.absolute()) for path in pictures]
        vlm = open_vlm(self.vlm, model=self.vlm_model, key_env=self.key_env, device=self.device, dtype=self.dtype)
        (reply,) = vlm.ask([[Turn("user", [*parts, text_part(self.question)])]], Ask(max_tokens=self.max_tokens))
        if reply.error is not None:
            raise WeftError(f"{self.vlm} did not answer: {reply.error}")
        print(reply.text.strip())
        return 0
