"""The instruction rewriter: what it asks, how it reads answers, when it runs, and that training teaches it."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden.make_unipic2 import picture
from tiny_metaquery import tiny_qwen_folder
from weft.cli.main import main
from weft.cli.options import ModelOptions
from weft.errors import WeftError
from weft.models.rewriter import (
    FIELDS,
    Form,
    Rewriter,
    open_rewriter,
    open_vlm,
    parse,
    question,
    split_standard,
    standard,
    stretch_to_format,
    with_instruction,
)
from weft.models.rewriter_training import RewriterTrainable, standardised
from weft.record import make_record, weave, write_records
from weft.types import Draw, Trainable
from weft.vlm.ask import Ask, Reply, ask_key
from weft.vlm.structured import read_fields, write_fields


class Fake:
    """A VLM that answers by the book and keeps what it was asked."""

    name = "fake"

    def __init__(self, answer="<gen> do it </gen>", error=None):
        self.answer, self.error, self.asked = answer, error, []

    def ask(self, questions, how):
        self.asked += [(question, how) for question in questions]
        return [Reply(self.answer, error=self.error) for _ in questions]


def edit(text="make it red", references=()):
    return make_record(text, picture(64, 96), references=references, id="e")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<gen> a red star </gen>", "a red star"),
        ("<gen>a red star</gen>", "a red star"),
        ("<edit>[instruction]: x, [caption]: y</edit>", "[instruction]: x, [caption]: y"),
        ("< edit >\n a red star\n</ edit > and more", "a red star"),
        ("<gen>a red star, cut", "a red star, cut"),
        ("Sure: <gen>a red star</gen>", "a red star"),
        ("<gen> a red star </ge", "a red star"),
        ("<gen>a red star</edit>", "a red star"),
        ("Put the star of <image2> here", "Put the star of <image2> here"),
        ("a red star without tags", "a red star without tags"),
        ("a < b", "a < b"),
        (
            '{"instruction": "make it red", "caption": "a red star"}',
            "[instruction]: make it red, [caption]: a red star",
        ),
        ('```json\n{"caption": "a red star"}\n```', "a red star"),
        ('{"broken', '{"broken'),
        ("", ""),
    ],
)
def test_answers_are_read_with_tolerance(answer, expected):
    assert parse(answer) == expected


def test_the_releases_cut_by_length():
    assert parse("<gen> a red star </gen>", strict_slice=True) == "a red star"
    assert parse("<edit>a red star</edit>", strict_slice=True) == "a red star"
    assert parse("no tags at all, cut all the same", strict_slice=True) == "s at all, cut all t"


def test_structured_texts():
    assert standard("make it red", "a red star") == "[instruction]: make it red, [caption]: a red star"
    assert standard("", "a red star") == "a red star"


def test_the_question_is_that_of_the_release():
    (turn,) = question(edit("take the colour", [picture(64, 64)]))
    assert [part.type for part in turn.parts] == ["image", "image", "text"]
    assert turn.parts[2].text == "take the colour It is editing task."
    assert [part.load().size for part in turn.parts[:2]] == [(1248, 832), (1024, 1024)]
    (turn,) = question(make_record("a star", references=[picture(64, 96)]), fit="none")
    assert turn.parts[0].load().size == (96, 64) and turn.parts[1].text == "a star It is generation task."


def test_woven_pictures_are_named_by_number(tmp_path):
    picture(32, 32).save(tmp_path / "b.png")
    record = make_record(weave(f"give it the colour of {{{tmp_path / 'b.png'}}}"), picture(64, 64))
    assert question(record)[0].parts[-1].text == "give it the colour of image 2 It is editing task."
    again = with_instruction(record, "new words")
    assert again.instruction == "new words" and len(again.inputs) == 2


def test_formats_are_the_nearest_by_aspect():
    assert stretch_to_format(picture(64, 64)).size == (1024, 1024)
    assert stretch_to_format(picture(200, 10)).size == (672, 1568)


@pytest.mark.parametrize(("when", "expected"), [("on", [0, 1, 1]), ("several", [0, 0, 1]), ("off", [0, 0, 0])])
def test_when_it_runs(when, expected):
    records = [make_record("a star"), edit(), edit("f", [picture(32, 32)])]
    fake = Fake()
    out = Rewriter(fake, when=when).rewrite(records)
    assert [r.instruction == "do it" for r in out] == [bool(k) for k in expected]
    assert len(fake.asked) == sum(expected)
    for new, old in zip(out, records, strict=True):
        assert [p.digest() for p in new.inputs] == [p.digest() for p in old.inputs] and new.id == old.id
        assert new is old or new.meta["asked"] == old.instruction


@pytest.mark.parametrize(
    ("fake", "message"), [(Fake(error="timeout"), "failed .timeout"), (Fake("<gen></gen>"), "nothing")]
)
def test_a_failure_is_never_a_text(fake, message):
    with pytest.raises(WeftError, match=message):
        Rewriter(fake).rewrite([edit()])


# -- structured answers


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server without probabilities: keeps what it is asked, answers with the next of `answers`."""

    asked: ClassVar[list[dict]] = []
    answers: ClassVar[list[str]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        content = {"message": {"content": self.answers.pop(0)}, "logprobs": None}
        reply = json.dumps({"choices": [content]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Handler.asked, Handler.answers = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
        httpd.shutdown()
        thread.join()


def test_a_server_is_asked_for_the_form_and_held_to_it(server):
    rewriter = open_rewriter(server, model="m", structured=True)
    Handler.answers[:] = ['{"caption": "a red star", "instruction": "make it red"}']
    (out,) = rewriter.rewrite([edit()])
    assert out.instruction == "[instruction]: make it red, [caption]: a red star"
    wanted = Handler.asked[0]["response_format"]["json_schema"]
    assert wanted["strict"] and wanted["schema"]["required"] == ["instruction", "caption"]
    assert wanted["schema"]["additionalProperties"] is False
    Handler.answers[:] = ['{"caption": "a star"}']
    (out,) = rewriter.rewrite([make_record("a star", references=[picture(32, 32)])])
    assert out.instruction == "a star"
    assert list(Handler.asked[1]["response_format"]["json_schema"]["schema"]["properties"]) == ["caption"]
    for answer in ("<gen> do it </gen>", '{"instruction": 3, "caption": ""}', '{"instruction": "no caption"}'):
        Handler.answers[:] = [answer]
        with pytest.raises(WeftError, match="did not keep to the form"):
            rewriter.rewrite([edit()])
    Handler.answers[:] = ["<gen> do it </gen>"]
    (out,) = open_rewriter(server, model="m").rewrite([edit()])  # not structured: no form is asked for
    assert out.instruction == "do it" and "response_format" not in Handler.asked[-1]


def test_a_server_without_probabilities_will_do(server):
    """Texts alone are wanted, so none are asked for: many servers know none, and 4,096 tokens of them are megabytes."""
    Handler.answers[:] = ["<gen> do it </gen>"]
    (out,) = open_rewriter(server, model="m").rewrite([edit()])
    assert out.instruction == "do it" and "logprobs" not in Handler.asked[0]


def test_a_release_s_vlm_is_found_in_its_folder(folder, tmp_path, monkeypatch, capsys):
    """A DreamOmni2 folder holds it as `vlm-model`, on this machine or fetched from the hub."""
    from weft.models.image import metaquery_parts

    shutil.copytree(folder, tmp_path / "DreamOmni2" / "vlm-model")
    (tmp_path / "DreamOmni2" / "vlm-model" / "weft.json").write_text('{"rewriter": {"fit": "none"}}')
    monkeypatch.setattr(metaquery_parts, "from_hub", lambda name, *rest: tmp_path / name.split("/")[1])
    for where in (tmp_path / "DreamOmni2", "xiabs/DreamOmni2"):
        assert open_rewriter(where, device="cpu").form.fit == "none"
        ModelOptions(model="tiny-kontext", rewriter=str(where), device="cpu").load()  # its licence is shown, too
        assert f"licence of {where}: weights: Apache-2.0 as published; base: its adapters" in capsys.readouterr().err
    assert open_rewriter(folder, device="cpu").licence is None  # nothing is known
    named = open_rewriter("http://localhost:1/v1", model="Qwen/Qwen2.5-VL-3B-Instruct").licence
    assert named is not None and "no commercial use" in named
    (tmp_path / "DreamOmni2" / "vlm-model" / "model.safetensors").unlink()
    with pytest.raises(WeftError, match="vlm-model: cannot be read"):
        open_vlm(tmp_path / "DreamOmni2")


def test_a_vlm_that_lacks_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "vlm")
    file = tmp_path / "vlm" / "model.safetensors"
    state = load_file(file)
    del state[next(key for key in state if "down_proj" in key)]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(WeftError, match="1 weights are missing, the first is .*down_proj"):
        open_vlm(tmp_path / "vlm", device="cpu")


def test_in_process_every_answer_is_the_object(folder):
    vlm = open_vlm(folder, device="cpu")
    tokenizer = vlm.processor.tokenizer
    fixed = len(write_fields(tokenizer, {"instruction": "x", "caption": "x"})) + 1
    for room, temperature in ((fixed, 0.0), (fixed + 3, 1.0), (fixed + 60, 1.5)):
        how = Ask(max_tokens=room, fields=("instruction", "caption"), temperature=temperature)
        for reply in vlm.ask([question(edit(), "none"), question(edit("b"), "none")], how):
            found = read_fields(reply.text, how.fields)
            assert all(found.values()) and len(reply.tokens) <= room and reply.tokens[-1].text == "<|im_end|>"
    with pytest.raises(WeftError, match=f"max_tokens is {fixed - 1}"):
        vlm.ask([question(edit(), "none")], Ask(max_tokens=fixed - 1, fields=("instruction", "caption")))
    (out,) = Rewriter(vlm, form=Form("none", True), max_tokens=80).rewrite([edit()])
    assert out.instruction.startswith("[instruction]: ") and ", [caption]: " in out.instruction


def test_forms_are_checked():
    assert split_standard("[instruction]: a, b, [caption]: c", FIELDS) == {"instruction": "a, b", "caption": "c"}
    assert split_standard("a ; b", ("instruction",)) == {"instruction": "a ; b"}
    with pytest.raises(WeftError, match="does not have the fields instruction, caption"):
        split_standard("a ; b", FIELDS)
    with pytest.raises(WeftError, match="edit_fields are some of"):
        Form(edit_fields=("text",))
    with pytest.raises(WeftError, match="leave one out"):
        Rewriter(Fake(), strict_slice=True, form=Form(structured=True))
    question_ = question(edit(), "none")
    assert ask_key("m", question_, Ask()) != ask_key("m", question_, Ask(fields=("caption",)))


def test_options_and_places_are_checked(tmp_path):
    with pytest.raises(WeftError, match="choose off, on, several"):
        Rewriter(Fake(), when="maybe")
    with pytest.raises(WeftError, match="name the model"):
        open_vlm("http://localhost:1/v1")
    with pytest.raises(WeftError, match="no such folder"):
        open_vlm(tmp_path / "nothing")


# -- training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen_folder(tmp_path_factory.mktemp("vlm"))


def records():
    meta = [{"standard": "a red star in a blue ring"}, {"standard": "make the star red"}]
    return [
        make_record("a ring", references=[picture(56, 56)], id="g", meta=meta[0]),
        make_record("red", picture(28, 56), references=[picture(28, 28)], id="e", meta=meta[1]),
    ]


def test_the_loss_is_of_the_answer_alone(folder):
    trainable = RewriterTrainable(folder, fit="none")
    assert isinstance(trainable, Trainable)
    examples = trainable.examples(records())
    words = trainable.reader.processor.tokenizer.decode(examples[1]["ids"][int(examples[1]["answer"]) :])
    assert words == "<gen> make the star red </gen><|im_end|>"
    with torch.no_grad():
        both = trainable.loss(examples, Draw(0, 0, ["g", "e"])).per_sample
        alone = torch.stack([trainable.loss([e], Draw(0, 0, ["x"])).per_sample[0] for e in examples])
        assert (both - alone).abs().max() < 1e-5  # padding changes nothing
        example, start = examples[0], int(examples[0]["answer"])
        labels = example["ids"].clone()
        labels[:start] = -100
        expected = trainable.model(
            input_ids=example["ids"][None], pixel_values=example["pixels"], image_grid_thw=example["grids"],
            mm_token_type_ids=(example["ids"] == trainable.reader.processor.image_id)[None].int(), labels=labels[None],
        ).loss  # fmt: skip
    assert (both[0] - expected).abs() < 1e-5
    with pytest.raises(WeftError, match=r'no meta\["standard"\]'):
        trainable.examples([edit()])


def recipe(folder, out, path, **model):
    return {
        "model": {"path": str(folder), "train": ["vlm"], **model},
        "trainable": "weft.models.rewriter_training:RewriterTrainable",
        "trainable_args": {"fit": "none"},
        "data": [{"source": {"kind": "jsonl", "path": str(path)}}],
        "cache": {"ahead": True},
        "optim": {"name": "adamw", "lr": 0.01},
        "run": {"folder": str(out), "steps": 60, "batch_size": 2, "threads": 1},
    }


def test_training_teaches_it_and_the_export_rewrites(folder, tmp_path):
    from weft.train import run

    path = tmp_path / "records.jsonl"
    write_records(path, records())
    result = run(recipe(folder, tmp_path / "run", path), say=lambda line: None)
    rewriter = open_rewriter(result.export, fit="none", max_tokens=40, device="cpu")
    out = rewriter.rewrite(records())
    assert [record.instruction for record in out] == ["a red star in a blue ring", "make the star red"]
    assert rewriter.vlm.model.config.model_type == "qwen2_5_vl"
    taught = standardised(str(path))
    assert [record.instruction for record in taught] == [record.instruction for record in out]
    assert len(taught[1].inputs) == 2


def test_a_changed_file_of_records_is_encoded_anew(folder, tmp_path):
    """Generated sources are remembered with their cache; `standardised` generates nothing, it reads a file."""
    from weft.train.loop import Trainer
    from weft.train.reading import read_recipe

    path, keys = tmp_path / "records.jsonl", []
    for text in ("make the star red", "make the star green"):
        write_records(path, [replace(record, meta={"standard": text}) for record in records()])
        call = {"call": "weft.models.rewriter_training:standardised", "args": {"path": str(path)}}
        tree = recipe(folder, tmp_path / "run", path) | {"data": [{"source": call}]}
        trainer = Trainer(read_recipe(tree), {}, lambda line: None)
        trainer.prepare_data()
        keys.append({key for key, _ in trainer.feed._keys.values()})
    assert len(keys[0]) == 2 and not keys[0] & keys[1]


def test_a_form_is_trained_and_kept(folder, tmp_path):
    from weft.train import run

    path = tmp_path / "records.jsonl"
    write_records(path, records())
    tree = recipe(folder, tmp_path / "run", path)
    tree["trainable_args"] = {"fit": "none", "structured": True, "edit_fields": ["instruction"]}
    result = run(tree, say=lambda line: None)
    rewriter = open_rewriter(result.export, max_tokens=60, device="cpu")
    assert rewriter.form == Form("none", True, ("instruction",))
    assert [r.instruction for r in rewriter.rewrite(records())] == ["a red star in a blue ring", "make the star red"]
    reply = rewriter.vlm.ask([question(records()[1], "none")], Ask(max_tokens=60))[0].text
    assert reply == '{"instruction": "make the star red"}'  # and without the constraint


def test_lora_and_the_frozen_vision_tower(folder, tmp_path):
    from weft.train.loop import Trainer
    from weft.train.reading import read_recipe

    path = tmp_path / "records.jsonl"
    write_records(path, records())
    lora = {"rank": 2, "alpha": 4, "targets": ["self_attn.q_proj", "self_attn.v_proj"]}
    trainer = Trainer(read_recipe(recipe(folder, tmp_path / "run", path, lora=lora)), {}, lambda line: None)
    trainer.prepare_data()
    assert all("lora" in name for name in trainer.parameters)
    first, *_, last = [trainer.train_step()["loss"] for _ in range(8)]
    assert last < first
    full = RewriterTrainable(folder, fit="none")
    assert not any(p.requires_grad for p in full.model.model.visual.parameters())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"


def test_options_of_the_rewriter_do_nothing_without_one():
    for given in ({"rewrite": "on"}, {"strict_slice": True}, {"rewriter_model": "m"}, {"rewriter_key_env": "KEY"}):
        with pytest.raises(WeftError, match="does nothing without --rewriter"):
            ModelOptions(**given).load()


def test_the_world_s_evaluation_takes_no_rewriter(capsys):
    assert main(["eval", "world", "--rewriter", "nothing"]) == 2
    assert "leave out --rewriter" in capsys.readouterr().err
