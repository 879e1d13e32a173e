"""What an example depends on, as digests: the record, the frozen weights, and the code that made the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from weft.record import Record
from weft.types import Trainable
from weft.vlm.processor import Processor


def content_digest(record: Record) -> str:
    """A digest of everything in a record that its example may depend on: task, roles, texts, media."""
    turns = [
        [t.role, [[p.type, p.role, p.text if p.type == "text" else p.digest(record.root)] for p in t.parts]]
        for t in record.turns
    ]
    # a canonical sentence or any other label in meta can be a training target, so meta counts
    meta = {k: v for k, v in record.meta.items() if k != "world"}
    return hashlib.sha256(json.dumps([record.task, turns, meta], sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(trainable: Trainable, trained: Iterable[str], args: dict[str, Any]) -> str:
    """A digest of the frozen modules' weights and of what else decides about an example: class and arguments."""
    digest = hashlib.sha256()
    kind = type(trainable)
    digest.update(json.dumps([kind.__module__, kind.__qualname__, args], sort_keys=True, default=str).encode())
    facts: dict[str, Any] = {name: getattr(trainable, name, None) for name in ("resolution", "options")}
    if hasattr(trainable, "example_facts"):
        facts |= trainable.example_facts()
    facts |= {name: part_facts(part) for name, part in sorted(getattr(trainable, "parts", {}).items())}
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    trained = set(trained)
    for name, module in sorted(trainable.modules().items()):
        if name in trained:
            continue
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}.{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def part_facts(part: Any) -> Any:
    """What a part is besides its weights, the same for a released folder and for one that weft saved of it.

    Private keys of a configuration are left out: where it was read, by which version it was written, and which
    arguments its file left to their defaults (diffusers lists them in another order in every process).
    """
    if isinstance(part, Processor):
        return [part_facts(part.tokenizer), part_facts(part.images), part.template]
    if hasattr(part, "get_vocab"):  # a tokenizer
        return [part.model_max_length, sorted(part.get_vocab().items())]
    config = getattr(part, "config", part)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    facts = dict(config) if isinstance(config, Mapping) else {}
    kept = {k: v for k, v in facts.items() if not k.startswith("_") and k != "architectures"}
    return kept | {"class": type(part).__qualname__}


def code_digest(dotted: str) -> str:
    """A digest of the Python files beside the module of a callable: generated data change when they do."""
    module_name = dotted.rpartition(":")[0]
    if module_name.endswith(".py"):
        return hashlib.sha256(Path(module_name).read_bytes()).hexdigest()
    import importlib

    file = importlib.import_module(module_name).__file__
    digest = hashlib.sha256()
    for path in sorted(Path(file).parent.glob("*.py")) if file else []:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def texts_in(value: Any) -> Iterator[str]:
    """All texts in nested lists and mappings, as arguments of a callable: some may name files."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)
