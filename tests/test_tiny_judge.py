"""Judges in training: graded edits, learning from them, agreement and attacks, the gap, the judge that ships."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import weft
from tiny import tiny_kontext_folder
from weft.errors import WeftError
from weft.evals.judge import ATTACKS, evaluate_judge, rank
from weft.evals.judge_gap import gap_curve, gap_evaluator
from weft.evals.judge_page import agreement_table, attack_table
from weft.models.build_vlm import build
from weft.record import make_record, read_records, write_records
from weft.reward.critic_training import CriticTrainable
from weft.reward.graded import BEST, MAKERS, SPOILT, attempt, described, grade, graded, reasons, records, truth
from weft.reward.judge import Judge
from weft.reward.judge_training import JudgeTrainable, between, packed, unpacked
from weft.reward.scorers.critic import Critic
from weft.rng import numpy_rng
from weft.train.loop import Trainer, run
from weft.types import Draw, Score, Trainable
from weft.vlm.ask import Ask
from weft.world import records as world_records
from weft.world.oracle import Verdict, judge, scenes

SMALL = {
    "corpus": [{"kind": "python", "path": "weft.reward.graded:records", "options": {"count": 40}}],
    "tokenizer": {"min_count": 2, "vocabulary": 512},
    "pictures": {"patch_size": 16, "merge_size": 1, "size": {"shortest_edge": 4096, "longest_edge": 4096}},
    "vision": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16,
        "spatial_merge_size": 1, "window_size": 64, "fullatt_block_indexes": [0],
    },
    "text": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 6.0, "mrope_section": [2, 3, 3]},
    },
}  # fmt: skip
ZOO = Path(weft.__file__).parent / "zoo" / "tiny-judge"
shipped = pytest.mark.skipif(not (ZOO / "config.json").is_file(), reason="tiny-judge is not in the zoo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build(SMALL, tmp_path_factory.mktemp("judge") / "init")


# -- graded edits


def test_a_grade_is_the_share_done_cut_for_what_else_changed() -> None:
    assert grade(Verdict(True, {"add": True, "keep": True})) == 5
    assert grade(Verdict(False, {"add": False, "keep": True})) == 0
    assert grade(Verdict(False, {"add": True, "move": False, "keep": True})) == 2.5
    one = grade(Verdict(False, {"add": True, "keep": False}, seen={"light": "left"}))
    two = grade(Verdict(False, {"add": True, "keep": False}, seen={"light": "left", "style": "neon"}))
    assert 0 < two < one < 2.5


def test_the_grade_of_a_drawn_attempt_is_the_oracles() -> None:
    differences = []
    for name in ("target", "copy", "corrupted", "misread", "half", "other"):
        for i, record in enumerate(world_records("train", count=3, seed=3, tasks=["edit"])):
            made = attempt(record, name, numpy_rng(i, name), wear=False)
            found = judge(record, made.load(made.target))
            assert found.success == (made.meta["grade"] == 5), (name, record.instruction)
            # where the whole style is wrong, too, the oracle may no longer know the things: not always equal below 5
            differences.append(abs(grade(found) - made.meta["grade"]))
    assert np.mean(differences) < 0.3


def test_graded_records_are_a_function_of_their_number_and_of_every_sort() -> None:
    some = records("train", count=150, seed=4)
    again = records("train", count=400, seed=4)
    assert some[7].meta == again[7].meta
    assert np.array_equal(np.asarray(some[7].load(some[7].target)), np.asarray(again[7].load(again[7].target)))
    found = some[:]
    assert {r.meta["made"] for r in found} >= {"target", "copy", "corrupted", "misread", "half", "written", "spoken"}
    assert 0.2 < np.mean([r.meta["grade"] == 5 for r in found]) < 0.5
    assert "tone" not in {r.meta["kind"] for r in found}
    with pytest.raises(WeftError, match="unknown maker 'forged'"):
        records(weights={"forged": 1})


def test_reasons_follow_from_the_scenes() -> None:
    """Every thing has its word, and the grade follows from the counts that stand at the end."""
    words = {"done": 0, "wrong": 0, "kept": 0, "changed": 0}
    for name in ("target", "copy", "corrupted", "misread", "half"):
        for i, record in enumerate(world_records("train", count=12, seed=8, tasks=["edit"])):
            made = attempt(record, name, numpy_rng(i, name), wear=False)
            before, asked, shown, counts = made.meta["says"].split(" ; ")
            items = shown.removeprefix("made ").split(" , ")
            found = [item.rsplit(" ", 1)[1] for item in items]
            for word in found:
                words[word] += 1
            right, of, more = (int(v) for v in re.findall(r"\d+", counts))
            assert made.meta["grade"] == pytest.approx(BEST * right / of * SPOILT**more)
            assert ("changed" in found) == (more > 0) and ("wrong" in found) == (right < of)
            if name == "target":
                assert set(found) <= {"done", "kept"}
            for item in items:  # "no" names what is wrong; what was kept stands in the source in the same words
                assert (" no " in item) == item.endswith((" wrong", " changed")), item
                if item.endswith(" kept"):
                    place, _, twice = item.removesuffix(" kept").partition(" before ")
                    said, again = twice.split()[::2], twice.split()[1::2]
                    assert said == again and (f"{place} {' '.join(said)}" in before or "none" in said), (item, before)
    assert min(words.values()) > 5


def test_what_a_picture_shows_stands_word_by_word_beside_what_it_should() -> None:
    record = world_records("train", count=1, seed=8, tasks=["edit"], kinds=["light"])[0]
    source, target, _ = scenes(record)
    place, words = next((k, v) for k, v in described(source).items() if len(v.split()) == 4)
    size, colour, pattern, shape = words.split()
    other = "pink" if colour != "pink" else "teal"
    shows = described(target) | {place: f"{size} {other} {pattern} {shape}"}
    assert f" made {place} before {size} {size} {other} {colour} no {pattern} {pattern} {shape} {shape} changed , " in (
        reasons(record, shows, None)
    )
    shows = described(target) | {place: "empty"}
    assert f" made {place} before empty {words} no changed , " in reasons(record, shows, None)


def test_what_the_oracle_saw_is_told() -> None:
    scene = scenes(world_records("val", count=1, seed=1, tasks=["edit"])[0])[1]
    place, plain = next((k, v) for k, v in described(scene).items() if len(v.split()) == 4)
    size, colour, pattern, shape = plain.split()
    other = "cross" if shape != "cross" else "star"
    assert described(scene, {place: other})[place] == f"{size} {colour} {pattern} {other}"
    assert described(scene, {place: "nothing"})[place] == "empty"
    assert described(scene, {place: "something"})[place] == "something"
    assert described(scene, {"style": "neon"})["style"] == "neon"
    assert described(None)["background"] == "none" and described(None)["top left"] == "empty"


def test_attacks_do_not_raise_a_grade() -> None:
    for i, record in enumerate(world_records("train", count=20, seed=5, tasks=["edit"])):
        written = attempt(record, "written", numpy_rng(i, "w"))
        assert written.meta["grade"] <= 2.0
        spoken = attempt(record, "spoken", numpy_rng(i, "s"))
        assert "5" in spoken.instruction or "five" in spoken.instruction.lower()


def test_samples_are_graded_written_and_read(tmp_path: Path) -> None:
    record = world_records("val", count=1, seed=1, tasks=["edit"])[0]
    found = [graded(record, record.load(part), f"{k}", "me") for k, part in enumerate((record.target, record.source))]
    write_records(tmp_path / "r.jsonl", found)
    back = list(read_records(tmp_path / "r.jsonl"))
    assert [r.meta["grade"] for r in back] == [5.0, 0.0] and back[1].meta["made"] == "me"
    scores = truth([(record, record.load(record.target)), (make_record("x"), Image.new("RGB", (8, 8)))])
    assert scores[0].value == 1.0 and scores[1].value is None and "embedded world" in (scores[1].reason or "")


# -- training


def test_two_digits_share_a_grade_between_them() -> None:
    grades = torch.tensor([0.0, 2.4, 5.0])
    shares = between(grades, 0, 5)
    assert torch.allclose(shares.sum(-1), torch.ones(3))
    assert torch.allclose((shares * torch.arange(6.0)).sum(-1), grades)
    assert shares[1].nonzero()[:, 0].tolist() == [2, 3]


@pytest.mark.parametrize("reasoning", [False, True])
def test_packed_patches_are_exact_and_the_judge_reads_what_training_saw(folder: Path, reasoning: bool) -> None:
    trainable = JudgeTrainable(folder, template="{instruction}", reasoning=reasoning)
    assert isinstance(trainable, Trainable)
    record = records("train", count=1, seed=6)[0]
    example = trainable.examples([record])[0]
    prompt = trainable.reader.encode(trainable.judge.question(record, record.load(record.target)))
    patches = torch.cat(prompt.patches)
    packs = packed(patches, trainable.reader.processor.images)
    assert packs.dtype == torch.uint8 and torch.equal(unpacked(packs, trainable.reader.processor.images), patches)
    begin, digit = int(example["begin"]), int(example["digit"])
    assert torch.equal(example["ids"][:begin], prompt.ids)
    said = trainable.reader.processor.tokenizer.decode(example["ids"][begin:])
    grade, says = round(record.meta["grade"]), record.meta["says"]
    assert said == (f"{says} Score: {grade}<|im_end|>" if reasoning else f"{grade}{says}")
    assert example["ids"][digit] == trainable.digits[grade]
    if reasoning:
        return  # what it writes before the digit depends on its weights: see below
    # the digit's loss is that of the distribution which the judge reads
    with torch.no_grad():
        for parameter in trainable.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        trainable.reasons = 0.0
        loss = trainable.loss([example], Draw(0, 0, ["a"]))
    token = trainable.reader.ask(
        [trainable.judge.question(record, record.load(record.target))], Ask(1, tuple("012345"))
    )
    log_probs = torch.tensor([token[0].tokens[0].top[d] for d in "012345"])
    wanted = -(between(torch.tensor([record.meta["grade"]]), 0, 5)[0] * log_probs).sum()
    assert float(loss.per_sample[0]) == pytest.approx(float(wanted), abs=1e-4)


def test_a_batch_is_its_samples(folder: Path) -> None:
    for trainable in (JudgeTrainable(folder), CriticTrainable(folder, kind="logit")):
        examples = trainable.examples(records("train", count=3, seed=7)[:])
        with torch.no_grad():
            together = trainable.loss(examples, Draw(0, 0, [])).per_sample
            alone = torch.cat([trainable.loss([e], Draw(0, 0, [])).per_sample for e in examples])
        assert torch.allclose(together, alone, atol=1e-5)


def recipe(folder: Path, out: Path, name: str, **more) -> dict:
    source = {"call": "weft.reward.graded:records", "args": {"count": 8, "seed": 8}}
    return {
        "model": {"path": str(folder)},
        "trainable": f"weft.reward.{name[:-9].lower()}_training:{name}",
        "trainable_args": {"template": "{instruction}", **more},
        "data": [{"source": source}],
        "cache": {},
        "optim": {"lr": 1e-2},
        "run": {
            "folder": str(out),
            "steps": 60,
            "batch_size": 8,
            "threads": 1,
            "log_every": 60,
            "checkpoint_every": 60,
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("reasoning", [False, True])
def test_a_judge_learns_its_records_and_opens_as_any_judge(folder: Path, tmp_path: Path, reasoning: bool) -> None:
    settings = recipe(folder, tmp_path, "JudgeTrainable", reasoning=reasoning)
    settings["run"]["steps"] = 60 + 100 * reasoning
    result = run(settings, say=lambda line: None)
    some = records("train", count=8, seed=8)[:]
    judge = Judge(str(result.export), min_mass=0.0)
    assert judge.template == "{instruction}" and judge.reasoning is reasoning  # as it was taught
    found = judge([(r, r.load(r.target)) for r in some])
    values = np.array([score.parts["score"] for score in found])
    wanted = np.array([r.meta["grade"] for r in some])
    assert np.abs(values - wanted).mean() < np.abs(wanted.mean() - wanted).mean()
    assert min(score.parts["mass"] for score in found) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regression", "logit"])
def test_a_critic_learns_its_records_and_opens_as_a_scorer(folder: Path, tmp_path: Path, kind: str) -> None:
    result = run(recipe(folder, tmp_path, "CriticTrainable", kind=kind), say=lambda line: None)
    some = records("train", count=8, seed=8)[:]
    critic = Critic(str(result.export))
    found = critic([(r, r.load(r.target)) for r in some] + [(some[0], "no picture")])  # type: ignore[list-item]
    assert found[-1].value is None and "pictures" in (found[-1].reason or "")
    values = np.array([score.parts["score"] for score in found[:-1]])
    wanted = np.array([r.meta["grade"] for r in some])
    assert np.abs(values - wanted).mean() < np.abs(wanted.mean() - wanted).mean()
    alone = [critic([(r, r.load(r.target))])[0].parts["score"] for r in some[:3]]
    assert values[:3] == pytest.approx(alone, abs=1e-4)


def test_what_cannot_be_graded_is_refused(folder: Path, tmp_path: Path) -> None:
    trainable = JudgeTrainable(folder)
    record = records("train", count=1, seed=9)[0]
    record.meta["grade"] = 7
    with pytest.raises(WeftError, match="7; give a number from 0 to 5"):
        trainable.examples([record])
    with pytest.raises(WeftError, match="no critic.json"):
        Critic(str(folder))
    with pytest.raises(WeftError, match="exists; give a new folder"):
        build(SMALL, folder)
    with pytest.raises(WeftError, match="unknown section 'audio'"):
        build({**SMALL, "audio": {}}, tmp_path / "x")


def test_training_resumes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    def trained(steps: list[int], out: Path) -> dict[str, torch.Tensor]:
        for last in steps:
            tree = recipe(folder, out, "JudgeTrainable")
            tree["optim"]["schedule"] = "constant"
            tree["run"] |= {"steps": last, "checkpoint_every": 2, "batch_size": 2, "allow_changes": True}
            trainer = Trainer(weft.train.read_recipe(tree), {}, lambda line: None)
            trainer.run()
        return {k: p.detach().clone() for k, p in trainer.parameters.items()}

    straight, resumed = trained([4], tmp_path / "a"), trained([2, 4], tmp_path / "b")
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


# -- measuring


@pytest.mark.slow
def test_the_oracle_agrees_with_itself_and_falls_for_nothing(tmp_path: Path) -> None:
    base = world_records("test", count=4, seed=2, tasks=["edit"])[:]
    some = [graded(r, r.load(p), f"{r.id}-{k}", "x") for r in base for k, p in enumerate((r.target, r.source))]
    report = evaluate_judge(truth, {"x": some}, name="oracle", attacked=base)
    group = report.groups["x"]
    assert group.rank is not None and group.rank.value == 1 and group.pairs is not None and group.pairs.value == 1
    assert group.gap.value == 0 and group.count == 8 and group.missing == 0
    assert set(report.attacks) == set(ATTACKS) and report.target == 1.0
    assert report.attacks["copy of the source"].fooled.value == 0
    assert report.attacks["instruction talks, copy"].gain.value == 0
    report.write(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["groups"]["x"]["rank"]["value"] == 1
    assert "Attacks" in (tmp_path / "report.html").read_text()


def test_a_judge_that_sees_nothing_is_shown_as_one() -> None:
    some = records("test", count=12, seed=3)[:]
    report = evaluate_judge(lambda batch: [Score(0.5)] * len(batch), {"x": some})
    group = report.groups["x"]
    assert group.rank is None and group.gap.value == pytest.approx(0.5 - group.truth)
    assert "–" in agreement_table(report).cells[0]
    part = evaluate_judge(lambda batch: [Score(None, reason="away"), *[Score(0.1)] * (len(batch) - 1)], {"x": some})
    assert part.groups["x"].missing == 1
    with pytest.raises(WeftError, match="gave no score: away"):
        evaluate_judge(lambda batch: [Score(None, reason="away")] * len(batch), {"x": some})


def test_a_resample_without_a_rank_correlation_is_none_of_zero() -> None:
    found = rank(np.array([0.1, 0.1, 0.7, 0.7]), np.array([0.0, 0.0, 1.0, 1.0]), ["a", "a", "b", "b"])
    assert found is not None and (found.low, found.value, found.high) == (1, 1, 1)


def test_an_attack_without_any_score_is_shown_as_one(tmp_path: Path) -> None:
    calls = iter([Score(1.0)])  # for the exact target
    judge = lambda batch: [next(calls, Score(None, reason="away")) for _ in batch]  # noqa: E731
    report = evaluate_judge(judge, {}, attacked=world_records("train", 1, tasks=["edit"])[:])
    assert set(report.attacks) == set(ATTACKS)
    assert all((attack.count, attack.missing, attack.score) == (1, 1, None) for attack in report.attacks.values())
    assert all(row[1:] == ["1", "1", "–", "–", "–", "–"] for row in attack_table(report).cells)
    report.write(tmp_path)


def test_the_gap_is_a_curve_with_an_alarm(monkeypatch, tmp_path: Path) -> None:
    import weft.evals.judge_gap as module

    class Output:
        def __init__(self, record, image):
            self.record, self.made = record, image

    base = world_records("val", count=6, seed=4, tasks=["edit"])[:]
    monkeypatch.setattr(
        module, "outputs", lambda model, records, sampling: [Output(r, r.load(r.source)) for r in records]
    )
    said: list[str] = []
    level = 0.05
    measure = gap_evaluator(lambda batch: [Score(level)] * len(batch), base, say=said.append)
    first = measure(None, 0)  # type: ignore[arg-type]
    assert first["truth"] == 0 and first["gap"] == pytest.approx(0.05) and first["alarm"] == 0 and not said
    level = 0.5
    later = measure(None, 10)  # type: ignore[arg-type]
    assert later["alarm"] == 1 and later["grown"] == pytest.approx(0.45) and "ALARM step 10" in said[0]
    rows = [{"step": s, **{f"gap/{k}": v for k, v in m.items()}} for s, m in ((0, first), (10, later))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gap_curve(tmp_path / "log.jsonl") is not None
    again = gap_evaluator(lambda batch: [Score(0.5)] * len(batch), base, log=tmp_path / "log.jsonl", say=said.append)
    assert again(None, 20)["grown"] == pytest.approx(0.45)  # type: ignore[arg-type]  # as before the resume
    assert set(MAKERS) >= {"target", "copy"}


@pytest.mark.slow
def test_the_command_keeps_its_samples(tmp_path: Path, capsys, monkeypatch) -> None:
    import weft.evals.samples as module
    from weft.cli.main import main

    model = f"young={tiny_kontext_folder(tmp_path / 'model')}"
    call = ["eval", "judge", "oracle", "--models", model, "--steps", "1", "--count", "2", "--seeds", "2"]
    call += ["--attacks", "0", "-o", str(tmp_path / "out")]
    assert main(call) == 0
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(first["groups"]) == ["young, 1 steps", "young, 1 steps, tone (held out)", "drawn attempts"]
    assert first["groups"]["young, 1 steps"]["count"] == 4 and first["groups"]["young, 1 steps"]["gap"]["value"] == 0
    monkeypatch.setattr(module, "samples", lambda *given: pytest.fail("sampled again"))
    assert main(call) == 0 and json.loads((tmp_path / "out" / "results.json").read_text()) == first
    assert main([*call, "--seeds", "1"]) == 2 and "two or more samples" in capsys.readouterr().err


# -- the one that ships


@pytest.mark.slow
@shipped
def test_the_shipped_judge_agrees_with_the_truth_and_is_not_talked_round() -> None:
    some = records("test", count=48, seed=21)[:]
    base = world_records("test", count=8, seed=22, tasks=["edit"])[:]
    report = evaluate_judge(Judge("tiny-judge", batch_size=64), {"drawn": some}, attacked=base)
    assert report.groups["drawn"].rank is not None and report.groups["drawn"].rank.value > 0.6
    assert report.attacks["copy of the source"].fooled.value < 0.2
    assert report.attacks["instruction talks, copy, unseen words"].gain.value < 0.2  # type: ignore[union-attr]
    assert sum(f.stat().st_size for f in ZOO.rglob("*") if f.is_file()) < 10e6
