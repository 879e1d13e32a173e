"""The two skeletons of the text-to-motion literature, as data: HumanML3D (22 joints) and KIT (21 joints).

A layout fixes joint order, chains, rest directions and the constants of feature extraction. Everything here is a
measured or published constant of HumanML3D (Guo et al. 2022; EricGuo5513/HumanML3D paramUtil.py and
motion_representation.ipynb).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from weft.errors import WeftError

_AXES = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1), "X": (-1, 0, 0), "Y": (0, -1, 0), "Z": (0, 0, -1)}


@dataclass(frozen=True)
class Layout:
    """A skeleton with the constants of its features; lengths in the layout's `unit`, y up.

    `rest` has one letter a joint after the root: the axis of its bone at rest, upper case for the negative axis.
    """

    name: str
    joints: tuple[str, ...]
    chains: tuple[tuple[int, ...], ...]
    rest: str
    face: tuple[int, int, int, int]  # right hip, left hip, right shoulder, left shoulder
    legs: tuple[int, int]  # the two joints whose bones scale the root translation
    feet: tuple[int, int, int, int]  # left ankle, left toe, right ankle, right toe: the order of the contacts
    contact: float  # squared displacement per frame, in unit^2, below which a foot is in contact
    swaps: tuple[tuple[int, int], ...]  # (left, right)
    fps: float
    unit: str
    lengths: tuple[float, ...] | None  # of the reference skeleton, joint 1 onwards

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The parent of every joint, -1 for the root."""
        parents = [-1] * len(self.joints)
        for chain in self.chains:
            for parent, joint in zip(chain[:-1], chain[1:], strict=True):
                parents[joint] = parent
        return tuple(parents)

    @cached_property
    def turned_by(self) -> tuple[int, ...]:
        """The joint whose rotation a joint's own is relative to.

        It is the parent, but for the first joint of a chain: the dataset starts every chain, also those that leave
        the upper spine, from the root's rotation.
        """
        relative = list(self.parents)
        for chain in self.chains:
            relative[chain[1]] = 0
        return tuple(relative)

    @cached_property
    def directions(self) -> np.ndarray:
        """Unit rest directions, [J, 3] float64; the root's is zero."""
        return np.array([(0, 0, 0), *(_AXES[c] for c in self.rest)], dtype=np.float64)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Joints after the root, grouped by their distance from it: parents come before children."""
        depth = [0] * len(self.joints)
        for chain in self.chains:
            for parent, joint in zip(chain[:-1], chain[1:], strict=True):
                depth[joint] = depth[parent] + 1
        return tuple(tuple(j for j, d in enumerate(depth) if d == k) for k in range(1, max(depth) + 1))

    @cached_property
    def mirrored(self) -> tuple[int, ...]:
        """The permutation that exchanges left and right."""
        order = list(range(len(self.joints)))
        for left, right in self.swaps:
            order[left], order[right] = right, left
        return tuple(order)

    @property
    def width(self) -> int:
        """Numbers per feature frame: 1 + 2 + 1 + (J-1)*3 + (J-1)*6 + J*3 + 4."""
        return 12 * len(self.joints) - 1

    def blocks(self) -> dict[str, slice]:
        """The columns of a feature frame by name."""
        n = len(self.joints)
        a, b, c = 4 + (n - 1) * 3, 4 + (n - 1) * 9, 4 + (n - 1) * 9 + n * 3
        return {
            "root_yaw": slice(0, 1),
            "root_velocity": slice(1, 3),
            "root_height": slice(3, 4),
            "positions": slice(4, a),
            "rotations": slice(a, b),
            "velocities": slice(b, c),
            "contacts": slice(c, c + 4),
        }

    def index(self, name: str) -> int:
        """The number of a joint. Raises `WeftError` for an unknown name."""
        if name not in self.joints:
            raise WeftError(f"{name}: no joint of {self.name}, use one of {', '.join(self.joints)}")
        return self.joints.index(name)

    def bone_lengths(self, lengths: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
        """Lengths of the bones that end in each joint, [J] float64, the root's 0.

        `lengths` ([J] or [J-1]) overrides the reference skeleton. Raises `WeftError` where neither exists (KIT's
        reference, clip 03950, has to be given) or a length is not positive.
        """
        values = self.lengths if lengths is None else lengths
        if values is None:
            raise WeftError(f"{self.name} has no built-in bone lengths: give them (`lengths_of` of a reference pose)")
        array = np.asarray(values, dtype=np.float64)
        if array.shape == (len(self.joints) - 1,):
            array = np.concatenate([[0.0], array])
        if array.shape != (len(self.joints),) or not (np.isfinite(array).all() and (array[1:] > 0).all()):
            raise WeftError(f"bone lengths: need {len(self.joints) - 1} positive numbers for {self.name}")
        return array

    def lengths_of(self, pose: np.ndarray) -> np.ndarray:
        """Bone lengths of one pose [J, 3]: [J], the root's 0."""
        pose = np.asarray(pose, dtype=np.float64)
        lengths = np.zeros(len(self.joints))
        lengths[1:] = np.linalg.norm(pose[1:] - pose[list(self.parents[1:])], axis=-1)
        return lengths


HUMANML3D = Layout(
    name="humanml3d",
    joints=(
        "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle",
        "right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head",
        "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
    ),  # fmt: skip
    chains=((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15), (9, 14, 17, 19, 21), (9, 13, 16, 18, 20)),
    rest="xXyYYyYYyzzyxXzYYYYYY",
    face=(2, 1, 17, 16),
    legs=(5, 8),
    feet=(7, 10, 8, 11),
    contact=0.002,
    swaps=((1, 2), (4, 5), (7, 8), (10, 11), (13, 14), (16, 17), (18, 19), (20, 21)),
    fps=20.0,
    unit="m",
    # measured on the stored sample new_joints/012314.npy, whose skeleton is that of clip 000021
    lengths=(
        0.103074, 0.1098834, 0.1315682, 0.3936232, 0.3901882, 0.1431902, 0.432433, 0.4256434, 0.0573647, 0.1433818,
        0.1494191, 0.21936, 0.1374868, 0.1433828, 0.1030392, 0.131614, 0.1229844, 0.2568399, 0.2630919, 0.2660118,
        0.2698763,
    ),  # fmt: skip
)  # fmt: skip

KIT = Layout(
    name="kit",
    joints=(
        "root", "spine1", "spine2", "chest", "head", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder",
        "left_elbow", "left_wrist", "right_hip", "right_knee", "right_ankle", "right_heel", "right_toe", "left_hip",
        "left_knee", "left_ankle", "left_heel", "left_toe",
    ),  # fmt: skip
    chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4), (3, 5, 6, 7), (3, 8, 9, 10)),
    rest="yyyyxYYXYYxYYzzXYYzz",
    face=(11, 16, 5, 8),
    legs=(17, 18),
    feet=(19, 20, 14, 15),
    contact=0.05,
    swaps=((8, 5), (9, 6), (10, 7), (16, 11), (17, 12), (18, 13), (19, 14), (20, 15)),
    fps=12.5,
    unit="mm",
    lengths=None,
)  # fmt: skip

LAYOUTS = {layout.name: layout for layout in (HUMANML3D, KIT)}


def layout_of(width: int) -> Layout:
    """The layout of a feature width (263, 251) or joint count (22, 21). Raises `WeftError` for another number."""
    for layout in LAYOUTS.values():
        if width in (layout.width, len(layout.joints)):
            return layout
    raise WeftError(f"{width} numbers a frame: expected 263 (HumanML3D), 251 (KIT), or 22 or 21 joints")
