"""Motion features beside the public per-clip code: parity and speed in one process.

    python benchmarks/motion_features.py --upstream PATH_OF_MOMASK_CODES [--clips 96] [--json FILE]

The public code (EricGuo5513/momask-codes, utils/motion_process.py) is read from PATH and is not part of this
repository. Both run on one thread, on the same procedural clips of mixed length, best of several rounds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from weft.motion import extract, recover, retarget  # noqa: E402
from weft.motion.skeleton import HUMANML3D, Layout  # noqa: E402


class Upstream:
    """The public functions for one layout. Their module takes its constants from globals."""

    def __init__(self, path: str, layout: Layout, lengths: np.ndarray | None = None) -> None:
        import scipy.ndimage
        import torch

        torch.set_num_threads(1)
        np.float = float  # type: ignore[attr-defined]  # a name NumPy has dropped
        filters = types.ModuleType("scipy.ndimage.filters")
        filters.gaussian_filter1d = scipy.ndimage.gaussian_filter1d  # type: ignore[attr-defined]
        sys.modules["scipy.ndimage.filters"] = filters
        sys.path.insert(0, path)
        self.torch, self.layout = torch, layout
        self.code: Any = importlib.import_module("utils.motion_process")
        self.skeletons: Any = importlib.import_module("common.skeleton")
        target = layout.directions * layout.bone_lengths(lengths)[:, None]
        self.target = torch.from_numpy(target).float()
        self.rest = torch.from_numpy(layout.directions).long()
        self.chains = [list(c) for c in layout.chains]

    def _constants(self) -> None:
        code, layout = self.code, self.layout
        code.n_raw_offsets, code.kinematic_chain, code.tgt_offsets = self.rest, self.chains, self.target
        code.l_idx1, code.l_idx2 = layout.legs
        code.fid_l, code.fid_r = list(layout.feet[:2]), list(layout.feet[2:])
        code.face_joint_indx = list(layout.face)

    def extract(self, clip: np.ndarray) -> np.ndarray:
        self._constants()
        return self.code.process_file(clip.copy(), self.layout.contact)[0].astype(np.float32)

    def extract_float64(self, clip: np.ndarray) -> np.ndarray:
        """The same code in double precision, which its own `.float()` calls would prevent."""
        single, self.target = self.torch.Tensor.float, self.target.double()
        self.torch.Tensor.float = self.torch.Tensor.double
        try:
            self._constants()
            return self.code.process_file(clip.astype(np.float64), self.layout.contact)[0]
        finally:
            self.torch.Tensor.float, self.target = single, self.target.to(self.torch.float32)

    def retarget(self, clip: np.ndarray) -> np.ndarray:
        self._constants()
        return self.code.uniform_skeleton(clip, self.target)

    def from_positions(self, features: np.ndarray) -> np.ndarray:
        data = self.torch.from_numpy(features)[None]
        return self.code.recover_from_ric(data, len(self.layout.joints))[0].numpy()

    def from_rotations(self, features: np.ndarray) -> np.ndarray:
        skeleton = self.skeletons.Skeleton(self.rest, self.chains, "cpu")
        skeleton.set_offset(self.target)
        data = self.torch.from_numpy(features)[None]
        return self.code.recover_from_rot(data, len(self.layout.joints), skeleton).numpy()


def precisions(
    upstream: Upstream, clips: list[np.ndarray], ours: list[np.ndarray], theirs: list[np.ndarray]
) -> dict[str, dict[str, float]]:
    """Where a bone comes near the opposite of its rest direction, float32 loses digits: whose, and how many?"""
    exact = [upstream.extract_float64(clip) for clip in clips]
    pairs = {"weft to public float64": (ours, exact), "public to public float64": (theirs, exact)}
    return {
        name: {
            block: max(float(np.abs(a[:, columns] - b[:, columns]).max()) for a, b in zip(one, other, strict=True))
            for block, columns in HUMANML3D.blocks().items()
        }
        for name, (one, other) in pairs.items()
    }


def best(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    from motion_clips import procedural

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, help="a checkout of EricGuo5513/momask-codes")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--json", help="write the figures here, too")
    options = parser.parse_args()
    upstream = Upstream(options.upstream, HUMANML3D)
    rng = np.random.default_rng(0)
    clips = [procedural(int(n), k, swing=0.2) for k, n in enumerate(rng.integers(40, 200, options.clips))]

    ours, theirs = extract(clips), [upstream.extract(c) for c in clips]
    worst: dict[str, float] = {}
    for name, block in HUMANML3D.blocks().items():
        worst[name] = max(float(np.abs(a[:, block] - b[:, block]).max()) for a, b in zip(ours, theirs, strict=True))
    worst["retargeted"] = max(float(np.abs(retarget(c) - upstream.retarget(c)).max()) for c in clips[:16])
    pairs = (("positions", upstream.from_positions), ("rotations", upstream.from_rotations))
    for source, function in pairs:
        worst[f"from {source}"] = max(float(np.abs(recover(f, source) - function(f)).max()) for f in theirs)

    precision = precisions(upstream, clips, ours, theirs)
    timed = {"extract": (best(lambda: [upstream.extract(c) for c in clips], 3), best(lambda: extract(clips), 7))}
    for source, function in pairs:
        slow = best(lambda function=function: [function(f) for f in theirs], 3)
        timed[f"from {source}"] = slow, best(lambda source=source: recover(theirs, source), 7)

    commit = subprocess.run(["git", "-C", options.upstream, "rev-parse", "HEAD"], capture_output=True, text=True)
    print(f"upstream {commit.stdout.strip()[:12] or 'unknown'}, {len(clips)} clips, {sum(map(len, clips))} frames\n")
    print("largest difference: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()) + "\n")
    for name, difference in precision.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.1e}" for k, v in difference.items()))
    print()
    for name, (slow, fast) in timed.items():
        print(f"{name:16} public {1e3 * slow:8.1f} ms   weft {1e3 * fast:7.1f} ms   {slow / fast:6.1f} x")
    if options.json:
        figures = {"commit": commit.stdout.strip(), "difference": worst, "precision": precision, "seconds": timed}
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
