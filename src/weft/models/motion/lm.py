"""OmniMoGen's model (arXiv 2512.19159): one causal LM over interleaved text and motion tokens, with its RVQ.

    folder/model_index.json, folder/weft.json, folder/rvq/, folder/statistics.json, folder/tokenizer/,
    folder/transformer/ (any causal LM, as transformers saves it), folder/heads/ (depth and base_only)

A record becomes rows of tokens turn by turn: a marker, the parts in order, an end marker. The last user turn is
answered by text, a movement, or both; only the instruction says which (`respond`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.media import atomic_write
from weft.models.motion.codec import Codec
from weft.models.motion.heads import HeadConfig, ResidualPredictor, make_head, save_head
from weft.models.motion.network import MotionNetwork
from weft.models.motion.reading import OWN, ROLE_WORDS, TEMPLATES, Reader, Rows, asked, read_vocabulary, wordless
from weft.models.motion.tokens import CLOSE, OPEN, Reply, Serialisation, code_names
from weft.models.tokenizers import warn_unknown
from weft.motion.clip import Motion
from weft.motion.files import load_part
from weft.record import Part, Record, Turn, motion_part, text_part
from weft.rng import seed_of
from weft.sample.tokens import Sampling, sample_tokens

PIPELINE = "OmniMoGenPipeline"


@dataclass(frozen=True, slots=True)
class TokenOptions:
    """`weft.json`'s `tokens`. `depth`, `residual`: sizes of the head (`HeadConfig`'s width, layers, heads).

    `window`: latent steps of the longest movement in one go; longer ones are continued from their last `overlap`
    steps. `words`: the longest text in tokens. The rest are the defaults of sampling.
    """

    serialisation: str = "flat"
    depth: dict[str, int] = field(default_factory=dict)
    residual: dict[str, int] = field(default_factory=dict)
    window: int = 49
    overlap: int = 8
    words: int = 96
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0


def make_options(given: dict[str, Any]) -> TokenOptions:
    """Raises WeftError for an unknown name."""
    known = [f.name for f in dataclasses.fields(TokenOptions)]
    for key in given:
        if key not in known:
            raise WeftError(f"tokens: unknown option {key!r}; known: {', '.join(known)}")
    options = TokenOptions(**given)
    if not 0 < options.overlap < options.window:
        raise WeftError(f"tokens: overlap {options.overlap} must be from 1 to below the window {options.window}")
    return options


class MotionLM:
    """The model: `codec`, `tokenizer` (extended), `transformer`, `head`. See `create` and `weft.models.motion.load`."""

    name = "omnimogen"

    def __init__(self, codec: Codec, tokenizer: Any, transformer: Any, options: TokenOptions, head: Any = None) -> None:
        self.codec, self.tokenizer, self.transformer, self.head = codec, tokenizer, transformer, head
        self.options = options
        self.vocabulary, markers = read_vocabulary(codec, tokenizer, options.serialisation)
        self.serial = Serialisation(options.serialisation, self.vocabulary)
        limit = int(getattr(transformer.config, "max_position_embeddings", 0) or 1 << 30)
        self.reader = Reader(codec, tokenizer, self.serial, markers, limit)
        needed = {"depth": "depth", "base_only": "residual"}.get(options.serialisation)
        found = head.config.kind if head is not None else None
        if found != needed:
            raise WeftError(f"serialisation {options.serialisation} needs the head {needed}, the folder has {found}")
        rows = transformer.get_input_embeddings().weight.shape[0]
        if rows < len(tokenizer):
            raise WeftError(f"transformer: {rows} embeddings for {len(tokenizer)} tokens; build the model again")
        self.network = MotionNetwork(transformer, self.serial, head)

    @classmethod
    def create(cls, codec: Codec, tokenizer: Any, transformer: Any, options: dict[str, Any]) -> MotionLM:
        """A model whose vocabulary is extended here: markers and codes behind the tokenizer's own tokens.

        New embeddings begin with the deviation of the old ones. Raises WeftError for unknown options, and for a
        transformer whose logits would not be those of its own class.
        """
        made = make_options(options)
        levels = 1 if made.serialisation == "base_only" else codec.config.levels
        known = set(tokenizer.get_vocab())
        own = () if any(mark in known for mark, *_ in TEMPLATES) else OWN
        names = [*own, OPEN, CLOSE, *code_names(levels, codec.config.codes)]
        clash = [name for name in names if name in known]
        if clash:
            raise WeftError(f"the tokenizer knows {clash[0]} already: give the tokenizer of a plain language model")
        tokenizer.add_tokens(names, special_tokens=True)
        size = transformer.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > size:
            with torch.no_grad():
                std = float(transformer.get_input_embeddings().weight.float().std())
                transformer.resize_token_embeddings(len(tokenizer), mean_resizing=False)
                for table in {id(t): t for t in (transformer.get_input_embeddings().weight,
                                                 transformer.get_output_embeddings().weight)}.values():  # fmt: skip
                    table[size:].normal_(0.0, std)
        kind = {"depth": "depth", "base_only": "residual"}.get(made.serialisation)
        head = None
        if kind is not None:
            width = transformer.get_input_embeddings().weight.shape[1]
            sizes = getattr(made, kind)
            head = make_head(HeadConfig(kind, width, codec.config.levels, codec.config.codes, **sizes))
        model = cls(codec, tokenizer, transformer, made, head)
        model.network.check_logits()
        return model

    def modules(self) -> dict[str, nn.Module]:
        """The networks by their folders' names."""
        found = {"rvq": self.codec.rvq, "transformer": self.transformer}
        return found | ({"heads": self.head} if self.head is not None else {})

    def respond(self, records: Sequence[Record], *, seeds: Sequence[int], options: Any = None) -> list[list[Part]]:
        """The assistant's parts that answer each record's last user turn: texts, and motion parts holding a `Motion`.

        A movement comes unless `record.task` is "describe" (text alone) or "reflect" (as the model decides).
        `options` has `seconds` (None: as long as the model finds right), `temperature`, `top_k`, `top_p`, `guidance`,
        None being the model's default (see `weft.api_motion.MotionOptions`). Answer k is a function of record k, seed
        k and the options. Raises WeftError for what cannot be read.
        """
        said = [p.text for record in records for turn in record.turns for p in turn.parts if p.text]
        warn_unknown(self.tokenizer, said)
        seconds = getattr(options, "seconds", None)
        texts, codes = self.generate(records, seeds=seeds, seconds=seconds, sampling=self.sampling(options))
        clips = iter(self.codec.decode([c for c in codes if c is not None]))
        answers = []
        for text, own in zip(texts, codes, strict=True):
            parts = [text_part(text)] if text else []
            answers.append(parts + ([motion_part(next(clips))] if own is not None else []))
        return answers

    def generate_motion(self, records: Sequence[Record], seeds: Sequence[int], options: Any = None) -> list[Motion]:
        """The movements alone, one a record. Raises WeftError where the task makes none."""
        answers = self.respond(records, seeds=seeds, options=options)
        found = [next((p.value for p in parts if p.type == "motion"), None) for parts in answers]
        if None in found:
            raise WeftError(f"record {records[found.index(None)].id} was answered without a movement; use respond")
        return [clip for clip in found if clip is not None]

    def describe(self, records: Sequence[Record], seeds: Sequence[int] | None = None, options: Any = None) -> list[str]:
        """The texts that answer the records, whatever their task is called."""
        asked_for = [dataclasses.replace(record, task="describe") for record in records]
        answers = self.respond(asked_for, seeds=seeds or [0] * len(records), options=options)
        return ["".join(p.text or "" for p in parts).strip() for parts in answers]

    def timeline(
        self, scenes: Sequence[tuple[str | Sequence[Part], float]], *, seed: int = 0, options: Any = None,
        start: Motion | None = None,
    ) -> Motion:  # fmt: skip
        """One movement of several instructions, (text or parts, seconds) each: every scene goes on from the codes of
        the one before, the first from those of `start`, and all are decoded together, so nothing jumps. Raises
        WeftError for no scenes, a scene below 0.2 s, or a start that holds no code."""
        if not scenes:
            raise WeftError("timeline: no scenes; give at least one (text, seconds)")
        codes = torch.empty((0, self.codec.config.levels), dtype=torch.long)
        if start is not None:
            codes = self.codec.encode([start])[0]
            if not len(codes):
                raise WeftError(f"timeline: a start of {start.seconds:.2g} s is too short to go on from; give 0.4 s")
        for k, (said, seconds) in enumerate(scenes):
            parts = [text_part(said)] if isinstance(said, str) else list(said)
            record = Record(f"scene-{k}", "generate", [Turn("user", parts)])
            more = self._moved([record], [codes], [self._steps(seconds)], [seed_of(seed, "scene", k)],
                               self.sampling(options))  # fmt: skip
            codes = more[0]
        return self.codec.decode([codes])[0]

    def sampling(self, options: Any) -> Sampling:
        """The options, the model's own defaults where they are None."""

        def one(name: str) -> Any:
            given = getattr(options, name, None)
            return getattr(self.options, name) if given is None else given

        return Sampling(one("temperature"), one("top_k"), one("top_p"), one("guidance"))

    def _steps(self, seconds: float) -> int:
        steps = round(seconds * self.codec.steps_per_second)
        if steps < 1:
            raise WeftError(f"{seconds:g} seconds: the shortest movement is {1 / self.codec.steps_per_second:g} s")
        return steps

    def generate(
        self,
        records: Sequence[Record],
        *,
        seeds: Sequence[int],
        seconds: float | None = None,
        sampling: Sampling | None = None,
        cache: bool = True,
    ) -> tuple[list[str], list[Tensor | None]]:
        """Texts and codes [t, L] (None: no movement) that answer the records."""
        sampling = sampling or self.sampling(None)
        window = self.options.window
        steps = None if seconds is None else self._steps(seconds)
        self._check_ends(records, seconds)
        least, most = (1, window) if steps is None else (min(steps, window), min(steps, window))
        grammars = []
        for record in records:
            kind = {"describe": "never", "reflect": "may"}.get(record.task, "must")
            grammars.append(Reply(self.serial, motion=kind, words=self.options.words, least=least, most=most))
        prompts = self.reader.encode(records, answers=False)
        rows = self._sample(prompts, grammars, seeds, sampling, cache)
        texts = [self._text(r) for r in rows]
        codes = self._codes(prompts, rows)
        if steps is not None and steps > window:
            long = [k for k, own in enumerate(codes) if own is not None]
            begun = [own for own in codes if own is not None]
            more = self._moved(
                [records[k] for k in long], begun, [steps - len(c) for c in begun], [seeds[k] for k in long], sampling
            )
            for k, own in zip(long, more, strict=True):
                codes[k] = own
        return texts, codes

    def _check_ends(self, records: Sequence[Record], seconds: float | None) -> None:
        """A movement between a start and an end holds both and is made in one go: whether `seconds` allow that."""
        longest = self.options.window / self.codec.steps_per_second
        for record in records:
            parts = [p for p in asked(record)[-1].parts if p.role in ROLE_WORDS and p.type == "motion"]
            given = sum(load_part(part, record.root, fps=None).seconds for part in parts)
            if parts and not (given < (seconds or longest) <= longest):
                wanted = f"{seconds:g} s are asked for and " if seconds is not None else ""
                raise WeftError(
                    f"record {record.id}: {wanted}start and end are {given:.3g} s, this model makes {longest:.3g} s in "
                    "one go, both included: shorten them, or change the seconds"
                )

    def _moved(
        self, records: Sequence[Record], codes: Sequence[Tensor], steps: Sequence[int], seeds: Sequence[int],
        sampling: Sampling,
    ) -> list[Tensor]:  # fmt: skip
        """Movements continued by so many latent steps each, window by window, every record's prompt before its last
        `overlap` steps."""
        done, left = list(codes), list(steps)
        prompts = self.reader.encode(records, answers=False)
        wide = self.serial.levels if self.serial.name == "flat" else 1
        round_ = 0
        while any(left):
            rest = [k for k in range(len(done)) if left[k]]
            given, grammars, keeps, begun = [], [], [], []
            for k in rest:
                keep = min(self.options.overlap, len(done[k]))
                take = min(left[k], self.options.window - keep)
                grammar = Reply(self.serial, motion="must", words=0, least=keep + take, most=keep + take)
                prefix = self.serial.rows(done[k][-keep:])[: 1 + keep * wide] if keep else torch.empty(0)
                prefix = prefix.view(-1, self.serial.columns).long()
                grammar.prime(prefix)
                given.append(Rows(torch.cat([prompts[k].rows, prefix]),
                                  torch.cat([prompts[k].kind, torch.zeros(len(prefix), dtype=torch.uint8)]),
                                  prompts[k].above))  # fmt: skip
                grammars.append(grammar)
                keeps.append(keep)
                begun.append(prefix)
                left[k] -= take
            own = [seed_of(seeds[k], "window", round_) for k in rest]
            rows = self._sample(given, grammars, own, sampling, True)
            whole = [torch.cat([b, r]) for b, r in zip(begun, rows, strict=True)]
            found = self._codes([prompts[k] for k in rest], whole)
            for k, keep, new in zip(rest, keeps, found, strict=True):
                assert new is not None
                done[k] = torch.cat([done[k][: len(done[k]) - keep], new])
            round_ += 1
        return done

    def _sample(
        self, prompts: Sequence[Rows], grammars: Sequence[Reply], seeds: Sequence[int], sampling: Sampling, cache: bool
    ) -> list[Tensor]:
        for module in self.modules().values():
            module.eval()
        negative = [p.rows[wordless(p.kind)] for p in prompts] if sampling.guidance > 1 else None
        given = [p.rows for p in prompts]
        return sample_tokens(
            self.network, given, grammars, seeds, sampling=sampling, negative=negative, cache=cache
        )  # fmt: skip

    def _text(self, rows: Tensor) -> str:
        column = rows[:, 0]
        ids = column[(column >= 0) & (column < self.vocabulary.text)].tolist()
        return self.tokenizer.decode([i for i in ids if i not in self.vocabulary.special]).strip()

    def _codes(self, prompts: Sequence[Rows], rows: Sequence[Tensor]) -> list[Tensor | None]:
        """The codes of each answer, with base_only's upper levels predicted."""
        found: list[Tensor | None] = []
        for prompt, own in zip(prompts, rows, strict=True):
            starts = (own[:, 0] == self.vocabulary.open).nonzero()
            if not len(starts):
                found.append(None)
                continue
            start = int(starts[0])
            stop = len(own) - int(own[-1, 0] == self.vocabulary.end)
            codes = self.serial.codes(own[start:stop])
            if self.serial.name == "base_only":
                codes = self._predicted(torch.cat([prompt.rows, own[:stop]]), len(prompt.rows) + start + 1, codes)
            found.append(codes)
        return found

    @torch.no_grad()
    def _predicted(self, rows: Tensor, first: int, codes: Tensor) -> Tensor:
        assert isinstance(self.head, ResidualPredictor)
        hidden = self.network.hidden(rows[None], torch.ones((1, len(rows)), dtype=torch.long))
        state = hidden[:, first : first + len(codes)]
        return self.head.complete(state.float(), codes[None, :, 0].to(state.device))[0].cpu()

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder layout above; floating-point weights as `dtype` if given."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.codec.save(folder, dtype)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        own = next(self.transformer.parameters()).dtype
        (self.transformer if dtype is None else self.transformer.to(dtype)).save_pretrained(folder / "transformer")
        self.transformer.to(own)
        if self.head is not None:
            save_head(self.head, folder / "heads", dtype)
        card = {"tokens": dataclasses.asdict(self.options)}
        for name, value in (("weft.json", card), ("model_index.json", {"_class_name": PIPELINE})):
            with atomic_write(folder / name) as handle:
                handle.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
