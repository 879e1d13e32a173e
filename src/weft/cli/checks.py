"""`weft tour` and `weft doctor`: does it work here, and how well."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from weft.cli.options import check_folder
from weft.cli.shipped import tested_versions, zoo_models

CORE = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
EXTRAS = {
    "photos": ("skimage",),
    "data": ("pyarrow",),
    "track": ("tensorboard", "wandb", "trackio"),
    "quant": ("bitsandbytes",),
}


@dataclass
class Tour:
    """Generate, edit, fine-tune and evaluate with the tiny models that ship with weft, and write one HTML report.
    Takes about three minutes on two cores; on a slower machine it does fewer steps, and says so."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("tour")
    """The folder of the report and its pictures."""
    model: str = "tiny-kontext"
    """The model to show."""
    seed: int = 0
    """The seed of everything in it."""

    def run(self) -> int:
        check_folder(self.out)
        from weft.tour import run_tour

        print(run_tour(self.out, model=self.model, seed=self.seed))
        return 0


class Finding(NamedTuple):
    """A line of the doctor: `state` is "ok", "note" (works, but know it) or "bad" (mend it)."""

    state: str
    what: str
    found: str
    advice: str = ""


@dataclass
class Doctor:
    """Versions against the tested ones, device, threads, speed, extras, models, disk. Exit status 1 if something must
    be mended."""

    licences: bool = False
    """Print what is known about the licences of the public checkpoints instead."""

    def run(self) -> int:
        if self.licences:
            from weft.models.licences import LICENCES

            print("\n".join(f"{name}\n    {note}" for name, note in sorted(LICENCES.items())))
            return 0
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True)
        marks = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "bad": "[red]bad [/]"}
        bad = 0
        for state, what, found, advice in findings():
            bad += state == "bad"
            text = f"{found}{': ' if advice else ''}{advice}".replace("[", r"\[")
            console.print(f"{marks[state]} {what:14} {text}")
        print(f"\n{bad} to mend" if bad else "\nweft works here.")
        return 1 if bad else 0


def findings() -> Iterator[Finding]:
    """Every check, in order, as it is made."""
    tested = tested_versions()
    here = platform.python_version()
    yield Finding("ok" if sys.version_info >= (3, 11) else "bad", "python", here, "" if sys.version_info >= (3, 11) else
                  "weft needs 3.11 or newer")  # fmt: skip
    missing = False
    for name in CORE:
        finding = _package(name, tested.get(name, ""))
        missing |= finding.state == "bad"
        yield finding
    if not missing:
        yield from _hardware()
    for extra, modules in EXTRAS.items():
        absent = [module for module in modules if find_spec(module) is None]
        if absent:
            yield Finding("note", f"extra {extra}", f"without {', '.join(absent)}", f"pip install 'weft[{extra}]'")
        else:
            yield Finding("ok", f"extra {extra}", ", ".join(modules))
    yield from _zoo()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding("ok" if free > 2 else "note", "disk", f"{free:.1f} GiB free in {Path.cwd()}", "" if free > 2 else
                  "training writes checkpoints; free some space")  # fmt: skip


def _package(name: str, tested: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding("bad", name, "missing", f"pip install '{name}=={tested}'")
    if not tested or found.partition("+")[0] == tested:
        return Finding("ok", name, found)
    return Finding("note", name, found, f"weft is tested with {tested}")


def _hardware() -> Iterator[Finding]:
    """Device, threads, and how fast a matrix product is in fp32 and bf16."""
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    advice = f"of {cores} cores; OMP_NUM_THREADS sets it" if threads < cores // 2 else ""
    yield Finding("note" if advice else "ok", "threads", str(threads), advice)
    if torch.cuda.is_available():
        device, name = "cuda", torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("ok", "device", f"cuda: {name}, {memory:.0f} GiB, {torch.cuda.device_count()} device(s)")
    elif torch.backends.mps.is_available():
        device = "mps"
        yield Finding("ok", "device", "mps")
    else:
        device = "cpu"
        yield Finding("ok", "device", "cpu", "enough for the tiny models; the real ones want a GPU")
    full, half = (matmul_speed(device, dtype) for dtype in ("float32", "bfloat16"))
    advice = "" if half > 0.8 * full else "bf16 is slow here; train and sample in fp32"
    yield Finding("note" if advice else "ok", "speed", f"fp32 {full:.0f} GFLOP/s, bf16 {half:.0f} GFLOP/s", advice)


def matmul_speed(device: str, dtype: str, size: int = 512, seconds: float = 0.2) -> float:
    """Billions of floating-point operations a second of a size x size matrix product, best of short runs."""
    import torch

    a = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    best, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        for _ in range(4):
            b = a @ a
        b[0, 0].item()  # waits for the device
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


def _zoo() -> Iterator[Finding]:
    models = zoo_models()
    for name, folder in models.items():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
        yield Finding("ok", "zoo model", f"{name}, {size:.1f} MiB")
    if not models:
        yield Finding("bad", "zoo model", "none", "install weft again: its tiny models are missing")
