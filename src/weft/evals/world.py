"""The benchmark of the embedded world: what the oracle says of a model's pictures, by group, with intervals.

Beside every score stand the scores, on the same records, of copying the source or the first reference, of a blank
picture, of chance (another record's target) and of the exact target after the model's own VAE, which no model with it
can beat by much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.errors import WeftError
from weft.evals import stats
from weft.evals.runner import (
    Results,
    Row,
    Sampling,
    evaluate,
    fingerprint,
    progress_bar,
    rescore,
    write_atomically,
)
from weft.evals.stats import Interval
from weft.evals.world_groups import DEFAULT, SHORT, expand, group_of, world_items
from weft.world.oracle import MUCH, edit_mask, judge, requested_concepts
from weft.world.references import CONCEPTS
from weft.world.render import RENDERER

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Record
    from weft.types import FlowModel

EDIT_MEAN = "edit, mean over kinds"
BASELINES = ("copy", "reference", "blank", "chance")


@dataclass(slots=True)
class GroupScore:
    """One group's results. Rates are fractions; `requests` counts single requested changes, `kept` the records in
    which all that was not asked for stayed; `concepts` are the requests that a reference picture gives the value of,
    by what it gives (concrete things, local and global attributes); `collateral` is the mean absolute change (0..1)
    and `psnr` the mean PSNR in dB outside the edit mask, `vae_psnr` that of the exact target after the VAE there.
    `baselines` and `vae_success` are measured on the group's first `baseline_count` records."""

    name: str
    count: int
    success: Interval
    wilson: Interval | None = None
    requests: Interval | None = None
    concepts: dict[str, Interval] = field(default_factory=dict)
    kept: float | None = None
    collateral: float | None = None
    psnr: Interval | None = None
    vae_psnr: float | None = None
    vae_success: float | None = None
    baselines: dict[str, float | None] = field(default_factory=dict)
    baseline_count: int = 0

    def dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["concepts"] = {name: value.dict() for name, value in self.concepts.items()}
        return {name: value.dict() if isinstance(value, Interval) else value for name, value in values.items()}


