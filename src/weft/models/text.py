"""Text encoders as trainables: a CLIP text tower taught by pictures, a T5 encoder taught by paraphrase.

Large models bring theirs; small ones, built by `weft.models.build`, learn them here, each from what its full-size
sibling learned: CLIP by telling which picture belongs to a text (arXiv 2103.00020), T5 by text to text
(arXiv 1910.10683), here from an instruction to its canonical sentence, one fixed wording per meaning.
Both are run exactly as the Stable Diffusion 3 pipeline runs them: padded to the tokenizer's full length, no mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.models.flow import cover
from weft.types import Draw, Example, Loss

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Record

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP, section 2.5: more would make training unstable


def part_folder(path: str | Path, name: str) -> Path:
    """`path/name`, checked to be a part that transformers can load."""
    folder = Path(path) / name
    if not any((folder / file).is_file() for file in ("config.json", "tokenizer_config.json")):
        raise WeftError(f"{path}: has no part {name}; give a model folder in diffusers layout (weft.models.build)")
    return folder


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Ids [B, L] padded or cut to the tokenizer's own length, as the pipeline pads and cuts them."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


class Contrast(nn.Module):
    """The picture side of CLIP, used in training only: a vision transformer on 6 channels and the logit scale.

    The channels are source and target, so that an instruction is matched with the change that it asks for; a
    generation has an empty (grey) source.
    """

    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, projection: int) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=projection,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_channels=6,
            image_size=size,
            patch_size=patch,
        )
        self.tower: Any = CLIPVisionModelWithProjection(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pictures: Tensor) -> Tensor:
        """uint8 [B, 6, H, W] -> unit vectors [B, P]."""
        embeds = self.tower(pixel_values=pictures.float() / 127.5 - 1).image_embeds
        return F.normalize(embeds.float(), dim=-1)


class ClipTrainable:
    """Trains `encoder` (`text_encoder` or `text_encoder_2`) of a model folder against a small vision tower.

    `size` (pixels), `patch`, `width`, `layers`, `heads` shape the tower, which starts from random weights and is
    not saved. The loss of a sample is the mean of both directions' cross-entropies within the batch (CLIP, figure
    3), so a batch cut into micro-batches is not the same loss; equal texts do not count as each other's negatives.
    """

    name = "clip"

    def __init__(
        self,
        path: str | Path,
        *,
        encoder: str = "text_encoder",
        size: int = 64,
        patch: int = 8,
        width: int = 96,
        layers: int = 3,
        heads: int = 4,
    ) -> None:
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        if encoder not in ("text_encoder", "text_encoder_2"):
            raise WeftError(f"encoder is {encoder!r}; it must be text_encoder or text_encoder_2")
        self.encoder_name, self.tokenizer_name = encoder, encoder.replace("text_encoder", "tokenizer")
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(part_folder(path, self.tokenizer_name))
        folder = part_folder(path, encoder)
        self.encoder: Any = CLIPTextModelWithProjection.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
        self.size = size
        self.contrast = Contrast(size, patch, width, layers, heads, self.encoder.config.projection_dim)

    def modules(self) -> dict[str, nn.Module]:
        """The text encoder by its folder's name, and `contrast`, which is needed in training only."""
        return {self.encoder_name: self.encoder, "contrast": self.contrast}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`input_ids` [L] of the instruction and `pictures` uint8 [6, size, size]: source (or grey) and target."""
        ids = token_ids(self.tokenizer, [record.instruction for record in records])
        return [{"input_ids": i, "pictures": self._pictures(record)} for i, record in zip(ids, records, strict=True)]

    def _pictures(self, record: Record) -> Tensor:
        if record.target is None:
            raise WeftError(f"record {record.id!r} has no target picture for its instruction to be matched with")
        source = torch.full((3, self.size, self.size), 128, dtype=torch.uint8)
        if record.source is not None:
            source = self._bytes(record.load(record.source))
        return torch.cat([source, self._bytes(record.load(record.target))])

    def _bytes(self, image: Image.Image) -> Tensor:
        square = cover(image.convert("RGB"), (self.size, self.size))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Symmetric InfoNCE per sample [B]; `top1` is the share of texts whose own picture is nearest in the batch."""
        device = self.contrast.logit_scale.device
        ids = torch.stack([example["input_ids"] for example in examples]).to(device)
        pictures = torch.stack([example["pictures"] for example in examples]).to(device)
        texts = F.normalize(self.encoder(input_ids=ids).text_embeds.float(), dim=-1)
        scale = self.contrast.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
        with torch.autocast(device.type, enabled=False):
            logits = scale * texts @ self.contrast(pictures).T  # [text, picture]
        own = torch.eye(len(ids), dtype=torch.bool, device=device)
        same = (ids[:, None] == ids[None]).all(-1) & ~own
        masked = logits.masked_fill(same, -torch.inf)
        label = torch.arange(len(ids), device=device)
        per_sample = (
            F.cross_entropy(masked, label, reduction="none") + F.cross_entropy(masked.T, label, reduction="none")
        ) / 2
        top1 = float((masked.argmax(1) == label).float().mean())
        return Loss(per_sample, {"top1": top1, "scale": float(scale.detach())})

    def save(self, folder: Path) -> None:
        """Write the text encoder and its tokenizer to their folders."""
        self.encoder.save_pretrained(Path(folder) / self.encoder_name)
        self.tokenizer.save_pretrained(Path(folder) / self.tokenizer_name)


