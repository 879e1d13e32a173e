"""The motion language model: serialisations, grammar, rollout, loss, folders. Sizes are a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from motion_clips import procedural
from tiny_motion import CODES, LEVELS, corpus, record, settings_for, tiny_motion_folder
from weft.api_motion import MotionModel, MotionOptions
from weft.errors import WeftError
from weft.models.build_vlm import qwen_tokenizer
from weft.models.motion.build import build
from weft.models.motion.lm import MotionLM, make_options
from weft.models.motion.lm_training import MotionLMTrainable, runs
from weft.models.motion.load import load
from weft.models.motion.network import MotionNetwork
from weft.models.motion.reading import Reader, Rows, learned, read_vocabulary, wordless
from weft.models.motion.think import think
from weft.models.motion.tokens import (
    CLOSE,
    OPEN,
    SERIALISATIONS,
    Reply,
    Serialisation,
    Span,
    Vocabulary,
    code_names,
)
from weft.motion.clip import Motion
from weft.record import Record, Turn, motion_part, text_part
from weft.sample.tokens import Choice, Sampling, ids, pick, sample_tokens
from weft.types import Draw, TokenModel, Trainable


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("motion")
    return {name: tiny_motion_folder(root / name, name) for name in SERIALISATIONS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, MotionLM]:
    return {name: load(folder, device="cpu") for name, folder in folders.items()}


# -- serialisations


def serial(name: str, levels: int = LEVELS, codes: int = CODES) -> Serialisation:
    return Serialisation(name, Vocabulary(50, (0, 1, 52), 52, 53, 54, 55, levels, codes))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SERIALISATIONS), levels=st.integers(1, 6), steps=st.integers(1, 12), seed=st.integers(0, 99)
)
def test_round_trip_is_exact(name: str, levels: int, steps: int, seed: int) -> None:
    """codes -> rows -> codes, the promised length, and each code's id in the block of its level."""
    form = serial(name, levels)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, CODES, (steps, levels)))
    rows = form.rows(codes)
    assert rows.shape == (form.length(steps), form.columns)
    assert torch.equal(form.codes(rows), codes[:, : form.levels])
    ordinary = rows[(rows >= 0) & (rows != 53) & (rows != 54)]
    assert len(ordinary) == steps * form.levels and ordinary.min() >= 55 and ordinary.max() < 55 + levels * CODES
    assert (rows == 53).sum() == 1 and (rows == 54).sum() == 1


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(SERIALISATIONS), seed=st.integers(0, 999))
def test_any_wrong_token_is_refused(name: str, seed: int) -> None:
    """One id replaced by one that is illegal there: wrong level, text, a marker, nothing, or an end too early."""
    draw = np.random.default_rng(seed)
    form = serial(name)
    rows = form.rows(torch.from_numpy(draw.integers(0, CODES, (4, LEVELS))))
    r, c = int(draw.integers(0, len(rows))), int(draw.integers(0, form.columns))
    old = int(rows[r, c])
    level = None if old < 55 else (old - 55) // CODES
    options = [t for t in (-1, 3, 53, *(55 + k * CODES for k in range(LEVELS)), 55 + LEVELS * CODES)
               if t != old and (level is None or (t - 55) // CODES != level or t < 55)]  # fmt: skip
    if old == 54:  # another code instead of the end only moves the end on
        options = [-1, 3, 53]
    rows[r, c] = int(draw.choice(options))
    with pytest.raises(WeftError, match="motion tokens"):
        form.codes(rows)


def test_delay_shifts_level_by_level() -> None:
    form = serial("delay", 3)
    rows = form.rows(torch.tensor([[1, 2, 3], [4, 5, 6]])) - torch.tensor([55, 55 + 16, 55 + 32])
    seen = rows.tolist()
    assert [r[0] for r in seen[1:3]] == [1, 4] and [r[1] for r in seen[2:4]] == [2, 5]
    assert [r[2] for r in seen[3:5]] == [3, 6] and len(seen) == form.length(2) == 5
    assert form.rows(torch.tensor([[1, 2, 3], [4, 5, 6]]))[3, 0] == 54, "the end stands in column 0"


def test_bad_codes_are_named() -> None:
    with pytest.raises(WeftError, match="16 a level"):
        serial("flat").rows(torch.full((2, LEVELS), 16))
    with pytest.raises(WeftError, match="flat needs"):
        serial("flat").rows(torch.zeros((2, 1), dtype=torch.long))
    with pytest.raises(WeftError, match="without a latent step"):
        serial("depth").rows(torch.zeros((0, LEVELS), dtype=torch.long))
    with pytest.raises(WeftError, match="serialisation"):
        serial("spiral")


# -- grammar and rollout


class Uniform:
    """A network to which all tokens are equally likely: what comes out is what the grammar allows."""

    def __init__(self, form: Serialisation, size: int) -> None:
        self.columns, self.form, self.size = form.columns, form, size

    def begin(self, prompts: Any, *, cache: bool) -> list[int]:
        return [len(prompts)]

    def feed(self, state: list[int], rows: torch.Tensor, seen: torch.Tensor) -> None:
        assert len(rows) == state[0]

    def logits(self, state: list[int], column: int, chosen: torch.Tensor) -> tuple[torch.Tensor, int]:
        return torch.zeros(state[0], self.size), 0


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(SERIALISATIONS), seed=st.integers(0, 999), kind=st.sampled_from(["must", "may", "never"]))
def test_random_answers_are_legal(name: str, seed: int, kind: str) -> None:
    form = serial(name)
    grammars = [Reply(form, motion=kind, words=4, least=2, most=5) for _ in range(3)]
    rows = sample_tokens(Uniform(form, 200), [torch.zeros(1, form.columns)] * 3, grammars, [seed, seed + 1, seed])
    assert torch.equal(rows[0], rows[2]) or len(rows) == 3
    for one in rows:
        column = one[:, 0]
        assert column[-1] == 52 and (column == 52).sum() == 1
        text = column[(column >= 0) & (column < 50)]
        assert len(text) <= 4 and not set(text.tolist()) & {0, 1}
        starts = (column == 53).nonzero()
        assert len(starts) == {"must": 1, "never": 0}.get(kind, len(starts))
        if len(starts):
            assert 2 <= len(form.codes(one[int(starts[0]) : -1])) <= 5
        else:
            assert len(text) >= 1


def test_length_is_kept_exactly() -> None:
    for name in SERIALISATIONS:
        form = serial(name)
        grammar = Reply(form, motion="must", words=0, least=7, most=7)
        (rows,) = sample_tokens(Uniform(form, 200), [torch.zeros(1, form.columns)], [grammar], [1])
        assert len(form.codes(rows[:-1])) == 7
    with pytest.raises(WeftError, match="latent steps"):
        Span(serial("flat"), 5, 4)


def test_picking_follows_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000

    def share(**options: Any) -> list[float]:
        return (torch.bincount(pick(logits, uniform, Sampling(**options)), minlength=4) / 4000).tolist()

    assert np.allclose(share(), [0.5, 0.3, 0.15, 0.05], atol=1e-3)
    assert np.allclose(share(top_k=2), [0.625, 0.375, 0, 0], atol=1e-3)
    assert np.allclose(share(top_p=0.6), [0.625, 0.375, 0, 0], atol=1e-3), "the fewest that hold the share"
    assert np.allclose(share(top_p=0.5), [1, 0, 0, 0], atol=1e-3)
    # transformers' order: the share of what the two likeliest hold; the first has 0.625 of it
    assert np.allclose(share(top_k=2, top_p=0.6), [1, 0, 0, 0], atol=1e-3)
    assert np.allclose(share(top_k=2, top_p=0.7), [0.625, 0.375, 0, 0], atol=1e-3)
    assert np.allclose(share(temperature=0), [1, 0, 0, 0])
    sharp = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert np.allclose(share(temperature=0.5), (sharp / sharp.sum()).tolist(), atol=1e-3)
    for bad in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"guidance": 0.5}):
        with pytest.raises(WeftError):
            Sampling(**bad)
    assert ids(Choice(3, 7, (9,), (4,))).tolist() == [3, 5, 6, 9]


