"""The residual quantiser: MoMask's numbers, masked batches, its training step, and its files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from motion_clips import procedural
from weft.errors import WeftError
from weft.models.foreign import convert, read_foreign
from weft.models.motion.build import new_codec
from weft.models.motion.codec import Codec, batches, codec_of_momask, load_codec, momask_config
from weft.models.motion.rvq import Codebook, Noise, Rvq, RvqConfig, fill
from weft.models.motion.rvq_training import RvqTrainable
from weft.motion.clip import Motion
from weft.motion.features import extract
from weft.motion.files import read_motion
from weft.motion.stats import DatasetStats, GeneratorStats
from weft.record import Record, Turn, motion_part, text_part
from weft.types import Draw, Trainable

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from make_rvq import CONFIG, STEPS, clips, gumbel, weights  # noqa: E402

GOLDEN = load_file(Path(__file__).parent / "golden" / "rvq.safetensors")
TINY = RvqConfig(levels=3, codes=16, code_width=8, width=16, depth=2, dropout=0.0)


def momask_state() -> dict[str, torch.Tensor]:
    own = Rvq(CONFIG).state_dict()
    return weights({k: v.shape for k, v in own.items() if not k.endswith(("sum", "count", "ready"))})


def golden_model() -> Rvq:
    model = Rvq(CONFIG)
    model.load_momask(momask_state())
    return model


def motion(frames: int, seed: int) -> Motion:
    return Motion(procedural(frames, seed))


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(0)
    rvq = Rvq(TINY).eval()
    for layer in rvq.quantizer.layers:
        assert isinstance(layer, Codebook)
        layer.start(torch.randn(TINY.codes, TINY.code_width) * 0.3, torch.zeros(TINY.codes, TINY.code_width))
    return Codec(rvq, DatasetStats(np.zeros(263), np.ones(263)).for_generator())


@pytest.fixture(scope="module")
def folder(codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("motion")
    codec.save(path)
    return path


def record(frames: int, seed: int) -> Record:
    turns = [Turn("user", [text_part("walk")]), Turn("assistant", [motion_part(motion(frames, seed))])]
    return Record(f"r{seed}", "motion", turns)


def test_indices_and_features_are_momasks() -> None:
    model = golden_model().eval()
    index = model.encode(clips(3, 40, 100))
    assert torch.equal(index, GOLDEN["index"])
    assert torch.allclose(model.decode(index)[:, :8], GOLDEN["decoded"], atol=1e-6)
    partial = index.clone()
    partial[:, ::2, 2:] = -1
    assert torch.allclose(model.decode(partial)[:, :8], GOLDEN["decoded_partial"], atol=1e-6)
    coarse = index.clone()
    coarse[..., 2:] = -1
    assert torch.equal(model.decode(coarse), model.decode(index[..., :2])), "missing last levels are -1"


def test_training_steps_are_momasks() -> None:
    """Losses, gradients, averages and resets over four steps, with levels dropped in two of them."""
    model = golden_model().train()
    for layer in model.quantizer.layers:
        assert isinstance(layer, Codebook)
        layer.ready.fill_(False)  # MoMask starts its codebooks from the first batch
    smooth = torch.nn.SmoothL1Loss()
    resets = 0
    for step, (count, frames, cut) in enumerate(STEPS):
        model.zero_grad()
        x = clips(count, frames, step)
        z, _ = model.latents(x)
        rows = z.reshape(-1, z.shape[-1])
        noise = Noise(gumbel(len(rows), step), torch.zeros(()).expand(4, CONFIG.codes, CONFIG.code_width), cut)
        found = model.quantizer(rows, noise)
        y = model.decoder(found.rows.view_as(z).transpose(1, 2))[0].transpose(1, 2)
        recon, explicit = smooth(y, x), smooth(y[..., 4:67], x[..., 4:67])
        loss = recon + 0.5 * explicit + 0.02 * found.commit.mean()
        loss.backward()
        mine = torch.stack([loss, recon, explicit, found.commit.mean(), torch.tensor(found.perplexity)]).detach()
        assert torch.allclose(mine, GOLDEN[f"{step}.losses"], rtol=1e-6, atol=1e-6), step
        named = dict(model.named_parameters())
        for key in (k for k in GOLDEN if k.startswith(f"{step}.grad.")):
            assert torch.allclose(named[key.removeprefix(f"{step}.grad.")].grad, GOLDEN[key], atol=1e-6), key
        for level, layer in enumerate(model.quantizer.layers):
            assert isinstance(layer, Codebook)
            if f"{step}.sum.{level}" in GOLDEN:
                assert torch.allclose(layer.code_sum, GOLDEN[f"{step}.sum.{level}"], atol=1e-6), (step, level)
                assert torch.allclose(layer.code_count, GOLDEN[f"{step}.count.{level}"], atol=1e-6), (step, level)
                assert torch.allclose(layer.codebook, GOLDEN[f"{step}.codebook.{level}"], atol=1e-6), (step, level)
                resets += int((layer.code_count < 1).sum())
    assert resets > 20, "the reset rule was at work"


def test_a_code_used_once_after_the_start_stays() -> None:
    """0.99 * 1 + 0.01 * 1 is 1 exactly in fp32, which the limit lets pass."""
    book = Codebook(RvqConfig(codes=2, code_width=1))
    book.start(torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1))
    book.update(torch.tensor([[9.0], [0.0]]), torch.tensor([0, 0]), torch.zeros(2, 1))
    assert torch.equal(book.code_count < 1, torch.tensor([False, True]))
    assert torch.allclose(book.codebook, torch.tensor([[0.09 / 1.01], [0.0]])), "the unused one is the batch's row 1"
    book = Codebook(RvqConfig(codes=2, code_width=1))
    book.start(torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1))
    book.update(torch.tensor([[1.0], [4.0]]), torch.tensor([0, 1]), torch.zeros(2, 1))
    assert (book.code_count >= 1).all() and book.codebook[1] == 4


def test_few_rows_are_repeated_with_noise() -> None:
    rows, jitter = torch.arange(6.0).view(3, 2), torch.ones(7, 2)
    made = fill(rows, jitter)
    assert made.shape == (7, 2) and torch.allclose(made[3:6] - rows, torch.full((3, 2), 0.01 / 2**0.5))
    assert torch.equal(fill(made, jitter), made)


def test_batch_is_one_by_one(codec: Codec) -> None:
    """Clips of all lengths, in batches under a mask and alone: the same codes, and the same features back."""
    many = [motion(int(n), k) for k, n in enumerate(np.random.default_rng(0).integers(4, 90, 40))]
    together = codec.encode(many)
    for clip, codes in zip(many, together, strict=True):
        assert torch.equal(codes, codec.encode([clip])[0])
        assert codes.shape == (len(clip) // 4, 3)
    back = codec.decode(together)
    for codes, clip in zip(together, back, strict=True):
        assert len(clip) == 4 * len(codes) and np.allclose(clip.joints, codec.decode([codes])[0].joints, atol=1e-5)


def test_short_clips_are_held(codec: Codec) -> None:
    codes = codec.encode([motion(1, 0), motion(3, 1), motion(4, 2), motion(7, 3)])
    assert [len(c) for c in codes] == [1, 1, 1, 1]
    assert all(np.isfinite(clip.joints).all() for clip in codec.decode(codes))


def test_stored_features_are_tokenised_as_they_are(codec: Codec, tmp_path: Path) -> None:
    """A file of features gives the network what MoMask's loader gives it; made again from its joints they differ."""
    rows = extract(procedural(60, 5, spin=1.5))
    np.save(tmp_path / "a.npy", rows)
    clip = read_motion(tmp_path / "a.npy")
    again = Motion(clip.joints)
    whole, piece, made = codec.features([clip, clip.crop(11, 32), again])
    assert np.array_equal(whole, codec.stats.normalise(rows[:56]))
    assert np.array_equal(piece, codec.stats.normalise(rows[11:31]))
    assert made.shape == whole.shape and np.abs(made - whole).max() > 1e-3
    (codes,) = codec.encode([clip])
    assert torch.equal(codes, codec.rvq.encode(torch.from_numpy(whole)[None])[0])
    other = Codec(codec.rvq, codec.stats, "correct")  # its rule is not the file's
    assert np.array_equal(other.features([clip])[0], other.features([again])[0])
    assert len(codec.encode([clip.crop(0, 3)])[0]) == 1, "shorter than a step: held"


