"""Run by Blender: `blender -b -P blender_joints.py -- FILE FPS OUT`: joints by name and frame, y up, JSON."""

from __future__ import annotations

import json
import sys

import bpy  # type: ignore[import-not-found]

path, fps, out = sys.argv[sys.argv.index("--") + 1 :]
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.context.scene.render.fps = int(fps)
if path.endswith(".bvh"):
    import io_anim_bvh.import_bvh as importer  # type: ignore[import-not-found]

    # Debian's Blender 3.4 runs on Python 3.11, which has dropped the mode "rU" that this add-on opens files with
    importer.open = lambda name, mode: open(name, mode.replace("U", ""))
    bpy.ops.import_anim.bvh(filepath=path, axis_forward="-Z", axis_up="Y", frame_start=0, use_fps_scale=False)
else:
    import numpy

    numpy.bool = bool  # the glTF add-on of Debian's Blender 3.4 uses a name that its NumPy (python3-numpy) has dropped
    bpy.ops.import_scene.gltf(filepath=path)
armature = next(o for o in bpy.context.scene.objects if o.type == "ARMATURE")
start, stop = armature.animation_data.action.frame_range
frames = []
for frame in range(round(start), round(stop) + 1):
    bpy.context.scene.frame_set(frame)
    heads = {b.name: armature.matrix_world @ b.head for b in armature.pose.bones}
    frames.append({name: [p.x, p.z, -p.y] for name, p in heads.items()})
with open(out, "w") as handle:
    json.dump({"frames": frames, "meshes": sum(o.type == "MESH" for o in bpy.context.scene.objects)}, handle)