# -- the model


@pytest.mark.slow
@pytest.mark.parametrize("name", SERIALISATIONS)
def test_folder_opens_to_the_same_model(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders[name], device="cpu")
    assert isinstance(model, TokenModel)
    model.save(tmp_path / "again")
    again = load(tmp_path / "again", device="cpu")
    a, b = model.generate([record(0)], seeds=[1]), again.generate([record(0)], seeds=[1])
    assert a[0] == b[0] and torch.equal(a[1][0], b[1][0])  # type: ignore[arg-type]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again" / "tokenizer")
    assert tokenizer("<motion><motion_0_3></motion>", add_special_tokens=False).input_ids == [
        model.vocabulary.open, model.vocabulary.first + 3, model.vocabulary.close]  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "transformer")
    assert plain.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_records_become_rows(models: dict[str, MotionLM]) -> None:
    """Turns, roles, kinds: what is read, what is said by the user, what is learned."""
    model = models["flat"]
    v, end = model.vocabulary, model.vocabulary.end

    def shown(k: int, task: str, answers: bool = True) -> tuple[list[str], Rows]:
        (rows,) = model.reader.encode([record(k, task)], answers=answers)
        names = model.tokenizer.convert_ids_to_tokens(rows.rows[:, 0].tolist())
        return [n for n in names if not n.startswith("<motion_")], rows

    names, rows = shown(0, "generate")
    assert names[0] == "<user>" and names[-3:] == ["<motion>", "</motion>", "<end>"]
    assert (rows.kind == 2).sum() == 5 * LEVELS + 3 and rows.kind[0] == 0
    assert rows.rows[rows.kind == 1].min() >= 0 and not (rows.rows[rows.kind == 1] >= v.text).any()
    names, rows = shown(0, "reflect")
    answers = rows.rows[rows.kind == 2][:, 0]
    assert (answers == v.open).sum() == 1 and (answers == end).sum() == 1, "a rejected attempt is not learned"
    assert (rows.rows[:, 0] == v.open).sum() == 2
    names, rows = shown(0, "chain")
    assert (rows.rows[rows.kind == 2][:, 0] == end).sum() == 2, "every turn is learned"
    _, rows = shown(0, "between")
    words = rows.rows[(rows.rows[:, 0] < v.text) & (rows.kind == 0)][:, 0]
    assert model.tokenizer.decode(words) == "start end", "the two poses are told apart by a word"
    names, rows = shown(0, "describe", answers=False)
    assert names[-1] == "<assistant>" and not (rows.kind == 2).any()
    with pytest.raises(WeftError, match="marker"):
        model.reader.encode([Record("x", "generate", [Turn("user", [text_part("walk <motion_0_3>")])])], answers=False)
    long = Record("x", "edit", [Turn("user", [motion_part(Motion(procedural(1200, 1)), "source"), text_part("walk")])])
    with pytest.raises(WeftError, match="record x: 9.. tokens, the model reads 512"):
        model.reader.encode([long], answers=False)


