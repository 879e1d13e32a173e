"""Qwen-Image-Edit: pictures read by a VLM and by the transformer itself (arXiv 2508.02324); 2509 and 2511 take several.

diffusers' `QwenImageTransformer2DModel` and `AutoencoderKLQwenImage` and transformers' Qwen2.5-VL, unchanged. Every
input picture is shown twice: small to the VLM, whose states of pictures and instruction are the text, and large as
clean latents behind the noisy tokens. Differences to diffusers' `QwenImageEditPlusPipeline`: requests of any number and
size of pictures make one batch; an output has the shape of its source, not of the last picture (`parity`); the VLM
places pictures by rows and columns, as in its training (with transformers 5 the pipeline numbers them flat; `mrope`);
an instruction of any length is read whole. The first release takes one picture, in `QwenImageEditPipeline`'s prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.media import to_rgb
from weft.models import flow
from weft.models.image.attention import patches, unpatches
from weft.models.image.attention_qwen import adopt_qwen, mixed_shapes, mixed_tables
from weft.models.image.packed import PackedFlow
from weft.types import Batch, Condition
from weft.vlm.processor import PICTURE

if TYPE_CHECKING:
    from PIL import Image

BEFORE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
"""What the VLM reads before the request, and whose states are dropped: the prompt the model was trained with."""
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
EMPTY = " "
"""What stands for an empty text: the model's own negative."""
PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class QwenOptions:
    """Choices of a Qwen-Image-Edit model.

    `condition_area`: pixels of a picture as the VLM sees it. `vae_area`: pixels at which inputs are encoded to latents;
    None encodes the source at the output's size and references at the model's resolution. `mrope`: how the VLM counts a
    picture's tokens, by "grid" or "flat". `parity`: output and latents sized as diffusers' pipeline does it.
    `keep_empty`: training examples also hold the states of the empty text beside their pictures, for text dropout.
    """

    condition_area: int = 384 * 384
    vae_area: int | None = None
    mrope: str = "grid"
    parity: bool = False
    keep_empty: bool = False

    def __post_init__(self) -> None:
        if self.mrope not in ("grid", "flat"):
            raise WeftError(f"mrope {self.mrope!r} is unknown; choose grid or flat")
        for name in ("condition_area", "vae_area"):
            area = getattr(self, name)
            if area is not None and area < 32 * 32:
                raise WeftError(f"{name} is {area} pixels; it must be at least {32 * 32}")


@dataclass(frozen=True)
class QwenFirstOptions(QwenOptions):
    """Those of the first Qwen-Image-Edit, whose VLM sees its picture as large as the transformer does."""

    condition_area: int = 1024 * 1024


