"""The instruction rewriter of DreamOmni2 (arXiv 2510.06679, section 3.2): a VLM turns a loose request into the form
that the adapters were trained on.

The diffusion model reads the rewritten text alone; nothing else passes between the two. Prompt, suffixes and greedy
decoding (with the repetition penalty of the VLM's own generation settings) are those of dvlab-research/DreamOmni2,
inference_{edit,gen}.py. Any Qwen2.5-VL-class model will do, in this process or behind an OpenAI-compatible server; only
one that was trained to (see `rewriter_training`) answers in form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.models.image.flux_kontext import KONTEXT_FORMATS
from weft.models.weights import licence_note, read_json
from weft.record import Record, Turn, image_part, text_part
from weft.vlm.ask import VLM, Ask, Question, Reply
from weft.vlm.structured import read_fields

if TYPE_CHECKING:
    from PIL import Image

EDITING, GENERATION = " It is editing task.", " It is generation task."
WHEN = ("off", "on", "several")
FIELDS = ("instruction", "caption")
PAIR = re.compile(r"\[instruction\]: (.*), \[caption\]: (.*)", re.DOTALL)
TAG = re.compile(r"<\s*(\w+)\s*>(.*?)<\s*/\s*\1\s*>", re.DOTALL)
CUT = re.compile(r"<\s*\w+\s*>(.*?)(?:<\s*/\s*\w*\s*>?)?", re.DOTALL)
"""An answer that ends before or within its closing tag, or with that of another name."""


def parse(answer: str, *, strict_slice: bool = False) -> str:
    """The standardised text inside an answer.

    `strict_slice` drops the first 6 and the last 7 characters, as the release does, whatever they are. Otherwise the
    inside of the first pair of tags, whatever their name; a closing tag that is missing or torn (a cut answer) is no
    fault where the answer begins with a tag; a JSON object's `instruction` and `caption`; and without either the
    whole answer.
    """
    if strict_slice:
        return answer[6:-7]
    text = answer.strip()
    fenced = re.fullmatch(r"```\w*\s*(.*?)\s*```", text, re.DOTALL)
    text = fenced[1] if fenced else text
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except ValueError:
            return text
        return standard(str(found.get("instruction") or ""), str(found.get("caption") or ""))
    if match := TAG.search(text):
        return match[2].strip()
    match = CUT.fullmatch(text)
    return (match[1] if match else text).strip()


def standard(instruction: str, caption: str) -> str:
    """The structured text of an edit, instruction and caption; of a generation, the caption alone."""
    return f"[instruction]: {instruction}, [caption]: {caption}" if instruction and caption else instruction or caption


@dataclass(frozen=True, slots=True)
class Form:
    """How a rewriter answers, and is trained to: a folder keeps it in its `weft.json` under `rewriter`.

    `fit`: "kontext" stretches the pictures it sees to their FLUX Kontext formats, as DreamOmni2's release does; "none"
    leaves them. `structured`: it writes a JSON object, `edit_fields` of an edit and `caption` of a generation, enforced
    by the back-end; otherwise free text inside a pair of tags, read by `parse`.
    """

    fit: str = "kontext"
    structured: bool = False
    edit_fields: tuple[str, ...] = FIELDS

    def __post_init__(self) -> None:
        if self.fit not in ("kontext", "none"):
            raise WeftError(f"rewriter: fit {self.fit!r} is unknown; choose kontext or none")
        if not self.edit_fields or not set(self.edit_fields) <= set(FIELDS):
            raise WeftError(f"rewriter: edit_fields are some of {', '.join(FIELDS)}, not {list(self.edit_fields)}")

    def fields(self, record: Record) -> tuple[str, ...]:
        """The fields of a structured answer about this record."""
        return ("caption",) if record.source is None else self.edit_fields


def split_standard(text: str, fields: Sequence[str]) -> dict[str, str]:
    """The `fields` of a standardised text, the inverse of `standard`. Raises WeftError if it has others."""
    match = PAIR.fullmatch(text.strip())
    found = {"instruction": match[1], "caption": match[2]} if match else {fields[0]: text.strip()}
    if set(found) != set(fields):
        raise WeftError(f"the standardised text {text[:60]!r} does not have the fields {', '.join(fields)}")
    return {name: found[name] for name in fields}


def question(record: Record, fit: str = "kontext") -> Question:
    """What the VLM is asked: all pictures in order, then the instruction and the task's suffix, in one user turn.

    `fit`: see `Form`.
    """
    text = record.instruction_as("image {k}") + (GENERATION if record.source is None else EDITING)
    pictures = [record.load(part) for part in record.inputs]
    if fit == "kontext":
        pictures = [stretch_to_format(picture) for picture in pictures]
    return [Turn("user", [*(image_part(picture) for picture in pictures), text_part(text)])]


def stretch_to_format(picture: Image.Image) -> Image.Image:
    """The picture stretched (Lanczos) to the FLUX Kontext format of the nearest aspect ratio."""
    from PIL import Image as Pillow

    aspect = picture.width / picture.height
    size = min(KONTEXT_FORMATS, key=lambda size: (abs(aspect - size[0] / size[1]), size[0]))  # (width, height)
    return picture if picture.size == size else picture.resize(size, Pillow.Resampling.LANCZOS)


def with_instruction(record: Record, text: str) -> Record:
    """The record asking for `text` in place of its instruction: media as they are, none of them woven any more."""
    turns = list(record.turns)
    at = max(k for k, turn in enumerate(turns) if turn.role == "user")
    media = [part for part in turns[at].parts if part.type != "text"]
    turns[at] = Turn("user", [*media, text_part(""), text_part(text)] if media else [text_part(text)])
    return replace(record, turns=turns)


class Rewriter:
    """Rewrites records with a VLM. `when`: "on", "off", or "several": only requests with two pictures or more, for
    which the adapters are there. `strict_slice`: see `parse`. `licence`: what is known of the VLM's, to be shown."""

    def __init__(
        self,
        vlm: VLM,
        *,
        when: str = "on",
        strict_slice: bool = False,
        form: Form | None = None,
        max_tokens: int = 4096,
        licence: str | None = None,
    ) -> None:
        if when not in WHEN:
            raise WeftError(f"rewriter: {when!r} is unknown; choose {', '.join(WHEN)}")
        self.vlm, self.when, self.strict_slice, self.max_tokens = vlm, when, strict_slice, max_tokens
        self.form = form or Form()
        self.licence = licence
        if strict_slice and self.form.structured:
            raise WeftError("rewriter: strict_slice cuts tags off, and a structured answer has none; leave one out")

    def applies(self, record: Record) -> bool:
        """Whether this record is rewritten."""
        pictures = len(record.inputs)
        return self.when == "on" and pictures > 0 or self.when == "several" and pictures > 1

    def rewrite(self, records: Sequence[Record]) -> list[Record]:
        """The records, those that `applies` holds for with the rewritten instruction; the user's own is kept in
        `meta["asked"]`. Raises WeftError for a failed or empty answer: the text is never guessed."""
        chosen = [k for k, record in enumerate(records) if self.applies(record)]
        out = list(records)
        if not chosen:
            return out
        for k, reply in zip(chosen, self._ask([records[k] for k in chosen]), strict=True):
            if reply.error is not None:
                raise WeftError(f"record {records[k].id}: the rewriter failed ({reply.error})")
            text = self._read(records[k], reply.text).strip()
            if not text:
                raise WeftError(
                    f"record {records[k].id}: the rewriter wrote nothing ({reply.text[:60]!r}); switch it off"
                )
            asked = {"asked": records[k].instruction}
            out[k] = replace(with_instruction(records[k], text), meta={**records[k].meta, **asked})
        return out

    def _ask(self, records: Sequence[Record]) -> list[Reply]:
        """One reply for each record, in order; those of one form are asked together."""
        replies: dict[int, Reply] = {}
        forms = [self.form.fields(record) if self.form.structured else () for record in records]
        for fields in dict.fromkeys(forms):
            rows = [k for k, own in enumerate(forms) if own == fields]
            how = Ask(max_tokens=self.max_tokens, fields=fields, top=0)
            asked = self.vlm.ask([question(records[k], self.form.fit) for k in rows], how)
            replies |= dict(zip(rows, asked, strict=True))
        return [replies[k] for k in range(len(records))]

    def _read(self, record: Record, answer: str) -> str:
        if not self.form.structured:
            return parse(answer, strict_slice=self.strict_slice)
        try:
            found = read_fields(answer, self.form.fields(record))
        except ValueError as error:
            raise WeftError(
                f"record {record.id}: the rewriter did not keep to the form ({error}): {answer[:60]!r}; does its "
                "server offer structured output?"
            ) from error
        return standard(found.get("instruction", ""), found.get("caption", ""))