def test_batches_bound_the_padding() -> None:
    lengths = [5, 100, 7, 99, 3]
    groups = batches(lengths, 200)
    assert sorted(i for g in groups for i in g) == [0, 1, 2, 3, 4]
    assert all(len(g) * max(lengths[i] for i in g) <= 200 for g in groups)
    assert batches([500], 200) == [[0]], "one clip is always let through"


def test_wrong_lengths_and_codes_are_named(codec: Codec) -> None:
    with pytest.raises(WeftError, match="multiples of 4"):
        codec.rvq.encode(torch.zeros(1, 6, 263))
    with pytest.raises(WeftError, match="levels"):
        codec.rvq.decode(torch.full((1, 2, 3), 16))
    with pytest.raises(WeftError, match="kit"):
        from weft.motion.skeleton import KIT

        codec.encode([Motion(np.zeros((4, 21, 3)), layout=KIT)])


def test_folder_round_trip(codec: Codec, folder: Path) -> None:
    again = load_codec(folder)
    assert again.config == codec.config and again.heading == codec.heading
    for a, b in zip(codec.rvq.state_dict().values(), again.rvq.state_dict().values(), strict=True):
        assert torch.equal(a, b), "averages and counts are saved too"
    (folder / "rvq" / "config.json").rename(folder / "rvq" / "away.json")
    with pytest.raises(WeftError, match="config.json"):
        load_codec(folder)
    (folder / "rvq" / "away.json").rename(folder / "rvq" / "config.json")


