"""GenEval as a reward: are the things there, in the right number, colour and place? Over any detector.

Three numbers: the dense reward that Flow-GRPO trains on, whether everything is exactly right, and GenEval's official
accuracy, to which more things than asked for do no harm unless the row excludes them (yifan123/reward-server,
reward_server/gen_eval.py, after GenEval, arXiv 2310.11513). A record's `meta` holds GenEval's row: `tag`, `include`
(class, count, color, position), optionally `exclude` (class, count: so many are too many).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from weft.errors import WeftError
from weft.reward.mix import Pair
from weft.reward.scorers.clip import CLIPScore
from weft.settings import load_object
from weft.types import Score

CONFIDENCE, COUNTING_CONFIDENCE, MOST = 0.3, 0.9, 16
DISTANCE = 0.1  # a relation holds beyond this part of the two sizes
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
NAMES = {  # of the classes of COCO in detectors' configurations -> in GenEval's rows
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(slots=True, frozen=True)
class Found:
    """A detected thing: its class, confidence, and box (left, top, right, bottom) in pixels."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]


Detector = Callable[[Sequence[Image.Image]], Sequence[Sequence[Found]]]
Colours = Callable[[Image.Image, Sequence[Found]], Sequence[str]]
Told = Callable[[str, int], list[str]]  # the colours of the first so many things of a class


class GenEval:
    """The dense reward, or with `mode` "strict" or "accuracy" 1 or 0; the parts hold all three under these names.

    `parity` keeps a slip of the public code, which adds a full point for a position even where it is wrong.
    The dense reward may be negative: three things too many of one asked for give -2. Missing: without an `include`,
    where a colour is asked for without `colours`, and for a class that the detector does not know.
    """

    def __init__(
        self,
        detector: Detector | str,
        colours: Colours | str | None = None,
        mode: Literal["dense", "strict", "accuracy"] = "dense",
        parity: bool = False,
    ) -> None:
        """`detector`: a function from pictures to what is in each, or the folder of a transformers detector.
        `colours`: the colour of each thing found in a picture, or the folder of a CLIP model that tells it
        (openai/clip-vit-large-patch14 in GenEval). Functions may be named as `file.py:name`."""
        if mode not in ("dense", "strict", "accuracy"):
            raise WeftError(f"mode {mode!r} is unknown: use dense, strict or accuracy")
        if isinstance(detector, str):
            detector = load_object(detector, "detector") if ":" in detector else TransformersDetector(detector)
        if isinstance(colours, str):
            colours = load_object(colours, "colours") if ":" in colours else ClipColours(colours)
        self.detector, self.colours, self.mode, self.parity = detector, colours, mode, parity
        self.classes: frozenset[str] | None = getattr(detector, "classes", None)  # None: anything may be asked for

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        found = self.detector([image for _, image in batch])
        return [self._one(record.meta, image, things) for (record, image), things in zip(batch, found, strict=True)]

    def _one(self, row: Mapping[str, Any], image: Image.Image, things: Sequence[Found]) -> Score:
        include = row.get("include")
        if not isinstance(include, list) or not include or not all(isinstance(clause, dict) for clause in include):
            return Score(None, reason="meta.include does not say what should be there (GenEval's row)")
        if self.colours is None and any("color" in clause for clause in include):
            return Score(None, reason="a colour is asked for, and there is nothing to tell colours with (colours=)")
        unknown = {repr(clause.get("class")) for clause in include if clause.get("class") not in (self.classes or ())}
        if self.classes is not None and unknown:
            return Score(None, reason=f"the detector knows no class {', '.join(sorted(unknown))}: it is never found")
        least = COUNTING_CONFIDENCE if row.get("tag") == "counting" else CONFIDENCE
        seen: dict[str, list[Found]] = {}
        for thing in sorted(things, key=lambda thing: -thing.confidence):
            if thing.confidence > least and len(seen.get(thing.name, [])) < MOST:
                seen.setdefault(thing.name, []).append(thing)
        colours: dict[str, list[str]] = {}

        def told(name: str, count: int) -> list[str]:
            if name not in colours and self.colours is not None:
                colours[name] = list(self.colours(image, seen[name]))
            return colours[name][:count]

        try:
            dense, strict = self._judge(include, seen, told)
            parts = {"dense": dense, "strict": float(strict), "accuracy": float(_accurate(row, seen, told))}
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            return Score(None, reason=f"meta.include is no GenEval row: {type(error).__name__} {error}")
        return Score(parts[self.mode], parts)

    def _judge(
        self, include: Sequence[Mapping[str, Any]], seen: Mapping[str, list[Found]], told: Told
    ) -> tuple[float, bool]:
        points: list[float] = []
        groups: list[list[Found] | None] = []  # the things of each clause, None where it is not met
        for clause in include:
            count, things = int(clause["count"]), seen.get(clause["class"], [])
            points.append(1 - abs(count - len(things)) / count)
            met = len(things) == count
            if not met and ("color" in clause or "position" in clause):
                points.append(0.0)
            if met and "color" in clause:
                right = told(clause["class"], count).count(clause["color"])
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


