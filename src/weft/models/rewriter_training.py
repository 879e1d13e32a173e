"""Teaching the rewriter: a VLM learns to write the standardised text of a simple instruction and its pictures.

What DreamOmni2 calls joint training (arXiv 2510.06679, section 3.2): the same records, with a simple and a
standardised instruction, train the VLM to write the one from the other, and the adapters to paint the other. The
loss is next-token cross-entropy on the answer alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.models.image.metaquery_parts import find_vlm
from weft.models.rewriter import FIELDS, Form, question, split_standard, with_instruction
from weft.record import Record, read_records
from weft.types import Draw, Example, Loss
from weft.vlm.local import load_vlm
from weft.vlm.structured import write_fields


class RewriterTrainable:
    """Trains the VLM in `path` (`model.train: [vlm]`, full or LoRA): instruction and pictures in,
    `record.meta[target]` out, inside the tags `<{tag}> </{tag}>`, or `structured`, as a JSON object.

    `fit`, `structured`, `edit_fields`: see `weft.models.rewriter.Form`; the saved folder keeps them. `vision`: train
    the vision tower, too (not with LoRA, whose targets name the layers). `attention`: "eager" is faster on a CPU in
    bf16. The loss of a sample is the mean over its answer's tokens.
    """

    name = "rewriter"

    def __init__(
        self,
        path: str | Path,
        *,
        target: str = "standard",
        tag: str = "gen",
        fit: str = "kontext",
        structured: bool = False,
        edit_fields: Sequence[str] = FIELDS,
        vision: bool = False,
        attention: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        self.form = Form(fit, structured, tuple(edit_fields))
        self.reader = load_vlm(find_vlm(str(path), Path()), device="cpu", dtype=torch.float32)
        self.model: Any = self.reader.model
        self.model.requires_grad_(True)
        self.model.model.visual.requires_grad_(vision)
        if attention not in ("sdpa", "eager"):
            raise WeftError(f"attention {attention!r} is unknown; choose sdpa or eager")
        self.model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        self.target, self.tag = target, tag

    def modules(self) -> dict[str, nn.Module]:
        """The VLM."""
        return {"vlm": self.model}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`ids` [L] of prompt and answer, `answer` [1] (where the answer begins), and of records with pictures
        `pixels` [P, D] and `grids` [n, 3]."""
        out = []
        for record in records:
            wanted = record.meta.get(self.target)
            if not isinstance(wanted, str) or not wanted.strip():
                raise WeftError(f'record {record.id!r} has no meta["{self.target}"]: the text that the VLM is to write')
            prompt = self.reader.encode(question(record, self.form.fit))
            answer = self._answer(record, wanted.strip())
            ids = torch.cat([prompt.ids, answer])
            example = {"ids": ids, "answer": torch.tensor([len(prompt.ids)])}
            if len(prompt.patches):
                example |= {"pixels": torch.cat(list(prompt.patches)), "grids": prompt.grids}
            out.append(example)
        return out

    def _answer(self, record: Record, wanted: str) -> Tensor:
        """Ids [N] of the answer in its form, and the end of the turn."""
        processor = self.reader.processor
        if not self.form.structured:
            return processor.encode(f"<{self.tag}> {wanted} </{self.tag}><|im_end|>").ids
        ids = write_fields(processor.tokenizer, split_standard(wanted, self.form.fields(record)))
        return torch.cat([torch.tensor(ids), processor.encode("<|im_end|>").ids])

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Cross-entropy per sample [B] over the answer's tokens; `tokens` is the share that is predicted right,
        `exact` that of the answers without a wrong one."""
        rows = [example["ids"] for example in examples]
        states = hidden_states(self.model, examples)
        device = states.device
        losses, right, count, exact = [], 0, 0, 0
        for k, example in enumerate(examples):  # logits of the answers alone: the vocabulary is large
            start, stop = int(example["answer"]), len(rows[k])
            logits = self.model.lm_head(states[k, start - 1 : stop - 1]).float()
            labels = rows[k][start:].to(device)
            losses.append(F.cross_entropy(logits, labels))
            hits = logits.argmax(-1) == labels
            right, count, exact = right + int(hits.sum()), count + stop - start, exact + bool(hits.all())
        return Loss(torch.stack(losses), {"tokens": right / count, "exact": exact / len(losses)})

    def save(self, folder: Path) -> None:
        """Write a complete VLM folder: weights, tokenizer, chat template, image processor, and its form."""
        self.model.save_pretrained(folder)
        self.reader.processor.save(folder)
        text = json.dumps({"rewriter": asdict(self.form)}, indent=2) + "\n"
        (Path(folder) / "weft.json").write_text(text, encoding="utf-8")


def hidden_states(model: Any, examples: Sequence[Example]) -> Tensor:
    """The last layer's states [B, L, C] of a VLM over examples with `ids` [L] and, where they have pictures, `pixels`
    [P, D] and `grids` [n, 3]; shorter rows are padded at the end."""
    device = model.get_input_embeddings().weight.device
    rows = [example["ids"] for example in examples]
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    inputs: dict[str, Tensor] = {
        "input_ids": ids.to(device),
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device),
    }
    shown = [example for example in examples if "pixels" in example]
    if shown:
        inputs |= {
            "pixel_values": torch.cat([example["pixels"] for example in shown]).to(device, model.dtype),
            "image_grid_thw": torch.cat([example["grids"] for example in shown]).to(device),
            "mm_token_type_ids": (ids == model.config.image_token_id).int().to(device),
        }
    return model.model(**inputs, use_cache=False).last_hidden_state


def standardised(path: str, target: str = "standard") -> list[Record]:
    """The records of a JSONL file with `meta[target]` in the place of the instruction: what the adapters train on.

    For a recipe: `source: {call: "weft.models.rewriter_training:standardised", args: {path: ...}}`.
    """
    records = []
    for record in read_records(path):
        wanted = record.meta.get(target)
        if not isinstance(wanted, str) or not wanted.strip():
            raise WeftError(f'{path}: record {record.id!r} has no meta["{target}"]')
        records.append(with_instruction(record, wanted.strip()))
    return records
