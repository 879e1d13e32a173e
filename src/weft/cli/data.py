"""`weft data check|show|convert`: look at records before a model does."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from weft.cli.motion import MotionFiles
from weft.cli.options import MOVEMENTS, File, check_file, check_folder, refuse
from weft.errors import WeftError

if TYPE_CHECKING:
    from weft.motion.viewer import Scene
    from weft.record import Record
    from weft.report.page import Comparison


@dataclass
class Check:
    """Read every record, picture and movement, and name what is wrong. Exit status 1 if anything is."""

    path: Positional[Path]
    """A JSONL file of records."""
    out: Annotated[File, tyro.conf.arg(aliases=["-o"], metavar="FILE.jsonl")] = None
    """Write the records that can be used; media stay where they are, or are copied into another folder."""

    def run(self) -> int:
        check_file(self.path, "records file")
        if self.out is not None:
            if self.out.suffix != ".jsonl" or self.out.absolute() == self.path.absolute():
                raise WeftError(f"{self.out}: name another file for the usable records, with the suffix .jsonl")
            check_folder(self.out.parent)
        from weft.data.check import check_records
        from weft.record import write_records

        report = check_records(self.path)
        print(report)
        if self.out is not None:
            if not report.usable:
                raise WeftError(f"{self.path}: no record can be used, nothing is written to {self.out}")
            beside = self.out.absolute().parent == self.path.absolute().parent
            write_records(self.out, report.usable, media="keep" if beside else "copy")
            print(self.out)
        return 1 if report.faults else 0


@dataclass
class Show:
    """An HTML page of records: inputs, instruction, target. Movements play in it; where a file holds pictures, too,
    they have a second page (NAME-motion.html)."""

    path: Positional[Path]
    """A JSONL file of records, or a motion file."""
    out: Annotated[File, tyro.conf.arg(aliases=["-o"])] = None
    """The page to write; default: beside the file, with the suffix .html."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 50
    """How many records, from the first."""
    start: int = 0
    """The first record to show."""

    def run(self) -> int:
        check_file(self.path, "records file")
        out = self.out or self.path.with_suffix(".html")
        if out.suffix.lower() != ".html":
            raise WeftError(f"{out}: a page is written; name it .html")
        if self.count < 1 or self.start < 0:
            raise WeftError(f"--count {self.count} --start {self.start}: show 1 record or more, from number 0 on")
        check_folder(out.parent)
        from weft.record import MOTION_SUFFIXES, read_records

        if self.path.suffix.lower() in MOTION_SUFFIXES:
            from weft.motion import read_motion
            from weft.motion.viewer import write_viewer

            write_viewer([read_motion(self.path).placed()], out, title=self.path.name)
            print(out)
            return 0

        records = list(itertools.islice(read_records(self.path), self.start, self.start + self.count))
        if not records:
            raise WeftError(f"{self.path}: no record from number {self.start} on; lower --start")
        moving = [r for r in records if any(p.type == "motion" for turn in r.turns for p in turn.parts)]
        still = [r for r in records if r not in moving]
        if still:
            from weft.report.page import Page

            page = Page(f"{self.path.name}", facts={"file": str(self.path), "records shown": len(still)})
            page.section("Records").comparisons([_card(record) for record in still])
            print(page.write(out))
        if moving:
            from weft.motion.viewer import write_viewer

            place = out.with_stem(f"{out.stem}-motion") if still else out
            write_viewer([_scene(record) for record in moving], place, title=self.path.name)
            print(place)
        return 0


