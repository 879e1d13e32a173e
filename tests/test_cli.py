"""The command line: help is instant, every mistake is one clear line and status 2, nothing half-written stays."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from weft.cli import main as cli
from weft.cli.options import parse_size
from weft.cli.shipped import find_recipe
from weft.cli.shipped import tested_versions as pinned_versions
from weft.errors import WeftError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def weft(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: (status, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:  # how tyro ends on --help and on unknown options
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_kontext_folder

    return tiny_kontext_folder(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(path)
    return path


def is_one_line(result: tuple[int, str, str], *words: str) -> None:
    """Status 2, nothing on stdout, one line on stderr that holds the words."""
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.startswith("weft: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"


# ---------------------------------------------------------------- help


def test_help_names_every_command(weft: Run) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        status, out, _ = weft(*words)
        assert status == 0
        assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert weft("data")[1].count("  data ") == 3
    assert weft("--version")[1].startswith("weft 0.")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_itself_without_torch(name: str) -> None:
    code = f"import sys; from weft.cli.main import main; main({[*name.split(), '--help']!r})"
    check = "import atexit, sys; atexit.register(lambda: print('HEAVY', *{'torch', 'diffusers'} & set(sys.modules))); "
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: weft {name}" in done.stdout
    assert done.stdout.rstrip().endswith("HEAVY"), "help must not import torch"


def test_help_is_instant() -> None:
    """In processor time, so that a busy machine does not fail it."""
    code = (
        "import atexit, time; atexit.register(lambda: print('SECONDS', time.process_time())); "
        "from weft.cli.main import main; main(['edit', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 1.0


# ---------------------------------------------------------------- mistakes


def test_unknown_commands_get_the_nearest(weft: Run) -> None:
    is_one_line(weft("edt"), "did you mean 'edit'?")
    is_one_line(weft("data", "chek"), "did you mean 'data check'?")
    is_one_line(weft("frobnicate"), "use one of tour, generate")


def test_unknown_options_are_refused(weft: Run, tmp_path: Path) -> None:
    status, _, err = weft("generate", "a star", "-o", tmp_path / "x.png", "--gidance", "3")
    assert status == 2 and "--gidance" in err


def test_bad_requests(weft: Run, tmp_path: Path, picture: Path) -> None:
    out = tmp_path / "out.png"
    is_one_line(weft("generate", "-o", out), "no instruction")
    is_one_line(weft("generate", "  ", "-o", out), "instruction", "empty")
    is_one_line(weft("edit", picture, "", "-o", out), "instruction", "empty")
    is_one_line(weft("edit", "-o", out), "no source")
    is_one_line(weft("edit", tmp_path / "missing.png", "make it red", "-o", out), "missing.png", "scene.png")
    is_one_line(weft("generate", "like {nowhere.png}", "-o", out), "nowhere.png")
    is_one_line(weft("generate", "a star", "-o", out, "--size", "big"), "--size 'big'", "96x64")
    is_one_line(weft("generate", "a star", "-o", out, "--steps", "0"), "steps is 0")
    is_one_line(weft("generate", "a star", "-o", out, "--guidance", "0.5"), "guidance is 0.5")
    is_one_line(weft("generate", "a star", "-o", tmp_path / "out.txt"), "'.txt'", ".png")
    is_one_line(weft("generate", "a star", "-o", tmp_path), "folder")
    is_one_line(weft("generate", "a star", "--records", "r.jsonl", "-o", out), "exclude")
    is_one_line(weft("generate", "--records", tmp_path / "r.jsonl", "-o", tmp_path / "o"), "r.jsonl")
    is_one_line(weft("plan", "tiny/nothing-like-it-at-all"), "no recipe")
    is_one_line(weft("data", "check", tmp_path / "r.jsonl"), "r.jsonl", "does not exist")
    is_one_line(weft("data", "convert", tmp_path, "-o", tmp_path / "r.txt"), ".jsonl")
    is_one_line(weft("generate", "a star", "-o", out, "--guidance", "nan"), "guidance is nan")
    is_one_line(weft("generate", "a star", "-o", out, "--option", "layout=["), "--option layout=[", "not valid YAML")
    is_one_line(weft("generate", "like {" + "x" * 300 + "}", "-o", out), "no such file")
    is_one_line(weft("describe", picture, "--vlm", "http://host:port/v1", "--vlm-model", "m"), "not a server's address")
    is_one_line(weft("train", "tiny/kontext", "--evaluate", "world", "-o", tmp_path), "run.evaluate_every is 0")
    assert not out.exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(weft: Run, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    is_one_line(weft("generate", "a star", "-o", blocker / "out.png"), "file")
    if os.geteuid() != 0:  # root writes everywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        is_one_line(weft("generate", "a star", "-o", locked / "out.png"), "cannot be written")


def test_models_that_are_none(weft: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    is_one_line(weft("generate", "a star", "-o", out, "--model", "tiny-kontexd"), "tiny-kontexd")
    empty = tmp_path / "empty"
    empty.mkdir()
    is_one_line(weft("generate", "a star", "-o", out, "--model", empty), "model_index.json")
    (empty / "model_index.json").write_text("{not json")
    is_one_line(weft("generate", "a star", "-o", out, "--model", empty), str(empty))
    (empty / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    is_one_line(weft("generate", "a star", "-o", out, "--model", empty), str(empty))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out.png"), ["disk is full", "out.png"]),
        (PermissionError(errno.EACCES, "Permission denied", "out.png"), ["Permission denied: out.png"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), ["No such file", "x"]),
        (MemoryError(), ["out of memory", "--batch"]),
        (WeftError("two\nlines"), ["two lines"]),
    ],
)
def test_errors_are_one_line(weft: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str]) -> None:
    def fail(argv: object) -> int:
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    is_one_line(weft("doctor"), *words)


def test_bugs_keep_their_traceback(weft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "dispatch", lambda argv: 1 // 0)
    status, _, err = weft("doctor")
    assert status == 1 and "ZeroDivisionError" in err and "report" in err


def test_interruption(weft: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", stop)
    status, _, err = weft("doctor")
    assert status == 130 and err.count("\n") == 1


# ---------------------------------------------------------------- the small parts


def test_sizes() -> None:
    assert parse_size(None) is None
    assert parse_size("96x64") == (64, 96)
    assert parse_size("64") == (64, 64)
    for wrong in ("", "x", "0x64", "64x0", "64x", "-64", "64*64", "6.4x64"):
        with pytest.raises(WeftError, match="WIDTHxHEIGHT"):
            parse_size(wrong)


def test_recipes_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("run: {steps: 1}")
    assert find_recipe(str(mine)) == mine
    assert find_recipe("tiny/tour_tone").name == "tour_tone.yaml"
    assert find_recipe("recipes/tiny/tour_tone.yaml").samefile(find_recipe("tiny/tour_tone"))
    with pytest.raises(WeftError, match="did you mean 'tiny/tour_tone"):
        find_recipe("tiny/tour_ton")


def test_the_tested_versions_are_readable() -> None:
    assert pinned_versions()["torch"].count(".") == 2


# ---------------------------------------------------------------- making pictures


def test_generate_and_edit(weft: Run, tiny: Path, picture: Path, tmp_path: Path) -> None:
    from weft.media import load_image, read_metadata

    options = ["--model", tiny, "--steps", 2, "--size", "64x64"]
    scene = tmp_path / "new" / "a.png"
    status, out, err = weft("generate", "a red star", "-o", scene, "--seed", 5, *options)
    assert status == 0, err
    assert out.strip() == str(scene)
    facts = read_metadata(scene)
    assert facts["seed"] == 5 and facts["instruction"] == "a red star" and facts["model"] == str(tiny)

    edited = tmp_path / "b.webp"
    text = f"make it like {{{scene}}}"
    assert weft("edit", picture, text, "-o", edited, "-n", 2, "--seed", 7, *options)[0] == 0
    names = [tmp_path / "b-0.webp", tmp_path / "b-1.webp"]
    assert [read_metadata(name)["seed"] for name in names] == [7, 8]
    assert read_metadata(names[0])["instruction"] == "make it like picture 2"

    plain = tmp_path / "plain.png"
    assert weft("edit", picture, "make it red", "-o", plain, "--no-metadata", *options)[0] == 0
    assert read_metadata(plain) == {} and load_image(plain).size == (64, 64)
    assert not list(tmp_path.rglob("*.tmp"))

    is_one_line(weft("generate", "a star", "-o", scene, "--model", tiny, "--size", "63x64"), "63", "multiples")


def test_a_mask_keeps_what_lies_outside(weft: Run, tiny: Path, picture: Path, tmp_path: Path) -> None:
    import numpy as np

    mask = tmp_path / "mask.png"
    white = Image.new("L", (64, 64))
    white.paste(255, (0, 0, 32, 64))
    white.save(mask)
    out = tmp_path / "out.png"
    words = ["edit", picture, "make it red", "-o", out, "--mask", mask, "--model", tiny, "--steps", 2]
    assert weft(*words, "--size", "64x64")[0] == 0
    before, after = (np.asarray(Image.open(path).convert("RGB")) for path in (picture, out))
    assert (before[:, 32:] == after[:, 32:]).all() and (before[:, :32] != after[:, :32]).any()
    white.resize((64, 48)).save(mask)
    is_one_line(weft(*words, "--size", "64x64"), "64 x 48", "64 x 64")


def test_records_in_batches(weft: Run, tiny: Path, picture: Path, tmp_path: Path) -> None:
    from weft.media import read_metadata
    from weft.record import make_record, write_records

    file = tmp_path / "in.jsonl"
    write_records(file, [make_record(f"a {word} star", id=word, size=(64, 64)) for word in ("red", "blue", "green")])
    out = tmp_path / "out"
    options = ["--model", tiny, "--steps", 2, "--records", file]
    status, text, err = weft("generate", *options, "-o", out, "--batch", 2)
    assert status == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["blue.png", "green.png", "red.png"]
    assert weft("generate", *options, "-o", tmp_path / "alone", "--batch", 1)[0] == 0
    a, b = (read_metadata(folder / "blue.png") for folder in (out, tmp_path / "alone"))
    assert a == b
    is_one_line(weft("edit", *options, "-o", out), "no record")
    mixed, long = tmp_path / "mixed.jsonl", tmp_path / "long.jsonl"
    write_records(mixed, [make_record("a star", id="new", size=(64, 64)), make_record("red", picture, id="old")])
    status, text, err = weft("generate", *options[:-1], mixed, "-o", tmp_path / "mixed")
    assert status == 0 and "left out: 1 records for weft edit" in err and text.count("\n") == 1
    write_records(long, [make_record("a star", id="é" * 150)])
    is_one_line(weft("generate", *options[:-1], long, "-o", out), "300 bytes")
    is_one_line(weft("generate", *options, "-o", tmp_path / "x.png"), "folder")


def test_a_full_disk_leaves_the_old_picture(
    weft: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.png"
    words = ["generate", "a star", "-o", out, "--model", tiny, "--steps", 1, "--size", "64x64"]
    assert weft(*words)[0] == 0
    old = out.read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = weft(*words, "--seed", 1)
    assert status == 2 and err.splitlines()[-1].startswith("weft: ") and "Traceback" not in err
    assert out.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["out.png"]


# ---------------------------------------------------------------- data and doctor


def test_data_commands(weft: Run, picture: Path, tmp_path: Path) -> None:
    from weft.record import make_record, write_records

    file = tmp_path / "set" / "records.jsonl"
    write_records(file, [make_record("make it red", picture, target=picture, id="one")])
    status, out, err = weft("data", "check", file)
    assert status == 0, out + err
    assert weft("data", "show", file)[0] == 0
    page = file.with_suffix(".html").read_text()
    assert "make it red" in page and "data:image/png;base64" in page
    again = tmp_path / "again" / "all.jsonl"
    status, out, err = weft("data", "convert", file, "-o", again)
    assert status == 0 and "1 records" in err
    assert weft("data", "check", again)[0] == 0
    is_one_line(weft("data", "show", file, "--start", 5), "no record from number 5")
    is_one_line(weft("data", "show", file, "--start", -1), "--start -1")
    is_one_line(weft("data", "show", file, "-n", 0), "--count 0")
    before = file.read_bytes()
    is_one_line(weft("data", "show", file, "-o", file), "name it .html")
    is_one_line(weft("data", "convert", file, "-o", file), "is the source")
    is_one_line(weft("data", "convert", file, "-o", tmp_path / "held_out.jsonl", "--hold", 0.5), "another -o")
    is_one_line(weft("data", "convert", tmp_path / "none", "-o", again), "does not exist")
    is_one_line(weft("data", "convert", tmp_path / "*.tar", "-o", again, "--kind", "webdataset"), "no such file")
    assert file.read_bytes() == before

    for medium in again.parent.rglob("*.png"):
        medium.unlink()
    assert weft("data", "check", again)[0] == 1
    usable = file.with_name("usable.jsonl")
    is_one_line(weft("data", "check", again, "-o", again), "name another file")
    status, out, err = weft("data", "check", again, "-o", usable)
    assert status == 2 and "1 skipped" in out and "no record can be used" in err and not usable.exists()
    bad = Image.new("RGB", (8, 8), "blue")
    write_records(file, [make_record("make it red", picture, id="one"), make_record("x", target=bad, id="two")])
    target = [json.loads(line) for line in file.read_text().splitlines()][1]["turns"][1]["parts"][0]["path"]
    (file.parent / target).write_bytes(b"<html>")
    for place, media in (
        (usable, sorted(p.name for p in file.parent.glob("media/*"))),
        (tmp_path / "a" / "b.jsonl", 1),
    ):
        status, out, _ = weft("data", "check", file, "-o", place)
        assert status == 1 and "1 used, 1 skipped" in out and "web page" in out
        assert [json.loads(line)["id"] for line in place.read_text().splitlines()] == ["one"]
        found = sorted(p.name for p in place.parent.glob("media/*"))
        assert found == media or len(found) == media
        assert weft("data", "check", place)[0] == 0
    file.write_text("not json\n")
    is_one_line(weft("data", "show", file), "records.jsonl:1")


def test_the_doctor(weft: Run, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    from weft.cli import checks

    monkeypatch.setattr(checks, "zoo_models", lambda: {"tiny-kontext": tiny})
    status, out, err = weft("doctor")
    assert status == 0, out + err
    assert "tiny-kontext, " in out and "weft works here" in out
    for word in ("python", "torch", "threads", "speed", "bf16", "extra track", "disk"):
        assert word in out

    monkeypatch.setattr(checks, "zoo_models", dict)
    monkeypatch.setattr(checks, "tested_versions", lambda: {"torch": "1.0.0"})
    status, out, err = weft("doctor")
    assert status == 1 and "bad  zoo model" in out and "tested with 1.0.0" in out and "1 to mend" in out


# ---------------------------------------------------------------- evaluating and training


@pytest.mark.slow
def test_eval_world(weft: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    words = [
        "eval",
        "world",
        "--model",
        tiny,
        "--count",
        1,
        "--steps",
        1,
        "--groups",
        "generate",
        "edit/add",
        "-o",
        out,
    ]
    status, text, err = weft(*words)
    assert status == 0, err
    assert text.rstrip().endswith("report.html") and (out / "report.html").is_file()
    settings = json.loads((out / "run.json").read_text())
    assert settings["model"] == str(tiny) and settings["steps"] == 1
    assert weft("eval", "world", "--rescore", out)[0] == 0
    is_one_line(weft("eval", "world", "--rescore", out, "--steps", 2), "--steps does nothing with --rescore")
    is_one_line(weft("eval", "world", "--groups", "edit/paint"), "edit/paint", "edit/add")
    is_one_line(weft("eval", "world", "--model", tiny, "--size", "64x64"), "--size")
    is_one_line(weft(*words, "--seed", 1), "another run", "seed")


def test_train_and_plan(weft: Run, tiny: Path, tmp_path: Path) -> None:
    small = [f"model.path={tiny}", "data.0.source.args.count=4", "data.1.source.args.count=4", "run.batch_size=2"]
    status, out, err = weft("plan", "tiny/tour_tone", *small)
    assert status == 0, err
    assert "memory" in out and "tokens" in out
    run = tmp_path / "run"
    status, out, err = weft("train", "tiny/tour_tone", *small, "run.steps=2", "-o", run)
    assert status == 0, err
    export = Path(out.strip().splitlines()[-1])
    assert (export / "model_index.json").is_file() and run in export.parents
    assert weft("generate", "a star", "--model", export, "--steps", 1, "-o", tmp_path / "x.png")[0] == 0
    is_one_line(weft("train", "tiny/tour_tone", "run.stps=2"), "run.stps", "steps")
    is_one_line(weft("train", "tiny/tour_tone", "steps"), "key.subkey=value")
