"""Text encoders as trainables: losses by hand, what counts as a negative, exactness, and that both learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tiny import tiny_kontext_folder
from weft.errors import WeftError
from weft.models.text import ClipTrainable, T5Trainable
from weft.record import Record, make_record
from weft.types import Draw, Example, Trainable

COLOURS = {"red": (220, 40, 40), "blue": (45, 80, 220), "green": (40, 160, 60), "yellow": (245, 215, 40)}
SHAPES = ("square", "circle")


def record(colour: str, shape: str, words: str = "draw a {} {}", source: bool = False) -> Record:
    y, x = np.mgrid[:32, :32] - 15.5
    inside = (np.maximum(abs(x), abs(y)) if shape == "square" else np.hypot(x, y)) < 11
    array = np.where(inside[..., None], COLOURS[colour], 240).astype(np.uint8)
    return make_record(
        words.format(colour, shape),
        source=Image.new("RGB", (32, 32), (9, 9, 9)) if source else None,
        target=Image.fromarray(array),
        id=f"{colour}-{shape}-{words[:4]}",
        meta={"canonical": f"{shape} {colour}"},
    )


RECORDS = [record(c, s) for c in COLOURS for s in SHAPES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_kontext_folder(tmp_path_factory.mktemp("text") / "model")


def train(model: Any, examples: list[Example], steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.Adam([p for m in model.modules().values() for p in m.parameters()], lr=lr)
    losses = []
    for step in range(steps):
        loss = model.loss(examples, Draw(0, step, [str(i) for i in range(len(examples))])).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def clip(folder: Path, **given: Any) -> ClipTrainable:
    torch.manual_seed(0)
    return ClipTrainable(folder, **({"size": 32, "width": 32, "layers": 1, "heads": 2} | given))


def test_clip_is_a_trainable_for_either_encoder(folder: Path) -> None:
    for name in ("text_encoder", "text_encoder_2"):
        model = clip(folder, encoder=name)
        assert isinstance(model, Trainable) and set(model.modules()) == {name, "contrast"}
    with pytest.raises(WeftError, match="text_encoder_2"):
        clip(folder, encoder="text_encoder_3")
    with pytest.raises(WeftError, match="no part tokenizer"):
        clip(folder / "vae")


def test_clip_examples_hold_source_and_target(folder: Path) -> None:
    model = clip(folder)
    drawn, edited = model.examples([RECORDS[0], record("red", "square", source=True)])
    assert drawn["pictures"].shape == (6, 32, 32) and drawn["pictures"].dtype == torch.uint8
    assert (drawn["pictures"][:3] == 128).all() and (edited["pictures"][:3] == 9).all()
    assert torch.equal(drawn["pictures"][3:], edited["pictures"][3:])
    assert drawn["input_ids"].shape == (model.tokenizer.model_max_length,)
    with pytest.raises(WeftError, match="no target"):
        model.examples([make_record("draw a star")])


def test_clip_loss_by_hand_and_equal_texts_are_no_negatives(folder: Path) -> None:
    model = clip(folder)
    examples = model.examples(RECORDS[:3])
    draw = Draw(0, 0, ["a", "b", "c"])
    with torch.no_grad():
        texts = model.encoder(input_ids=torch.stack([e["input_ids"] for e in examples])).text_embeds
        pictures = model.contrast.tower(
            pixel_values=torch.stack([e["pictures"] for e in examples]).float() / 127.5 - 1
        ).image_embeds
        logits = F.normalize(texts, dim=1) @ F.normalize(pictures, dim=1).T / 0.07
        p_text, p_picture = logits.softmax(1).diagonal(), logits.softmax(0).diagonal()
        expected = -(p_text.log() + p_picture.log()) / 2
        assert torch.allclose(model.loss(examples, draw).per_sample, expected, atol=1e-4)
        alone = model.loss(examples[:1], draw).per_sample
        twins = model.loss([examples[0], examples[0]], draw).per_sample
        assert float(alone[0]) == 0 and float(twins.abs().sum()) == 0
        assert not torch.allclose(model.loss(examples[:2], draw).per_sample, torch.zeros(2), atol=1e-3)


@pytest.mark.slow
def test_clip_learns_and_saves_what_transformers_loads(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    model = clip(folder)
    examples = model.examples(RECORDS)
    losses = train(model, examples, 160, 1e-3)  # colours first, shapes after a plateau
    assert losses[-1] < 0.1 * losses[0]
    loss = model.loss(examples, Draw(0, 0, ["x"] * len(examples)))
    assert loss.metrics["top1"] == 1.0
    model.save(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")(["draw a red square"], return_tensors="pt").input_ids
    loaded = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).text_embeds, model.encoder.eval()(ids).text_embeds)


def test_t5_examples_and_loss_by_hand(folder: Path) -> None:
    torch.manual_seed(0)
    model = T5Trainable(folder, decoder_layers=1)
    assert isinstance(model, Trainable) and set(model.modules()) == {"text_encoder_3"}
    examples = model.examples([RECORDS[0], record("blue", "circle")])
    assert examples[0]["input_ids"].shape == (model.tokenizer.model_max_length,)
    assert model.tokenizer.decode(examples[0]["labels"]) == "square red</s>"
    examples[1]["labels"] = torch.cat([examples[1]["labels"][:-1].repeat(3), examples[1]["labels"][-1:]])  # longer
    with torch.no_grad():
        both = model.loss(examples, Draw(0, 0, ["a", "b"]))
        for i in range(2):  # padding of labels must not count
            single = model.loss([examples[i]], Draw(0, 0, ["a"]))
            assert torch.allclose(single.per_sample, both.per_sample[i : i + 1], atol=1e-5)
        out = model.model(input_ids=examples[0]["input_ids"][None], labels=examples[0]["labels"][None])
        assert torch.allclose(out.loss, both.per_sample[0], atol=1e-5)
    with pytest.raises(WeftError, match="canonical"):
        model.examples([make_record("draw a star")])


@pytest.mark.slow
def test_t5_learns_rewrites_and_keeps_the_encoder(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    torch.manual_seed(0)
    model = T5Trainable(folder, decoder_layers=1)
    train(model, model.examples(RECORDS), 80, 5e-3)
    held = [record(c, s, "the picture of a {} {}") for c in COLOURS for s in SHAPES]
    loss = model.loss(model.examples(RECORDS), Draw(0, 0, ["x"] * 8))
    assert loss.metrics["exact"] == 1.0 and loss.metrics["tokens"] == 1.0
    assert model.rewrite([r.instruction for r in RECORDS]) == [r.meta["canonical"] for r in RECORDS]
    # the metric is what greedy decoding does, right or wrong
    with torch.no_grad():
        scored = [model.loss(model.examples([r]), Draw(0, 0, ["x"])).metrics["exact"] for r in held]
    written = [
        float(w == r.meta["canonical"]) for w, r in zip(model.rewrite([r.instruction for r in held]), held, strict=True)
    ]
    assert scored == written
    model.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer_3")
    ids = tokenizer(["draw a red square"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    loaded = T5EncoderModel.from_pretrained(tmp_path / "text_encoder_3").eval()
    with torch.no_grad():
        trained = model.model.encoder(input_ids=ids).last_hidden_state
        assert torch.equal(loaded(ids).last_hidden_state, trained)
        assert not torch.allclose(T5Trainable(folder).encoder(ids).last_hidden_state, trained, atol=1e-2)


def test_unknown_words_are_counted():
    """Words that are spelled in letters, or hold a letter that the tokenizer has not; known ones never."""
    from weft.models.tokenizers import t5_tokenizer, unknown_words

    tokenizer = t5_tokenizer(["a person walks forward"] * 3, length=32)
    unknown, words = unknown_words(tokenizer, ["A person walks, dribbles!", "dribbles über 12 a walkway"])
    assert dict(unknown) == {"dribbles": 2, "über": 1, "walkway": 1} and words == 8


def test_words_that_a_small_vocabulary_lacks_are_told_once(caplog):
    from weft.models import tokenizers

    tokenizers._tell.cache_clear()
    tokenizer = tokenizers.t5_tokenizer(["a person walks and waves"] * 3, length=32)
    for _ in range(2):
        tokenizers.warn_unknown(tokenizer, ["a person walks", "a dog walks"])
    assert [r.getMessage() for r in caplog.records] == [
        "the model's small vocabulary lacks the word 'dog': it reads letters and guesses"
    ]
    large = type("Large", (), {"vocab_size": 32100})()
    tokenizers.warn_unknown(large, ["qwzx"])  # spells any word: never even asked
    assert len(caplog.records) == 1
