"""Critics that learn from comparisons: the loss, the pairs, the records, a training, the scorer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from test_tiny_judge import SMALL
from tiny import fill_
from tiny_vlm import tiny_vlm_folder
from weft.data.columns import convert, fields_of
from weft.errors import WeftError
from weft.models.build_vlm import build
from weft.models.export_vlm import CARDS
from weft.record import Record, Turn, image_part, make_record, read_records, write_records
from weft.reward.critic_training import CriticTrainable
from weft.reward.graded import records as graded_records
from weft.reward.preferences import attempts, candidates, group, grouped
from weft.reward.ranking import LOSSES, combined, normal_grid, ordered_pairs, ranking_loss, right_order
from weft.reward.scorers.critic import Critic
from weft.reward.scorers.editreward import import_editreward
from weft.train.loop import run
from weft.types import Draw

GOLDEN = json.loads((Path(__file__).parent / "golden" / "editreward.json").read_text())
UNSURE = [form for form, numbers in LOSSES.items() if numbers == 2]
ASKED = {"following": "done? {instruction}", "quality": "well made? {instruction}"}


def golden(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.float64)


def released_grid() -> tuple[torch.Tensor, torch.Tensor]:
    """The nodes of the golden run: 1,000 normal quantiles in fp16, of equal weight."""
    places = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    nodes = torch.special.ndtri(places).to(torch.float16).double()
    return nodes, torch.full_like(nodes, -math.log(1000))


# -- the loss


@pytest.mark.parametrize("form", ["uncertainty_released", "bradley_terry"])
def test_the_loss_and_its_gradient_are_those_of_editreward(form: str) -> None:
    numbers = LOSSES[form]
    better, worse = (golden(name)[:, :numbers].clone().requires_grad_() for name in ("better", "worse"))
    each = ranking_loss(better, worse, form, released_grid())
    each.mean().backward()
    wanted = GOLDEN[form]
    assert each.mean().item() == pytest.approx(wanted["loss"], abs=1e-9)
    assert torch.allclose(better.grad, torch.tensor(wanted["grad_better"], dtype=torch.float64), atol=1e-9, rtol=0)
    assert torch.allclose(worse.grad, torch.tensor(wanted["grad_worse"], dtype=torch.float64), atol=1e-9, rtol=0)
    if numbers == 2:
        assert torch.allclose(each, golden("uncertainty_each"), atol=1e-9, rtol=0)
        exact = ranking_loss(golden("better"), golden("worse"), form)  # what their draws estimate
        assert torch.allclose(exact, golden("uncertainty_each"), atol=5e-3)


def test_questions_are_pooled_as_in_editreward() -> None:
    heads = golden("heads").transpose(0, 1)  # [N, D, 2]
    for how in ("mean", "sum"):
        assert torch.allclose(combined(heads, how), golden(f"pooled_{how}"), atol=1e-9, rtol=0)
    lowest = combined(heads, "min")
    assert torch.allclose(lowest[:, 0], golden("pooled_min")[:, 0], atol=1e-9, rtol=0)
    rows = heads[..., 0].argmin(1)
    assert torch.equal(lowest[:, 1], heads[torch.arange(len(heads)), rows, 1])  # the sigma of that question: not theirs
    for how in ("mean", "min", "sum"):
        assert torch.equal(combined(heads[..., :1], how), combined(heads, how)[:, :1])


def test_expectations_are_integrals() -> None:
    from scipy.integrate import quad

    for gap in (-12.0, -1.0, 0.0, 0.3, 8.0):
        for spread in (0.05, 1.0, 3.0, 10.0):
            one = math.log(spread) - math.log(2) / 2  # two of them make the spread
            better, worse = (torch.tensor([[mu, one]], dtype=torch.float64) for mu in (gap, 0.0))

            def density(z: float) -> float:
                return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

            def wins(z: float, gap: float = gap, spread: float = spread) -> float:
                return 1 / (1 + math.exp(-(gap + spread * z)))

            middle = min(max(-gap / spread, -9.0), 9.0)
            edges = {"points": sorted({middle, 0.0}), "epsabs": 1e-13, "epsrel": 1e-12, "limit": 400}
            chance = quad(lambda z: wins(z) * density(z), -10, 10, **edges)[0]
            expected = quad(lambda z: -math.log(wins(z)) * density(z), -10, 10, **edges)[0]
            assert float(ranking_loss(better, worse, "uncertainty")) == pytest.approx(-math.log(chance), abs=1e-8)
            assert float(ranking_loss(better, worse, "uncertainty_released")) == pytest.approx(expected, abs=1e-8)


def test_a_certain_score_is_bradley_terrys_and_fp32_is_near() -> None:
    better, worse = golden("better"), golden("worse")
    plain = ranking_loss(better[:, :1], worse[:, :1], "bradley_terry")
    for form in UNSURE:
        sure = [torch.stack([s[:, 0], torch.full_like(s[:, 0], -90.0)], 1).requires_grad_() for s in (better, worse)]
        losses = ranking_loss(*sure, form)
        assert torch.allclose(losses, plain, atol=1e-12)
        losses.sum().backward()
        assert all(torch.isfinite(s.grad).all() for s in sure)
        narrow = ranking_loss(better.float(), worse.float(), form).double()
        assert torch.allclose(narrow, ranking_loss(better, worse, form), atol=1e-5)


def test_swapped_scores_have_the_rest_of_the_probability() -> None:
    better, worse = golden("better"), golden("worse")
    there, back = (-ranking_loss(a, b, "uncertainty") for a, b in ((better, worse), (worse, better)))
    assert torch.allclose(there.exp() + back.exp(), torch.ones(6, dtype=torch.float64), atol=1e-12)
    released = ranking_loss(better, worse, "uncertainty_released")
    assert (released > -there).all()  # Jensen


@pytest.mark.parametrize("form", list(LOSSES))
def test_the_gradient_raises_the_better_and_lowers_the_worse(form: str) -> None:
    scores = torch.tensor([[2.0, 0.2], [-1.0, 0.1]], dtype=torch.float64)
    for right in (True, False):
        better, worse = (
            s[None, : LOSSES[form]].clone().requires_grad_() for s in (scores if right else scores.flip(0))
        )
        ranking_loss(better, worse, form).sum().backward()
        assert better.grad[0, 0] < 0 < worse.grad[0, 0]
        if form == "uncertainty":  # a pair in the wrong order makes both unsure, one in the right order sure
            assert bool((better.grad[0, 1] > 0) & (worse.grad[0, 1] > 0)) == right
            assert bool((better.grad[0, 1] < 0) & (worse.grad[0, 1] < 0)) == (not right)
        if form == "uncertainty_released":  # sure in any case
            assert better.grad[0, 1] > 0 and worse.grad[0, 1] > 0


def test_a_tie_draws_scores_together() -> None:
    assert ordered_pairs([2.0, 2.0]) == [(0, 1), (1, 0)] and ordered_pairs([2.0, 2.0], "skip") == []
    for form in LOSSES:
        for gap in (0.0, 1.5):
            a = torch.tensor([[gap, 0.3][: LOSSES[form]]], dtype=torch.float64).requires_grad_()
            b = torch.tensor([[0.0, 0.3][: LOSSES[form]]], dtype=torch.float64)
            (ranking_loss(a, b, form) + ranking_loss(b, a, form)).sum().backward()
            pull = float(a.grad[0, 0])
            assert pull == pytest.approx(0, abs=1e-12) if gap == 0 else pull > 0
            if form == "uncertainty" and gap:
                assert a.grad[0, 1] < 0  # or the two may be unsure


def test_pairs_of_any_number_and_without_the_missing() -> None:
    assert ordered_pairs([3.0, 1.0, 2.0]) == [(0, 1), (0, 2), (2, 1)]
    assert ordered_pairs([3.0, math.nan, 3.0, 1.0], "skip") == [(0, 3), (2, 3)]
    assert (1 not in sum(ordered_pairs([3.0, math.nan, 3.0, 1.0]), ())) and ordered_pairs([math.nan, 1.0]) == []
    assert right_order(torch.tensor([1.0, -2.0, 0.0, 3.0])) == 0.625 and math.isnan(right_order(torch.zeros(0)))
    nodes, weights = normal_grid(torch.zeros(1, dtype=torch.float64))
    assert float(weights.exp().sum()) == pytest.approx(1) and float(nodes.square() @ weights.exp()) == pytest.approx(1)


# -- comparisons


def test_comparisons_of_the_world_have_one_request_and_the_programs_grades() -> None:
    some = attempts("train", count=20, seed=3, size=3)
    again = attempts("train", count=50, seed=3, size=3)[4]
    pictures, grades = candidates(some[4])
    assert len(pictures) == 3 and grades == candidates(again)[1]
    assert np.array_equal(*(np.asarray(r.load(candidates(r)[0][2])) for r in (some[4], again)))
    for record in some[:]:
        made = dict(zip(record.meta["made"], candidates(record)[1], strict=True))
        assert len(made) == 3 and made.get("target", 5.0) == 5.0 and made.get("blank", 0.0) == 0.0
        assert record.instruction == again.instruction or record.id != again.id
    makers = [("copy", 1.0), ("half", 2.0), ("target", 1.0)]
    assert len({str(attempts(count=1, size=2, weights=dict(m))[0].meta["made"]) for m in (makers, makers[::-1])}) == 1
    with pytest.raises(WeftError, match="'spoken' is unknown or changes the request"):
        attempts(weights={"spoken": 1, "target": 1})
    with pytest.raises(WeftError, match="size 3 with 2 makers: give 2 to 2"):
        attempts(size=3, weights={"target": 1, "copy": 1})


def test_graded_attempts_are_joined_by_request(tmp_path: Path) -> None:
    first, second, third = graded_records("train", count=3, seed=4)[:]
    rows = []
    for record, values in ((first, [1.0, 4.0, None]), (second, [2.0, None]), (third, [3.0, 3.0])):
        for k, value in enumerate(values):
            rows.append(replace(record, id=f"{record.id}-{k}", meta={**record.meta, "grade": value}))
    write_records(tmp_path / "r.jsonl", rows[::-1])
    found = grouped(str(tmp_path / "r.jsonl"))
    assert found.notes == ("1 of 3 requests have fewer than two graded attempts and are left out",)
    assert sorted(len(r.meta["grade"]) for r in found) == [2, 3]  # groups need not be equal
    pictures, grades = candidates(next(r for r in found if len(r.meta["grade"]) == 3))
    assert math.isnan(grades[0]) and grades[1:] == [4.0, 1.0] and len(pictures) == 3
    assert found[0].meta["world"] and found[0].meta["attempts"][0] == rows[-1].id
    write_records(tmp_path / "again.jsonl", found)
    assert [r.meta["grade"] for r in read_records(tmp_path / "again.jsonl")] == [r.meta["grade"] for r in found]
    with pytest.raises(WeftError, match="none of 1 requests has two"):
        group(rows[:1])


def test_a_rejected_picture_is_the_worse_one(tmp_path: Path) -> None:
    source = graded_records("train", count=1, seed=5)[0]
    row = {"path_src": "a.png", "path1": "b.png", "path2": "c.png", "prompt": "make it red"}
    for name in ("a", "b", "c"):
        source.load(source.target).save(tmp_path / f"{name}.png")
    given = {"source": "path_src", "target": "path1", "rejected": "path2", "instruction": "prompt"}
    record = convert(row, fields_of(row, given, "EditReward-Data"), "r", tmp_path, None)
    pictures, grades = candidates(record)
    assert [p.path for p in pictures] == ["b.png", "c.png"] and grades == [1.0, 0.0]


# -- training


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build(SMALL, tmp_path_factory.mktemp("critic") / "init")


def shaken(folder: Path, **more) -> CriticTrainable:
    """A ranking critic that sees something and says something."""
    trainable = CriticTrainable(
        folder, kind="ranking", template=None if "questions" in more else "{instruction}", **more
    )
    with torch.no_grad():
        for module in trainable.modules().values():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return trainable


def of(record: Record, grades: list, order: list[int] | None = None) -> Record:
    pictures = candidates(record)[0]
    order = order or list(range(len(grades)))
    turns = [record.turns[0], Turn("assistant", [pictures[i] for i in order])]
    return replace(record, turns=turns, meta={**record.meta, "grade": [grades[i] for i in order]})


def test_a_batch_is_its_requests_and_missing_attempts_are_not_there(folder: Path) -> None:
    trainable = shaken(folder, questions=ASKED, hidden=[8])
    one, two, three = attempts("train", count=3, seed=6, size=4)[:]
    batch = [of(one, [1.0, 5.0]), of(two, [4.0, 2.0, 2.0, 0.0]), of(three, [3.0, 1.0, 2.0])]
    examples = trainable.examples(batch)
    draw = Draw(0, 0, [])
    with torch.no_grad():
        together = trainable.loss(examples, draw)
        alone = torch.cat([trainable.loss([e], draw).per_sample for e in examples])
        assert torch.allclose(together.per_sample, alone, atol=1e-4) and together.metrics["pairs"] == (1 + 7 + 3) / 3
        # in another order of attempts, and with one more that nobody graded
        turned = trainable.loss(trainable.examples([of(three, [3.0, 1.0, 2.0], [2, 0, 1])]), draw).per_sample
        holed = trainable.loss(trainable.examples([of(three, [3.0, 1.0, 2.0, None])]), draw).per_sample
        worse = trainable.loss(trainable.examples([of(three, [1.0, 3.0, 2.0])]), draw).per_sample
    assert torch.allclose(turned, alone[2:], atol=1e-4) and torch.allclose(holed, alone[2:], atol=1e-4)
    assert not torch.allclose(worse, alone[2:], atol=1e-3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert trainable.scores(torch.ones(1, 2, 32)).dtype == torch.float32
        assert trainable.loss(examples, draw).per_sample.dtype == torch.float32


def test_a_request_without_a_pair_teaches_nothing_and_is_counted(folder: Path) -> None:
    trainable = shaken(folder, ties="skip")
    record = attempts("train", count=1, seed=6, size=3)[0]
    examples = trainable.examples(
        [of(record, [2.0, None, 2.0]), of(record, [None, None, None]), of(record, [1.0, 2.0])]
    )
    loss = trainable.loss(examples, Draw(0, 0, []))
    assert loss.metrics["unpaired"] == pytest.approx(2 / 3) and loss.metrics["pairs"] == pytest.approx(1 / 3)
    assert loss.per_sample[:2].tolist() == [0, 0] and loss.per_sample[2] > 0
    nothing = trainable.loss(examples[:2], Draw(0, 0, []))
    nothing.per_sample.sum().backward()
    assert set(nothing.metrics) == {"pairs", "unpaired"}
    assert all(not parameter.grad.any() for parameter in trainable.head.parameters())


def test_the_scorer_says_the_mean_that_was_trained(folder: Path, tmp_path: Path) -> None:
    trainable = shaken(folder, questions=ASKED, combine="sum")
    trainable.save(tmp_path / "critic")
    assert {f.name for f in (tmp_path / "critic").glob("critic*")} <= set(CARDS)
    record = attempts("train", count=1, seed=7, size=2)[0]
    pictures = [record.load(part) for part in candidates(record)[0]]
    found = Critic(str(tmp_path / "critic"))([(record, picture) for picture in pictures])
    assert all(s.value == s.parts["score"] == pytest.approx(s.parts["following"] + s.parts["quality"]) for s in found)
    means, sigmas = torch.tensor([[s.value, math.log(s.parts["sigma"])] for s in found]).T
    scores = torch.stack([means, sigmas], 1)
    pairs = ordered_pairs(candidates(record)[1])
    wanted = torch.stack([ranking_loss(scores[[i]], scores[[j]], "uncertainty") for i, j in pairs]).mean()
    loss = trainable.loss(trainable.examples([record]), Draw(0, 0, []))
    assert loss.per_sample.item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-4)
    with torch.no_grad():
        trainable.head.questions[1][-1].bias[0] = math.nan
    trainable.save(tmp_path / "broken")
    broken = Critic(str(tmp_path / "broken"))([(record, pictures[0])])[0]
    assert broken.value is None and "not finite" in (broken.reason or "")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["uncertainty", "bradley_terry"])
def test_a_critic_learns_which_is_better(folder: Path, tmp_path: Path, loss: str) -> None:
    weights = {"target": 1, "copy": 1, "blank": 1, "misread": 1}
    source = {
        "call": "weft.reward.preferences:attempts",
        "args": {"count": 4, "seed": 8, "size": 3, "weights": weights},
    }
    tree = {
        "model": {"path": str(folder), "gradient_checkpointing": True},
        "trainable": "weft.reward.critic_training:CriticTrainable",
        "trainable_args": {"kind": "ranking", "loss": loss, "template": "{instruction}"},
        "data": [{"source": source}],
        "cache": {},
        "validate": {"source": source, "count": 4, "batch_size": 2},
        "optim": {"lr": 3e-3, "schedule": "cosine"},
        "run": {"folder": str(tmp_path), "steps": 50, "batch_size": 4, "threads": 1, "log_every": 50}
        | {"checkpoint_every": 50, "validate_every": 50},
    }
    result = run(tree, say=lambda line: None)
    assert result.last["pairs_right"] > 0.8 and result.last["unpaired"] == 0
    assert result.last["val/pairs_right"] > 0.8 and result.last["val/loss"] < math.log(2)
    assert ("sigma" in result.last) == (loss == "uncertainty")
    critic = Critic(str(result.export))
    right = []
    for record in attempts(count=4, seed=8, size=3, weights=weights)[:]:
        pictures, grades = candidates(record)
        scores = critic([(record, record.load(part)) for part in pictures])
        right += [scores[i].value > scores[j].value for i, j in ordered_pairs(grades, "skip")]  # type: ignore[operator]
        assert set(scores[0].parts) == ({"score", "sigma"} if loss == "uncertainty" else {"score"})
    assert np.mean(right) > 0.8


# -- EditReward's own weights


def released(folder: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, a base model and a checkout as the golden run had them: tiny, with stand-in texts."""
    facts = GOLDEN["released"]
    base = tiny_vlm_folder(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]}, replace_extra_special_tokens=False)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.rm_heads = torch.nn.ModuleDict()
    for k in range(2):
        layers = [torch.nn.Linear(32, 1024), torch.nn.ReLU(), torch.nn.Dropout(0.05), torch.nn.Linear(1024, 16)]
        model.rm_heads[f"head_{k}"] = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(16, 2))
    fill_(model, "editreward", 0)
    state = {
        k: v.clone() * (4 if "rm_heads" in k and k.endswith("weight") else 1) for k, v in model.state_dict().items()
    }
    assert sorted(k for k in state if "rm_head" in k) == facts["keys"]
    (folder / "checkpoint").mkdir()
    save_file(state, folder / "checkpoint" / "model.safetensors")
    source = folder / "EditReward" / "EditReward" / "dataset"
    source.mkdir(parents=True)
    lines = [f"{name} = {text!r}" for name, text in facts["texts"].items()]
    (source / "prompts.py").write_text("raise SystemExit  # read, not run\n" + "\n".join(lines))
    (source / "data_collator_qwen_edit.py").write_text(f"import os\nprompt_with_special_token = {facts['end']!r}\n")
    return folder / "checkpoint", base, folder / "EditReward"