@dataclass(slots=True)
class WorldReport:
    """The benchmark's results: scores by group, differences between groups (in fractions), and what they were
    measured with. `rows` are the single results, `items` their records."""

    groups: dict[str, GroupScore]
    differences: dict[str, Interval]
    settings: dict[str, Any]
    rows: dict[str, Row]
    items: dict[str, Record]
    results: Results | None = None

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a training log: success by group (`edit`: mean over kinds), `psnr_outside` of all edits."""
        found = {"edit" if name == EDIT_MEAN else name: group.success.value for name, group in self.groups.items()}
        if EDIT_MEAN in self.groups and (psnr := self.groups[EDIT_MEAN].psnr):
            found["psnr_outside"] = psnr.value
        return found

    def dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": self.settings,
            "groups": {name: group.dict() for name, group in self.groups.items()},
            "differences": {name: value.dict() for name, value in self.differences.items()},
        }

    def write(self, folder: str | Path, *, shown: int = 8) -> Path:
        """Write results.json and report.html (with the first `shown` records of each group); returns the page."""
        import json

        from weft.evals.world_page import page

        write_atomically(Path(folder) / "results.json", json.dumps(self.dict(), indent=2) + "\n")
        return page(self, shown).write(Path(folder) / "report.html")

    def show(self) -> None:
        """Print the table."""
        from weft.evals.world_page import table

        table(self, brief=True).show()


def evaluate_world(
    model: FlowModel,
    *,
    split: str = "test",
    groups: Sequence[str] = DEFAULT,
    count: int = 512,
    steps: int = 28,
    guidance: float = 1.0,
    negative: str = "",
    seed: int = 0,
    data_seed: int = 0,
    batch_size: int = 32,
    baseline_count: int = 64,
    vae: bool = True,
    out: str | Path | None = None,
    shown: int = 8,
    progress: bool = False,
    show: bool = False,
) -> WorldReport:
    """Evaluate a model on `count` records of each group; with `out`, into a folder that an interrupted run resumes.

    `groups` are names of `GROUPS` or short names: generate, edit (each kind), unseen, held-out pair, held-out kind,
    references, concepts. `seed` draws the outputs, `data_seed` the records. `baseline_count` records of each group are
    also judged for the baselines and the VAE ceiling; `vae` measures the VAE's PSNR outside the mask on all. Writes
    results.jsonl (as it goes), results.json and report.html to `out`.

    Raises:
        WeftError: unknown group or split, no records; `out` holds the results of another run.
    """
    sampling = Sampling(steps, guidance, negative, seed, batch_size)
    data: dict[str, Any] = {"split": split, "groups": expand(groups), "count": count, "data_seed": data_seed}
    items = world_items(**data)
    settings = {
        "benchmark": "world",
        "renderer": RENDERER,
        "model": model.name,
        "weights": fingerprint(model),
        **data,
        **sampling.facts(),
        "baseline_count": baseline_count,
        "vae": vae,
    }
    results = Results(out, settings) if out is not None else None
    scorer = _Scorer(items, baseline_count)
    with progress_bar(len(items), "world") if progress else nullcontext() as advance:
        extra = scorer.vae if vae else None
        rows = evaluate(model, items, scorer, sampling=sampling, results=results, extra=extra, advance=advance)
    report = summarise(rows, items, settings, results)
    if out is not None:
        report.write(out, shown=shown)
    if show:
        report.show()
    return report


def rescore_world(folder: str | Path, *, shown: int = 8, show: bool = False) -> WorldReport:
    """Judge the recorded pictures of a results folder again, without a model, finished or not; rewrites its report.

    The VAE's numbers need the model and stay as recorded.
    """
    results = Results(folder)
    settings = results.settings
    if settings.get("benchmark") != "world" or settings.get("renderer") != RENDERER:
        raise WeftError(
            f"{folder}: recorded for benchmark {settings.get('benchmark')!r}, renderer {settings.get('renderer')}; "
            f"this is 'world', renderer {RENDERER}: run the evaluation again"
        )
    items = world_items(**{key: settings[key] for key in ("split", "groups", "count", "data_seed")})
    rows = rescore(results, items, _Scorer(items, settings["baseline_count"]))
    if not rows:
        raise WeftError(f"{results.path}: no finished result to score")
    report = summarise(rows, items, settings, results)
    report.write(folder, shown=shown)
    if show:
        report.show()
    return report


def world_evaluator(
    groups: Sequence[str] = ("generate", "edit"), count: int = 16, steps: int = 16, split: str = "val", **options: Any
) -> Callable[..., dict[str, float]]:
    """The benchmark as a plain function f(model, step) -> flat metrics, small and quick, for a training run to call.

    Uses the validation split; `options` go to `evaluate_world`.
    """

    def measure(model: FlowModel, step: int = 0) -> dict[str, float]:
        fixed = {"baseline_count": 0, "vae": False, **options}
        return evaluate_world(model, split=split, groups=groups, count=count, steps=steps, **fixed).metrics()

    return measure


class _Scorer:
    """Judges a picture; for the first records of each group, the baselines as well."""

    def __init__(self, items: Mapping[str, Record], baseline_count: int):
        by_group: dict[str, list[str]] = {}
        for key in items:
            by_group.setdefault(group_of(key), []).append(key)
        self.chance: dict[str, Record | None] = {}  # key -> the record whose target stands in, for baseline keys
        for keys in by_group.values():
            for index, key in enumerate(keys[:baseline_count]):
                other = keys[(index + 1) % len(keys)]  # records are in random order, so the next is a random one
                self.chance[key] = items[other] if other != key else None

    def __call__(self, key: str, record: Record, image: Image.Image) -> dict[str, Any]:
        verdict = judge(record, image)
        score: dict[str, Any] = {
            "success": verdict.success,
            "requests": verdict.requests,
            "collateral": verdict.collateral,
            "psnr_outside": verdict.psnr_outside,
            "seen": verdict.seen,
        }
        if key in self.chance:
            score["baselines"] = self.baselines(record, self.chance[key])
        return score

    def baselines(self, record: Record, other: Record | None) -> dict[str, bool | None]:
        from PIL import Image

        target, shown = _picture(record, record.target), record.references
        return {
            "copy": judge(record, _picture(record, record.source)).success if record.source else None,
            "reference": judge(record, _picture(record, shown[0])).success if shown else None,
            "blank": judge(record, Image.new("RGB", target.size, (128, 128, 128))).success,
            "chance": judge(record, _picture(other, other.target)).success if other else None,
        }

    def vae(self, model: FlowModel, keys: Sequence[str], records: Sequence[Record]) -> list[dict[str, Any]]:
        """What is left of the exact target after the model's own autoencoder."""
        import torch

        targets = [_picture(record, record.target) for record in records]
        facts: list[dict[str, Any]] = []
        with torch.no_grad():
            latents = torch.stack(model.encode_images(targets))  # one size: the world's records of a run share it
            images = model.decode(latents, [(target.height, target.width) for target in targets])
        for key, record, image in zip(keys, records, images, strict=True):
            found: dict[str, Any] = {"psnr_outside": psnr_outside(record, image)}
            if key in self.chance:
                found["success"] = judge(record, image).success
            facts.append({"vae": found})
        return facts


