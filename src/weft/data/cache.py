"""A store of encoded examples on disk, addressed by content: sharded safetensors, each shard proved by SHA-256.

Examples whose tensors agree in names, types and shapes are stacked in one shard, so a shard of a thousand has a
header of a few tensors and is mapped into memory, not read. Beside `<id>.safetensors` lies `<id>.json` with its
digest and the key of each row; a shard without this index does not exist for readers, hence writing is atomic. The id
is a digest of both, so several runs can write into one folder: none replaces what another reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import WeftError
from weft.media import atomic_write
from weft.types import Example

if TYPE_CHECKING:
    from torch import Tensor


def example_key(fingerprint: str, content: str, size: str = "") -> str:
    """The address of an example: encoder fingerprint, digest of the record's content, and target size."""
    return hashlib.sha256(json.dumps([fingerprint, content, size]).encode()).hexdigest()


def _signature(example: Example) -> str:
    return json.dumps([[k, str(t.dtype), list(t.shape)] for k, t in sorted(example.items())])


class ExampleCache:
    """Examples by key. `add` collects until `shard` of one shape are there and writes them; `flush` writes the rest.

    `narrow` names tensors (by prefix) that are stored in bfloat16 and returned in fp32. What `get` returns are views
    of mapped files: do not write to them.
    """

    def __init__(self, folder: str | Path, *, shard: int = 1024, narrow: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard, self.narrow = shard, tuple(narrow)
        self._where: dict[str, tuple[str, int]] = {}  # key -> shard id, row
        self._digest: dict[str, str] = {}
        self._open: dict[str, dict[str, Tensor]] = {}
        self._pending: dict[str, dict[str, Example]] = {}  # signature -> key -> example
        self._pending_of: dict[str, str] = {}
        for index in sorted(self.folder.glob("*.json")):
            if index.name.startswith("keys-"):
                continue
            try:
                data = json.loads(index.read_text(encoding="utf-8"))
                keys, digest = list(data["keys"]), data["sha256"]
            except (ValueError, KeyError, TypeError):
                raise WeftError(f"cache index {index} is damaged: delete it, its examples are encoded again") from None
            self._digest[index.stem] = digest
            for row, key in enumerate(keys):
                self._where[key] = (index.stem, row)

    def __len__(self) -> int:
        return len(self._where) + len(self._pending_of)

    def __contains__(self, key: str) -> bool:
        return key in self._where or key in self._pending_of

    def add(self, key: str, example: Example) -> None:
        """Store one example (CPU tensors); a key that is already there is left as it is."""
        import torch

        if key in self:
            return
        stored = {}
        for name, tensor in example.items():
            tensor = tensor.detach().cpu()
            if tensor.dtype == torch.float32 and self.narrow and name.startswith(self.narrow):
                tensor = tensor.bfloat16()
            stored[name] = tensor.clone(memory_format=torch.contiguous_format)
        signature = _signature(stored)
        group = self._pending.setdefault(signature, {})
        group[key] = stored
        self._pending_of[key] = signature
        if len(group) >= self.shard:
            self._write(signature)

    def flush(self) -> None:
        """Write everything that is not yet on disk."""
        for signature in list(self._pending):
            self._write(signature)

    def get(self, keys: Iterable[str]) -> list[Example]:
        """The examples of `keys`. Raises KeyError for an unknown one, WeftError if a shard fails its digest."""
        return [self._restore(self._one(key)) for key in keys]

    def _one(self, key: str) -> Example:
        if key in self._pending_of:
            return self._pending[self._pending_of[key]][key]
        shard, row = self._where[key]
        tensors = self._open.get(shard)
        if tensors is None:
            tensors = self._load(shard)
        return {name: stacked[row] for name, stacked in tensors.items()}

    def _restore(self, example: Example) -> Example:
        if not self.narrow:
            return example
        return {k: v.float() if k.startswith(self.narrow) and v.is_floating_point() else v for k, v in example.items()}

    def _load(self, shard: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        path = self.folder / f"{shard}.safetensors"
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            digest = "missing"
        if digest != self._digest[shard]:
            raise WeftError(
                f"cache shard {path} is {'missing' if digest == 'missing' else 'damaged (SHA-256 differs)'}: "
                f"delete {shard}.json beside it, its examples are encoded again"
            )
        self._open[shard] = load_file(path)
        return self._open[shard]

    def _write(self, signature: str) -> None:
        import torch
        from safetensors.torch import save_file

        group = self._pending[signature]
        keys = list(group)
        temporary = self.folder / f".writing-{secrets.token_hex(8)}"
        try:
            names = sorted(group[keys[0]])
            save_file({n: torch.stack([group[k][n] for k in keys]) for n in names}, temporary)
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            shard = hashlib.sha256("\n".join([digest, *keys]).encode()).hexdigest()[:24]
            os.replace(temporary, self.folder / f"{shard}.safetensors")
            with atomic_write(self.folder / f"{shard}.json") as index:
                index.write(json.dumps({"sha256": digest, "keys": keys}).encode())
        except Exception as error:
            temporary.unlink(missing_ok=True)
            raise WeftError(f"could not write a shard of the cache {self.folder}: {error}") from error
        del self._pending[signature]
        self._digest[shard] = digest
        for row, key in enumerate(keys):
            self._where[key] = (shard, row)
            del self._pending_of[key]