def _accurate(row: Mapping[str, Any], seen: Mapping[str, list[Found]], told: Told) -> bool:
    """GenEval's own rule (`evaluate` of the public code): of each class its most confident things, as many as asked
    for, have the colour and place, and of none that is excluded there are too many."""
    groups: list[list[Found] | None] = []
    for clause in row["include"]:
        count = int(clause["count"])
        things = seen.get(clause["class"], [])[:count]
        met = len(things) == count
        if met and "color" in clause:
            met = told(clause["class"], count).count(clause["color"]) == count
        if met and "position" in clause:
            relation, target = clause["position"]
            others = groups[target]
            met = others is not None and all(relation in relations(a, b) for a in things for b in others)
        groups.append(things if met else None)
    surplus = [len(seen.get(clause["class"], ())) >= int(clause["count"]) for clause in row.get("exclude") or ()]
    return None not in groups and not any(surplus)


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


class TransformersDetector:
    """Any object detection model of transformers (DETR, RT-DETR, Grounding-free ones). `classes` are what it can find,
    under the names of GenEval's rows."""

    def __init__(self, folder: str, device: str | None = None, batch_size: int = 8) -> None:
        """Raises WeftError if no detector can be read from the folder or hub id."""
        import torch
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        try:
            network = AutoModelForObjectDetection.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
            self.images = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise WeftError(f"{folder}: no detector can be read there ({str(error).splitlines()[0]})") from error
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network, self.batch_size = network.eval().requires_grad_(False).to(self.device), batch_size
        self.names = {k: NAMES.get(name, name) for k, name in network.config.id2label.items()}
        self.classes = frozenset(self.names.values())

    def __call__(self, pictures: Sequence[Image.Image]) -> list[list[Found]]:
        import torch

        out: list[list[Found]] = []
        for start in range(0, len(pictures), self.batch_size):
            some = [picture.convert("RGB") for picture in pictures[start : start + self.batch_size]]
            with torch.inference_mode():
                output = self.network(**self.images(images=some, return_tensors="pt").to(self.device))
            sizes = [(picture.height, picture.width) for picture in some]
            for row in self.images.post_process_object_detection(output, threshold=CONFIDENCE, target_sizes=sizes):
                rows = zip(row["labels"].tolist(), row["scores"].tolist(), row["boxes"].tolist(), strict=True)
                out.append([Found(self.names[label], score, tuple(box)) for label, score, box in rows])
        return out


class ClipColours:
    """The colour of things by CLIP without training, as GenEval tells it: the nearest of ten colours, each the mean of
    three sentences' vectors. GenEval greys out what its detector's mask leaves out of a box; boxes have no mask, so
    all of the box is looked at."""

    def __init__(self, model: str, device: str | None = None) -> None:
        """`model`: a folder or hub id with CLIPModel weights and their processor."""
        self.clip = CLIPScore(model, device=device)

    def __call__(self, image: Image.Image, things: Sequence[Found]) -> list[str]:
        """One of `COLOURS` for each thing, in order."""
        told: dict[int, str] = {}
        for name in dict.fromkeys(thing.name for thing in things):
            own = [k for k, thing in enumerate(things) if thing.name == name]
            texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in TEMPLATES]
            words, seen = self.clip.embed(texts, [image.convert("RGB").crop(_pixels(things[k], image)) for k in own])
            means = words.reshape(len(COLOURS), len(TEMPLATES), -1).mean(1)
            nearest = (seen @ (means / means.norm(dim=-1, keepdim=True)).T).argmax(1).tolist()
            told |= {k: COLOURS[index] for k, index in zip(own, nearest, strict=True)}
        return [told[k] for k in range(len(things))]


def _pixels(thing: Found, image: Image.Image) -> tuple[int, int, int, int]:
    """Its box in whole pixels within the picture, at least one of them."""
    left, top, right, bottom = (round(edge) for edge in thing.box)
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return left, top, max(left + 1, min(right, image.width)), max(top + 1, min(bottom, image.height))