def psnr_outside(record: Record, image: Image.Image) -> float | None:
    """PSNR in dB (at most 100) against the source outside the edit mask; None where there is no such place."""
    if record.source is None:
        return None
    outside = ~edit_mask(record)
    if outside.mean() <= MUCH:
        return None
    source = np.asarray(_picture(record, record.source), np.float64)[outside]
    square = ((np.asarray(image.convert("RGB"), np.float64)[outside] - source) ** 2).mean() / 255**2
    return float(-10 * np.log10(max(square, 1e-10)))


def summarise(
    rows: Mapping[str, Row], items: Mapping[str, Record], settings: Mapping[str, Any], results: Results | None = None
) -> WorldReport:
    """Aggregate rows of `evaluate`; needs no model and no picture."""
    by_group: dict[str, list[Row]] = {}
    for key, row in rows.items():
        by_group.setdefault(group_of(key), []).append(row)
    groups = {name: _group(name, part, items) for name, part in by_group.items()}
    success = {name: [float(row["score"]["success"]) for row in part] for name, part in by_group.items()}
    edits = [name for name in SHORT["edit"] if name in groups]
    differences: dict[str, Interval] = {}
    if len(edits) > 1:
        pooled = _group(EDIT_MEAN, [row for name in edits for row in by_group[name]], items)
        pooled.success = stats.macro_mean({name: success[name] for name in edits})
        pooled.wilson = None  # a mean of group means is not one proportion
        after = edits[-1]
        groups = {
            key: value
            for name, group in groups.items()
            for key, value in ([(name, group), (EDIT_MEAN, pooled)] if name == after else [(name, group)])
        }
    base = {"generate": success.get("generate"), "edit": [value for name in edits for value in success[name]]}
    for name, values in success.items():
        task, _, what = name.partition("/")
        if what in ("unseen phrasing", "held-out pair") and base.get(task):
            differences[name] = stats.difference(values, base[task] or [])
    return WorldReport(groups, differences, dict(settings), dict(rows), dict(items), results)


def _group(name: str, rows: Sequence[Row], items: Mapping[str, Record]) -> GroupScore:
    scores = [row["score"] for row in rows]
    success = [float(score["success"]) for score in scores]
    asked = [
        (float(passed), index)
        for index, score in enumerate(scores)
        for request, passed in score["requests"].items()
        if request != "keep"
    ]
    given: dict[str, list[tuple[float, int]]] = {}
    for index, row in enumerate(rows):
        for request, concept in requested_concepts(items[row["key"]]).items():
            if request in row["score"]["requests"]:
                given.setdefault(concept, []).append((float(row["score"]["requests"][request]), index))
    kept = [float(score["requests"]["keep"]) for score in scores if "keep" in score["requests"]]
    psnr = [score["psnr_outside"] for score in scores if score["psnr_outside"] is not None]
    judged = [score["baselines"] for score in scores if "baselines" in score]
    vae = [row.get("vae", {}) for row in rows]
    return GroupScore(
        name=name,
        count=len(rows),
        success=stats.bootstrap(success),
        wilson=stats.wilson(round(sum(success)), len(success)),
        # Requests of one record stand or fall together, so records are resampled, not requests.
        requests=_clustered(asked) if asked else None,
        concepts={concept: _clustered(given[concept]) for concept in CONCEPTS if concept in given},
        kept=_mean(kept),
        collateral=_mean([score["collateral"] for score in scores]),
        psnr=stats.bootstrap(psnr) if psnr else None,
        vae_psnr=_mean([found.get("psnr_outside") for found in vae]),
        vae_success=_mean([found.get("success") for found in vae]),
        baselines={kind: _mean([found.get(kind) for found in judged]) for kind in BASELINES},
        baseline_count=len(judged),
    )


def _clustered(values: Sequence[tuple[float, int]]) -> Interval:
    return stats.bootstrap([value for value, _ in values], clusters=[record for _, record in values])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _picture(record: Record, part: Any) -> Image.Image:
    return record.load(part).convert("RGB")
