"""A Qwen-VL model in this process: batched, with the prefix that questions share computed once.

The judge asks about k samples of one record: the system line, the original and the references are the same tokens in
the same places, and only the edited picture and the text after it differ. Attention is causal and the vision tower
sees each picture alone, so the key-value cache of the prefix is exact for every sample of the group, and so is the
vision tower's work on its pictures.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weft.errors import WeftError
from weft.rng import numpy_rng
from weft.vlm.ask import Ask, Question, Reply, Token, plain
from weft.vlm.processor import IMAGE_PAD, Processor
from weft.vlm.structured import Alphabet, Writer, writable

if TYPE_CHECKING:
    from PIL import Image

END = "<|im_end|>"  # of a turn
CLASSES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}


def load_vlm(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    batch_size: int = 16,
) -> LocalVLM:
    """A Qwen2.5-VL or Qwen3-VL folder. A picture is resized, keeping its aspect, to between `min_pixels` and
    `max_pixels` in all (None: as the model says). `device`: None takes CUDA, then MPS, then the CPU; `dtype`: None is
    fp32 on the CPU and bf16 elsewhere. Raises WeftError for another family, or a folder that cannot be read."""
    import transformers
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise WeftError(f"{folder}: no model can be read there ({str(error).splitlines()[0]})") from error
    if config.model_type not in CLASSES:
        raise WeftError(f"{folder}: model type {config.model_type} is not supported: use one of {', '.join(CLASSES)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    target = torch.device(device)
    kind = dtype or (torch.float32 if target.type == "cpu" else torch.bfloat16)
    if isinstance(kind, str):
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(kind) or getattr(torch, kind)
    try:
        model, info = getattr(transformers, CLASSES[config.model_type]).from_pretrained(
            folder, dtype=kind, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise WeftError(f"{folder}: cannot be read ({line}); download or export the model again") from error
    lost = sorted(info["missing_keys"])
    if lost:
        raise WeftError(f"{folder}: {len(lost)} weights are missing, the first is {lost[0]}; download the model again")
    processor = Processor.load(folder)
    usual = processor.images.size
    areas = (min_pixels or usual["shortest_edge"], max_pixels or usual["longest_edge"])
    if areas[0] > areas[1]:
        raise WeftError(f"min_pixels {areas[0]} is above max_pixels {areas[1]}: give a smaller one")
    return LocalVLM(model.to(target), processor, name=Path(folder).name, batch_size=batch_size, areas=areas)


@dataclass(slots=True)
class Encoded:
    """A question as model inputs: `ids` [L], `kinds` [L] (1 where a picture stands, else 0), the `patches` [P, D] and
    `grids` [n, 3] (time, rows, columns) of its pictures, and each picture's content digest."""

    ids: Tensor
    kinds: Tensor
    patches: list[Tensor]
    grids: Tensor
    digests: list[str]


@dataclass(slots=True)
class _Piece:
    """A stretch of one question: ids [L], positions [3, L], patches and grids of the pictures in it."""

    ids: Tensor
    positions: Tensor
    patches: list[Tensor] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)


