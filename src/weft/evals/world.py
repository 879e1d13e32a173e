"""The benchmark of the embedded world: what the oracle says of a model's pictures, by group, with intervals.

Beside every score stand the scores, on the same records, of copying the source or the first reference, of a blank
picture, of chance (another record's target) and of the exact target after the model's own VAE, which no model with it
can beat by much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.evals import stats
from weft.evals.benchmark import EDIT_MEAN, BaselineScorer, Benchmark, Report, by_group, inserted, mean
from weft.evals.runner import PICTURES, Results, Row, Sampling
from weft.evals.stats import Interval
from weft.evals.world_groups import DEFAULT, SHORT, WORLD
from weft.world.oracle import MUCH, edit_mask, judge, requested_concepts
from weft.world.references import CONCEPTS
from weft.world.render import RENDERER

if TYPE_CHECKING:
    from PIL import Image

    from weft.record import Record
    from weft.report.page import Page
    from weft.report.table import Table
    from weft.types import FlowModel

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

    @property
    def rate(self) -> Interval:
        """Success of few records, with Wilson's interval: the bootstrap's has no width where all came out alike."""
        return self.wilson or self.success


@dataclass(slots=True)
class WorldReport(Report[GroupScore]):
    """The benchmark's results."""

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a training log: success by group (`edit`: mean over kinds), `psnr_outside` of all edits."""
        found = {"edit" if name == EDIT_MEAN else name: group.success.value for name, group in self.groups.items()}
        if EDIT_MEAN in self.groups and (psnr := self.groups[EDIT_MEAN].psnr):
            found["psnr_outside"] = psnr.value
        return found

    def page(self, shown: int) -> Page:
        from weft.evals.world_page import page

        return page(self, shown)

    def table(self, brief: bool = False) -> Table:
        from weft.evals.world_page import table

        return table(self, brief)


def evaluate_world(
    model: FlowModel,
    *,
    split: str = "test",
    groups: Sequence[str] = DEFAULT,
    count: int = 512,
    steps: int = 28,
    guidance: float = 1.0,
    negative: str = "",
    solver: str = "euler",
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
    return BENCHMARK.run(
        model,
        Sampling(steps, guidance, negative, seed, batch_size, solver),
        name=model.name,
        split=split,
        groups=groups,
        count=count,
        data_seed=data_seed,
        baseline_count=baseline_count,
        facts={"vae": vae},
        extra=vae,
        out=out,
        shown=shown,
        progress=progress,
        show=show,
    )


def rescore_world(folder: str | Path, *, shown: int = 8, show: bool = False) -> WorldReport:
    """Judge the recorded pictures of a results folder again, without a model, finished or not; rewrites its report.

    The VAE's numbers need the model and stay as recorded.
    """
    return BENCHMARK.rescore(folder, shown=shown, show=show)


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


class _Scorer(BaselineScorer):
    """Judges a picture; for the first records of each group, the baselines as well."""

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

    def extra(self, model: FlowModel, keys: Sequence[str], records: Sequence[Record]) -> list[dict[str, Any]]:
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
    parts = by_group(rows)
    groups = {name: _group(name, part, items) for name, part in parts.items()}
    success = {name: [float(row["score"]["success"]) for row in part] for name, part in parts.items()}
    edits = [name for name in SHORT["edit"] if name in groups]
    differences: dict[str, Interval] = {}
    if len(edits) > 1:
        pooled = _group(EDIT_MEAN, [row for name in edits for row in parts[name]], items)
        pooled.success = stats.macro_mean({name: success[name] for name in edits})
        pooled.wilson = None  # a mean of group means is not one proportion
        groups = inserted(groups, edits[-1], EDIT_MEAN, pooled)
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
        kept=mean(kept),
        collateral=mean([score["collateral"] for score in scores]),
        psnr=stats.bootstrap(psnr) if psnr else None,
        vae_psnr=mean([found.get("psnr_outside") for found in vae]),
        vae_success=mean([found.get("success") for found in vae]),
        baselines={kind: mean([found.get(kind) for found in judged]) for kind in BASELINES},
        baseline_count=len(judged),
    )


def _clustered(values: Sequence[tuple[float, int]]) -> Interval:
    return stats.bootstrap([value for value, _ in values], clusters=[record for _, record in values])


def _picture(record: Record, part: Any) -> Image.Image:
    return record.load(part).convert("RGB")


BENCHMARK = Benchmark("world", RENDERER, WORLD, PICTURES, _Scorer, summarise)