@pytest.mark.slow
def test_a_momask_checkpoint_opens(tmp_path: Path) -> None:
    """Its file layout, read in a process apart; a pickle that would run code is refused."""
    torch.save({"vq_model": momask_state(), "ep": 3, "opt_vq_model": {}}, tmp_path / "net_best_fid.tar")
    np.save(tmp_path / "mean.npy", np.zeros(263))
    np.save(tmp_path / "std.npy", np.ones(263))
    codec = codec_of_momask(tmp_path / "net_best_fid.tar", tmp_path / "mean.npy", tmp_path / "std.npy")
    assert codec.config == RvqConfig(**{**{f: getattr(CONFIG, f) for f in CONFIG.__slots__}, "dropout": 0.2})
    assert torch.equal(codec.rvq.encode(clips(3, 40, 100)), GOLDEN["index"])
    assert isinstance(codec.stats, GeneratorStats)
    with pytest.raises(WeftError, match="vq_model"):
        momask_config({})
    with pytest.raises(WeftError, match="no entry 'weights'"):
        convert(tmp_path / "net_best_fid.tar", tmp_path / "out", "weights")
    with pytest.raises(WeftError, match="no such file"):
        read_foreign(tmp_path / "nothing.tar")

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    torch.save({"vq_model": Evil()}, tmp_path / "evil.tar")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        convert(tmp_path / "evil.tar", tmp_path / "out", "vq_model")
    assert not (tmp_path / "pwned").exists()


