"""`weft eval judge`: agreement of a judge or critic with the oracle, and its attack table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from weft.errors import WeftError

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[MODEL ...]", help_behavior_hint="")]
Numbers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="[N ...]", help_behavior_hint="")]


@dataclass
class EvalJudge:
    """How far a judge agrees with the oracle on samples of editing models (rank correlation, pairs of one request in
    the right order), on an edit kind that it never saw, and how it takes attacks. Samples are kept and used again."""

    judge: Positional[str]
    """A judge's folder or zoo name, or a scorer: judge, clip, ..., or your own as file.py:name."""
    models: Names = ("tiny-kontext",)
    """Editing models whose samples are judged: zoo names or folders; NAME=FOLDER gives a name."""
    steps: Numbers = (12,)
    """Sampling steps; several of them stand for better and worse policies."""
    count: int = 64
    """Requests for each model and step count, and as many of the held-out kind."""
    seeds: int = 4
    """Samples of each request: they make the pairs."""
    attacks: int = 128
    """Requests that each attack is tried on; 0: none."""
    held_out: bool = True
    """Also judge the edit kind that neither judge nor models were trained on."""
    split: Literal["test", "val"] = "test"
    """Which part of the world."""
    data_seed: int = 0
    """Draws the requests."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="")] = None
    """The folder of the results; default: out/eval-judge-JUDGE."""

    def run(self) -> int:
        from weft.cli.options import check_folder
        from weft.evals.judge import evaluate_judge
        from weft.evals.judge_page import agreement_table, attack_table
        from weft.evals.samples import Wanted, stored
        from weft.reward.graded import records as graded_records
        from weft.world import records as world_records
        from weft.world.edits import HELD_OUT_KIND

        if self.seeds < 2:
            raise WeftError(f"seeds is {self.seeds}: two or more samples of a request make a pair")
        name = Path(self.judge.rpartition(":")[2]).name
        out = self.out or Path("out") / f"eval-judge-{name}"
        check_folder(out)
        scorer = self.scorer()
        groups = {}
        for model in self.models:
            label, _, folder = model.rpartition("=")
            label = label or Path(folder).name
            for steps in self.steps:
                kinds = {"": [], f", {HELD_OUT_KIND} (held out)": [HELD_OUT_KIND]}
                for suffix, kind in kinds.items() if self.held_out else [("", [])]:
                    wanted = Wanted(folder, label, steps, self.seeds, self.count, self.split, self.data_seed, kind)
                    groups[f"{label}, {steps} steps{suffix}"] = stored(out / "samples", wanted)
        groups["drawn attempts"] = graded_records(self.split, 4 * self.count, self.data_seed)[:]
        attacked = world_records(self.split, self.attacks, seed=self.data_seed, start=500_000, tasks=["edit"])[:]
        identity = getattr(scorer, "identity", {})
        settings = {
            "models": list(self.models), "steps": list(self.steps), "requests": self.count, "seeds": self.seeds,
            "split": self.split, "data_seed": self.data_seed, **identity,
        }  # fmt: skip
        report = evaluate_judge(scorer, groups, name=name, attacked=attacked, settings=settings)
        path = report.write(out)
        agreement_table(report).show()
        if report.attacks:
            attack_table(report).show()
        print(path)
        return 0

    def scorer(self) -> Any:
        """The scorer that the first argument names."""
        from weft.reward.judge import judge_folder
        from weft.reward.make import SCORERS, make_scorer

        if self.judge in SCORERS or ":" in self.judge:
            return make_scorer(self.judge, {})
        folder = judge_folder(self.judge)
        if (folder / "critic.json").is_file():
            return make_scorer("weft.reward.scorers.critic:Critic", {"folder": str(folder)})
        return make_scorer("judge", {"model": str(folder)})
