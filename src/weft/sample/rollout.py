"""From conditions to latents: one loop for editing, generation and the rollouts of reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from weft import rng
from weft.errors import WeftError
from weft.sample import kernels
from weft.sample.solvers import KEEPS_PAST, SOLVERS, Past
from weft.types import Batch, Condition, FlowModel, Rollout, SkipLayers

Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]
"""diffusers' `callback_on_step_end(pipe, step, timestep, callback_kwargs)`; what it returns replaces the tensors."""

KEEP = ("trajectory", "log_probs")


@torch.no_grad()
def sample_flow(
    model: FlowModel,
    conditions: Sequence[Condition],
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    guidance: float = 1.0,
    negative: Sequence[Condition] | None = None,
    skip_layers: SkipLayers | None = None,
    solver: str = "euler",
    kind: str = "ode",
    eta: float = 0.0,
    window: tuple[int, int] | None = None,
    keep: Sequence[str] = (),
    init_latents: Sequence[Tensor] | Tensor | None = None,
    group_ids: Sequence[str] | None = None,
    callback_on_step_end: Callback | None = None,
    callback_tensor_inputs: Sequence[str] = ("latents",),
    progress: bool = False,
    noise_purpose: str = "latent",
) -> Rollout:
    """Sample one output for each condition, in one batch of any sizes and reference counts.

    The grid is `sigmas` [T + 1] (descending) or the model's own for `steps`; where that depends on the output's size,
    each sample of a mixed batch walks its own, and the rollout's `sigmas` are [B, T + 1]. Noise of sample i is a
    function of seeds[i] alone: x_T from (seed, `noise_purpose`), step k's from (seed, "step", k); so it does not depend
    on the batch. `init_latents` (one [C, h, w] each, or padded [B, C, H, W]) take x_T's place.

    With `guidance` > 1, each step is one velocity call on [negative, positive] and
    v = v_neg + guidance (v_pos - v_neg) in fp32 (arXiv 2207.12598), or what the model's own `guide` makes of the two;
    references belong to both halves, so guidance acts on the text only. `skip_layers` adds skip-layer guidance for
    models that can leave layers out (`skipping`): one call more, references included, in each of its steps.

    Steps inside `window` = (start, stop) take the SDE `kind` with noise level `eta` (see `kernels`), the others the
    ODE `solver`; an SDE kind without a window is used everywhere (Flow-GRPO-Fast, MixGRPO: arXiv 2507.21802).
    `keep` names what the rollout stores besides the final latents: "trajectory" [B, T + 1, C, H, W] in fp32, and
    "log_probs" [B, T], NaN at the ODE steps, which have none.

    `callback_on_step_end` has diffusers' signature, with the model as pipe and timestep 1000 sigma ([B] if samples walk
    their own grids). It gets the tensors named in `callback_tensor_inputs` ("latents", or a tensor of the model's
    batch, which has 2B rows under guidance) and may return changed ones. Raises WeftError for whatever does not fit
    together.
    """
    grids = _grids(model, conditions, steps, sigmas)
    total, shared = len(grids[0]) - 1, all(grid == grids[0] for grid in grids)
    _check(conditions, seeds, guidance, negative, solver, kind, eta, keep, group_ids)
    start, stop = _window(window, kind, total)
    guided = guidance > 1
    batch = model.prepare([*(negative or ()), *conditions])
    device = next(value.device for value in batch.values() if isinstance(value, Tensor))
    skipped = _skipped(model, conditions, guidance, skip_layers)
    if init_latents is None:
        init_latents = initial_latents(model, conditions, seeds, noise_purpose)
    x, valid = _start(model, conditions, init_latents)
    x, valid = x.to(device), valid if valid is None else valid.to(device)

    trajectory, log_probs = [x], []
    past: list[Past] | None = None
    for k in tqdm(range(total), desc="sampling", unit="step", disable=not progress):
        now, then = [grid[k] for grid in grids], [grid[k + 1] for grid in grids]
        active = skip_layers is not None and total * skip_layers.start < k < total * skip_layers.stop
        v = _velocity(model, x, now, batch, guidance if guided else None, skipped if active else None)
        noisy = start <= k < stop
        if noisy:
            shapes = [_shape(model, c) for c in conditions]
            noise, _ = pad_latents([rng.normal(z, seed, "step", k) for z, seed in zip(shapes, seeds, strict=True)])
            s, s_next = (now[0], then[0]) if shared else (_column(now), _column(then))
            result = kernels.step(x, v, s, s_next, noise.to(device), kind=kind, eta=eta, valid=valid)
            x_next, log_prob = result.x_next, result.log_prob
        else:
            x_next, log_prob = _solve(solver, x, v, now, then, past, shared), None
        past = None if noisy and solver not in KEEPS_PAST else _remember(x, v, now, shared)
        if callback_on_step_end is not None:
            time = torch.tensor(now[0] if shared else now, dtype=torch.float64, device=device).mul(1000).float()
            given = _inputs(callback_tensor_inputs, x_next, batch)
            changed = _changes(given, callback_on_step_end(model, k, time, dict(given)))
            if "latents" in changed:
                if "log_probs" in keep:
                    raise WeftError("a callback that changes the latents falsifies log_probs; drop one of the two")
                x_next = changed.pop("latents")
                x_next = x_next if valid is None else x_next * valid
            batch.update(changed)
        x = x_next
        if "trajectory" in keep:
            trajectory.append(x)
        if "log_probs" in keep:
            log_probs.append(x.new_full((len(conditions),), torch.nan) if log_prob is None else log_prob)

    ids = [c.record_id for c in conditions]
    return Rollout(
        record_ids=ids,
        group_ids=list(ids if group_ids is None else group_ids),
        sizes=[c.size for c in conditions],
        latents=x,
        sigmas=torch.tensor(grids[0] if shared else grids, dtype=torch.float32),
        trajectory=torch.stack(trajectory, 1) if "trajectory" in keep else None,
        log_probs=torch.stack(log_probs, 1) if "log_probs" in keep else None,
    )


