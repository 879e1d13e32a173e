"""Run a model over records, in batches, into a results folder that survives interruption and needs no model to
be scored again.

A results folder holds `run.json` (settings: what must be equal for results to be comparable), the outputs as files
(`images/*.png`; movements: `weft.evals.motion_answers`) and `results.jsonl`, one line for each finished record: its
key, seed, output (with its digest) and score. A line is written after its output is in place, so whatever the file
names exists; a line torn by a crash is dropped on opening and its record is run again.

Two things depend on what is made, and are given: a `Drawing` makes the outputs of a batch, a `Medium` keeps them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from weft.errors import WeftError
from weft.media import atomic_write, save_image
from weft.rng import seed_of

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Record
    from weft.types import FlowModel, TokenModel

Row = dict[str, Any]
Scorer = Callable[[str, "Record", Any], dict[str, Any]]
"""(key, record, output) -> JSON values."""
Extra = Callable[[Any, Sequence[str], Sequence["Record"]], list[dict[str, Any]]]
"""(model, keys, records) -> further facts of each row."""
T = TypeVar("T")


@dataclass(slots=True)
class Output(Generic[T]):
    """What was made for one record (a picture; the parts of each answered turn), and its seed."""

    record: Record
    made: T
    seed: int


class Drawing(Protocol):
    """How outputs are drawn from a model: options of sampling that know how to sample."""

    @property
    def batch_size(self) -> int: ...

    def facts(self) -> dict[str, Any]:
        """What determines the outputs: all but the batch size, on which no output depends."""
        ...

    def draw(self, model: Any, records: Sequence[Record]) -> Iterator[Output[Any]]:
        """One output for each record, in order, as batches finish."""
        ...


class Medium(Protocol):
    """How outputs are kept in a results folder."""

    def keep(self, folder: Path, name: str, made: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Write an output's files, `name` being their stem; returns the facts of its row, which name them."""
        ...

    def read(self, folder: Path, row: Row) -> Any:
        """The output of a row, verified against its digests."""
        ...


@dataclass(slots=True, frozen=True)
class Sampling:
    """How outputs are drawn. `guidance` above 1 adds a pass with `negative` as the instruction (CFG); `solver` is one
    of `weft.sample.solvers.SOLVERS`."""

    steps: int = 28
    guidance: float = 1.0
    negative: str = ""
    seed: int = 0
    batch_size: int = 32
    solver: str = "euler"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise WeftError(f"steps ({self.steps}) and batch_size ({self.batch_size}) must be at least 1")

    def facts(self) -> dict[str, Any]:
        """What determines the outputs: all but the batch size, on which no output depends. The usual solver goes
        without saying, as in results that are older than the choice."""
        silent = ("batch_size", "solver") if self.solver == "euler" else ("batch_size",)
        return {name: value for name, value in asdict(self).items() if name not in silent}

    def draw(self, model: FlowModel, records: Sequence[Record]) -> Iterator[Output[Image.Image]]:
        """`outputs` with these options."""
        return outputs(model, records, self)


def outputs(
    model: FlowModel, records: Sequence[Record], sampling: Sampling | None = None
) -> Iterator[Output[Image.Image]]:
    """One output for each record, in order, as batches finish. A batch may mix tasks, sizes and reference counts.

    An output's seed is a function of (`sampling.seed`, record id) and of nothing else.
    """
    from weft.sample.rollout import sample_flow

    sampling = sampling or Sampling()
    for start in range(0, len(records), sampling.batch_size):
        batch = [records[i] for i in range(start, min(start + sampling.batch_size, len(records)))]
        seeds = [seed_of(sampling.seed, "output", record=record.id) for record in batch]
        rollout = sample_flow(
            model,
            model.encode(batch),
            steps=sampling.steps,
            guidance=sampling.guidance,
            solver=sampling.solver,
            negative=model.encode(batch, negative=sampling.negative) if sampling.guidance > 1 else None,
            seeds=seeds,
        )
        images = rollout.outputs or model.decode(rollout.latents, rollout.sizes)
        for record, image, seed in zip(batch, images, seeds, strict=True):
            yield Output(record, image, seed)


class Pictures:
    """Pictures as images/NAME.png: a `Medium`."""

    def keep(self, folder: Path, name: str, made: Image.Image, metadata: Mapping[str, Any]) -> dict[str, Any]:
        path = f"images/{name}.png"
        (folder / "images").mkdir(exist_ok=True)
        save_image(made, folder / path, dict(metadata))
        return {"image": path, "sha256": hashlib.sha256((folder / path).read_bytes()).hexdigest()}

    def read(self, folder: Path, row: Row) -> Image.Image:
        import io

        from PIL import Image

        return Image.open(io.BytesIO(kept_bytes(folder / row["image"], row["sha256"]))).convert("RGB")


PICTURES = Pictures()


def kept_bytes(path: Path, digest: str) -> bytes:
    """A file of a results folder. Raises `WeftError` if it is not what was recorded."""
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        raise WeftError(f"{path}: {'changed since' if data else 'missing, but'} it was recorded; run it again")
    return data


