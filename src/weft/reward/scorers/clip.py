"""Preference models on transformers' CLIP: CLIPScore, PickScore, HPSv2.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import WeftError
from weft.reward.mix import Pair
from weft.types import Score


class CLIPScore:
    """Cosine of picture and instruction, as logits / 100 of a model whose logit scale is 100 (yifan123/flow_grpo and
    PKU-YuanGroup/UniWorld-V2, flow_grpo/clip_scorer.py). Pictures go through the model's own processor, which for CLIP
    is bicubic; the public reward code resizes them bilinearly.

    An output without an instruction is missing. Texts are cut at the tokenizer's length, as everywhere with CLIP.
    """

    learned_scale = True  # multiply by the model's own logit scale
    divisor = 100.0

    def __init__(
        self, model: str, processor: str | None = None, *, device: str | None = None, batch_size: int = 32
    ) -> None:
        """`model`: a folder or hub id with CLIPModel weights in safetensors; `processor`: that of tokenizer and image
        processor if it is another. Raises WeftError if they cannot be read."""
        from transformers import CLIPModel

        try:
            network = CLIPModel.from_pretrained(model, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise WeftError(f"{model}: no CLIP model can be read there ({str(error).splitlines()[0]})") from error
        self._start(network, processor or model, device, batch_size)

    def _start(self, network: Any, processor: str, device: str | None, batch_size: int) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
            self.images = AutoImageProcessor.from_pretrained(processor, backend="pil", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise WeftError(f"{processor}: no CLIP processor ({str(error).splitlines()[0]})") from error
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network, self.batch_size = network.eval().requires_grad_(False).to(target), batch_size
        self.length = network.config.text_config.max_position_embeddings

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        scores: list[Score | None] = [None] * len(batch)
        told = [k for k, (record, _) in enumerate(batch) if record.instruction]
        for start in range(0, len(told), self.batch_size):
            rows = told[start : start + self.batch_size]
            values = self.values([batch[k][0].instruction for k in rows], [batch[k][1] for k in rows])
            for k, value in zip(rows, values, strict=True):
                scores[k] = Score(value)
        return [score or Score(None, reason="no instruction to compare with") for score in scores]

    @torch.inference_mode()
    def values(self, texts: Sequence[str], pictures: Sequence[Any]) -> list[float]:
        """Score of each text with the picture beside it."""
        words, seen = self.embed(texts, pictures)
        scale = self.network.logit_scale.exp() if self.learned_scale else 1.0
        return ((words * seen).sum(-1) * scale / self.divisor).float().cpu().tolist()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], pictures: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Texts [N, C] and pictures [M, C] as vectors of length 1."""
        words = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        pixels = self.pixels(pictures)
        output = self.network(
            input_ids=words["input_ids"].to(self.network.device),
            attention_mask=words["attention_mask"].to(self.network.device),
            pixel_values=pixels.to(self.network.device),
        )
        return output.text_embeds, output.image_embeds

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """What the network sees [M, 3, H, W]: of a picture that is not square the middle."""
        return self.images(images=[p.convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"]


class PickScore(CLIPScore):
    """Logit / 26, about 0..1 (yuvalkirstain/PickScore_v1; yifan123/flow_grpo, flow_grpo/pickscore_scorer.py).
    Its processor is that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""

    divisor = 26.0


class HPSv2(CLIPScore):
    """HPSv2.1: the cosine of an OpenCLIP ViT-H-14, its weights converted to transformers' class (xswu/HPSv2;
    PKU-YuanGroup/UniWorld-V2, flow_grpo/hpsv2_scorer.py)."""

    learned_scale = False
    divisor = 1.0

    def __init__(self, weights: str, processor: str, *, device: str | None = None, batch_size: int = 32) -> None:
        """`weights`: a safetensors file with OpenCLIP's names; `processor`: a folder or hub id with tokenizer and image
        processor of CLIP ViT-H-14."""
        from safetensors.torch import load_file
        from transformers import CLIPModel

        if not Path(weights).is_file() or Path(weights).suffix != ".safetensors":
            raise WeftError(
                f"{weights}: not a safetensors file; convert the released one: "
                f"python -m weft.models.foreign HPS_v2.1_compressed.pt hps.safetensors state_dict"
            )
        state = {name: value.float() for name, value in load_file(weights).items()}  # fp32, as the public scorer has it
        config = clip_config(state)
        with torch.device("meta"):
            network = CLIPModel(config)
        network.load_state_dict(open_clip_to_transformers(state), assign=True)
        for part in (network.text_model, network.vision_model):
            ids = part.embeddings.position_ids
            part.embeddings.position_ids = torch.arange(ids.shape[-1])[None]
        self._start(network, processor, device, batch_size)

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """All of each picture, its longer edge resized (bicubic, on unrounded values), in a black square: ResizeMaxSize
        of tgxs002/HPSv2, hpsv2/src/open_clip/transform.py, with today's torchvision, which smooths what it shrinks."""
        side = self.network.config.vision_config.image_size
        whole = []
        for picture in pictures:
            values = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
            scale = side / max(values.shape[1:])
            height, width = (max(1, round(edge * scale)) for edge in values.shape[1:])
            values = F.interpolate(values[None], (height, width), mode="bicubic", antialias=True)[0]
            top, left = (side - height) // 2, (side - width) // 2
            whole.append(F.pad(values, (left, side - width - left, top, side - height - top)))
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.images.image_mean, self.images.image_std))
        return (torch.stack(whole) - mean) / std


