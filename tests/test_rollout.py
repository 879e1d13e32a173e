"""The rollout loop on a toy flow model whose velocity is exact arithmetic per cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weft import rng
from weft.errors import WeftError
from weft.sample import kernels, schedules
from weft.sample.rollout import initial_latents, pad_latents, sample_flow
from weft.sample.solvers import SOLVERS
from weft.types import Batch, Condition, Draw, Example, FlowModel, Loss, SkipLayers

SDES = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}


class Toy:
    """A flow to the constant image `text`, bent a little; counts its calls. Two pixels a cell, multiples of four."""

    name = "toy"
    multiple, channels, downsample = 4, 3, 2

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []

    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        valid = pad_latents([torch.ones(1, c.size[0] // 2, c.size[1] // 2) for c in conditions])[0]
        references = [sum((r.mean() for r in c.references), torch.tensor(0.0)) for c in conditions]
        return {
            "text": torch.stack([c.tensors["text"] for c in conditions]),
            "reference": torch.stack(references),
            "valid": valid,
        }

    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        self.calls.append((len(x), float(sigma[0])))
        assert x.dtype == sigma.dtype == torch.float32 and sigma.shape == (len(x),) and x.shape[0] == len(batch["text"])
        goal = (batch["text"] + batch["reference"])[:, None, None, None]
        return (x - goal + 0.1 * sigma[:, None, None, None] * x.clamp(-1, 1)) * batch["valid"]

    def sigmas(self, steps: int, size: tuple[int, int]) -> Tensor:
        return schedules.flow_match_sigmas(steps)

    def modules(self) -> dict[str, nn.Module]:
        return {}

    def examples(self, records: Sequence) -> list[Example]:
        raise NotImplementedError

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def encode_text(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        raise NotImplementedError

    def encode_images(self, images: Sequence) -> list[Tensor]:
        raise NotImplementedError

    def encode(self, records: Sequence, *, negative: str | None = None) -> list[Condition]:
        raise NotImplementedError

    def decode(self, latents: Tensor, sizes: Sequence[tuple[int, int]]) -> list:
        raise NotImplementedError


def condition(
    text: float, size: tuple[int, int] = (8, 8), references: Sequence[float] = (), name: str = "r"
) -> Condition:
    return Condition(name, size, {"text": torch.tensor(text)}, [torch.full((3, 2, 2), value) for value in references])


MIXED = [condition(0.5, (8, 8)), condition(-0.25, (4, 16), [0.25]), condition(1.0, (12, 4), [1.0, 2.0])]


def test_the_toy_is_a_flow_model() -> None:
    assert isinstance(Toy(), FlowModel)


def test_initial_noise_of_an_image_is_the_same_alone_and_in_a_batch() -> None:
    rollout = sample_flow(Toy(), MIXED, steps=2, seeds=[5, 6, 7], keep=["trajectory"])
    for k, (c, seed) in enumerate(zip(MIXED, [5, 6, 7], strict=True)):
        h, w = c.size[0] // 2, c.size[1] // 2
        alone = sample_flow(Toy(), [c], steps=2, seeds=[seed], keep=["trajectory"])
        assert rollout.trajectory is not None and alone.trajectory is not None
        want = rng.normal((3, h, w), seed, "latent")
        assert torch.equal(rollout.trajectory[k, 0, :, :h, :w], want) and torch.equal(alone.trajectory[0, 0], want)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([(4, 4), (8, 8), (4, 12), (16, 8)]), st.integers(0, 2), st.integers(0, 9)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([("ode", 0.0), *SDES.items()]),
    st.sampled_from(["euler", "ab2", "dpmpp_2m", "dpmpp_2m_release"]),
    st.sampled_from([1.0, 3.5]),
    st.booleans(),
)
def test_image_k_does_not_depend_on_its_batch(rows, kind_eta, solver: str, guidance: float, windowed: bool) -> None:
    kind, eta = kind_eta
    conditions = [condition(0.1 * seed, size, [0.3] * count) for size, count, seed in rows]
    negative = [condition(0.0, size, [0.3] * count) for size, count, _ in rows]
    seeds = [seed for _, _, seed in rows]
    options = {"steps": 5, "solver": solver, "kind": kind, "eta": eta, "guidance": guidance}
    options |= {"keep": ["trajectory"] + ([] if kind == "ode" else ["log_probs"])}
    options |= {"window": (1, 3)} if windowed and kind != "ode" else {}
    batch = sample_flow(Toy(), conditions, seeds=seeds, negative=negative if guidance > 1 else None, **options)
    assert batch.sizes == [c.size for c in conditions]
    for k, c in enumerate(conditions):
        alone = sample_flow(Toy(), [c], seeds=[seeds[k]], negative=[negative[k]] if guidance > 1 else None, **options)
        h, w = c.size[0] // 2, c.size[1] // 2
        assert torch.equal(batch.latents[k, :, :h, :w], alone.latents[0])
        assert batch.trajectory is not None and alone.trajectory is not None
        assert torch.equal(batch.trajectory[k, :, :, :h, :w], alone.trajectory[0])
        assert not batch.trajectory[k, :, :, h:].any() and not batch.trajectory[k, :, :, :, w:].any()
        if kind != "ode":
            assert batch.log_probs is not None and alone.log_probs is not None
            assert torch.allclose(batch.log_probs[k], alone.log_probs[0], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_euler_rollout_is_the_scheduler_loop_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, scheduler = Toy(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x, batch = rng.normal((3, 4, 4), 3, "latent")[None], model.prepare(MIXED[:1])
    for t in scheduler.timesteps:
        x = scheduler.step(model.velocity(x, t[None] / 1000, batch), t, x).prev_sample
    assert torch.allclose(sample_flow(Toy(), MIXED[:1], steps=10, seeds=[3]).latents, x, atol=1e-6)


def test_guidance_is_one_call_of_the_doubled_batch_with_references_in_both_halves() -> None:
    model = Toy()
    negative = [condition(0.0, c.size, [float(r.mean()) for r in c.references]) for c in MIXED]
    guided = sample_flow(model, MIXED, steps=4, seeds=[1, 2, 3], guidance=3.0, negative=negative)
    grid = schedules.flow_match_sigmas(4)
    assert model.calls == [(6, float(s)) for s in grid[:-1]]
    # The toy is affine in its text, so guidance from text 0 is the text times three, and the references stay.
    direct = [condition(3 * float(c.tensors["text"]), c.size, [float(r.mean()) for r in c.references]) for c in MIXED]
    plain = Toy()
    want = sample_flow(plain, direct, steps=4, seeds=[1, 2, 3])
    assert plain.calls == [(3, float(s)) for s in grid[:-1]]
    assert torch.allclose(guided.latents, want.latents, atol=1e-5)


@pytest.mark.parametrize("kind", SDES)
def test_stored_trajectory_replays_to_its_log_probs_bitwise(kind: str) -> None:
    model = Toy()
    out = sample_flow(
        model, MIXED, steps=5, seeds=[1, 2, 3], kind=kind, eta=SDES[kind], keep=("trajectory", "log_probs")
    )
    assert out.trajectory is not None and out.log_probs is not None and out.sigmas is not None
    assert out.trajectory.shape == (3, 6, 3, 6, 8) and out.log_probs.shape == (3, 5) and out.sigmas.shape == (6,)
    assert torch.equal(out.trajectory[:, -1], out.latents) and out.log_probs.isfinite().all()
    batch = model.prepare(MIXED)
    valid = batch["valid"].bool()
    for k in range(5):
        x, s, t = out.trajectory[:, k], float(out.sigmas[k]), float(out.sigmas[k + 1])
        v = model.velocity(x, torch.full((3,), s), batch)
        again = kernels.step(x, v, s, t, kind=kind, eta=SDES[kind], valid=valid, x_next=out.trajectory[:, k + 1])
        assert torch.equal(again.log_prob, out.log_probs[:, k])


def test_noise_falls_inside_the_window_only() -> None:
    options = {"steps": 6, "seeds": [1, 2, 3]}
    ode = sample_flow(Toy(), MIXED, keep=["trajectory"], **options)
    out = sample_flow(
        Toy(), MIXED, kind="flow_sde", eta=0.7, window=(2, 4), keep=["trajectory", "log_probs"], **options
    )
    assert ode.trajectory is not None and out.trajectory is not None and out.log_probs is not None
    assert torch.equal(out.trajectory[:, :3], ode.trajectory[:, :3])
    assert not torch.equal(out.trajectory[:, 3], ode.trajectory[:, 3])
    assert out.log_probs.isnan().tolist() == [[True, True, False, False, True, True]] * 3
    x, s, t = out.trajectory[:, 4], float(out.sigmas[4]), float(out.sigmas[5])
    model = Toy()
    v = model.velocity(x, torch.full((3,), s), model.prepare(MIXED))
    assert torch.allclose(out.trajectory[:, 5], x + (t - s) * v, atol=1e-7)


def test_multistep_starts_anew_after_noise_except_in_the_releases_variant() -> None:
    ends = {}
    for solver in ("euler", "dpmpp_2m", "dpmpp_2m_release"):
        out = sample_flow(
            Toy(), MIXED, steps=12, seeds=[1, 2, 3], solver=solver, kind="flow_sde", eta=0.7, window=(0, 4),
            keep=["trajectory"],
        )  # fmt: skip
        assert out.trajectory is not None
        ends[solver] = out.trajectory
    assert torch.equal(ends["dpmpp_2m"][:, 5], ends["euler"][:, 5])
    assert not torch.equal(ends["dpmpp_2m"][:, 6], ends["euler"][:, 6])
    assert not torch.equal(ends["dpmpp_2m_release"][:, 5], ends["euler"][:, 5])


def test_seeds_decide_and_step_noise_is_fresh_at_every_step() -> None:
    c, options = MIXED[0], {"steps": 4, "kind": "cps", "eta": 0.8}
    same = sample_flow(Toy(), [c, c, c], seeds=[4, 4, 5], **options).latents
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    shared = initial_latents(Toy(), [c, c], [9, 9])
    assert torch.equal(shared[0], shared[1])
    out = sample_flow(Toy(), [c, c], seeds=[4, 5], init_latents=shared, keep=["trajectory"], **options)
    assert out.trajectory is not None
    assert torch.equal(out.trajectory[0, 0], out.trajectory[1, 0])
    assert not torch.equal(out.trajectory[0, 1], out.trajectory[1, 1])
    assert not torch.equal(rng.normal((3,), 4, "step", 0), rng.normal((3,), 4, "step", 1))


def test_initial_latents_and_custom_sigmas() -> None:
    start = initial_latents(Toy(), MIXED, [1, 2, 3])
    plain = sample_flow(Toy(), MIXED, steps=3, seeds=[1, 2, 3])
    assert torch.equal(sample_flow(Toy(), MIXED, steps=3, seeds=[7, 8, 9], init_latents=start).latents, plain.latents)
    padded, _ = pad_latents(start)
    assert torch.equal(sample_flow(Toy(), MIXED, steps=3, seeds=[7, 8, 9], init_latents=padded).latents, plain.latents)
    own = [0.6, 0.3, 0.0]
    out = sample_flow(Toy(), MIXED, sigmas=own, seeds=[1, 2, 3])
    assert out.sigmas is not None and out.sigmas.tolist() == pytest.approx(own)
    assert out.trajectory is None and out.log_probs is None
    assert out.record_ids == out.group_ids == ["r", "r", "r"]
    named = sample_flow(Toy(), MIXED, sigmas=own, seeds=[1, 2, 3], group_ids=["a", "a", "b"])
    assert named.group_ids == ["a", "a", "b"]


def test_callbacks_see_and_change_what_they_ask_for() -> None:
    seen = []

    def watch(pipe, step, timestep, kwargs):
        seen.append((type(pipe), step, float(timestep), sorted(kwargs)))
        return kwargs

    plain = sample_flow(Toy(), MIXED, steps=3, seeds=[1, 2, 3])
    watched = sample_flow(Toy(), MIXED, steps=3, seeds=[1, 2, 3], callback_on_step_end=watch)
    grid = schedules.flow_match_sigmas(3)
    assert torch.equal(watched.latents, plain.latents)
    assert seen == [(Toy, k, pytest.approx(1000 * float(grid[k])), ["latents"]) for k in range(3)]

    def paint(pipe, step, timestep, kwargs):
        return {"latents": torch.full_like(kwargs["latents"], 2.0)} if step == 2 else None

    painted = sample_flow(Toy(), MIXED, steps=3, seeds=[1, 2, 3], callback_on_step_end=paint, keep=["trajectory"])
    assert torch.equal(painted.latents[1, :, :2, :8], torch.full((3, 2, 8), 2.0))
    assert not painted.latents[1, :, 2:].any()  # the padding stays empty
    assert painted.trajectory is not None and torch.equal(painted.trajectory[:, -1], painted.latents)

    def reword(pipe, step, timestep, kwargs):
        return {"text": kwargs["text"] * 0}

    reworded = sample_flow(
        Toy(), MIXED, steps=3, seeds=[1, 2, 3], callback_on_step_end=reword, callback_tensor_inputs=["text"]
    )
    assert not torch.equal(reworded.latents, plain.latents)


@pytest.mark.parametrize(
    ("returned", "options", "message"),
    [
        ({"text": torch.zeros(3)}, {}, "does not list"),
        ({"latents": torch.zeros(3, 3, 1, 1)}, {}, "changed the shape"),
        (None, {"callback_tensor_inputs": ["txt"]}, "unknown name 'txt'"),
        (
            {"latents": torch.zeros(3, 3, 6, 8)},
            {"kind": "cps", "eta": 0.5, "keep": ["log_probs"]},
            "falsifies log_probs",
        ),
    ],
)
def test_callbacks_that_cannot_be_followed_are_refused(returned, options: dict, message: str) -> None:
    with pytest.raises(WeftError, match=message):
        sample_flow(Toy(), MIXED, steps=2, seeds=[1, 2, 3], callback_on_step_end=lambda *_: returned, **options)


def test_progress_is_shown_on_demand_only(capsys: pytest.CaptureFixture[str]) -> None:
    sample_flow(Toy(), MIXED, steps=3, seeds=[1, 2, 3])
    assert capsys.readouterr().err == ""
    sample_flow(Toy(), MIXED, steps=3, seeds=[1, 2, 3], progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": None}, "at least 1"),
        ({"seeds": [1]}, "1 seeds for 3"),
        ({"solver": "heun"}, "solver 'heun'"),
        ({"kind": "sde"}, "kind 'sde'"),
        ({"kind": "flow_sde"}, "eta > 0"),
        ({"eta": 0.7}, "adds no noise"),
        ({"keep": ["log_probs"]}, "log_probs need noise"),
        ({"keep": ["latents"]}, "unknown name 'latents'"),
        ({"window": (0, 1)}, "nothing for kind ode"),
        ({"kind": "cps", "eta": 0.5, "window": (1, 3)}, "does not fit 2 steps"),
        ({"kind": "cps", "eta": 0.5, "window": (1, 1)}, "start < stop"),
        ({"guidance": 3.5}, "needs one negative"),
        ({"guidance": 3.5, "negative": MIXED[::-1]}, "same size"),
        ({"guidance": 0.0}, "at least 1"),
        ({"negative": MIXED}, "unused at guidance 1"),
        ({"sigmas": [1.0, 0.5]}, "2 sigmas for 2 steps"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "fall strictly"),
        ({"sigmas": [1.2, 0.5, 0.0]}, "fall strictly"),
        ({"init_latents": [torch.zeros(3, 4, 4)]}, "1 initial latents"),
        ({"init_latents": [torch.zeros(3, 8, 8)] * 3}, "initial latent has shape"),
        ({"group_ids": ["a"]}, "1 group ids"),
        ({"guidance": 2.0, "negative": MIXED, "skip_layers": SkipLayers((1,))}, "cannot leave layers out"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_any_call(options: dict, message: str) -> None:
    model = Toy()
    with pytest.raises(WeftError, match=message):
        sample_flow(model, MIXED, **({"steps": 2, "seeds": [1, 2, 3]} | options))
    assert not model.calls


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(WeftError, match="multiples of 4"):
        sample_flow(Toy(), [condition(0.0, (6, 8))], steps=2, seeds=[1])
    with pytest.raises(WeftError, match="empty"):
        sample_flow(Toy(), [], steps=2, seeds=[])


class Dynamic(Toy):
    """A model whose grid depends on the output's size, like FLUX's."""

    def sigmas(self, steps: int, size: tuple[int, int]) -> Tensor:
        return schedules.flow_match_sigmas(steps, 1.0 + size[0] / 8)


@pytest.mark.parametrize("how", [*SOLVERS, "flow_sde", "cps"])
def test_samples_with_their_own_grids_equal_one_by_one(how: str) -> None:
    sde = how not in SOLVERS
    options = {"kind": how, "eta": 0.5, "window": (1, 3), "keep": ("log_probs",)} if sde else {"solver": how}
    together = sample_flow(Dynamic(), MIXED, steps=5, seeds=[1, 2, 3], **options)
    assert together.sigmas is not None and together.sigmas.shape == (3, 6)
    times: list[Tensor] = []

    def watch(pipe: object, k: int, time: Tensor, given: dict[str, Tensor]) -> None:
        times.append(time)

    sample_flow(Dynamic(), MIXED, steps=5, seeds=[1, 2, 3], callback_on_step_end=watch)
    assert torch.allclose(torch.stack(times, 1), 1000 * together.sigmas[:, :-1], atol=1e-3)
    for k, c in enumerate(MIXED):
        alone = sample_flow(Dynamic(), [c], steps=5, seeds=[k + 1], **options)
        _, _, h, w = alone.latents.shape
        assert torch.equal(together.latents[k : k + 1, :, :h, :w], alone.latents)
        assert torch.equal(together.sigmas[k], alone.sigmas)
        if sde:
            assert torch.allclose(together.log_probs[k : k + 1], alone.log_probs, atol=1e-6, equal_nan=True)


def test_a_model_s_own_guidance_takes_the_place_of_the_usual_line() -> None:
    class Careful(Toy):
        def guide(self, v_neg: Tensor, v_pos: Tensor, guidance: float) -> Tensor:
            return v_pos

    plain = sample_flow(Toy(), [condition(0.5)], steps=3, seeds=[1])
    pair = {"guidance": 4.0, "negative": [condition(-0.5)]}
    assert torch.equal(sample_flow(Careful(), [condition(0.5)], steps=3, seeds=[1], **pair).latents, plain.latents)
    assert not torch.equal(sample_flow(Toy(), [condition(0.5)], steps=3, seeds=[1], **pair).latents, plain.latents)