def test_a_chat_model_reads_the_turns_of_its_own_template(models: dict[str, MotionLM]) -> None:
    codec = models["flat"].codec
    tokenizer = qwen_tokenizer(["walk, then sit", "done"], min_count=1)
    tokenizer.add_tokens([OPEN, CLOSE, *code_names(codec.config.levels, codec.config.codes)], special_tokens=True)
    vocabulary, markers = read_vocabulary(codec, tokenizer, "flat")
    reader = Reader(codec, tokenizer, Serialisation("flat", vocabulary), markers, 1000)
    said = [("user", "walk"), ("assistant", "done"), ("user", "then sit"), ("assistant", "sit")]
    talk = Record("x", "describe", [Turn(role, [text_part(text)]) for role, text in said])
    for answers, turns in ((True, said), (False, said[:3])):
        messages = [{"role": role, "content": text} for role, text in turns]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answers)
        ids = tokenizer(wanted.removesuffix("<|im_end|>\n") + "<|im_end|>" * answers).input_ids
        assert reader.encode([talk], answers=answers)[0].rows[:, 0].tolist() == ids


@pytest.mark.parametrize("name", SERIALISATIONS)
def test_batch_and_cache_change_nothing(name: str, models: dict[str, MotionLM]) -> None:
    """Left padding, other samples and the KV cache: the same tokens for the same seed."""
    model = models[name]
    records = [record(0), record(1, "edit"), record(2, "in_context"), record(0, "knowledge"), record(1, "chain")]
    seeds = [11, 12, 13, 14, 15]
    texts, codes = model.generate(records, seeds=seeds)
    for k, one in enumerate(records):
        alone = model.generate([one], seeds=[seeds[k]], cache=False)
        assert alone[0][0] == texts[k]
        assert torch.equal(alone[1][0], codes[k])  # type: ignore[arg-type]
        assert codes[k].shape[1] == LEVELS and len(codes[k]) <= 12  # type: ignore[index, arg-type, union-attr]