def shapes(k: int, size: list[int]) -> Image.Image:
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    bands = [(x * (3 + k)) % 256, (y * (5 + 2 * k)) % 256, (x * y * (1 + k)) % 256]
    return Image.fromarray(np.stack(bands, -1).astype("uint8"))


def test_released_critics_score_as_editreward_does(tmp_path: Path) -> None:
    facts = GOLDEN["released"]
    checkpoint, base, repository = released(tmp_path)
    folder = import_editreward(checkpoint, base, repository, tmp_path / "critic")
    assert Critic(str(folder)).reader.areas == (200704, 200704)
    critic = Critic(str(folder), min_pixels=256, max_pixels=4096)  # the tiny model's
    asked = [
        (make_record(text, shapes(k, size)), shapes(k + 3, size))
        for k, (text, size) in enumerate(zip(facts["prompts"], facts["sizes"], strict=True))
    ]
    found = critic(asked)
    for score, (mean, sigma), follows, looks in zip(found, facts["scores"], *facts["each"], strict=True):
        assert score.value == pytest.approx(mean, abs=2e-6)
        assert math.log(score.parts["sigma"]) == pytest.approx(sigma, abs=2e-6)
        assert score.parts["following"] == pytest.approx(follows[0], abs=1e-4)
        assert score.parts["quality"] == pytest.approx(looks[0], abs=1e-4)
    assert critic(asked[1:2])[0].value == pytest.approx(found[1].value, abs=1e-4)

    with pytest.raises(WeftError, match="no special token <.Score.>"):
        critic.reader.states([critic.judges[0].question(*asked[0])], "<|Score|>")
    other = tiny_vlm_folder(tmp_path / "qwen3", "qwen3_vl")
    with pytest.raises(WeftError, match="model type qwen3_vl; only critics on qwen2_5_vl"):
        import_editreward(checkpoint, other, repository, tmp_path / "x")
    with pytest.raises(WeftError, match="exists; give a new folder"):
        import_editreward(checkpoint, base, repository, folder)
    with pytest.raises(WeftError, match="neither model.safetensors nor model.pth"):
        import_editreward(base.parent / "EditReward", base, repository, tmp_path / "x")
    with pytest.raises(WeftError, match="prompts.py: no such file: give a checkout"):
        import_editreward(checkpoint, base, base, tmp_path / "x")
    state = load_file(checkpoint / "model.safetensors")
    for drop, message in (("rm_heads.head_1", "1 heads .* for 2 questions"), ("visual.merger", "does not fit.* keys")):
        save_file({k: v for k, v in state.items() if drop not in k}, tmp_path / "some.safetensors")
        with pytest.raises(WeftError, match=message):
            import_editreward(tmp_path / "some.safetensors", base, repository, tmp_path / drop)
    save_file({**state, "model.language_model.embed_tokens.weight": torch.zeros(9, 32)}, tmp_path / "some.safetensors")
    with pytest.raises(WeftError, match=r"has 9, \d+ rows of embeddings, .* \d+ tokens"):
        import_editreward(tmp_path / "some.safetensors", base, repository, tmp_path / "y")
    save_file({**state, "rm_head.0.weight": torch.zeros(2, 2)}, tmp_path / "some.safetensors")
    with pytest.raises(WeftError, match="rm_head.0.weight is no head of ranknet_multi_head"):
        import_editreward(tmp_path / "some.safetensors", base, repository, tmp_path / "y")