def clip_config(state: Mapping[str, Tensor], head: int | None = None) -> Any:
    """The configuration of an OpenCLIP vision transformer, read off its weights. Heads are 64 wide in text towers and
    80 in ViT-H, as its config says; `head` sets both (for tiny ones)."""
    from transformers import CLIPConfig

    def depth(prefix: str) -> int:
        found = {int(k[len(prefix) :].partition(".")[0]) for k in state if k.startswith(prefix)}
        return len(found)

    try:
        patch = state["visual.conv1.weight"]
        tokens = state["visual.positional_embedding"].shape[0] - 1
        text, vision = state["ln_final.weight"].shape[0], patch.shape[0]
        words, length = state["token_embedding.weight"].shape[0], state["positional_embedding"].shape[0]
    except KeyError as error:
        raise WeftError(f"no OpenCLIP vision transformer: {error} is missing") from error
    common = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": state["text_projection"].shape[1]}
    return CLIPConfig(
        projection_dim=common["projection_dim"],
        text_config=common
        | {
            "hidden_size": text,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth("transformer.resblocks."),
            "num_attention_heads": text // (head or 64),
            "vocab_size": words,
            "max_position_embeddings": length,
            "eos_token_id": 2,  # transformers' sign for "the highest id ends the text", as OpenCLIP pools
        },
        vision_config=common
        | {
            "hidden_size": vision,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth("visual.transformer.resblocks."),
            "num_attention_heads": vision // (head or (80 if vision == 1280 else 64)),
            "patch_size": patch.shape[-1],
            "image_size": round(tokens**0.5) * patch.shape[-1],
        },
    )


def open_clip_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names and layouts as those of transformers' CLIPModel: joint q, k, v split, projections transposed.
    Raises WeftError for a name that it does not know."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _WHOLE:
            target = _WHOLE[name]
            out[target] = value.T.contiguous() if target.endswith("projection.weight") else value
            continue
        tower, found, rest = name.partition("transformer.resblocks.")
        if not found or tower not in ("", "visual."):
            if name == "attn_mask":
                continue
            raise WeftError(f"no OpenCLIP vision transformer: unknown weight {name}")
        layer, _, inner = rest.partition(".")
        place = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{layer}"
        if inner.startswith("attn.in_proj_"):
            kind = inner.removeprefix("attn.in_proj_")
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[f"{place}.self_attn.{part}_proj.{kind}"] = piece.contiguous()
            continue
        head, _, kind = inner.rpartition(".")
        if head not in _INNER:
            raise WeftError(f"no OpenCLIP vision transformer: unknown weight {name}")
        out[f"{place}.{_INNER[head]}.{kind}"] = value
    return out


_INNER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WHOLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
