"""What a vision language model of the Qwen2.5-VL class reads: tokens and picture patches, without torchvision.

transformers' own processor for these models also loads a video processor, which needs torchvision. This one composes
the tokenizer, the Pillow image processor and the chat template of a model folder, and is used everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from weft.errors import WeftError

if TYPE_CHECKING:
    from PIL import Image

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
"""What stands for a picture in the text; `image_pad` is repeated once per token of the picture."""
IMAGE_PAD = "<|image_pad|>"


@dataclass(slots=True)
class Prompt:
    """One text with its pictures, ready for the model.

    `ids` [L]; `pixels` [P, D] patches of all pictures in order (None without any); `grids` [n, 3] (frames, rows,
    columns) of patches of each picture, whose `merge`^2-th part are its tokens.
    """

    ids: Tensor
    pixels: Tensor | None
    grids: Tensor


class Processor:
    """Tokenizer, Pillow image processor and chat template of a Qwen2.5-VL-class model folder."""

    def __init__(self, tokenizer: Any, images: Any, template: str | None = None) -> None:
        self.tokenizer, self.images = tokenizer, images
        self.template = template or tokenizer.chat_template
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        if self.image_id is None or self.image_id == tokenizer.unk_token_id:
            raise WeftError(f"the tokenizer has no token {IMAGE_PAD}: this is not a Qwen2.5-VL-class model")
        self.merge: int = images.merge_size
        self.patch: int = images.patch_size

    @classmethod
    def load(cls, folder: str | Path) -> Processor:
        """Of a folder with tokenizer files and preprocessor_config.json. Raises WeftError naming what is missing."""
        from transformers import AutoImageProcessor, AutoTokenizer

        folder = Path(folder)
        if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
            raise WeftError(f"{folder}: no preprocessor_config.json; give the folder of a Qwen2.5-VL-class model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            images = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WeftError(f"{folder}: tokenizer or image processor cannot be read ({line})") from error
        template = tokenizer.chat_template
        file = folder / "chat_template.json"  # where older folders keep it
        if template is None and file.is_file():
            template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        return cls(tokenizer, images, template)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer, image processor and template as transformers reads them."""
        self.tokenizer.chat_template = self.template
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)

    from_pretrained = load  # as the other readers of a model's parts are called
    save_pretrained = save

    def chat(self, turns: Sequence[dict[str, Any]], *, answer: bool = True) -> str:
        """The text of a conversation by the model's template; with `answer`, up to where the assistant begins.

        A turn is {"role", "content"}; content a text or a list of {"type": "image"} and {"type": "text", "text"}.
        """
        if not self.template:
            raise WeftError("the model folder has no chat template; add chat_template.jinja")
        return self.tokenizer.apply_chat_template(
            list(turns), chat_template=self.template, tokenize=False, add_generation_prompt=answer
        )

    def encode(self, text: str, pictures: Sequence[Image.Image] = (), areas: tuple[int, int] | None = None) -> Prompt:
        """Tokens of a text that holds `PICTURE` once for each picture.

        `areas` (smallest, largest) number of pixels that a picture is resized to (bicubic, edges multiples of
        patch x merge); None takes the folder's. Raises WeftError if text and pictures do not match.
        """
        grids, pixels = torch.zeros(0, 3, dtype=torch.long), None
        if pictures:
            # each at its own size: the processor takes a list, but one picture at a time keeps the memory small
            size = None if areas is None else {"shortest_edge": int(areas[0]), "longest_edge": int(areas[1])}
            done = [self._patches(picture, size) for picture in pictures]
            pixels = torch.cat([patches for patches, _ in done])
            grids = torch.cat([grid for _, grid in done])
        pieces = text.split(IMAGE_PAD)
        if len(pieces) != len(pictures) + 1:
            raise WeftError(
                f"{len(pictures)} pictures, but the text has {len(pieces) - 1} places for them ({IMAGE_PAD})"
            )
        counts = [int(grid.prod()) // self.merge**2 for grid in grids]
        whole = pieces[0] + "".join(IMAGE_PAD * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
        ids = self.tokenizer(whole, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        return Prompt(ids, pixels, grids)

    def _patches(self, picture: Image.Image, size: dict[str, int] | None) -> tuple[Tensor, Tensor]:
        options = {} if size is None else {"size": size}
        try:
            out = self.images(images=[picture], return_tensors="pt", **options)
        except ValueError as error:
            raise WeftError(
                f"a picture of {picture.width}x{picture.height} cannot be read by the VLM: {error}"
            ) from error
        return out["pixel_values"], out["image_grid_thw"].long()

    def batch(self, prompts: Sequence[Prompt], side: Literal["left", "right"] = "left") -> dict[str, Tensor]:
        """The model's arguments for several prompts: padded on the left to generate, on the right to train."""
        longest = max(len(prompt.ids) for prompt in prompts)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            n = len(prompt.ids)
            place = slice(longest - n, longest) if side == "left" else slice(0, n)
            ids[row, place], mask[row, place] = prompt.ids, 1
        out = {"input_ids": ids, "attention_mask": mask}
        pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
        if pixels:
            out |= {
                "pixel_values": torch.cat(pixels),
                "image_grid_thw": torch.cat([prompt.grids for prompt in prompts]),
                "mm_token_type_ids": (ids == self.image_id).int(),
            }
        return out

    def decode(self, ids: Tensor) -> list[str]:
        """Texts of generated ids [B, L] without special tokens."""
        return [str(t) for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
