"""The headline run's machinery on a random tiny model: both runs, equal operations, paired differences, the report."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tiny import tiny_kontext_folder
from weft.train import plan

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def headline():
    spec = importlib.util.spec_from_file_location("headline", ROOT / "benchmarks" / "headline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_differences_are_paired_and_resample_records(headline):
    before = {k: {"success": float(i % 2), "collateral": None if i else 0.5} for i, k in enumerate("abcdefgh")}
    after = {k: {**row, "success": 1.0} for k, row in before.items()}
    found = headline.compare({"0": after, "1": before}, {"0": before, "1": before}, "success")
    assert found["seed 0"]["value"] == 0.5 and found["seed 1"] == {**found["seed 1"], "value": 0, "low": 0, "high": 0}
    assert found["all seeds"]["value"] == 0.25 and found["all seeds"]["count"] == 16
    assert headline.compare({"0": after}, {"0": before}, "collateral")["seed 0"]["count"] == 1


@pytest.mark.slow
def test_the_control_costs_as_much(headline, tmp_path):
    options = headline.argparse.Namespace(override=["control:run.batch_size=24"], model="tiny-kontext", looks=8)
    made = headline.recipes(options, tmp_path, 3)
    nft, control = (plan(recipe).flops for recipe in made.values())
    assert control == pytest.approx(nft, rel=0.01)
    assert made["control"].run.batch_size == 24 and made["nft"].run.seed == 3
    assert made["nft"].data[0].source.args == made["control"].data[0].source.args, "the same requests"


@pytest.mark.long
def test_a_small_headline_run_writes_its_report_and_resumes(headline, tmp_path, capsys):
    folder = tiny_kontext_folder(tmp_path / "tiny")
    out = tmp_path / "out"
    truth = "both:run.log_every=1"
    arguments = [
        "-o", str(out), "--seeds", "0", "--count", "11", "--steps", "2", "--looks", "1", "--model", str(folder), truth,
        "nft:reward.scorers=[{call: 'weft.reward.graded:truth', name: judge}]", "nft:rollout.groups=2",
        "nft:rollout.group_size=2", "nft:rollout.batch=4", "nft:rollout.updates=1", "nft:rollout.steps=2",
        "both:run.steps=1", "both:run.batch_size=4", "nft:run.grid_every=0", "nft:grid=null",
    ]  # fmt: skip
    assert headline.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["records"] == 11 and set(results["success"]) == {"before", "nft", "control"}
    assert set(results["differences"]["success"]) == {"nft - before", "control - before", "nft - control"}
    assert (out / "report.html").is_file() and (out / "success.png").is_file()
    assert results["curves"]["nft"]["0"]["held_out/truth"][0][0] == 0
    before = (out / "nft-0" / "log.jsonl").read_text()
    assert headline.main(arguments) == 0 and (out / "nft-0" / "log.jsonl").read_text() == before
    assert headline.main([*arguments, "nft:nothing=1"]) == 2 and "nothing" in capsys.readouterr().err
