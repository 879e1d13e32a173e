"""Where a run's numbers go: a JSONL file always, TensorBoard, Weights & Biases and Trackio if asked for."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from weft.errors import WeftError

TRACKERS = ("jsonl", "tensorboard", "wandb", "trackio")


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """One JSON object a line in `log.jsonl`. A resumed run first drops what was logged after its checkpoint."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "log.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # the torn last line of a killed process
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}


class TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for key, value in _numbers(values).items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class Remote:
    """wandb or trackio: two libraries with one interface."""

    def __init__(self, library: Any, folder: Path, config: dict[str, Any]) -> None:
        self.library = library
        library.init(project="weft", name=folder.name, config=config)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.library.log(_numbers(values), step=step)

    def close(self) -> None:
        self.library.finish()


def open_trackers(names: Sequence[str], folder: Path, step: int, config: dict[str, Any]) -> list[Tracker]:
    """The trackers by name; the JSONL file is always the first. Raises WeftError naming the missing extra."""
    import importlib

    trackers: list[Tracker] = [Jsonl(folder, step)]
    for name in names:
        if name not in TRACKERS:
            raise WeftError(f'run.trackers: unknown "{name}", use {", ".join(TRACKERS)}')
        if name == "jsonl":
            continue
        module = "tensorboard" if name == "tensorboard" else name
        try:
            library = importlib.import_module(module)
        except ImportError:
            raise WeftError(f'run.trackers: "{name}" is not installed: pip install "weft[track]"') from None
        trackers.append(TensorBoard(folder, step) if name == "tensorboard" else Remote(library, folder, config))
    return trackers
