"""The headline run: reinforcement from a judge alone, beside supervised fine-tuning of equal cost, by the oracle.

    python benchmarks/headline.py -o runs/headline                         # three seeds; resumes where it was stopped
    python benchmarks/headline.py -o runs/headline --seeds 0 --count 11    # a look

For each seed recipes/tiny/nft_judge.yaml and sft_control.yaml start from the same model; the control's steps are those
for which `weft plan` counts as many operations in both (encoders, decoder and rewards left out on both sides). Before
and after, the world's benchmark asks the oracle about `--count` held-out test records, the edit kinds in equal parts,
with the same noise, so that differences are paired. While a run lasts, its reward and the oracle are measured on 48
fixed validation records: the distance of judge and truth as a curve.

Writes OUT/results.json, report.html, and plots as PNG. Overrides go to both recipes as `both:key=value`, to one of them
as `nft:key=value` or `control:key=value`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.evals import stats
from weft.evals.judge_gap import gap_evaluator
from weft.evals.world import evaluate_world
from weft.evals.world_groups import EDIT_KINDS
from weft.media import atomic_write
from weft.models.load import load
from weft.report import plots
from weft.report.page import Page, environment_facts
from weft.report.table import Table, percent, percent_interval
from weft.train import plan, read_recipe, run
from weft.train.config import Recipe
from weft.train.online import make_mixture
from weft.world import records as world_records

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"nft": "nft_judge.yaml", "control": "sft_control.yaml"}
NAMES = {"before": "before", "nft": "NFT, judge's reward", "control": "SFT control"}
Rows = dict[str, dict[str, Any]]  # key of a record -> success, collateral


def measured(model: Any, options: argparse.Namespace, out: Path) -> Rows:
    """What the oracle says of a model's edits of the held-out records. An interrupted measurement goes on."""
    each = -(-options.count // len(EDIT_KINDS))
    report = evaluate_world(
        model, split="test", groups=("edit",), count=each, steps=options.steps, seed=0, baseline_count=0, vae=False,
        out=out, progress=sys.stderr.isatty(),
    )  # fmt: skip
    scores = {key: row["score"] for key, row in report.rows.items()}
    return {
        key: {"success": float(score["success"]), "collateral": score["collateral"], "kind": key.split("/")[1]}
        for key, score in scores.items()
    }


def compare(first: Mapping[str, Rows], second: Mapping[str, Rows], what: str) -> dict[str, Any]:
    """Paired difference first - second of each seed, and of all seeds together with the records resampled whole."""
    found: dict[str, Any] = {}
    pooled, labels = [], []
    for seed, rows in first.items():
        keys = [k for k in rows if rows[k][what] is not None and second[seed][k][what] is not None]
        a, b = ([side[k][what] for k in keys] for side in (rows, second[seed]))
        found[f"seed {seed}"] = stats.paired_difference(a, b).dict()
        pooled += list(np.subtract(a, b))
        labels += keys
    found["all seeds"] = stats.bootstrap(pooled, clusters=labels).dict()
    return found


def equal_steps(nft: Recipe, control: Recipe) -> int:
    """Steps of the control with the operations of the other run."""
    one = plan(control)
    return max(1, round(plan(nft).flops / (one.flops / one.steps)))


def recipes(options: argparse.Namespace, out: Path, seed: int) -> dict[str, Recipe]:
    """Both recipes of a seed, the control's steps set."""
    made = {}
    for name, file in RECIPES.items():
        own = [o.split(":", 1)[1] for o in options.override if o.split(":", 1)[0] in (name, "both")]
        own += [
            f"run.folder={json.dumps(str(out / f'{name}-{seed}'))}",
            f"run.seed={seed}",
            f"model.path={options.model}",
        ]
        made[name] = read_recipe(ROOT / "recipes" / "tiny" / file, own)
        if made[name].model.lora is not None:
            raise WeftError(f"{file}: the headline run compares full weights; remove model.lora")
    steps = equal_steps(made["nft"], made["control"])
    made["control"] = read_recipe(made["control"], [f"run.steps={steps}"])
    for name, recipe in made.items():
        every = max(1, recipe.run.steps // options.looks) if options.looks else 0
        made[name] = read_recipe(recipe, [f"run.evaluate_every={every}"])
    return made


def trained(recipe: Recipe, evaluator: Callable[..., dict[str, float]] | None) -> Path:
    """The export of a run; one that is complete is not repeated."""
    folder = Path(recipe.run.folder)
    facts = folder / "export" / "training.json"
    if facts.is_file() and json.loads(facts.read_text("utf-8"))["step"] == recipe.run.steps:
        return folder / "export"
    export = run(recipe, evaluators={"held_out": evaluator} if evaluator else None).export
    assert export is not None
    return export


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=528, help="held-out records, in equal parts of the edit kinds")
    parser.add_argument("--steps", type=int, default=12, help="Euler steps of the evaluation")
    parser.add_argument("--looks", type=int, default=8, help="measurements of the curve during a run; 0 for none")
    parser.add_argument("--model", default="tiny-kontext")
    parser.add_argument("override", nargs="*", help="nft:key=value, control:key=value, both:key=value")
    options = parser.parse_args(arguments)
    for override in options.override:
        if override.split(":", 1)[0] not in (*RECIPES, "both"):
            parser.error(f"{override} is not of the form nft:key=value, control:key=value or both:key=value")
    try:
        measure(options)
    except WeftError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace) -> None:
    """Run everything that is not there yet, and write the results."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    model = load(options.model)
    base = measured(model, options, out / "eval-before")
    start: dict[str, float] = {}
    rows: dict[str, dict[str, Rows]] = {"before": {}, "nft": {}, "control": {}}
    used: dict[str, Recipe] = {}
    for seed in options.seeds:
        rows["before"][str(seed)] = base
        used = recipes(options, out, seed)
        reward = make_mixture(used["nft"].reward, None, "nft")
        for name, recipe in used.items():
            look = gap(options, reward) if options.looks else None
            if look is not None:
                start = look(model, 0)  # what later gaps are compared with
            export = trained(recipe, look)
            rows[name][str(seed)] = measured(load(export), options, out / f"eval-{name}-{seed}")
            gc.collect()
    results = summary(options, rows, used)
    for seeds in results["curves"].values():
        for points in seeds.values():
            for key, value in start.items():
                if f"held_out/{key}" in points:
                    points[f"held_out/{key}"].insert(0, [0, value])
    with atomic_write(out / "results.json") as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    print(page(results, out).write(out / "report.html"))
    print(table(results).plain())


def gap(options: argparse.Namespace, reward: Any) -> Callable[..., dict[str, float]]:
    """Reward and truth of fixed validation records."""
    held = world_records("val", count=48, seed=21, tasks=["edit"])
    return gap_evaluator(reward, held, steps=options.steps, name="held_out")


def summary(
    options: argparse.Namespace, rows: Mapping[str, Mapping[str, Rows]], used: Mapping[str, Recipe]
) -> dict[str, Any]:
    """Everything that is reported, as JSON."""
    rates, kinds, collateral = {}, {}, {}
    for name, seeds in rows.items():
        every = [row for table in seeds.values() for row in table.values()]
        labels = [key for table in seeds.values() for key in table]
        rates[name] = stats.bootstrap([row["success"] for row in every], clusters=labels).dict()
        kinds[name] = {k: float(np.mean([r["success"] for r in every if r["kind"] == k])) for k in EDIT_KINDS}
        collateral[name] = float(np.mean([r["collateral"] for r in every if r["collateral"] is not None]))
    pairs = (("nft", "before"), ("control", "before"), ("nft", "control"))
    return {
        "model": options.model,
        "seeds": options.seeds,
        "records": len(next(iter(rows["before"].values()))),
        "evaluation_steps": options.steps,
        "overrides": options.override,
        "success": rates,
        "success_by_kind": kinds,
        "collateral": collateral,
        "differences": {
            what: {f"{a} - {b}": compare(rows[a], rows[b], what) for a, b in pairs}
            for what in ("success", "collateral")
        },
        "operations": {name: plan(recipe).flops for name, recipe in used.items()},
        "steps": {name: recipe.run.steps for name, recipe in used.items()},
        "curves": {name: curves(options.out, name, options.seeds) for name in RECIPES},
        "environment": environment_facts(),
    }


def curves(out: Path, name: str, seeds: Sequence[int]) -> dict[str, dict[str, list[list[float]]]]:
    """[step, value] of the logs: the held-out reward and truth, and the rollouts' own numbers."""
    wanted = (
        "held_out/reward", "held_out/truth", "held_out/gap", "reward", "gap/oracle", "rank/oracle", "reward_group_std",
        "reward_zero_std", "kl", "velocity_norm", "loss",
    )  # fmt: skip
    found: dict[str, dict[str, list[list[float]]]] = {}
    for seed in seeds:
        lines = (out / f"{name}-{seed}" / "log.jsonl").read_text("utf-8").splitlines()
        logged = [json.loads(line) for line in lines]
        points = {key: [[row["step"], row[key]] for row in logged if key in row] for key in wanted}
        found[str(seed)] = {key: values for key, values in points.items() if values}
    return found


