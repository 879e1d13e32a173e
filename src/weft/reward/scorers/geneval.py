"""GenEval as a reward: are the things there, in the right number, colour and place? Over any detector.

Two numbers: the dense reward that Flow-GRPO trains on, and whether everything is exactly right (yifan123/reward-server,
reward_server/gen_eval.py, after GenEval, arXiv 2310.11513). A record's `meta` holds GenEval's row: `tag`, `include`
(class, count, color, position), optionally `exclude`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from weft.errors import WeftError
from weft.reward.mix import Pair
from weft.types import Score

CONFIDENCE, COUNTING_CONFIDENCE, MOST = 0.3, 0.9, 16
DISTANCE = 0.1  # a relation holds beyond this part of the two sizes


@dataclass(slots=True, frozen=True)
class Found:
    """A detected thing: its class, confidence, and box (left, top, right, bottom) in pixels."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]


Detector = Callable[[Sequence[Image.Image]], Sequence[Sequence[Found]]]
Colours = Callable[[Image.Image, Sequence[Found]], Sequence[str]]


class GenEval:
    """The dense reward, or with `mode="strict"` 1 or 0; the parts hold both (`dense`, `strict`).

    `parity` keeps a slip of the public code, which adds a full point for a position even where it is wrong.
    The dense reward may be negative: three things too many of one asked for give -2. Missing: without an `include`,
    and where a colour is asked for without `colours`.
    """

    def __init__(
        self,
        detector: Detector | str,
        colours: Colours | None = None,
        mode: Literal["dense", "strict"] = "dense",
        parity: bool = False,
    ) -> None:
        """`detector`: a function from pictures to what is in each, or the folder of a transformers detector.
        `colours`: the colour of each thing found in a picture."""
        if mode not in ("dense", "strict"):
            raise WeftError(f"mode {mode!r} is unknown: use dense or strict")
        self.detector = transformers_detector(detector) if isinstance(detector, str) else detector
        self.colours, self.mode, self.parity = colours, mode, parity

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        found = self.detector([image for _, image in batch])
        return [self._one(record.meta, image, things) for (record, image), things in zip(batch, found, strict=True)]

    def _one(self, row: Mapping[str, Any], image: Image.Image, things: Sequence[Found]) -> Score:
        include = row.get("include")
        if not isinstance(include, list) or not include:
            return Score(None, reason="meta.include does not say what should be there (GenEval's row)")
        if self.colours is None and any("color" in clause for clause in include):
            return Score(None, reason="a colour is asked for, and there is nothing to tell colours with (colours=)")
        least = COUNTING_CONFIDENCE if row.get("tag") == "counting" else CONFIDENCE
        seen: dict[str, list[Found]] = {}
        for thing in sorted(things, key=lambda thing: -thing.confidence):
            if thing.confidence > least and len(seen.get(thing.name, [])) < MOST:
                seen.setdefault(thing.name, []).append(thing)
        try:
            dense, strict = self._judge(include, seen, image)
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            return Score(None, reason=f"meta.include is no GenEval row: {type(error).__name__} {error}")
        return Score(dense if self.mode == "dense" else float(strict), {"dense": dense, "strict": float(strict)})

    def _judge(
        self, include: Sequence[Mapping[str, Any]], seen: Mapping[str, list[Found]], image: Image.Image
    ) -> tuple[float, bool]:
        points: list[float] = []
        groups: list[list[Found] | None] = []  # the things of each clause, None where it is not met
        for clause in include:
            count, things = int(clause["count"]), seen.get(clause["class"], [])
            points.append(1 - abs(count - len(things)) / count)
            met = len(things) == count
            if not met and ("color" in clause or "position" in clause):
                points.append(0.0)
            if met and "color" in clause and self.colours is not None:
                right = list(self.colours(image, things)).count(clause["color"])
                points.append(1 - abs(count - right) / count)
                met = right == count
            if met and "position" in clause:
                relation, target = clause["position"]
                others = groups[target]
                met = others is not None and all(relation in relations(a, b) for a in things for b in others)
                if not met:
                    points.append(0.0)
                if met or self.parity and others is not None:
                    points.append(1.0)
            groups.append(things if met else None)
        return float(np.mean(points)), all(group is not None for group in groups)


def relations(a: Found, b: Found) -> set[str]:
    """Where a lies as seen from b: of "left of", "right of", "above", "below"; empty where they are too close."""
    boxes = np.array([a.box, b.box], float).reshape(2, 2, 2)  # [thing, corner, xy]
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    free = np.maximum(np.abs(offset) - DISTANCE * sizes.sum(0), 0) * np.sign(offset)
    if np.all(np.abs(free) < 1e-3):
        return set()
    dx, dy = free / np.linalg.norm(offset)
    names = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in names.items() if holds}


def transformers_detector(folder: str, device: str | None = None, batch_size: int = 8) -> Detector:
    """Any object detection model of transformers (DETR, RT-DETR, Grounding-free ones), with its own class names.

    Raises WeftError if none can be read from the folder or hub id.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    try:
        network = AutoModelForObjectDetection.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise WeftError(f"{folder}: no detector can be read there ({str(error).splitlines()[0]})") from error
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = network.eval().requires_grad_(False).to(target)
    names = network.config.id2label

    def detect(pictures: Sequence[Image.Image]) -> list[list[Found]]:
        out: list[list[Found]] = []
        for start in range(0, len(pictures), batch_size):
            some = [picture.convert("RGB") for picture in pictures[start : start + batch_size]]
            with torch.inference_mode():
                output = network(**images(images=some, return_tensors="pt").to(target))
            sizes = [(picture.height, picture.width) for picture in some]
            for row in images.post_process_object_detection(output, threshold=CONFIDENCE, target_sizes=sizes):
                rows = zip(row["labels"].tolist(), row["scores"].tolist(), row["boxes"].tolist(), strict=True)
                out.append([Found(names[label], score, tuple(box)) for label, score, box in rows])
        return out

    return detect
