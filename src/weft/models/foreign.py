"""The one reader of checkpoints in PyTorch's pickle format (.pt, .pth, .tar, .bin): tensors only, in a process apart.

    python -m weft.models.foreign net_best_fid.tar weights.safetensors vq_model

`torch.load(weights_only=True)` refuses everything but tensors and plain containers; the process apart keeps even a
hole in that from touching the caller. It runs only where a user names such a file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from weft.errors import WeftError


def read_foreign(path: str | Path, key: str = "") -> dict[str, Any]:
    """The tensors of a foreign checkpoint by name, on the CPU; `key` names the entry that holds them ("" the file).

    Raises WeftError for a missing file, one that holds more than tensors, and an entry that is not there.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise WeftError(f"{path}: no such file: check the path")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "weights.safetensors"
        command = [sys.executable, "-m", "weft.models.foreign", str(path.absolute()), str(out), key]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode or not out.is_file():
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise WeftError(f"{path}: cannot be read ({(lines or ['no reason given'])[-1][:300]})")
        return load_file(out)


def convert(path: Path, out: Path, key: str) -> None:
    """Write the tensors under `key` as safetensors. Runs in the process apart."""
    import torch
    from safetensors.torch import save_file

    found = torch.load(path, map_location="cpu", weights_only=True)
    for part in filter(None, key.split(".")):
        if not isinstance(found, dict) or part not in found:
            raise WeftError(f"no entry {part!r}, it has {', '.join(map(str, found)) if isinstance(found, dict) else 0}")
        found = found[part]
    if not isinstance(found, dict):
        raise WeftError(f"holds a {type(found).__name__}, not named tensors")
    tensors = {str(k): v.detach().contiguous().clone() for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise WeftError(f"no tensors under {key!r}; it has {', '.join(map(str, found))}")
    save_file(tensors, out)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except Exception as error:  # whatever a hostile file provokes: the caller reads the last line
        print(" ".join(str(error).split())[:300] or type(error).__name__, file=sys.stderr)
        sys.exit(2)
