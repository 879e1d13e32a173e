"""The language model over rows of tokens: embeddings of several columns, logits a column, and the KV cache.

Any transformers causal LM will do: its decoder reads embeddings, its output embeddings give logits, which some classes
scale or cap (`check_logits` compares with the class's own).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import WeftError
from weft.models.motion.heads import DepthTransformer
from weft.models.motion.tokens import Serialisation


@dataclass(slots=True)
class State:
    """What has been read: `hidden` [B, D] of the last row, `mask` [B, S] (0 is padding on the left), and either the
    `cache` or, without one, all `rows` [B, S, columns]."""

    hidden: Tensor
    mask: Tensor
    cache: Any
    rows: Tensor | None


class MotionNetwork:
    """A `weft.sample.tokens.TokenNetwork` of a causal LM, its serialisation and (depth) its head."""

    def __init__(self, transformer: Any, serial: Serialisation, head: Any = None) -> None:
        self.transformer, self.serial, self.head = transformer, serial, head
        self.columns = serial.columns

    @property
    def device(self) -> torch.device:
        return self.transformer.get_input_embeddings().weight.device

    def embed(self, rows: Tensor) -> Tensor:
        """[B, S, columns] -> [B, S, D]: the sum over the filled columns."""
        table = self.transformer.get_input_embeddings()
        rows = rows.to(self.device)
        if self.columns == 1:
            return table(rows[..., 0].clamp_min(0))
        return (table(rows.clamp_min(0)) * (rows >= 0)[..., None]).sum(-2)

    def hidden(self, rows: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Last states [B, S, D] of rows [B, S, columns]; `mask` [B, past + S] names what is no padding."""
        mask = mask.to(self.device)
        position = (mask.cumsum(-1) - 1).clamp_min(0)[:, -rows.shape[1] :]
        out = self.transformer.base_model(
            inputs_embeds=self.embed(rows),
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state

    def vocabulary_logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """fp32 logits [..., stop - start] of states [..., D]."""
        head = self.transformer.get_output_embeddings()
        if start == 0 and stop is None:
            logits = head(hidden)
        else:
            bias = getattr(head, "bias", None)
            logits = F.linear(hidden, head.weight[start:stop], None if bias is None else bias[start:stop])
        config = self.transformer.config
        cap = getattr(config, "final_logit_softcapping", None)
        logits = logits.float() * logit_factor(config)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def check_logits(self) -> None:
        """Raises WeftError if these are not the logits of the transformer's own class, on a few of its tokens."""
        rows = torch.full((1, 8, self.columns), -1)
        rows[0, :, 0] = torch.arange(8)
        training = self.transformer.training
        self.transformer.eval()
        own = self.vocabulary_logits(self.hidden(rows, torch.ones((1, 8), dtype=torch.long)))
        wanted = self.transformer(input_ids=rows[..., 0].to(self.device), use_cache=False).logits.float()
        self.transformer.train(training)
        apart = float((own - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
        if not apart < 0.02:
            name = type(self.transformer).__name__
            raise WeftError(
                f"{name} does something to its logits that is not known here (they differ by {apart:.0%} of the "
                "largest): build the model from another causal LM"
            )

    # -- the rollout's side

    def begin(self, prompts: Sequence[Tensor], *, cache: bool = True) -> State:
        """Read prompts of mixed lengths, padded on the left."""
        from transformers import DynamicCache

        length = max(len(p) for p in prompts)
        rows = torch.full((len(prompts), length, self.columns), -1)
        mask = torch.zeros((len(prompts), length), dtype=torch.long)
        for k, prompt in enumerate(prompts):
            rows[k, length - len(prompt) :] = prompt
            mask[k, length - len(prompt) :] = 1
        store = DynamicCache(config=self.transformer.config) if cache else None
        hidden = self.hidden(rows, mask, store)[:, -1]
        return State(hidden, mask, store, None if cache else rows)

    def feed(self, state: State, rows: Tensor, seen: Tensor) -> None:
        """Read one more row [B, columns] of the samples in `seen` [B]; the others stay where they are."""
        state.mask = torch.cat([state.mask, seen[:, None].long()], 1)
        if state.rows is None:
            hidden = self.hidden(rows[:, None], state.mask, state.cache)[:, -1]
        else:
            state.rows = torch.cat([state.rows, rows[:, None]], 1)
            hidden = self.hidden(state.rows, state.mask)[:, -1]
        state.hidden = torch.where(seen.to(hidden.device)[:, None], hidden, state.hidden)

    def logits(self, state: State, column: int, chosen: Tensor) -> tuple[Tensor, int]:
        """Logits [B, M] of a column and the id that they begin with."""
        if column == 0:
            return self.vocabulary_logits(state.hidden), 0
        start, stop = self.serial.vocabulary.block(column)
        if self.serial.name == "delay":
            return self.vocabulary_logits(state.hidden, start, stop), start
        assert isinstance(self.head, DepthTransformer)
        return self.head(state.hidden, self.level_codes(chosen.to(self.device)))[:, -1].float(), start

    def level_codes(self, rows: Tensor) -> Tensor:
        """Codes [N, l] of ids [N, l] whose column is their level; -1 where a column holds something else."""
        v = self.serial.vocabulary
        first = v.first + torch.arange(rows.shape[1], device=rows.device) * v.codes
        codes = rows - first
        return torch.where((codes >= 0) & (codes < v.codes), codes, -1)


def logit_factor(config: Any) -> float:
    """What a causal LM's class multiplies its logits by, after the output embeddings.

    `logit_scale` (Cohere) and `lm_head_multiplier` (Falcon-H1) multiply; `logits_scaling` divides (Granite, MiniCPM3),
    but multiplies in HyperCLOVA X (transformers' modeling files).
    """
    for name in ("logit_scale", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            return float(factor)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)