def open_vlm(
    where: str | Path, *, model: str | None = None, key_env: str | None = None, device: Any = None, dtype: Any = None
) -> VLM:
    """A VLM by the address of an OpenAI-compatible server (`model` is its name there), folder or hub id."""
    where = str(where)
    if _is_address(where):
        from weft.vlm.remote import RemoteVLM

        if model is None:
            raise WeftError(f"{where}: name the model on that server")
        return RemoteVLM(where, model, key_env=key_env)
    from weft.vlm.local import load_vlm

    return load_vlm(vlm_folder(where), device=device, dtype=dtype)


def vlm_licence(where: str | Path, model: str | None = None) -> str | None:
    """What is known about the licence of a VLM, by its folder or hub id; of one on a server by its name there."""
    return licence_note(model or "" if _is_address(where) else where)


def vlm_folder(where: str | Path) -> Path:
    """The VLM's own folder of a folder or hub id: inside a DreamOmni2 release, or the one that a MetaQuery model reads
    with. Raises WeftError if there is none, as in a MetaQuery release, which does not say what it reads with."""
    from weft.models.image.metaquery_parts import find_vlm
    from weft.models.load import find_model

    folder = find_model(str(where if Path(where).is_dir() else find_vlm(str(where), Path())))
    if (folder / "conditioner").is_dir():
        named = read_json(folder / "weft.json").get("options", {}).get("vlm", "")
        if not named and not (folder / "vlm").is_dir():
            raise WeftError(
                f"{where}: a MetaQuery model that neither holds nor names its VLM: give the VLM's own folder or hub id "
                "in its place (released models read with Qwen/Qwen2.5-VL-7B-Instruct)"
            )
        return find_vlm(str(named), folder)
    return folder / "vlm-model" if (folder / "vlm-model").is_dir() else folder


