"""Real mocap through the readers: every file of a folder imports, and joints -> features -> joints comes back.

    python benchmarks/motion_cmu.py FOLDER [--upstream PATH_OF_MOMASK_CODES] [--limit N]

FOLDER holds .bvh files and .amc files with their .asf, at any depth (the CMU Graphics Lab database or parts of it).
The round trip is measured on the clip as features see it (retargeted, on the floor); what retargeting itself moves
is reported apart: root-aligned joint distance between the imported and the retargeted clip.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from weft.errors import WeftError
from weft.motion import HUMANML3D, extract, place, read_motion, recover, retarget
from weft.motion.ik import solve
from weft.motion.physics import average, measure, mpjpe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--upstream", help="a checkout of EricGuo5513/momask-codes to compare features with")
    parser.add_argument("--limit", type=int, help="only the first files")
    options = parser.parse_args()
    files = sorted(p for p in options.folder.rglob("*") if p.suffix.lower() in (".bvh", ".amc"))[: options.limit]
    start = time.perf_counter()
    clips, failed = [], []
    for path in files:
        try:
            clips.append(read_motion(path, fps=HUMANML3D.fps))
        except WeftError as error:
            failed.append(str(error))
    took = time.perf_counter() - start
    frames = sum(map(len, clips))
    print(
        f"{len(clips)} of {len(files)} files import: {frames} frames, {frames / 20:.0f} s of movement, in {took:.0f} s"
    )
    for line in failed:
        print(" ", line)
    if not clips:
        sys.exit(1)
    heights = [float(np.percentile(c.joints[..., 1].max(1) - c.joints[..., 1].min(1), 90)) for c in clips]
    print(f"from lowest to highest joint (90th percentile of a clip): {min(heights):.2f} to {max(heights):.2f} m")

    joints = [c.joints for c in clips]
    goal = place(retarget(joints))
    exact = place(joints)
    features = {heading: extract(joints, heading=heading) for heading in ("correct", "humanml3d")}
    own = extract(joints, heading="correct", lengths="own")
    for name, rows, source, wanted in (
        ("heading correct, from positions", features["correct"], "positions", goal),
        ("heading correct, from rotations", features["correct"], "rotations", goal),
        ("heading correct, not retargeted", own, "positions", exact),
        ("heading humanml3d, from positions", features["humanml3d"], "positions", goal),
    ):
        errors = [np.linalg.norm(a - b[:-1], axis=-1) for a, b in zip(recover(rows, source), wanted, strict=True)]
        mean = np.concatenate([e.ravel() for e in errors]).mean()
        worst = [float(e.max()) for e in errors]
        print(
            f"joints -> features -> joints, {name:33}: mean {1e3 * mean:.4f} mm, largest {1e3 * max(worst):.4f} mm, "
            f"{sum(w < 1e-3 for w in worst)} of {len(worst)} clips within 1 mm"
        )
    print("  (the dataset's own heading has the wrong sign where a clip passes half a turn: heading humanml3d)")
    moved = [mpjpe(a, b) for a, b in zip(exact, goal, strict=True)]
    print(
        f"retargeting itself (root-aligned): mean {1e3 * np.mean(moved):.1f} mm, largest clip {1e3 * max(moved):.1f} mm"
    )
    fits = [1e3 * solve(c).error for c in clips]
    exactly = max(solve(c, exact=True).error for c in clips[:8])
    print(
        f"rotations with bones of one length: largest distance to the clip, median {np.median(fits):.1f} mm, "
        f"worst {max(fits):.1f} mm; with exact=True {1e3 * exactly:.6f} mm"
    )
    print("physics: " + ", ".join(f"{k} {v:.3g}" for k, v in average([measure(c.placed()) for c in clips]).items()))

    if options.upstream:
        sys.path.insert(0, str(Path(__file__).parent))
        from motion_features import Upstream

        upstream = Upstream(options.upstream, HUMANML3D)
        theirs = [upstream.extract(c) for c in joints]
        for name, block in HUMANML3D.blocks().items():
            worst = [
                float(np.abs(a[:, block] - b[:, block]).max())
                for a, b in zip(features["humanml3d"], theirs, strict=True)
            ]
            print(
                f"public code, {name:14}: largest difference {max(worst):.1e}, median over clips {np.median(worst):.1e}"
            )


if __name__ == "__main__":
    main()