class LocalVLM:
    """A model and its processor. Calls from several threads are taken one after the other."""

    def __init__(
        self,
        model: Any,
        processor: Processor,
        *,
        name: str = "vlm",
        batch_size: int = 16,
        areas: tuple[int, int] | None = None,
        share_prefix: bool = True,
    ):
        """`name` is completed by a digest of the weights. Raises WeftError if model and tokenizer do not fit."""
        self.model = model.eval().requires_grad_(False)
        self.processor, self.batch_size, self.share_prefix, self.areas = processor, batch_size, share_prefix, areas
        self.name = f"{name}@{fingerprint(model)}"
        tokenizer = processor.tokenizer
        self.special = sorted({*map(str, tokenizer.get_added_vocab()), *map(str, tokenizer.all_special_tokens)})
        self._special_ids = set(tokenizer.convert_tokens_to_ids(self.special)) - {processor.image_id}
        if model.config.image_token_id != processor.image_id:
            raise WeftError(
                f"the model's image token is {model.config.image_token_id}, the tokenizer's {processor.image_id}: "
                "use the tokenizer of this model"
            )
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.ends = {*ends, processor.tokenizer.eos_token_id} - {None}
        self._lock = threading.Lock()
        self._texts: dict[int, str] = {}  # of single tokens
        self._inside: Tensor | None = None  # tokens that may stand inside a text of a structured reply

    def ask(self, questions: Sequence[Question], how: Ask) -> list[Reply]:
        """One reply for each question, in order. Raises WeftError for a choice that is not one token.

        Where only a text is wanted (no `choices`, `top` 0), tokens repeat as little as the model's own generation
        settings say, as in `generate` and on servers; where probabilities are, they alone choose.
        """
        choices = self.choice_ids(how.choices)
        encoded = [self.encode(question) for question in questions]
        keys = [_prefix_key(item, _cut(item)) for item in encoded]
        order = sorted(range(len(encoded)), key=lambda i: (keys.index(keys[i]), i))  # groups side by side
        replies: list[Reply | None] = [None] * len(encoded)
        with self._lock, torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                got = self._answer([encoded[i] for i in rows], [keys[i] for i in rows], how, choices)
                for i, reply in zip(rows, got, strict=True):
                    replies[i] = reply
        return [reply for reply in replies if reply is not None]

    def states(self, questions: Sequence[Question], token: str | None = None, *, flat: bool = False) -> list[Tensor]:
        """The last layer's state [C] where each answer would begin, in order: what a critic's head reads.

        `token`: the state at this special token instead, put where the question's text ends. `flat`: positions count
        tokens, without the rows and columns of pictures. Raises WeftError for a token that the tokenizer lacks.
        """
        encoded = [self.encode(question) for question in questions]
        if token is not None:
            encoded = [self._closed(item, token) for item in encoded]
        found: list[Tensor] = []
        with self._lock, torch.inference_mode():
            for start in range(0, len(encoded), self.batch_size):
                pieces = [self._piece(item, 0, len(item.ids)) for item in encoded[start : start + self.batch_size]]
                for piece in pieces if flat else ():
                    piece.positions = torch.arange(len(piece.ids)).expand(3, -1)
                output, _ = self._forward(pieces, None, None, states=True)
                found += list(output.hidden_states[-1][:, -1])
        return found

    def _closed(self, item: Encoded, token: str) -> Encoded:
        """A question up to the end of its text, and `token`: what follows cannot change the state there."""
        tokenizer = self.processor.tokenizer
        if token not in tokenizer.get_added_vocab():
            raise WeftError(f"the tokenizer has no special token {token}")
        stop = int((item.ids == tokenizer.convert_tokens_to_ids(END)).nonzero()[-1])
        ids = torch.cat([item.ids[:stop], torch.tensor([tokenizer.convert_tokens_to_ids(token)])])
        return replace(item, ids=ids, kinds=(ids == self.processor.image_id).long())

    def choice_ids(self, choices: Sequence[str]) -> dict[int, str]:
        """Token ids of the choices, each checked to be one token that reads back as itself; with a leading blank,
        too, where that is one token (answers after "Score:" begin so)."""
        tokenizer = self.processor.tokenizer
        out: dict[int, str] = {}
        for choice in choices:
            ids = tokenizer.encode(choice, add_special_tokens=False)
            if len(ids) != 1 or tokenizer.decode(ids) != choice:
                raise WeftError(f"choice {choice!r} is {len(ids)} tokens for this tokenizer: choices must be one token")
            if ids[0] in out:
                raise WeftError(f"choices {out[ids[0]]!r} and {choice!r} are the same token: leave one out")
            out[ids[0]] = choice
            blank = tokenizer.encode(f" {choice}", add_special_tokens=False)
            if len(blank) == 1:
                out[blank[0]] = f" {choice}"
        return out

    def encode(self, question: Question) -> Encoded:
        """Tokens and patches. Texts are made harmless first (`weft.vlm.ask.plain`).

        Raises WeftError if a text brings a special token all the same, or the template drops a picture.
        """
        pictures = [part.load() for turn in question for part in turn.parts if part.type == "image"]
        prompt = self.processor.encode(self.processor.chat(self.messages(question)), pictures, self.areas)
        text = self.processor.chat(self.messages(question, blank=True)).replace(IMAGE_PAD, "")
        allowed = self.processor.encode(text).ids
        found, expected = (sum(int(i) in self._special_ids for i in ids) for ids in (prompt.ids, allowed))
        if found != expected:
            raise WeftError(f"a text brings {found - expected} special tokens of its own: it is refused")
        sizes = [int(grid.prod()) for grid in prompt.grids]
        patches = list(prompt.pixels.split(sizes)) if prompt.pixels is not None else []
        kinds = (prompt.ids == self.processor.image_id).long()
        return Encoded(prompt.ids, kinds, patches, prompt.grids, [_digest(picture) for picture in pictures])

    def messages(self, question: Question, blank: bool = False) -> list[dict[str, Any]]:
        """Chat messages of a question; `blank` puts "x" for every text."""
        out = []
        for turn in question:
            content: list[dict[str, Any]] = []
            for part in turn.parts:
                if part.type == "text":
                    content.append({"type": "text", "text": "x" if blank else plain(part.text or "", self.special)})
                elif part.type == "image":
                    content.append({"type": "image"})
                else:
                    raise WeftError(f"a {part.type} cannot be shown to a vision-language model: render it first")
            out.append({"role": turn.role, "content": content})
        return out

    # -- forward passes --

    def _answer(self, items: list[Encoded], keys: list[str], how: Ask, choices: dict[int, str]) -> list[Reply]:
        groups = list(dict.fromkeys(keys))
        cache = mask = None
        if self.share_prefix and len(groups) < len(items):
            firsts = [items[keys.index(key)] for key in groups]
            prefixes = [self._piece(item, 0, _cut(item)) for item in firsts]
            output, mask = self._forward(prefixes, None, None)
            rows = torch.tensor([groups.index(key) for key in keys], device=mask.device)
            cache, mask = output.past_key_values, mask[rows]
            cache.batch_select_indices(rows)
            pieces = [self._piece(item, _cut(item), len(item.ids)) for item in items]
        else:
            pieces = [self._piece(item, 0, len(item.ids)) for item in items]
        output, mask = self._forward(pieces, cache, mask)
        last = torch.stack([piece.positions[:, -1].max() for piece in pieces])  # the next text position follows it
        return self._decode(items, output, mask, last, how, choices)

    def _piece(self, item: Encoded, start: int, stop: int) -> _Piece:
        inner = self.model.model
        grids = item.grids if len(item.grids) else None
        positions, _ = inner.get_rope_index(item.ids[None], mm_token_type_ids=item.kinds[None], image_grid_thw=grids)
        shown = [k for k, at in enumerate(_starts(item)) if start <= at < stop]
        return _Piece(
            item.ids[start:stop],
            positions[:, 0, start:stop],
            [item.patches[k] for k in shown],
            [item.grids[k] for k in shown],
        )

    def _forward(
        self, pieces: list[_Piece], cache: Any, past: Tensor | None, states: bool = False
    ) -> tuple[Any, Tensor]:
        """One call on left-padded pieces [B, L]; returns the output and the mask [B, past + L], 0 where padded."""
        device, longest = self.model.device, max(len(piece.ids) for piece in pieces)
        ids = torch.full((len(pieces), longest), min(self.ends, default=0), dtype=torch.long)
        mask = torch.zeros(len(pieces), longest, dtype=torch.long)
        positions = torch.zeros(3, len(pieces), longest, dtype=torch.long)
        for row, piece in enumerate(pieces):
            ids[row, longest - len(piece.ids) :] = piece.ids
            mask[row, longest - len(piece.ids) :] = 1
            positions[:, row, longest - len(piece.ids) :] = piece.positions
        mask = mask.to(device)
        if past is not None:
            mask = torch.cat([past, mask], dim=1)
        patches = [patch for piece in pieces for patch in piece.patches]
        grids = [grid for piece in pieces for grid in piece.grids]
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
            past_key_values=cache,
            pixel_values=torch.cat(patches).to(device, self.model.dtype) if patches else None,
            image_grid_thw=torch.stack(grids).to(device) if grids else None,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=states,
        )
        return output, mask

    def _decode(
        self, items: list[Encoded], output: Any, mask: Tensor, last: Tensor, how: Ask, choices: dict[int, str]
    ) -> list[Reply]:
        draws = [numpy_rng(how.seed, "vlm", record=_prefix_key(item, len(item.ids))) for item in items]
        wanted = torch.tensor(sorted(choices), dtype=torch.long)
        made: list[list[int]] = [[] for _ in items]
        tokens: list[list[Token]] = [[] for _ in items]
        open_rows = set(range(len(items)))
        writers = self._writers(len(items), output.logits.shape[-1], how)
        penalty = getattr(self.model.generation_config, "repetition_penalty", None) or 1.0
        for step in range(how.max_tokens):
            logits = output.logits[:, -1].float()  # [B, V]
            log_probs = scores = logits.log_softmax(-1).cpu()
            if penalty != 1 and how.top == 0 and not choices:
                rows = [item.ids.tolist() + own for item, own in zip(items, made, strict=True)]
                scores = _penalised(logits.cpu(), rows, penalty)
            if writers:
                scores = torch.stack([w.bar(row) for w, row in zip(writers, scores, strict=True)])
            picked = self._pick(scores, how, draws)
            for row in sorted(open_rows):
                tokens[row].append(self._token(log_probs[row], picked[row], how, wanted, choices))
                made[row].append(picked[row])
                if writers:
                    writers[row].push(picked[row])
                if picked[row] in self.ends:
                    open_rows.discard(row)
            if not open_rows or step + 1 == how.max_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(items), 1)], dim=1)
            place = (last + 1 + step).view(1, -1, 1).expand(3, -1, 1)
            output = self.model(
                input_ids=torch.tensor(picked, device=mask.device)[:, None],
                attention_mask=mask,
                position_ids=place.to(mask.device),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
        decode = self.processor.tokenizer.decode
        texts = [decode([i for i in row if i not in self.ends], skip_special_tokens=True) for row in made]
        return [Reply(text, row) for text, row in zip(texts, tokens, strict=True)]

    def _writers(self, count: int, size: int, how: Ask) -> list[Writer]:
        if not how.fields:
            return []
        tokenizer = self.processor.tokenizer
        if self._inside is None:
            self._inside = writable(tokenizer, size, self._special_ids | self.ends)
        alphabet = Alphabet.of(tokenizer, how.fields, self._inside)
        return [Writer(alphabet, how.max_tokens, min(self.ends)) for _ in range(count)]

    def _pick(self, scores: Tensor, how: Ask, draws: list[np.random.Generator]) -> list[int]:
        if how.temperature <= 0:
            return scores.argmax(-1).tolist()
        cumulative = (scores.double() / how.temperature).softmax(-1).cumsum(-1).numpy()
        places = [
            int(np.searchsorted(row, draw.random() * row[-1])) for row, draw in zip(cumulative, draws, strict=True)
        ]
        return [min(place, scores.shape[-1] - 1) for place in places]

    def _token(self, row: Tensor, picked: int, how: Ask, wanted: Tensor, choices: dict[int, str]) -> Token:
        best = row.topk(min(how.top, len(row)))
        top: dict[str, float] = {}
        for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            top.setdefault(choices.get(i) or self._text(i), value)
        for i in wanted.tolist():
            top[choices[i]] = float(row[i])
        return Token(choices.get(picked) or self._text(picked), float(row[picked]), top)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.processor.tokenizer.decode([token])
        return self._texts[token]


def _penalised(logits: Tensor, rows: Sequence[list[int]], penalty: float) -> Tensor:
    """Logits [B, V] with those of the tokens in each row lowered (arXiv 1909.05858, section 4.1), by transformers."""
    from transformers import RepetitionPenaltyLogitsProcessor

    lower: Any = RepetitionPenaltyLogitsProcessor(penalty)
    return torch.cat([lower(torch.tensor([row]), own[None]) for row, own in zip(rows, logits, strict=True)])


def _starts(item: Encoded) -> list[int]:
    """Where the tokens of each picture begin: two pictures may stand side by side, so counted by their sizes."""
    places = item.kinds.nonzero()[:, 0].tolist()
    total = sum(int(grid.prod()) for grid in item.grids)
    starts, k = [], 0
    for grid in item.grids:
        starts.append(places[k])
        k += len(places) * int(grid.prod()) // total  # patches are merged by one factor everywhere
    return starts


def _cut(item: Encoded) -> int:
    """Where a question stops being common to its group: before its last picture (at 1 without pictures)."""
    starts = _starts(item)
    return max(1, starts[-1]) if starts else 1


def _prefix_key(item: Encoded, cut: int) -> str:
    """Equal exactly for equal tokens and equal pictures up to `cut`."""
    digest = hashlib.sha256(item.ids[:cut].numpy().tobytes())
    for start, name in zip(_starts(item), item.digests, strict=True):
        if start < cut:
            digest.update(name.encode())
    return digest.hexdigest()


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def fingerprint(model: torch.nn.Module) -> str:
    """A short digest of the weights: up to 4,096 evenly spaced values of each tensor, all of which training moves."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:12]