@pytest.mark.parametrize("name", SERIALISATIONS)
def test_longer_than_the_window_does_not_jump(name: str, models: dict[str, MotionLM]) -> None:
    """40 steps from a window of 12: exactly as long, the first window as without, one decoding for all."""
    model = models[name]
    options = SimpleNamespace(seconds=8.0)
    ((part,),) = [p[-1:] for p in model.respond([record(0)], seeds=[5], options=options)]
    assert len(part.value) == 160
    _, codes = model.generate([record(0)], seeds=[5], seconds=8.0)
    _, first = model.generate([record(0)], seeds=[5], seconds=12 / 5)
    assert codes[0] is not None and first[0] is not None
    same = 12 if name in ("flat", "depth") else 12 - LEVELS
    assert torch.equal(codes[0][:same], first[0][:same]) or name == "base_only"
    assert torch.equal(codes[0][:9, 0], first[0][:9, 0])
    assert np.allclose(part.value.joints, model.codec.decode([codes[0]])[0].joints)


def test_timeline_and_texts(models: dict[str, MotionLM]) -> None:
    model = models["depth"]
    clip = model.timeline([("a person walks", 2.0), ("walk faster", 3.0)], seed=3)
    assert len(clip) == 100 and np.isfinite(clip.joints).all()
    again = model.timeline([("a person walks", 2.0), ("what happens?", 3.0)], seed=3)
    assert np.allclose(clip.joints[:20], again.joints[:20], atol=1e-5), "a scene does not know the next"
    assert isinstance(model.describe([record(0, "describe")])[0], str)
    (parts,) = model.respond([record(0, "describe")], seeds=[1])
    assert [p.type for p in parts] == ["text"] and parts[0].text
    assert all(isinstance(m, Motion) for m in model.generate_motion([record(0), record(1)], [1, 2]))
    with pytest.raises(WeftError, match="no scenes"):
        model.timeline([])
    named = MotionModel(model, "tiny")
    scenes = [("a person walks", 2.0), ("walk faster", 3.0)]
    assert np.array_equal(named.timeline(scenes, seed=3).joints, clip.joints)
    for wrong, options in (
        ([("  ", 1.0)], None),
        (scenes, MotionOptions(seconds=5)),
        (scenes, MotionOptions(rounds=1)),
    ):
        with pytest.raises(WeftError, match="timeline: "):
            named.timeline(wrong, options=options)
    with pytest.raises(WeftError, match="shortest"):
        model.generate([record(0)], seeds=[1], seconds=0.01)


def test_guidance_reads_the_prompt_without_the_words(models: dict[str, MotionLM]) -> None:
    model = models["depth"]
    plain = model.generate([record(0)], seeds=[1], sampling=Sampling(guidance=1.0))[1][0]
    strong = model.generate([record(0)], seeds=[1], sampling=Sampling(guidance=8.0))[1][0]
    assert plain is not None and strong is not None and not torch.equal(plain, strong)
    both = model.generate([record(0), record(1, "edit")], seeds=[1, 2], sampling=Sampling(guidance=8.0))[1][0]
    assert both is not None and torch.equal(both, strong)