# -- refusals


def test_what_cannot_be_compared_is_refused(folder: Path) -> None:
    record = attempts("train", count=1, seed=9, size=2)[0]
    single = graded_records("train", count=1, seed=9)[0]
    with pytest.raises(WeftError, match="has 1 picture to compare.*preferences:grouped"):
        candidates(single)
    with pytest.raises(WeftError, match='"grade". is 3 for 2 pictures: list one each'):
        candidates(replace(record, meta={"grade": [1, 2, 3]}))
    with pytest.raises(WeftError, match='"grade". is 4 for 2 pictures'):
        candidates(replace(record, meta={"grade": 4}))
    for bad in ("good", True, math.inf):
        with pytest.raises(WeftError, match=r'"grade"\]\[1\] is .*give a number, or null'):
            candidates(replace(record, meta={"grade": [1, bad]}))
    with pytest.raises(WeftError, match="does not say which is better"):
        candidates(replace(record, meta={}))
    rejected = [image_part(p.value, "rejected") for p in candidates(record)[0]]
    with pytest.raises(WeftError, match="does not say which is better"):
        candidates(replace(record, turns=[record.turns[0], Turn("assistant", rejected)], meta={}))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"kind": "rank"}, "kind 'rank' is unknown: use regression or logit or ranking"),
        ({"loss": "uncertainty"}, "loss is of a critic of kind ranking, this one's kind is regression"),
        ({"kind": "logit", "hidden": [8]}, "hidden is of a critic of kind ranking"),
        ({"kind": "ranking", "loss": "btt"}, "loss 'btt' is unknown: use bradley_terry or uncertainty"),
        ({"kind": "ranking", "ties": "drop"}, "ties 'drop' is unknown: use both or skip"),
        ({"kind": "ranking", "combine": "max", "questions": ASKED}, "combine 'max' is unknown"),
        ({"kind": "ranking", "combine": "mean"}, "combine is for several questions"),
        ({"kind": "ranking", "questions": ASKED, "template": "x"}, "template and questions are given"),
        ({"kind": "ranking", "questions": {}}, "questions: give one or more"),
        ({"kind": "ranking", "questions": {"score": "x"}}, "the name 'score' is taken"),
        ({"kind": "ranking", "hidden": [0]}, "a layer's width is 1 or more"),
    ],
)
def test_arguments_that_make_no_critic_are_refused(folder: Path, args: dict, message: str) -> None:
    with pytest.raises(WeftError, match=message):
        CriticTrainable(folder, **args)