class T5Trainable:
    """Trains `text_encoder_3` of a model folder: instruction in, `record.meta["canonical"]` out.

    A decoder of `decoder_layers` layers with the encoder's configuration starts from random weights and is not
    saved. The loss of a sample is the mean cross-entropy over its own tokens; padding does not count.
    """

    name = "t5"

    def __init__(self, path: str | Path, *, decoder_layers: int = 2) -> None:
        from transformers import T5EncoderModel, T5ForConditionalGeneration, T5TokenizerFast

        self.tokenizer: Any = T5TokenizerFast.from_pretrained(part_folder(path, "tokenizer_3"))
        folder = part_folder(path, "text_encoder_3")
        self.encoder: Any = T5EncoderModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        config = self.encoder.config.__class__.from_dict(
            self.encoder.config.to_dict()
            | {
                "num_decoder_layers": decoder_layers,
                "is_encoder_decoder": True,
                "use_cache": False,
                "dropout_rate": 0.0,  # it would draw from the global generator
                "decoder_start_token_id": self.tokenizer.pad_token_id,
            }
        )
        self.model: Any = T5ForConditionalGeneration(config)
        self.model.encoder.load_state_dict(self.encoder.encoder.state_dict())
        with torch.no_grad():
            self.model.shared.weight.copy_(self.encoder.shared.weight)
        # A head of its own, as in T5 1.1 (the library ties it to the input embedding), with logits of order 1.
        self.model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.model.lm_head.weight, std=config.d_model**-0.5)
        self.model.config.scale_decoder_outputs = False

    def modules(self) -> dict[str, nn.Module]:
        """The whole encoder-decoder, under the name of the part that is kept."""
        return {"text_encoder_3": self.model}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`input_ids` [L] of the instruction, padded, and `labels` [N] of the canonical sentence, ended by </s>."""
        for record in records:
            if not isinstance(record.meta.get("canonical"), str):
                raise WeftError(f'record {record.id!r} has no meta["canonical"]: the sentence that T5 is to learn')
        ids = token_ids(self.tokenizer, [record.instruction for record in records])
        # not cut: only the encoder's length is fixed, and the tokenizer would warn of it
        labels = self.tokenizer([record.meta["canonical"] for record in records], verbose=False).input_ids
        return [{"input_ids": i, "labels": torch.tensor(label)} for i, label in zip(ids, labels, strict=True)]

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Cross-entropy per sample [B].

        `exact` is the share of samples in which every next token is predicted right given the true ones before it,
        which is the share that greedy decoding would write without a fault; `tokens` the share of right tokens.
        """
        device = self.model.shared.weight.device
        ids = torch.stack([example["input_ids"] for example in examples]).to(device)
        labels = nn.utils.rnn.pad_sequence(
            [example["labels"] for example in examples], batch_first=True, padding_value=-100
        ).to(device)  # [B, N]
        logits = self.model(input_ids=ids, labels=labels).logits.float()  # [B, N, vocabulary]
        real = labels != -100
        entropy = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        per_sample = entropy.sum(1) / real.sum(1)
        right = (logits.argmax(-1) == labels) | ~real
        tokens = float((right & real).sum() / real.sum())
        return Loss(per_sample, {"exact": float(right.all(1).float().mean()), "tokens": tokens})

    @torch.no_grad()
    def rewrite(self, texts: Sequence[str], max_tokens: int = 64) -> list[str]:
        """Greedy canonical sentences of instructions."""
        ids = token_ids(self.tokenizer, texts).to(self.model.shared.weight.device)
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
        return self.tokenizer.batch_decode(out, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write the encoder, as `T5EncoderModel`, and its tokenizer to their folders."""
        with torch.no_grad():
            self.encoder.encoder.load_state_dict(self.model.encoder.state_dict())
            self.encoder.shared.weight.copy_(self.model.shared.weight)
        self.encoder.save_pretrained(Path(folder) / "text_encoder_3")
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer_3")