def test_guidance_holds_for_what_the_model_says_first(models: dict[str, MotionLM]) -> None:
    """Words that an answer says before its movement are words too: the side without text does not read them."""
    model = models["depth"]
    clip = record(0).turns[-1].parts[-1]
    said = Record("p", "edit", [*record(1, "edit").turns[:-1], Turn("assistant", [text_part("a person walks"), clip])])
    (rows,) = model.reader.encode([said], answers=True)
    words = rows.rows[rows.kind == 3][:, 0]
    assert model.tokenizer.decode(words) == "a person walks" and learned(rows.kind)[rows.kind == 3].all()
    text = (rows.rows[:, 0] >= 0) & (rows.rows[:, 0] < model.vocabulary.text)
    assert not text[wordless(rows.kind) & (rows.kind != 0)].any()
    (alone,) = model.reader.encode([record(2, "describe")], answers=True)
    assert not (alone.kind == 3).any(), "an answer of words alone is no plan"

    seen: list[torch.Tensor] = []

    class Watched(Uniform):
        def feed(self, state: list[int], rows: torch.Tensor, seen_now: torch.Tensor) -> None:
            written = (rows[:, 0] >= 0) & (rows[:, 0] < 50)
            assert not (written[2:] & seen_now[2:]).any() and seen_now[:2].all()
            assert (seen_now[2:] | written[2:]).all(), "all else reaches both sides"
            seen.append(seen_now)

    form = serial("depth")
    grammars = [Reply(form, motion="must", words=4, least=2, most=3) for _ in range(2)]
    prompts = [torch.zeros(1, form.columns)] * 2
    sample_tokens(Watched(form, 200), prompts, grammars, [3, 4], sampling=Sampling(guidance=2.0), negative=prompts)
    assert any(not one.all() for one in seen), "words were drawn"


@pytest.mark.parametrize("cache", [True, False])
def test_a_row_that_is_not_seen_changes_nothing(cache: bool, models: dict[str, MotionLM]) -> None:
    network = models["depth"].network
    prompts = [r.rows for r in models["depth"].reader.encode([record(0), record(1, "edit")], answers=False)]
    row = prompts[0][2:3].repeat(2, 1)
    with torch.no_grad():
        plain, other = network.begin(prompts, cache=cache), network.begin(prompts, cache=cache)
        network.feed(other, row, torch.tensor([True, False]))
        network.feed(other, row, torch.tensor([True, True]))
        network.feed(plain, row, torch.tensor([True, True]))
        assert torch.allclose(plain.hidden[1], other.hidden[1], atol=1e-5)
        assert not torch.allclose(plain.hidden[0], other.hidden[0], atol=1e-3)


# -- training


@pytest.mark.parametrize("name", SERIALISATIONS)
def test_upper_levels_can_weigh_less(name: str, folders: dict[str, Path]) -> None:
    """The loss is a weighted mean: from its values at two weights follows that at a third."""
    records = [record(0), record(1, "edit")]
    found, counts = [], []
    for weight in (1.0, 0.5, 0.25):
        model = MotionLMTrainable(folders[name], upper_weight=weight)
        examples = model.examples(records)
        with torch.no_grad():
            found.append(model.loss(examples, Draw(0, 0, ["a", "b"])).per_sample)
    v = model.model.vocabulary
    for e in examples:
        ids = e["rows"][e["kind"] >= 2].flatten()
        ids = ids[ids >= 0]
        upper = ids >= v.block(0)[1]
        if name == "base_only":  # its predictor learns one level of every step
            upper = (ids >= v.block(0)[0]) & (ids < v.block(0)[1])
        counts.append([float(len(ids) - (0 if name == "base_only" else upper.sum())), float(upper.sum())])
    low, upper = torch.tensor(counts).T
    sums = [f * (low + w * upper) for f, w in zip(found, (1.0, 0.5, 0.25), strict=True)]
    assert torch.allclose((sums[0] - sums[1]) / 0.5, (sums[1] - sums[2]) / 0.25, rtol=1e-3)
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    with pytest.raises(WeftError, match="upper_weight 0"):
        MotionLMTrainable(folders[name], upper_weight=0)


