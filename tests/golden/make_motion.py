"""Makes motion_features and motion_float64 .safetensors by running the public feature code on procedural clips.

    python tests/golden/make_motion.py PATH_OF_MOMASK_CODES

The numbers in the repository: EricGuo5513/momask-codes, commit 94a6636c9c463b7a9414c3401a6f1b67e6c51824,
utils/motion_process.py (uniform_skeleton, process_file, recover_from_ric, recover_from_rot), fp32 as it computes.
The second file holds clips whose limbs swing up to half a turn, features by the same code in float64 (its `.float()`
calls replaced), stored as float32. KIT's reference skeleton is not public: its clip is retargeted to bones of 100,
110, ... mm.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from motion_features import Upstream  # noqa: E402

from motion_clips import KIT_LENGTHS, procedural  # noqa: E402
from weft.motion.skeleton import HUMANML3D, KIT  # noqa: E402


def main() -> None:
    out: dict[str, np.ndarray] = {}
    upstream = Upstream(sys.argv[1], HUMANML3D)
    for k, (frames, seed, scale, spin) in enumerate(((48, 1, 1.13, 0.6), (4, 2, 0.9, 0.6), (31, 3, 1.0, 2.5))):
        clip = procedural(frames, seed, scale=scale, spin=spin)
        features = upstream.extract(clip)
        out |= {
            f"humanml3d.{k}.joints": clip,
            f"humanml3d.{k}.features": features,
            f"humanml3d.{k}.retargeted": upstream.retarget(clip),
            f"humanml3d.{k}.from_positions": upstream.from_positions(features),
            f"humanml3d.{k}.from_rotations": upstream.from_rotations(features),
        }
    upstream = Upstream(sys.argv[1], KIT, KIT_LENGTHS)
    clip = procedural(40, 5, layout=KIT)
    clip[15:20] = clip[15]  # feet at rest: contacts are rare at this threshold
    features = upstream.extract(clip)
    out |= {
        "kit.0.joints": clip,
        "kit.0.features": features,
        "kit.0.from_positions": upstream.from_positions(features),
        "kit.0.from_rotations": upstream.from_rotations(features),
    }
    arrays = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in out.items()}
    save_file(arrays, Path(__file__).with_name("motion_features.safetensors"))
    wide_swings(sys.argv[1])


def wide_swings(path: str) -> None:
    upstream, arrays = Upstream(path, HUMANML3D), {}
    for k, seed in enumerate((0, 2)):
        clip = procedural(40, seed, swing=1.6)
        arrays |= {
            f"{k}.joints": clip,
            f"{k}.float64": upstream.extract_float64(clip).astype(np.float32),
            f"{k}.float32": upstream.extract(clip),
        }
    save_file(arrays, Path(__file__).with_name("motion_float64.safetensors"))


if __name__ == "__main__":
    main()