class QwenImageEdit(PackedFlow):
    """A `weft.types.FlowModel` over the parts of a Qwen-Image-Edit-2509 or -2511 folder; `weft.models.load` builds it.

    `parts`: `transformer`, `vae`, `text_encoder` (Qwen2.5-VL), `processor`, `tokenizer`, `scheduler`. `resolution`
    squared is the area of outputs.
    """

    name = "qwen_image_edit"
    pipeline: ClassVar[str] = "QwenImageEditPlusPipeline"
    several: ClassVar[bool] = True
    """Whether requests may have several pictures, which the prompt then numbers."""
    steps, guidance = 40, 4.0

    def __init__(
        self,
        parts: dict[str, Any],
        *,
        options: QwenOptions | None = None,
        resolution: int | None = None,
        loss_config: flow.FlowLossConfig | None = None,
        device: torch.device | str | None = None,
        licence: str | None = None,
    ) -> None:
        transformer = adopt_qwen(parts["transformer"])
        super().__init__(parts, transformer, loss_config=loss_config, device=device, licence=licence)
        self.options = options or QwenOptions()
        self.processor: Any = parts["processor"]
        patch, downsample = transformer.config.patch_size, 2 ** len(self.vae.config.temperal_downsample)
        self._measure(transformer.config.in_channels // patch**2, patch, downsample, resolution)
        self.factor = 32 if self.resolution >= 256 else self.multiple
        self.skip = len(self.processor.tokenizer(BEFORE, add_special_tokens=False).input_ids)

    def _anchor(self) -> Tensor:
        return self.transformer.txt_norm.weight

    # -- sizes

    def own_size(self, size: flow.Size) -> flow.Size:
        """The picture's own aspect at `vae_area`, or else at the model's resolution."""
        return area_size(size, self.options.vae_area or self.resolution**2, self.factor)

    def output_size(self, inputs: Sequence[flow.Size], aligned: flow.Size | None) -> flow.Size:
        """The source's aspect at the model's resolution (under `parity`, the last picture's)."""
        like = inputs[-1] if self.options.parity and inputs else aligned
        side = self.resolution
        return (side, side) if like is None else area_size(like, side**2, self.factor)

    def asked_size(self, size: flow.Size) -> flow.Size | None:
        """Under `parity`, as the pipeline does, edges rounded down to what latents allow; inputs are then stretched."""
        m = self.multiple
        return (size[0] // m * m, size[1] // m * m) if self.options.parity else None

    def input_sizes(self, inputs: Sequence[flow.Size], source: bool, output: flow.Size) -> list[flow.Size]:
        """The source at the output's size unless `vae_area` or `parity` says otherwise; references at their own."""
        sizes = [self.own_size(size) for size in inputs]
        if source and not self.options.parity and self.options.vae_area is None:
            sizes[0] = output
        return sizes

    # -- encoding

    def encode_text(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """States of instructions without pictures; see `states`."""
        return self.states(texts, [()] * len(texts))

    @torch.no_grad()
    def states(self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> list[dict[str, Tensor]]:
        """For each request `text` [L, C]: the VLM's states of its pictures and instruction, of any length.

        With `keep_empty` also `empty` [L', C], the same of the empty text beside the same pictures.
        """
        asked = [(text, tuple(shown)) for text, shown in zip(texts, pictures, strict=True)]
        if self.options.keep_empty:
            asked += [("", shown) for _, shown in asked]
        keys = [(text, *map(id, shown)) for text, shown in asked]
        unique = dict(zip(keys, asked, strict=True))
        found: list[Tensor] = []
        prompts = [self._prompt(text or EMPTY, shown) for text, shown in unique.values()]
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            found += self._read(prompts[start : start + PROMPTS_AT_ONCE])
        table = dict(zip(unique, found, strict=True))
        out = [{"text": table[key]} for key in keys[: len(texts)]]
        for states, key in zip(out, keys[len(texts) :], strict=False):
            states["empty"] = table[key]
        return out

    def _prompt(self, text: str, pictures: Sequence[Image.Image]) -> Any:
        if len(pictures) > 1 and not self.several:
            raise WeftError(
                f"the first Qwen-Image-Edit takes one picture, the request has {len(pictures)}; use "
                "Qwen-Image-Edit-2509 or -2511"
            )
        shown = []
        for image in pictures:
            size = area_size((image.height, image.width), self.options.condition_area, 32)
            shown.append(flow.stretch(to_rgb(image), size, self.resample))
        before = "".join(f"Picture {k}: {PICTURE}" if self.several else PICTURE for k in range(1, len(shown) + 1))
        return self.processor.encode(BEFORE + before + text + AFTER, shown)

    def _read(self, prompts: Sequence[Any]) -> list[Tensor]:
        """The VLM's last states [L, C] of prompts, without what comes before the request."""
        arguments = self.processor.batch(prompts, side="right")
        if self.options.mrope == "flat":
            arguments.pop("mm_token_type_ids", None)
        encoder = self.parts["text_encoder"]
        arguments = {name: value.to(self.device) for name, value in arguments.items()}
        with torch.autocast(self.device.type, enabled=False):
            # through the whole model, whose forward is what offloading hooks; its logits are not wanted
            out = encoder(**arguments, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        states = out.hidden_states[-1]
        return [row[self.skip : len(prompt.ids)] for row, prompt in zip(states, prompts, strict=True)]

    def with_text(self, conditions: Sequence[Condition], text: str) -> list[Condition]:
        """The same conditions with another text; only of requests without pictures, which the VLM would have to see."""
        if any(c.references for c in conditions):
            raise WeftError("the text states of Qwen-Image-Edit see the pictures; use encode(records, negative=...)")
        return super().with_text(conditions, text)

    def without_text(self, condition: Condition) -> dict[str, Tensor]:
        """The tensors of a condition with the empty text. Raises WeftError if an edit's example does not hold it."""
        if not condition.references:
            return condition.tensors | self.empty_text()
        if "empty" not in condition.tensors:
            raise WeftError(
                "text dropout of edits needs the empty text's states beside the pictures: set the model's option "
                "keep_empty=true, or text_dropout to 0"
            )
        return condition.tensors | {"text": condition.tensors["empty"]}

    def _statistics(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = (torch.tensor(v, device=self.device) for v in (config.latents_mean, config.latents_std))
        return mean[:, None, None], std[:, None, None]

    def _latents(self, pixels: Tensor) -> Tensor:
        mean, std = self._statistics()
        z = self.vae.encode(pixels[:, :, None].to(self.vae.dtype)).latent_dist.mode()[:, :, 0]  # one frame
        return (z.float() - mean) / std

    def _pixels(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        z = (latents * std + mean)[:, :, None].to(self.vae.dtype)
        return self.vae.decode(z, return_dict=False)[0][:, :, 0].float()

    # -- one step

    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        """The batch of one transformer call: `text` padded on the right, its mask, shapes, and `ImageFlow.arrange`."""
        batch = self.arrange_rows(conditions)
        device, layout = self.device, batch["layout"]
        texts = [c.tensors["text"].to(device, self.dtype) for c in conditions]
        batch["text"] = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        longest = batch["text"].shape[1]
        full = bool((lengths == longest).all())
        batch["text_mask"] = None if full else torch.arange(longest, device=device) < lengths[:, None]
        shapes = [
            [(1, *grid) for grid in (target, *grids)]
            for target, grids in zip(batch["targets"], batch["grids"], strict=True)
        ]
        batch["shapes"], batch["own"] = shapes, None
        if layout is not None:
            batch["shapes"] = mixed_shapes(shapes)
            tables = mixed_tables(self.transformer, shapes, longest, device)
            batch["own"] = {"tables": tables, "image_mask": layout.image_mask[:, 0, 0]}
        return batch

    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Velocity [B, C, H, W] in fp32 of x [B, C, H, W] at sigma [B]; zero in the padding. One transformer call."""
        out = self.transformer(
            hidden_states=self.pack(x, batch),
            encoder_hidden_states=batch["text"],
            encoder_hidden_states_mask=batch["text_mask"],
            timestep=self.time(sigma, batch),
            img_shapes=batch["shapes"],
            attention_kwargs=batch["own"],
            return_dict=False,
        )[0]
        return self.unpack(out, x, batch)

    def guide(self, v_neg: Tensor, v_pos: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance that keeps the length of each token's conditional velocity, as in the pipeline."""
        negative, positive = patches(v_neg, self.patch), patches(v_pos, self.patch)
        mixed = negative + guidance * (positive - negative)
        length = mixed.norm(dim=-1, keepdim=True)
        scale = torch.where(length > 0, positive.norm(dim=-1, keepdim=True) / length, 0)  # 0: padding
        grid = (v_pos.shape[2] // self.patch, v_pos.shape[3] // self.patch)
        return unpatches(mixed * scale, grid, self.patch)


class QwenImageEditFirst(QwenImageEdit):
    """The first Qwen-Image-Edit (August 2025): the same networks; one picture, not numbered (diffusers,
    pipeline_qwenimage_edit.py)."""

    pipeline: ClassVar[str] = "QwenImageEditPipeline"
    several = False


def area_size(size: flow.Size, area: int, factor: int) -> flow.Size:
    """The (height, width) of this aspect and about `area` pixels, edges rounded to multiples of `factor`."""
    aspect = size[1] / size[0]
    width = math.sqrt(area * aspect)
    height = width / aspect
    return max(1, round(height / factor)) * factor, max(1, round(width / factor)) * factor