def open_rewriter(
    where: str | Path,
    *,
    when: str = "on",
    strict_slice: bool = False,
    fit: str | None = None,
    structured: bool | None = None,
    edit_fields: Sequence[str] | None = None,
    max_tokens: int = 4096,
    model: str | None = None,
    key_env: str | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Rewriter:
    """A `Rewriter` on the VLM at `where` (see `open_vlm`). `fit`, `structured` and `edit_fields` make its `Form`; None
    takes what the VLM's folder says, else the defaults."""
    licence = vlm_licence(where, model)
    where = where if _is_address(where) else vlm_folder(where)
    own = {} if _is_address(where) else read_json(Path(where) / "weft.json").get("rewriter", {})
    given = {"fit": fit, "structured": structured, "edit_fields": None if edit_fields is None else tuple(edit_fields)}
    chosen = {**own, **{key: value for key, value in given.items() if value is not None}}
    if set(chosen) - set(given):
        raise WeftError(f"{where}: weft.json: rewriter has {', '.join(chosen)}; known: {', '.join(given)}")
    form = Form(**{**chosen, "edit_fields": tuple(chosen.get("edit_fields", FIELDS))})
    vlm = open_vlm(where, model=model, key_env=key_env, device=device, dtype=dtype)
    return Rewriter(vlm, when=when, strict_slice=strict_slice, form=form, max_tokens=max_tokens, licence=licence)


def _is_address(where: str | Path) -> bool:
    return str(where).startswith(("http://", "https://"))