class Results:
    """A results folder, opened for going on or for reading; `rows` maps keys to finished rows, in file order."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None, medium: Medium = PICTURES):
        """Open `folder`, or create it for `settings`; without settings it must exist. `medium` keeps the outputs.

        Raises:
            WeftError: no results there; results of other settings (named), which would mix two runs.
        """
        self.folder, self.medium = Path(folder), medium
        manifest = self.folder / "run.json"
        if manifest.exists():
            self.settings: dict[str, Any] = json.loads(manifest.read_text("utf-8"))
            if settings is not None:
                _compare(self.folder, self.settings, json.loads(json.dumps(settings)))
        elif settings is None:
            raise WeftError(f"{self.folder}: no results here (run.json is missing); give the folder of an evaluation")
        else:
            self.settings = dict(settings)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(manifest, json.dumps(self.settings, indent=2) + "\n")
        self.rows: dict[str, Row] = self._read()

    @property
    def path(self) -> Path:
        """The file of rows."""
        return self.folder / "results.jsonl"

    def append(self, key: str, output: Output[Any], facts: Mapping[str, Any], metadata: Mapping[str, Any]) -> Row:
        """Save one output and its row: its files first, then the line, flushed to disk."""
        try:
            kept = self.medium.keep(self.folder, file_name(key), output.made, metadata)
            row: Row = {**_row(key, output), **facts, **kept}
            with self.path.open("ab") as file:
                file.write((json.dumps(row) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WeftError(
                f"{self.folder}: {error.strerror or error}; {len(self.rows)} results are kept, mend it and run again"
            ) from error
        self.rows[key] = row
        return row

    def made(self, row: Row) -> Any:
        """The output of a row, verified against its digests."""
        return self.medium.read(self.folder, row)

    def rewrite(self, rows: Mapping[str, Row]) -> None:
        """Replace all rows atomically."""
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows.values()))
        self.rows = dict(rows)

    def _read(self) -> dict[str, Row]:
        if not self.path.exists():
            return {}
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the process died while it wrote; the next line must not be glued to this one
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        rows: dict[str, Row] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise WeftError(f"{self.path}:{number}: not a result row; remove the line and run again") from error
        return rows


def evaluate(
    model: Any,
    items: Mapping[str, Record],
    score: Scorer,
    *,
    sampling: Drawing,
    results: Results | None = None,
    extra: Extra | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Row]:
    """Run and score what is not yet in `results`; returns all rows in the order of `items`.

    `items` maps unique keys to records. `score` gives a row's score. `extra` gives, for a batch of keys and
    records, further facts of each row (those that need the model; they are kept when a row is scored again).
    `advance` is told how many rows are newly done.
    """
    rows = dict(results.rows) if results else {}
    pending = [key for key in items if key not in rows]
    if advance:
        advance(len(items) - len(pending))
    for start in range(0, len(pending), sampling.batch_size):
        keys = pending[start : start + sampling.batch_size]
        batch = [items[key] for key in keys]
        extras = extra(model, keys, batch) if extra else [{} for _ in batch]
        for key, output, more in zip(keys, sampling.draw(model, batch), extras, strict=True):
            facts = {"score": score(key, output.record, output.made), **more}
            if results is None:
                rows[key] = {**_row(key, output), **facts}
            else:
                metadata = {"instruction": output.record.instruction, "seed": output.seed, **sampling.facts()}
                rows[key] = results.append(key, output, facts, metadata)
            if advance:
                advance(1)
    return {key: rows[key] for key in items}


def rescore(results: Results, items: Mapping[str, Record], score: Scorer) -> dict[str, Row]:
    """Score the recorded outputs again, without a model, and rewrite the rows.

    Raises:
        WeftError: a row whose record is not in `items`; an output that is missing or changed.
    """
    unknown = [key for key in results.rows if key not in items]
    if unknown:
        raise WeftError(f"{results.path}: {len(unknown)} rows have no record, the first is {unknown[0]!r}")
    rows = {key: {**row, "score": score(key, items[key], results.made(row))} for key, row in results.rows.items()}
    results.rewrite(rows)
    return {key: rows[key] for key in items if key in rows}


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal; gives the function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def fingerprint(model: FlowModel | TokenModel) -> str:
    """A short digest of a model's weights, so that results of two checkpoints of one name are never mixed.

    Reads up to 131,072 evenly spaced values of each tensor: training moves all of them.
    """
    import torch

    digest = hashlib.sha256()
    for name, module in sorted(model.modules().items()):
        for key, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().flatten()
            values = flat[:: max(1, flat.numel() // 65536)].to("cpu", torch.float32).contiguous()
            digest.update(f"{name}.{key}{tuple(tensor.shape)}".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def file_name(key: str) -> str:
    """A file's stem for any key: readable, portable, unique."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", key).strip("._")[:80]
    return plain if plain and plain == key else f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old or the new one, never half."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _row(key: str, output: Output[Any]) -> Row:
    record = output.record
    return {"key": key, "id": record.id, "task": record.task, "instruction": record.instruction, "seed": output.seed}


def _compare(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if different:
        what = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in different)
        raise WeftError(f"{folder}: holds results of another run ({what}); give another folder")