@pytest.mark.parametrize("name", SERIALISATIONS)
def test_loss_by_hand_and_padding(name: str, folders: dict[str, Path]) -> None:
    """The loss of a sample is the mean over its answer's tokens, and does not depend on the batch."""
    model = MotionLMTrainable(folders[name])
    assert isinstance(model, Trainable)
    records = [record(0), record(1, "edit"), record(2, "describe"), record(0, "reflect")]
    examples = model.examples(records)
    draw = Draw(0, 0, [r.id for r in records])
    with torch.no_grad():
        together = model.loss(examples, draw).per_sample
        alone = torch.cat([model.loss([e], Draw(0, 0, [i])).per_sample for e, i in
                           zip(examples, draw.record_ids, strict=True)])  # fmt: skip
    assert torch.allclose(together, alone, atol=1e-5)
    e = examples[2]  # text alone: every serialisation is a plain language model
    with torch.no_grad():
        hidden = model.model.network.hidden(e["rows"][None], torch.ones(1, len(e["rows"])).long())[0]
        learned = e["kind"][1:] >= 2
        logits = model.model.network.vocabulary_logits(hidden[:-1][learned])
        wanted = F.cross_entropy(logits, e["rows"][1:, 0][learned])
    assert torch.allclose(together[2], wanted, atol=1e-5)
    everything = MotionLMTrainable(folders[name], learn="all")
    assert not torch.allclose(everything.loss(examples[:1], Draw(0, 0, ["a"])).per_sample, together[:1])
    assert runs(torch.tensor([True, False, True, True])) == [(0, 1), (2, 4)]


def test_text_dropout_is_drawn_for_the_record(folders: dict[str, Path]) -> None:
    model = MotionLMTrainable(folders["flat"], text_dropout=0.5)
    examples = model.examples([record(0)] * 8)
    draw = Draw(0, 0, [f"r{k}" for k in range(8)])
    found = model.loss(examples, draw).per_sample.detach()
    assert len(set(found.round(decimals=5).tolist())) == 2, "with and without the words"
    assert torch.equal(found, model.loss(examples, draw).per_sample.detach())
    with torch.no_grad():
        assert len(set(model.loss(examples, draw).per_sample.round(decimals=5).tolist())) == 1