def test_statistics_from_files_say_their_kind(tmp_path: Path) -> None:
    """A dataset's deviations are divided by MoMask's `feat_bias`, those of a MoMask run are so already."""
    paths = {"mean": str(tmp_path / "Mean.npy"), "std": str(tmp_path / "Std.npy")}
    np.save(paths["mean"], np.arange(263.0))
    np.save(paths["std"], np.ones(263))
    rvq = {"levels": 2, "codes": 4, "code_width": 4, "width": 8, "depth": 1}
    made = {kind: new_codec({"rvq": rvq, "statistics": {"kind": kind, **paths}}) for kind in ("dataset", "generator")}
    assert made["dataset"].stats.std[[0, 3, 4, 262]].tolist() == pytest.approx([0.2, 0.2, 1, 0.2])
    assert made["generator"].stats.std.tolist() == [1.0] * 263
    for wrong in (paths, {"kind": "evaluator", **paths}):
        with pytest.raises(WeftError, match="kind is dataset"):
            new_codec({"rvq": rvq, "statistics": wrong})


def test_loss_is_momasks_and_masked(folder: Path) -> None:
    """Terms by hand on whole windows; a clip's loss does not depend on what it is padded beside."""
    model = RvqTrainable(folder, window=32, velocity=1.0)
    model.rvq.eval()
    assert isinstance(model, Trainable)
    examples = model.examples([record(32, 1), record(20, 2), record(60, 3)])
    assert [len(e["motion"]) for e in examples] == [32, 20, 60]
    draw = Draw(0, 0, ["r1", "r2", "r3"])
    with torch.no_grad():
        together = model.loss(examples, draw).per_sample
        alone = torch.cat([model.loss([e], Draw(0, 0, [r])).per_sample for e, r in
                           zip(examples, draw.record_ids, strict=True)])  # fmt: skip
        assert torch.allclose(together, alone, atol=1e-6)
        x = examples[0]["motion"][None]
        y = model.rvq.decode(model.rvq.encode(x))
        z, _ = model.rvq.latents(x)
        q = model.rvq.quantizer.lookup(model.rvq.encode(x))
    smooth = torch.nn.SmoothL1Loss()
    a, b = x[..., 4:67], y[..., 4:67]
    found = model.rvq.quantizer(z[0])
    wanted = smooth(y, x) + 0.5 * smooth(b, a) + smooth(b.diff(dim=1), a.diff(dim=1)) + 0.02 * found.commit.mean()
    assert torch.allclose(together[0], wanted, atol=1e-5) and q.shape == z.shape


def test_the_error_of_joints_is_in_millimetres_and_one_everywhere(codec: Codec, folder: Path) -> None:
    still, moved = np.zeros((2, 5, 263))
    moved[:, 4:67] = np.tile([0.03, 0.04, 0], 21)
    moved[:, :4] = moved[:, 67:] = 9  # not positions
    assert codec.apart(still, moved) == pytest.approx(50)
    model = RvqTrainable(folder, window=32)
    model.rvq.eval()
    with torch.no_grad():  # clips of two lengths, padded
        found = model.loss(model.examples([record(32, 1), record(20, 2)]), Draw(0, 0, ["r1", "r2"]))
    clips = [motion(32, 1), motion(20, 2)]
    assert found.metrics["joints_mm"] == pytest.approx(model.codec.joint_error(clips), rel=1e-4)


