"""Checkpoints that are whole or absent: written beside, flushed to disk, renamed; a manifest proves every byte.

A folder `step-000123` holds safetensors and JSON only, and `manifest.json` (SHA-256 of each file) written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weft.errors import WeftError

MANIFEST = "manifest.json"
TEMPORARY = ".writing-"

# what may change between a checkpoint and its continuation without changing what is computed
FREE = {
    "run.folder", "run.checkpoint_every", "run.keep", "run.log_every", "run.validate_every", "run.grid_every",
    "run.evaluate_every", "run.threads", "run.device", "run.export", "run.allow_changes", "run.trackers", "run.compile",
    "run.prefetch", "run.max_faults",
    "rollout.workers", "rollout.patience", "reward.alarm",
}  # fmt: skip
FREE_SECTIONS = ("validate", "grid", "cache", "plan")
OWN = ("trainable_args", "options", "args", "map")  # mappings whose keys are not the recipe's but the user's


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint read back: `tensors[file stem][name]` and the JSON `state`."""

    step: int
    path: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-<step>` atomically, then remove all but the newest `keep` complete checkpoints.

    Raises WeftError on a full disk or another write error; earlier checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a killed process
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        temporary.mkdir()
        for name, group in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, temporary / f"{name}.safetensors")
        _write_json(temporary / "state.json", {"step": step, **state})
        names = sorted(p.name for p in temporary.iterdir())
        for name in names:
            sync(temporary / name)
        files = {n: {"sha256": sha256_file(temporary / n), "bytes": (temporary / n).stat().st_size} for n in names}
        _write_json(temporary / MANIFEST, {"step": step, "files": files})
        sync(temporary / MANIFEST)
        sync(temporary)
        if final.exists():
            shutil.rmtree(final)  # the same step again, after a resume from an older one
        os.replace(temporary, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        free = shutil.disk_usage(folder).free
        earlier = newest(folder)
        raise WeftError(
            f"could not write checkpoint {final}: {error}; it needs {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are "
            f"free. {f'{earlier} is intact' if earlier else 'there is no earlier one'}; make room and start again"
        ) from error
    for old in sorted((p for p in folder.glob("step-*") if (p / MANIFEST).is_file()), key=step_of)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder (one line), or None if it is complete and verified."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            if not (path / name).is_file():
                return f"{path}: {name} is missing"
            if sha256_file(path / name) != entry["sha256"]:
                return f"{path}: {name} does not match its SHA-256"
    except FileNotFoundError:
        return f"{path}: no {MANIFEST}, the write was not finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path}: {MANIFEST} is damaged"
    return None


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name; -1 if it is something else."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def newest(folder: Path, complain: Any = None) -> Path | None:
    """The newest complete and verified checkpoint under `folder`; `complain(line)` hears of every faulty one."""
    for path in sorted(folder.glob("step-*"), key=step_of, reverse=True):
        problem = fault(path)
        if problem is None:
            return path
        if complain is not None:
            complain(problem)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises WeftError if a file is missing or damaged."""
    problem = fault(path)
    if problem is not None:
        raise WeftError(f"{problem}: use an earlier checkpoint")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors[file.stem] = {key: opened.get_tensor(key).clone() for key in opened.keys()}
    return Checkpoint(int(state["step"]), path, tensors, state)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ and matter, as `key: old -> new`. An option that the checkpoint's version of weft
    did not know, and that is off (0, null, false, empty), is no difference."""
    changes: list[str] = []
    a, b = ((tree.get("cache") or {}).get("text_dtype", "fp32") for tree in (old, new))  # the one that rounds
    if a != b:
        changes.append(f"cache.text_dtype: {a} -> {b}")
    for section in new:
        if section not in FREE_SECTIONS:
            changes += _changes(section, old.get(section), new[section])
    return changes


def _changes(dotted: str, a: Any, b: Any, own: bool = False) -> list[str]:
    """`own`: inside a mapping of the user's, where a key that is missing stands for a default, and 0 for 0."""
    own = own or dotted.rpartition(".")[2] in OWN
    if isinstance(a, dict) and isinstance(b, dict):
        keys = {**a, **b} if own else [key for key in b if key in a or b[key]]
        return [line for key in keys for line in _changes(f"{dotted}.{key}", a.get(key), b.get(key), own)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for k in range(len(a)) for line in _changes(f"{dotted}.{k}", a[k], b[k], own)]
    return [f"{dotted}: {a} -> {b}"] if dotted not in FREE and a != b else []