def recipe(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    model = {"path": str(folder), "train": ["transformer", "heads"]} | changes.pop("model", {})
    return {
        "model": model,
        "trainable": "weft.models.motion.lm_training:MotionLMTrainable",
        "data": [{"source": {"call": "tiny_motion:corpus"}}],
        "cache": {},
        "optim": {"lr": 1e-2},
        "run": {"folder": str(out), "steps": 25, "batch_size": 8, "log_every": 25, "device": "cpu", "trackers": []},
    } | changes


def test_it_learns_in_the_loop(folders: dict[str, Path], tmp_path: Path) -> None:
    from weft.train import run

    done = run(recipe(folders["depth"], tmp_path / "run"), say=lambda line: None)
    before, after = MotionLMTrainable(folders["depth"]), MotionLMTrainable(done.export or Path())
    examples = before.examples(corpus()[:8])
    draw = Draw(0, 0, [str(k) for k in range(8)])
    with torch.no_grad():
        assert after.loss(examples, draw).per_sample.mean() < 0.7 * before.loss(examples, draw).per_sample.mean()


def test_lora_trains_new_rows_and_head_and_nothing_else(folders: dict[str, Path], tmp_path: Path) -> None:
    """The exported adapter on the untouched base is the trained model; old token rows did not move."""
    from weft.train import run

    lora = {"rank": 4, "alpha": 4.0, "targets": ["q_proj", "v_proj", "gate_proj"], "init": "default"}
    done = run(recipe(folders["depth"], tmp_path / "run", model={"lora": lora}), say=lambda line: None)
    assert done.export is not None and not (done.export / "transformer").exists()
    base, tuned = load(folders["depth"], device="cpu"), load(folders["depth"], device="cpu", lora=[str(done.export)])
    text = base.vocabulary.text
    row = torch.arange(len(base.tokenizer))
    a, b = base.transformer.get_input_embeddings()(row), tuned.transformer.get_input_embeddings()(row)
    assert torch.equal(a[:text], b[:text]) and not torch.equal(a[text:], b[text:])
    head_a, head_b = base.head.state_dict(), tuned.head.state_dict()
    assert any(not torch.equal(head_a[k], head_b[k]) for k in head_a)
    before, after = MotionLMTrainable(folders["depth"]), MotionLMTrainable(folders["depth"])
    after.model = tuned
    examples = before.examples(corpus()[:8])
    draw = Draw(0, 0, [str(k) for k in range(8)])
    with torch.no_grad():
        assert after.loss(examples, draw).per_sample.mean() < 0.9 * before.loss(examples, draw).per_sample.mean()
    x = torch.randn(2, 32)
    assert torch.allclose(tuned.transformer.get_output_embeddings()(x)[:, text:], x @ b[text:].t() / 32**0.5, atol=1e-4)


@pytest.mark.parametrize("serialisation", ["flat", "depth", "base_only"])
def test_a_lora_leaves_merged_or_alone(folders: dict[str, Path], tmp_path: Path, serialisation: str) -> None:
    """Token rows and head go with it; the merged folder is a plain model, and both answer as the adapted one did."""
    from transformers import AutoModelForCausalLM

    from weft.models.adapt import add_lora, save_lora
    from weft.models.export import export
    from weft.models.motion.export import probe

    trained = MotionLMTrainable(folders[serialisation])
    modules = {name: module for name, module in trained.modules().items() if name != "rvq"}
    rows = trained.new_rows()["transformer"]
    add_lora(modules["transformer"], rank=4, alpha=8, targets=["q_proj", "up_proj"], rows=rows)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in modules.values():
            for name, parameter in module.named_parameters():
                if any(word in name for word in ("lora_B", "tokens_delta", "condition")):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    lora = str(save_lora(modules, tmp_path / "lora").parent)
    plain, adapted = (probe(load(folders[serialisation], device="cpu", lora=x)) for x in ([], [lora]))
    assert (plain - adapted).abs().max() > 0.1

    whole = export(folders[serialisation], tmp_path / "whole", lora=[lora], device="cpu")
    assert whole.difference < 1e-4 and (probe(load(whole.path, device="cpu")) - adapted).abs().max() < 1e-4
    facts = json.loads((whole.path / "export.json").read_text())
    assert facts["merged_layers"] == 4 and facts["lora"] == [lora]
    theirs = AutoModelForCausalLM.from_pretrained(whole.path / "transformer").state_dict()
    ours = load(whole.path, device="cpu").transformer.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in ours.items()) and not any("lora" in k for k in ours)

    alone = export(folders[serialisation], tmp_path / "alone", lora=[lora], what="lora", device="cpu")
    facts = json.loads((alone.path / "export.json").read_text())
    assert (facts["rank"], facts["alpha"]) == (4, 8)
    again = load(folders[serialisation], device="cpu", lora=[str(alone.path)])
    assert torch.equal(probe(again), adapted)
    half = export(folders[serialisation], tmp_path / "half", lora=[lora], dtype="bf16", device="cpu")
    assert 0 < half.difference < 5e-2
    with pytest.raises(WeftError, match="must be 1"):
        export(folders[serialisation], tmp_path / "x", lora=[(lora, 0.5)])
    with pytest.raises(WeftError, match="a model of movement has none"):
        export(folders[serialisation], tmp_path / "x", lora=[lora], options={"layout": "mosaic"})


def test_it_opens_by_its_index(folders: dict[str, Path]) -> None:
    import weft
    from weft.models.load import load as load_any

    assert isinstance(load_any(folders["flat"], device="cpu"), MotionLM)
    with pytest.raises(WeftError, match="resolution"):
        load_any(folders["flat"], device="cpu", resolution=64)
    with pytest.raises(WeftError, match="load_motion"):
        weft.load(folders["flat"])
    walk = weft.load_motion(folders["flat"], device="cpu").generate("a person walks", seed=1, seconds=2.0)
    assert len(walk) == 40


LMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "granite": {"logits_scaling": 6.0, "embedding_multiplier": 3.0},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 4.0},
    "hyperclovax": {"logits_scaling": 6.0},
    "minicpm3": {"dim_model_base": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                 "v_head_dim": 16},
    "phi": {},  # its output layer has a bias
}  # fmt: skip


def tiny_lm(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
             "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(2)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | LMS[kind] | changes)).eval()
    if (bias := lm.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)
    return lm


@pytest.mark.parametrize("kind", sorted(LMS))
def test_logits_are_those_of_the_lm_s_own_class(kind: str) -> None:
    lm = tiny_lm(kind)
    network = MotionNetwork(lm, serial("flat"))
    rows = torch.randint(0, 40, (2, 7, 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = lm(input_ids=rows[..., 0]).logits
        hidden = network.hidden(rows, torch.ones((2, 7), dtype=torch.long))
        assert wanted.abs().max() > 0.1, "or all would be near"
        assert torch.allclose(network.vocabulary_logits(hidden), wanted, rtol=1e-5, atol=1e-6)
        assert torch.allclose(network.vocabulary_logits(hidden, 5, 11), wanted[..., 5:11], rtol=1e-5, atol=1e-6)
    network.check_logits()


def test_an_lm_with_other_logits_is_refused_when_a_model_is_built(tmp_path: Path) -> None:
    lm = tiny_lm("llama").train()
    plain = lm.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    lm.forward = scaled
    with pytest.raises(WeftError, match="LlamaForCausalLM does something to its logits .* 33%"):
        MotionNetwork(lm, serial("flat")).check_logits()
    assert lm.training
    settings = settings_for("flat")
    settings["transformer"] = {"model_type": "granite", "hidden_size": 32, "intermediate_size": 48,
                               "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                               "logits_scaling": 8.0}  # fmt: skip
    build(settings, tmp_path / "granite")
    answer = load(tmp_path / "granite", device="cpu").respond([record(0)], seeds=[1])[0]
    assert any(p.type == "motion" for p in answer)


def test_wrong_folders_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="tokens"):
        load(tmp_path)
    with pytest.raises(WeftError, match="unknown option 'serial'"):
        make_options({"serial": "flat"})
    with pytest.raises(WeftError, match="overlap"):
        make_options({"window": 4, "overlap": 4})
    with pytest.raises(WeftError, match="knows <user>|knows <motion>"):
        model = load(folders["flat"], device="cpu")
        MotionLM.create(model.codec, model.tokenizer, model.transformer, {})
    with pytest.raises(WeftError, match="exists"):
        build(settings_for("flat"), tmp_path)
    with pytest.raises(WeftError, match="unknown section"):
        build({"rvqq": {}}, tmp_path / "x")


class Scripted:
    """Answers in turn: an attempt, a judgement with another, a judgement without."""

    name = "scripted"

    def __init__(self, attempts: int) -> None:
        self.attempts, self.asked = attempts, []

    def modules(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path) -> None: ...

    def respond(self, records: Any, *, seeds: Any, options: Any = None) -> Any:
        self.asked.append((records, list(seeds)))
        moves = [motion_part(Motion(procedural(8, len(self.asked))))] if len(self.asked) <= self.attempts else []
        return [[text_part(f"{len(self.asked)}"), *moves] for _ in records]


def test_reflection_goes_on_until_a_judgement_is_content() -> None:
    model = Scripted(2)
    (parts,) = think(model, [record(0)], seeds=[4])
    assert [p.type for p in parts] == ["text", "motion", "text", "motion", "text"]
    last = model.asked[-1][0][0]
    assert last.task == "reflect" and [t.role for t in last.turns] == ["user", "assistant"] * 2 + ["user"]
    assert last.turns[-1].parts[0].text == "does the motion match the text?"
    assert len({s for _, seeds in model.asked for s in seeds}) == 3, "every round has its own seed"
    assert len(think(Scripted(9), [record(0)], seeds=[4], rounds=3)[0]) == 8, "three rounds at most"
    assert len(think(Scripted(9), [record(0)], seeds=[4], rounds=0)[0]) == 2
    with pytest.raises(WeftError, match="rounds"):
        think(model, [record(0)], seeds=[4], rounds=-1)