@dataclass
class Convert:
    """Write any source as weft's own records: one JSONL file with the media beside it. With another suffix of -o, or
    --to, motion files become other motion files."""

    source: Positional[Path]
    """What to read: a JSONL file, a text file of prompts, a folder of pairs, parquet files, webdataset shards,
    motion files."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE.jsonl|FILE|FOLDER")]
    """The records file to write (media go into the folder beside it), or the motion file or folder."""
    kind: Literal["jsonl", "prompts", "folder", "parquet", "webdataset", "motion", "humanml3d"] = "jsonl"
    """The source's kind."""
    map: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[FIELD=COLUMN ...]")] = ()
    """Which column of the source holds which field, as instruction=prompt."""
    option: Annotated[list[str], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = field(
        default_factory=list
    )
    """An option of the source's kind; can be repeated."""
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """The task of all records (generate, edit ...); default: what each record has pictures for."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Stop after so many records."""
    hold: Annotated[float | None, tyro.conf.arg(metavar="SHARE", help_behavior_hint="")] = None
    """Keep this share apart, for validation, in held_out.jsonl beside the records; takes are not torn."""
    media: Literal["copy", "keep"] = "copy"
    """copy: media travel with the records; keep: refer to them where they lie."""

    motion: OmitArgPrefixes[MotionFiles] = field(default_factory=MotionFiles)

    def run(self) -> int:
        if self.kind not in ("parquet", "webdataset") and not self.source.exists():  # those take patterns
            raise WeftError(f"source {self.source} does not exist")
        if self.motion.to is not None or self.out.suffix.lower() in MOVEMENTS:
            refuse(self, ("source", "out", "motion"), "for motion files")
            return self.motion.run(self.source, self.out)
        if self.out.suffix != ".jsonl":
            raise WeftError(
                f"{self.out}: records are written as .jsonl, movements as {', '.join(MOVEMENTS)} or with --to into a "
                "folder; name such a file with -o"
            )
        refuse(self.motion, (), "for records; give such options to --kind motion with --option")
        held = self.out.with_name("held_out.jsonl")
        for path in (self.out, held) if self.hold is not None else (self.out,):
            if path.absolute() == self.source.absolute():
                raise WeftError(f"{path} is the source; write the records elsewhere")
        if self.hold is not None and self.out == held:
            raise WeftError(f"{held} is where --hold puts its share; name another -o")
        check_folder(self.out.parent)
        from weft.data.sources import SourceConfig, hold_out, load_source
        from weft.record import write_records

        config = SourceConfig(
            kind=self.kind,
            path=str(self.source),
            map=_pairs(self.map, "--map"),
            limit=self.limit,
            task=self.task,
            options=_pairs(self.option, "--option"),
        )
        records = load_source(config)
        files = {self.out: records}
        if self.hold is not None:
            files[self.out], files[held] = hold_out(records, self.hold)
        for note in getattr(records, "notes", []):
            print(f"note: {note}", file=sys.stderr)
        for fault in getattr(records, "faults", []):
            print(f"left out: {fault}", file=sys.stderr)
        for path, part in files.items():
            write_records(path, part, media=self.media)
            print(path)
            print(f"{len(part)} records", file=sys.stderr)
        return 0


def _pairs(words: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise WeftError(f"{option} {word!r} is not KEY=VALUE")
        pairs[key] = value
    return pairs


def _scene(record: Record) -> Scene:
    """A record's movements side by side, under all that is said."""
    from weft.motion import load_part
    from weft.motion.viewer import MOST, Scene

    parts = [(turn.role, part) for turn in record.turns for part in turn.parts]
    moves = [(role, part) for role, part in parts if part.type == "motion"]
    if len(moves) > MOST:  # the beginning and the end of a long chain
        moves = [*moves[: MOST - 1], moves[-1]]
    names = [
        part.role or ("target" if role == "assistant" else f"motion {k}") for k, (role, part) in enumerate(moves, 1)
    ]
    words = " / ".join(f"{part.text}" for _, part in parts if part.type == "text" and (part.text or "").strip())
    clips = [load_part(part, record.root, fps=None) for _, part in moves]
    return Scene(clips, names, title=record.id, text=f"{record.task}: {words}")


def _card(record: Record) -> Comparison:
    """A record as pictures side by side under its instruction."""
    from weft.report.page import Comparison

    labels = [("source" if part is record.source else f"picture {k}", part) for k, part in enumerate(record.inputs, 1)]
    labels += [("mask", record.mask)] if record.mask else []
    labels += [("target", part) for part in record.targets]
    pictures = [(label, record.load(part)) for label, part in labels if part.type == "image"]
    return Comparison(record.instruction, pictures, detail=f"{record.id} · {record.task}")
