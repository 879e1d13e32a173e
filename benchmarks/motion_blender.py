"""Do the files that weft writes hold the same joints in Blender? Every clip as BVH and GLB, read there headless.

    python benchmarks/motion_blender.py FOLDER|FILE ... [--limit N] [--fps 20] [--json FILE]

FOLDER holds motion files of any kind that weft reads. Blender (tested: 3.4, Debian's package) evaluates its own scene
frame by frame; the figure is the largest distance between one of its bone heads and the clip's joint. Without `exact`
bones have one length, so the clip that is compared is the one that such bones can make; how far that is from the
original is printed, too. `exact` writes translations and is compared with the original itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from weft.errors import WeftError
from weft.motion import HUMANML3D, Motion, read_motion, write_motion
from weft.motion.convert import motion_files
from weft.motion.ik import solve

SCRIPT = Path(__file__).parents[1] / "tests" / "blender_joints.py"


def joints_in_blender(blender: str, path: Path, fps: float) -> np.ndarray:
    """Bone heads [T, 22, 3], y up, metres. Raises SystemExit with Blender's last words if it cannot."""
    out = path.with_suffix(path.suffix + ".json")
    command = [blender, "-b", "--factory-startup", "-P", str(SCRIPT), "--", str(path), f"{fps:g}", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if not out.is_file():
        sys.exit(f"{path.name}: Blender did not read it:\n{(done.stdout + done.stderr)[-2000:]}")
    frames = json.loads(out.read_text())["frames"]
    return np.array([[frame[name] for name in HUMANML3D.joints] for frame in frames])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, help="only so many files, spread over all")
    parser.add_argument("--fps", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    blender = shutil.which("blender")
    if blender is None:
        sys.exit("no blender on the path: install it (Debian: apt install blender)")
    version = subprocess.run([blender, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    files = [f for path in options.paths for f in motion_files(path)]
    if options.limit:
        files = [files[k] for k in np.linspace(0, len(files) - 1, min(options.limit, len(files))).round().astype(int)]
    worst: dict[str, list[float]] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            try:
                clip = read_motion(file, fps=options.fps)
            except WeftError as error:
                print(f"left out: {error}")
                continue
            rigid = Motion(solve(clip).positions(), clip.fps)
            line = [f"{file.name:14} {len(clip):5} frames"]
            for kind, goal in (("", rigid), (" exact", clip)):
                for suffix in (".bvh", ".glb"):
                    path = Path(folder) / f"{file.stem}{suffix}"
                    write_motion(clip, path, exact=bool(kind))
                    found = joints_in_blender(blender, path, options.fps)
                    if len(found) != len(goal):
                        sys.exit(f"{path.name}: {len(found)} frames in Blender, {len(goal)} written")
                    gap = 1e3 * float(np.linalg.norm(found - goal.joints, axis=-1).max())
                    worst.setdefault(f"{suffix[1:]}{kind}", []).append(gap)
                    line.append(f"{suffix[1:]}{kind} {gap:.4f} mm")
            moved = 1e3 * float(np.linalg.norm(rigid.joints - clip.joints, axis=-1).max())
            worst.setdefault("bones of one length", []).append(moved)
            print("  ".join(line), f" (bones of one length: {moved:.1f} mm)", flush=True)
    if not worst:
        sys.exit("no clip could be read")
    print(
        f"\n{version}, {len(next(iter(worst.values())))} clips, {time.perf_counter() - start:.0f} s; largest distance:"
    )
    for name, gaps in worst.items():
        print(f"  {name:20} {max(gaps):.4f} mm")
    if options.json:
        figures = {"blender": version, "clips": len(files), "largest_mm": {k: max(v) for k, v in worst.items()}}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
