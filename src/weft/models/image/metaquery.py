"""UniPic2-MetaQuery: a frozen VLM reads the request, learned queries read the VLM (arXiv 2509.04548, section 3.1).

The queries are appended to the VLM's input; a connector turns their last states into what the Kontext transformer
takes for its text, in the place of CLIP and T5. Everything else is `UniPic2Kontext`. Prompts, picture sizes and
position ids are those of SkyworkAI/UniPic, UniPic-2/scripts/unipic2_mq_{t2i,editing}.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.models import flow
from weft.models.image.sd3_kontext import UniPic2Kontext
from weft.models.weights import read_index
from weft.types import Batch, Condition, Example
from weft.vlm.ask import plain
from weft.vlm.processor import PICTURE

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Record

START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
GENERATE = "Generate an image: "
PIXELS_PER_TOKEN = 32
"""A VLM token covers a block of 32 x 32 pixels of the picture: 28 x 28 after the resize by 7/8."""
PROMPTS_AT_ONCE = 16


def positions(ids: Tensor, grids: Tensor, count: int, image_id: int, merge: int, mode: str) -> Tensor:
    """Position ids [3, L + count] of a prompt [L] with pictures of patch grids [n, 3], and of `count` queries after it.

    "grid" is Qwen2.5-VL's own M-RoPE: a picture's tokens share their time, and count rows and columns. "flat" counts
    tokens one by one on all three axes, as the released inference of UniPic2 does.
    """
    if mode == "flat":
        return torch.arange(len(ids) + count).expand(3, -1)
    pieces, now, start = [], 0, 0
    pad = (ids == image_id).tolist()
    for _, rows, columns in (grids // torch.tensor([1, merge, merge])).tolist():
        first = pad.index(True, start)
        pieces.append(torch.arange(first - start).expand(3, -1) + now)
        now += first - start
        grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        pieces.append(torch.stack([torch.zeros_like(grid[0]), *grid]).flatten(1) + now)
        now, start = now + max(rows, columns), first + rows * columns
    return torch.cat([*pieces, torch.arange(len(ids) + count - start).expand(3, -1) + now], dim=1)


@dataclass(frozen=True)
class MetaQueryOptions:
    """Choices of a MetaQuery model.

    `vlm`: folder or hub id of its VLM; "" is the folder `vlm` inside the model's. `mrope`: the position ids of pictures
    in the VLM; released weights run "flat", which one they were trained with is not known. `conditioning`: who sees
    the pictures of an edit, "both" (the release), the "vlm" alone or the "dit" alone (the report's table 2).
    """

    vlm: str = ""
    mrope: str = "flat"
    conditioning: str = "both"

    def __post_init__(self) -> None:
        for name, known in (("mrope", ("flat", "grid")), ("conditioning", ("both", "vlm", "dit"))):
            if getattr(self, name) not in known:
                raise WeftError(f"{name} {getattr(self, name)!r} is unknown; choose {', '.join(known)}")


class UniPic2MetaQuery(UniPic2Kontext):
    """A `weft.types.FlowModel` over `transformer`, `vae`, `scheduler`, `conditioner`, `vlm` and its `processor`.

    What trains is a matter of the recipe (the report's table 3): `conditioner`, `transformer` or both; the VLM stays
    as it is. A LoRA is the transformer's: the conditioner trains whole beside it. While the queries are frozen, the
    VLM's states at their places are part of a condition, so a cache holds them; while they train, the condition holds
    what they read. `gradient_checkpointing`: recompute activations also in networks that do not train, because the
    gradient of the queries passes through them.
    """

    name = "metaquery"
    sees: str = "inputs"
    resident: ClassVar[tuple[str, ...]] = ("conditioner",)  # its queries are read beside its forward
    whole: ClassVar[tuple[str, ...]] = ("conditioner",)
    text_tensors: ClassVar[tuple[str, ...]] = ("states", "visual")
    optional_parts: ClassVar[tuple[str, ...]] = (
        *("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *UniPic2Kontext.optional_parts,
    )

    def __init__(
        self,
        parts: dict[str, Any],
        *,
        options: MetaQueryOptions | None = None,
        gradient_checkpointing: bool = False,
        resolution: int | None = None,
        loss_config: flow.FlowLossConfig | None = None,
        device: torch.device | str | None = None,
        licence: str | None = None,
    ) -> None:
        super().__init__(parts, resolution=resolution, loss_config=loss_config, device=device, licence=licence)
        self.conditioner: Any = parts["conditioner"]
        self.vlm: Any = parts["vlm"].requires_grad_(False)
        self.processor = parts["processor"]
        self.queries.requires_grad_(False)  # until a recipe trains them
        self.options = options or MetaQueryOptions()
        self.gradient_checkpointing = gradient_checkpointing
        check_fit(self.conditioner.config, self.transformer.config, self.vlm.config.text_config)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
            self.conditioner.enable_gradient_checkpointing()
            self.vlm.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def queries(self) -> Tensor:
        """The learned queries [Q, H]; they are trained if they require a gradient."""
        return self.conditioner.meta_queries

    def step_modules(self) -> tuple[str, ...]:
        """The VLM is needed at every step only while the queries train."""
        return ("transformer", "conditioner", *(["vlm"] if self.queries.requires_grad else []))

    def example_facts(self) -> dict[str, Any]:
        """States of frozen queries depend on these queries, even if the rest of the conditioner trains."""
        frozen = self.queries.detach().float().cpu().numpy().tobytes()
        return {"queries": None if self.queries.requires_grad else hashlib.sha256(frozen).hexdigest()}

    # -- what the VLM reads

    def encode_text(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """What the transformer's text is made of, for requests without pictures; see `states`."""
        return self.states(texts, [()] * len(texts))

    @torch.no_grad()
    def states(self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> list[dict[str, Tensor]]:
        """For each request `ids` [L]; with pictures `visual` [V, H] (the vision tower's tokens), `grids` [n, 3] and
        `span` [2] (where in `ids` the text stands); with frozen queries also `states` [Q, H]. Equal requests share.
        """
        found: dict[tuple[str, tuple[int, ...]], dict[str, Tensor]] = {}
        keys = [(text, tuple(id(image) for image in given)) for text, given in zip(texts, pictures, strict=True)]
        for key, text, given in zip(keys, texts, pictures, strict=True):
            if key not in found:
                shown = [] if self.options.conditioning == "dit" else list(given)
                found[key] = self._request(text, shown, bare=bool(given))
        self._add_states(list(found.values()))
        return [dict(found[key]) for key in keys]

    def _add_states(self, requests: Sequence[dict[str, Tensor]]) -> None:
        if not self.queries.requires_grad:
            for start in range(0, len(requests), PROMPTS_AT_ONCE):
                some = requests[start : start + PROMPTS_AT_ONCE]
                for tensors, states in zip(some, self._read(some), strict=True):
                    tensors["states"] = states

    def _request(self, text: str, pictures: Sequence[Image.Image], *, bare: bool) -> dict[str, Tensor]:
        """The tensors of one request, before any query has read it; `bare`: without "Generate an image"."""
        text = plain(text)
        if not pictures:
            return {"ids": self.processor.encode(START + ("" if bare else GENERATE) + text + END).ids}
        edge = self.processor.patch * self.processor.merge / PIXELS_PER_TOKEN
        seen = []
        for image in pictures:  # each has its own area, so each is encoded by itself
            area = int(image.height * edge * image.width * edge)
            seen.append(self.processor.encode(PICTURE, [image], (area, area)))
        # special tokens part the pieces, so that their tokens are those of the whole
        before = torch.cat([self.processor.encode(START).ids, *(one.ids for one in seen)])
        body, after = self._body(text), self.processor.encode(END).ids
        grids = torch.cat([one.grids for one in seen])
        self._wake()
        pixels = torch.cat([one.pixels for one in seen]).to(self._vlm_device, self.vlm.dtype)
        with torch.autocast(self.device.type, enabled=False):
            features = self.vlm.model.get_image_features(pixels, grids.to(pixels.device)).pooler_output
        span = torch.tensor([len(before), len(before) + len(body)])
        return {"ids": torch.cat([before, body, after]), "span": span, "visual": torch.cat(features), "grids": grids}

    def _body(self, text: str) -> Tensor:
        return self.processor.encode(text).ids if text else torch.zeros(0, dtype=torch.long)

    def _read(self, requests: Sequence[dict[str, Tensor]]) -> Tensor:
        """States [B, Q, H] of the queries after each request: one call of the language model.

        Attention is causal and the padding comes last, so no request sees it.
        """
        self._wake()
        queries, device = self.queries, self._vlm_device
        count, embed = len(queries), self.vlm.get_input_embeddings()
        rows, places, starts = [], [], []
        for tensors in requests:
            ids = tensors["ids"].long()
            row = embed(ids.to(device))
            grids = tensors.get("grids", torch.zeros(0, 3, dtype=torch.long)).long().cpu()
            if "visual" in tensors:
                row = row.clone()
                row[ids.to(device) == self.processor.image_id] = tensors["visual"].to(device, row.dtype)
            rows.append(torch.cat([row, queries.to(device, row.dtype)]))
            where = positions(
                ids.cpu(), grids, count, self.processor.image_id, self.processor.merge, self.options.mrope
            )
            places.append(where.T)
            starts.append(len(ids))
        lengths = torch.tensor([len(row) for row in rows])
        model = self.vlm.model
        # transformers recomputes activations in train mode only; these models have no dropout
        model.language_model.train(self.gradient_checkpointing and torch.is_grad_enabled())
        with torch.autocast(self.device.type, enabled=False):
            out = model(
                inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True),
                attention_mask=(torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device),
                position_ids=nn.utils.rnn.pad_sequence(places, batch_first=True).permute(2, 0, 1).to(device),
                use_cache=False,
            ).last_hidden_state
        return torch.stack([out[k, start : start + count] for k, start in enumerate(starts)])

    @property
    def _vlm_device(self) -> torch.device:
        return self._device or self.vlm.get_input_embeddings().weight.device

    def _wake(self) -> None:
        """With offloading, bring the VLM to the device: its parts are called, not the whole that carries the hook."""
        hook = getattr(self.vlm, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.vlm)

    # -- conditions

    def encode(self, records: Sequence[Record], *, negative: str | None = None) -> list[Condition]:
        """Conditions of records. The negative of an edit sees the same pictures, as in the release."""
        conditions = super().encode(records, negative=negative)
        if self.options.conditioning == "vlm":
            for condition in conditions:
                condition.references = []
        return conditions

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """One cacheable training example per record."""
        examples = super().examples(records)
        if self.options.conditioning == "vlm":
            examples = [{k: t for k, t in e.items() if not k.startswith("reference.")} for e in examples]
        return examples

    def with_text(self, conditions: Sequence[Condition], text: str) -> list[Condition]:
        """The same conditions, pictures included, with another text."""
        return [Condition(c.record_id, c.size, self._swap(c, text), c.references) for c in conditions]

    def without_text(self, condition: Condition) -> dict[str, Tensor]:
        """The tensors of a condition whose text is dropped in training; an edit keeps its pictures."""
        return self._swap(condition, "")

    @torch.no_grad()
    def _swap(self, condition: Condition, text: str) -> dict[str, Tensor]:
        tensors = condition.tensors
        if "visual" in tensors:
            ids, (start, stop) = tensors["ids"], tensors["span"].tolist()
            body = self._body(plain(text)).to(ids)
            new = {key: tensors[key] for key in ("visual", "grids")}
            new |= {"ids": torch.cat([ids[:start], body, ids[stop:]]), "span": torch.tensor([start, start + len(body)])}
        elif condition.references:
            new = self._request(text, [], bare=True)
        else:
            return dict(self.empty_text() if not text else self.encode_text([text])[0])
        self._add_states([new])
        return new

    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        """The batch of one transformer call. The connector runs here, and the VLM where the queries train; gradients
        flow to whatever of them requires one."""
        batch = self.arrange(conditions, self.transformer.config.pos_embed_max_size, len(self.queries))
        training = self.queries.requires_grad
        absent = [k for k, c in enumerate(conditions) if training or "states" not in c.tensors]
        read: dict[int, Tensor] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and training):
            for start in range(0, len(absent), PROMPTS_AT_ONCE):
                some = absent[start : start + PROMPTS_AT_ONCE]
                read |= dict(zip(some, self._read([conditions[k].tensors for k in some]), strict=True))
        kind = self.conditioner.projector_1.weight.dtype
        rows = [read[k] if k in read else c.tensors["states"] for k, c in enumerate(conditions)]
        text, pooled = self.conditioner(torch.stack([row.to(self.device, kind) for row in rows]))
        return batch | {"text": text.to(self.dtype), "pooled": pooled.to(self.dtype)}

    # -- understanding, saving

    def describe(self, pictures: Sequence[Image.Image], question: str, *, max_tokens: int = 512) -> str:
        """What the untouched VLM answers to a question about pictures (greedy decoding)."""
        from weft.record import Turn, image_part, text_part
        from weft.vlm.ask import Ask
        from weft.vlm.local import LocalVLM

        turn = Turn("user", [*(image_part(picture) for picture in pictures), text_part(question)])
        return LocalVLM(self.vlm, self.processor, name="vlm").ask([[turn]], Ask(max_tokens=max_tokens, top=0))[0].text

    def save(self, folder: Path) -> None:
        """Write the released layout: transformer, vae, conditioner, scheduler. The VLM is not copied: `weft.json`
        names it. Plain diffusers opens the folder, too (`text_encoder=None` and so on), for prompt embeddings."""
        parts = self.parts
        self.parts = {name: part for name, part in parts.items() if name not in ("vlm", "processor")}
        try:
            super().save(folder)
        finally:
            self.parts = parts
        index = read_index(Path(folder))
        del index["conditioner"]  # no class of diffusers
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (Path(folder) / "model_index.json").write_text(text, encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """What `weft.json` has to say: the VLM and the options."""
        return {"options": asdict(self.options)}


def check_fit(conditioner: Any, transformer: Any, vlm: Any) -> None:
    """Raise WeftError with the numbers if conditioner, transformer and VLM (their configurations) do not fit."""
    for what, mine, other, theirs in (
        ("llm_hidden_size", conditioner.llm_hidden_size, "the VLM's hidden_size", vlm.hidden_size),
        ("joint_attention_dim", conditioner.joint_attention_dim, "the transformer's", transformer.joint_attention_dim),
        (
            "pooled_projection_dim",
            conditioner.pooled_projection_dim,
            "the transformer's",
            transformer.pooled_projection_dim,
        ),
    ):
        if mine != theirs:
            raise WeftError(
                f"the conditioner's {what} is {mine}, {other} is {theirs}: they do not belong together "
                "(the released UniPic2-Metaquery-9B was trained with Qwen/Qwen2.5-VL-7B-Instruct)"
            )