def test_training_is_a_function_of_the_draw(folder: Path) -> None:
    def step(draw: Draw, shuffle: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(shuffle)
        model = RvqTrainable(folder, window=16, dropout=0.5)
        model.rvq.train()
        loss = model.loss(model.examples([record(32, 1), record(40, 2)]), draw)
        loss.per_sample.sum().backward()
        book = model.rvq.quantizer.layers[0].codebook
        assert isinstance(book, torch.Tensor)
        return loss.per_sample.detach(), book

    ids = ["r1", "r2"]
    first, again, other = step(Draw(0, 3, ids)), step(Draw(0, 3, ids), 9), step(Draw(0, 4, ids))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def half(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows, index = torch.arange(24.0).view(12, 2), torch.arange(12) % 5
    book = Codebook(RvqConfig(codes=6, code_width=2))
    book.start(rows[rank::2], torch.zeros(6, 2))
    book.update(rows[rank::2], index[rank::2], torch.zeros(6, 2))
    torch.save(book.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_make_one_codebook(tmp_path: Path) -> None:
    """Averages are those of all rows; both processes hold the same codes, also those that were replaced."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(half, args=(port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    rows, index = torch.arange(24.0).view(12, 2), torch.arange(12) % 5
    order = torch.tensor([0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])  # as the processes hold them
    whole = Codebook(RvqConfig(codes=6, code_width=2))
    whole.start(rows[order], torch.zeros(6, 2))
    whole.update(rows[order], index[order], torch.zeros(6, 2))
    assert all(torch.allclose(a[key].float(), value.float()) for key, value in whole.state_dict().items())


def test_dropped_levels_and_divided_gradient(codec: Codec) -> None:
    rows = torch.randn(40, 8, requires_grad=True)
    full = Noise(torch.zeros(3, 40, 16), torch.zeros(()).expand(3, 16, 8), 2)
    import copy

    def gradient(cut: int, divide: bool) -> tuple[torch.Tensor, torch.Tensor]:
        quantizer = copy.deepcopy(codec.rvq.quantizer)
        rows.grad = None
        found = quantizer(rows, Noise(full.gumbel, full.jitter, cut), divide=divide)
        found.rows.sum().backward()
        assert rows.grad is not None
        return rows.grad.clone(), found.index

    grad, index = gradient(2, False)
    assert torch.allclose(grad, torch.full_like(grad, 3.0)) and (index >= 0).all()
    assert torch.allclose(gradient(2, True)[0], torch.ones_like(grad))
    grad, index = gradient(0, False)
    assert torch.allclose(grad, torch.ones_like(grad)) and (index[:, 1:] == -1).all() and (index[:, 0] >= 0).all()


def test_it_learns_and_resumes(folder: Path, tmp_path: Path) -> None:
    """In the loop: the loss falls, and a stopped run goes on as the uninterrupted one, codebooks included."""
    from weft.train import run

    def recipe(steps: int, name: str) -> dict:
        return {
            "model": {"path": str(folder)},
            "trainable": "weft.models.motion.rvq_training:RvqTrainable",
            "trainable_args": {"window": 32},
            "data": [{"source": {"call": f"{__file__}:training_records"}}],
            "optim": {"lr": 2e-3, "betas": [0.9, 0.99]},
            "run": {"folder": str(tmp_path / name), "steps": steps, "batch_size": 6, "checkpoint_every": 6,
                    "log_every": 6, "device": "cpu", "trackers": []},
        }  # fmt: skip

    said: list[str] = []
    whole = run(recipe(12, "a"), say=said.append)
    run(recipe(6, "b") | {}, say=said.append)
    longer = recipe(12, "b")
    longer["run"]["allow_changes"] = True
    part = run(longer, say=said.append)
    assert whole.export is not None and part.export is not None
    a, b = load_codec(whole.export).rvq.state_dict(), load_codec(part.export).rvq.state_dict()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    losses = [
        float(line.split("loss ")[1].split(",")[0]) for line in said if line.startswith("step") and "loss" in line
    ]
    assert losses[1] < losses[0]


def training_records() -> list[Record]:
    return [record(40 + k, k) for k in range(12)]


def test_the_decoder_alone_keeps_every_code(folder: Path) -> None:
    """Codes stay as they were, so a language model of them stays valid; the path's drift has a gradient."""
    model = RvqTrainable(folder, window=32, explicit=0.0, root=5.0, encoder=False)
    records = training_records()[:6]
    clips = [r.turns[-1].parts[-1].value for r in records]
    before, examples = model.codec.encode(clips), model.examples(records)
    optimizer = torch.optim.Adam([p for p in model.rvq.parameters() if p.requires_grad], 3e-3)
    roots = []
    for step in range(12):
        loss = model.loss(examples, Draw(0, step, [r.id for r in records]))
        optimizer.zero_grad()
        loss.per_sample.mean().backward()
        optimizer.step()
        roots.append(loss.metrics["root"])
    assert roots[-1] < roots[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.codec.encode(clips), strict=True))
    assert all(p.grad is None for p in model.rvq.encoder.parameters())