def table(results: Mapping[str, Any]) -> Table:
    """Success and collateral change, with what they differ by from the start."""
    lines = []
    for name, title in NAMES.items():
        rate = results["success"][name]
        row = [title, percent_interval(rate["value"], rate["low"], rate["high"])]
        for what, scale in (("success", 100), ("collateral", 1000)):
            value = results["differences"][what].get(f"{name} - before", {}).get("all seeds")
            text = (
                f"{scale * value['value']:+.1f} [{scale * value['low']:+.1f}, {scale * value['high']:+.1f}]"
                if value
                else "–"
            )
            row.append(text)
        lines.append(row)
    columns = ["run", "full success, %", "gain, points", "collateral change, thousandths more"]
    note = (
        f"{results['records']} held-out records, seeds {', '.join(map(str, results['seeds']))}; 95 % paired bootstrap"
    )
    return Table(columns, lines, note=note)


def page(results: Mapping[str, Any], out: Path) -> Page:
    """The report with its plots, which are written as PNG, too."""
    report = Page(
        "Reinforcement from a judge, beside supervised fine-tuning of equal cost",
        summary="What the oracle says of edits before and after. It is no reward unless an override says so.",
        facts={k: results[k] for k in ("model", "seeds", "records", "evaluation_steps", "overrides", "steps")},
        labels=["Tiny models on an embedded world of coloured shapes."],
    )
    section = report.section("Success").table(table(results))
    bars = plots.bars(
        {NAMES[n]: r["value"] for n, r in results["success"].items()},
        intervals={NAMES[n]: (r["low"], r["high"]) for n, r in results["success"].items()},
        label="full success", percent=True,
    )  # fmt: skip
    section.figure(bars)
    plots.save(bars, out / "success.png")
    kinds = results["success_by_kind"]
    section.table(
        Table(["edit kind", *NAMES.values()], [[k, *(percent(kinds[n][k]) for n in NAMES)] for k in kinds["before"]])
    )
    by_seed = results["differences"]["success"]
    section.table(
        Table(
            ["seed", *by_seed],
            [
                [seed, *(f"{100 * d[seed]['value']:+.1f} [{100 * d[seed]['low']:+.1f}, {100 * d[seed]['high']:+.1f}]"
                         for d in by_seed.values())]
                for seed in next(iter(by_seed.values()))
            ],
            title="Paired differences in points",
        )
    )  # fmt: skip
    for name in RECIPES:
        shown = report.section(f"Curves: {NAMES[name]}")
        for title, keys in (
            ("judge and truth on held-out records", ("held_out/reward", "held_out/truth", "held_out/gap")),
            ("rollouts", ("reward", "gap/oracle", "rank/oracle")),
            ("spread of rewards", ("reward_group_std", "reward_zero_std")),
            ("velocity norm against the reference", ("velocity_norm",)),
        ):
            lines = {
                f"{key}, seed {seed}": plots.Series(*map(list, zip(*points[key], strict=True)))
                for seed, points in results["curves"][name].items()
                for key in keys
                if key in points
            }
            if lines:
                figure = plots.curve(lines, xlabel="optimiser step", ylabel="", title=title)
                shown.figure(figure)
                plots.save(figure, out / f"{name}-{title.replace(' ', '-')}.png")
    return report


if __name__ == "__main__":
    sys.exit(main())