def initial_latents(
    model: FlowModel, conditions: Sequence[Condition], seeds: Sequence[int], purpose: str = "latent"
) -> list[Tensor]:
    """x_T of each sample [C, h, w], fp32 on the CPU: standard normal, a function of its seed and size only."""
    return [rng.normal(_shape(model, c), seed, purpose) for c, seed in zip(conditions, seeds, strict=True)]


def pad_latents(latents: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Latents [C, h, w] of any sizes as [B, C, H, W], zero-padded at bottom and right, and their real cells.

    The mask is bool [B, 1, H, W], or None where all sizes agree.
    """
    if all(x.shape == latents[0].shape for x in latents):
        return torch.stack(list(latents)), None
    height, width = max(x.shape[-2] for x in latents), max(x.shape[-1] for x in latents)
    out = latents[0].new_zeros(len(latents), latents[0].shape[0], height, width)
    valid = torch.zeros(len(latents), 1, height, width, dtype=torch.bool, device=out.device)
    for i, x in enumerate(latents):
        out[i, :, : x.shape[-2], : x.shape[-1]] = x
        valid[i, :, : x.shape[-2], : x.shape[-1]] = True
    return out, valid


def _skipped(
    model: FlowModel, conditions: Sequence[Condition], guidance: float, skip: SkipLayers | None
) -> tuple[Batch, float] | None:
    """The positive batch without the skipped layers, and the scale of what they add."""
    if skip is None:
        return None
    leave_out = getattr(model, "skipping", None)
    if leave_out is None:
        raise WeftError(f"{model.name} cannot leave layers out, which is for SD3 models; drop skip_layers")
    if guidance == 1:
        raise WeftError("skip-layer guidance is added to guidance; raise guidance above 1 or drop skip_layers")
    return leave_out(model.prepare(conditions), skip.layers), skip.scale


def _velocity(
    model: FlowModel,
    x: Tensor,
    now: list[float],
    batch: Batch,
    guidance: float | None,
    skipped: tuple[Batch, float] | None = None,
) -> Tensor:
    """Velocity in fp32, guided or not: one call of the model, and a second where layers are skipped."""
    sigma = x.new_tensor(now)
    if guidance is None:
        return model.velocity(x, sigma, batch).float()
    both = model.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), batch).float()
    v_neg, v_pos = both.chunk(2)
    v = guided(model, v_neg, v_pos, guidance)
    if skipped is None:
        return v
    without, scale = skipped
    return v + scale * (v_pos - model.velocity(x, x.new_tensor(now), without).float())


def guided(model: FlowModel, v_neg: Tensor, v_pos: Tensor, guidance: float) -> Tensor:
    """The guided velocity: the model's own `guide(v_neg, v_pos, guidance)` if it has one, else the usual line."""
    own = getattr(model, "guide", None)
    return v_neg + guidance * (v_pos - v_neg) if own is None else own(v_neg, v_pos, guidance)


def _solve(
    solver: str, x: Tensor, v: Tensor, now: list[float], then: list[float], past: list[Past] | None, shared: bool
) -> Tensor:
    """One ODE step of the batch, or of each sample on its own grid."""
    take = SOLVERS[solver]
    if shared:
        return take(x, v, now[0], then[0], past[0] if past else None)
    rows = [take(x[i : i + 1], v[i : i + 1], now[i], then[i], past[i] if past else None) for i in range(len(x))]
    return torch.cat(rows)


def _remember(x: Tensor, v: Tensor, now: list[float], shared: bool) -> list[Past]:
    if shared:
        return [Past(now[0], v, x - now[0] * v)]
    return [Past(s, v[i : i + 1], x[i : i + 1] - s * v[i : i + 1]) for i, s in enumerate(now)]


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _shape(model: FlowModel, condition: Condition) -> tuple[int, int, int]:
    height, width = condition.size
    if height <= 0 or width <= 0 or height % model.multiple or width % model.multiple:
        raise WeftError(f"size {height}x{width} (height x width): both must be positive multiples of {model.multiple}")
    return model.channels, height // model.downsample, width // model.downsample


def _start(
    model: FlowModel, conditions: Sequence[Condition], given: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor | None]:
    """x_T [B, C, H, W] in fp32 and its mask, each sample cropped to its own cells and checked."""
    shapes = [_shape(model, c) for c in conditions]
    if len(given) != len(shapes):
        raise WeftError(f"{len(given)} initial latents for {len(shapes)} conditions; give one for each")
    own = [z[:, :h, :w].float() for z, (_, h, w) in zip(given, shapes, strict=True)]
    for z, raw, shape in zip(own, given, shapes, strict=True):
        exact = isinstance(given, Tensor) or raw.shape == shape
        if z.shape != shape or not exact:
            raise WeftError(f"an initial latent has shape {list(raw.shape)}, its condition's size needs {list(shape)}")
    return pad_latents(own)


def _grids(
    model: FlowModel, conditions: Sequence[Condition], steps: int | None, sigmas: Sequence[float] | Tensor | None
) -> list[list[float]]:
    """The sigmas [T + 1] of each sample as numbers: the fp32 values, so coefficients are of what the model sees."""
    if not conditions:
        raise WeftError("nothing to sample: the list of conditions is empty")
    if sigmas is not None:
        return [_grid(sigmas, steps)] * len(conditions)
    if steps is None or steps < 1:
        raise WeftError(f"steps is {steps}; it must be at least 1 (or pass sigmas)")
    own = {size: _grid(model.sigmas(steps, size), steps) for size in dict.fromkeys(c.size for c in conditions)}
    return [own[c.size] for c in conditions]


def _grid(sigmas: Sequence[float] | Tensor, steps: int | None) -> list[float]:
    grid = torch.as_tensor(sigmas, dtype=torch.float32).tolist()
    if len(grid) < 2 or (steps is not None and len(grid) != steps + 1):
        raise WeftError(f"{len(grid)} sigmas for {steps} steps; a grid has one value more, the last usually 0")
    if not (1 >= grid[0] and grid[-1] >= 0 and all(a > b for a, b in zip(grid, grid[1:], strict=False))):
        raise WeftError(f"sigmas must fall strictly within [0, 1]; got {[round(s, 4) for s in grid]}")
    return grid


def _window(window: tuple[int, int] | None, kind: str, total: int) -> tuple[int, int]:
    """First step with noise and the first one after it."""
    if kind == "ode":
        if window is not None:
            raise WeftError(f"window {tuple(window)} means nothing for kind ode; choose an SDE kind or drop it")
        return 0, 0
    start, stop = (0, total) if window is None else window
    if not 0 <= start < stop <= total:
        raise WeftError(f"window ({start}, {stop}) does not fit {total} steps; it needs 0 <= start < stop <= {total}")
    return start, stop


def _check(
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    guidance: float,
    negative: Sequence[Condition] | None,
    solver: str,
    kind: str,
    eta: float,
    keep: Sequence[str],
    group_ids: Sequence[str] | None,
) -> None:
    """Everything that can be refused before the first network call."""
    count = len(conditions)
    if len(seeds) != count:
        raise WeftError(f"{len(seeds)} seeds for {count} conditions; give one for each")
    if group_ids is not None and len(group_ids) != count:
        raise WeftError(f"{len(group_ids)} group ids for {count} conditions; give one for each")
    if guidance < 1:
        raise WeftError(f"guidance is {guidance}; it must be at least 1 (1 = off)")
    if guidance > 1 and (negative is None or [c.size for c in negative] != [c.size for c in conditions]):
        raise WeftError(f"guidance {guidance} needs one negative condition for each condition, of the same size")
    if guidance == 1 and negative is not None:
        raise WeftError("negative conditions are unused at guidance 1; raise guidance or drop them")
    if solver not in SOLVERS:
        raise WeftError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}")
    unknown = [name for name in keep if name not in KEEP]
    if unknown:
        raise WeftError(f"keep has the unknown name {unknown[0]!r}; known: {', '.join(KEEP)}")
    kernels.coefficients(1.0, 0.5, kind=kind, eta=eta)  # refuses an unknown kind or a noise level that does not fit
    if "log_probs" in keep and kind == "ode":
        raise WeftError("log_probs need noise: choose an SDE kind (flow_sde, dance_sde, cps) with eta > 0")


def _inputs(names: Sequence[str], latents: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The tensors that the callback asked for."""
    have = {name: value for name, value in batch.items() if isinstance(value, Tensor)} | {"latents": latents}
    for name in names:
        if name not in have:
            raise WeftError(f"callback_tensor_inputs has the unknown name {name!r}; known: {', '.join(have)}")
    return {name: have[name] for name in names}


def _changes(given: dict[str, Tensor], returned: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """What a callback has replaced among the tensors that it was given, checked, in their dtype and place."""
    changed = {}
    for name, value in (returned or {}).items():
        if name not in given:
            raise WeftError(f"the callback returned {name!r}, which callback_tensor_inputs does not list")
        old = given[name]
        if value.shape != old.shape:
            raise WeftError(f"the callback changed the shape of {name!r}: {list(old.shape)} to {list(value.shape)}")
        if value is not old:
            changed[name] = value.to(old)
    return changed
