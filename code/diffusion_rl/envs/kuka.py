"""The Kuka stacking task in PyBullet, an optional engine: an arm and four blocks on a floor.

What is commanded is a state [39] of `tasks.kuka_stacking`: targets of the joints, and which blocks hang on the arm.
Blocks cannot be gripped otherwise. The models of arm, block and floor have licences of their own and do not ship with
this repository: they are the files below `MODELS` in the folder `utils/models` of the PyTorch code's branch `kuka`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.typing import Rng
from diffusion_rl.tasks.kuka_stacking import BLOCKS, JOINTS, blocks_of

MODELS = {
    "arm": "drake/iiwa_description/urdf/iiwa14_polytope_collision.urdf",
    "block": "drake/objects/simple_cuboid.urdf",
    "floor": "short_floor.urdf",
}
HAND = 8  # the arm's link that blocks hang on
PHYSICS_STEPS = 10  # of 1/240 s each, for every command
RADIUS = 0.6  # m, of the circle on which blocks lie at first
GRAVITY = -9.8
TRIES = 1000  # to find a free place


def import_pybullet() -> Any:
    """Imports PyBullet. Raises UserError if it is not installed."""
    try:
        import pybullet
    except ImportError as error:
        raise UserError("PyBullet is not installed: pip install -e '.[kuka]'") from error
    return pybullet


class KukaStacking:
    """Simulates one arm and its blocks.

    Args:
        urdf_dir: where `MODELS` are.

    Raises:
        UserError: PyBullet or a model is missing, or PyBullet cannot read it.
    """

    def __init__(self, urdf_dir: str | Path | None):
        self.p = import_pybullet()
        if urdf_dir is None:
            raise UserError(f"--urdf_dir names the folder of the models {', '.join(MODELS.values())}")
        self.models = {part: Path(urdf_dir) / file for part, file in MODELS.items()}
        for path in self.models.values():
            if not path.is_file():
                raise UserError(f"no model {path}: point --urdf_dir to utils/models of the PyTorch code's branch kuka")
        self.client = self.p.connect(self.p.DIRECT)
        self.held: dict[int, int] = {}  # constraint by block
        self.loaded = False

    def reset(self, rng: Rng) -> np.ndarray:
        """Puts the arm upright and the blocks at places drawn from `rng`; returns the state [39]."""
        if not self.loaded:  # loading takes most of a reset's time
            self._call("resetSimulation")
            self.arm, self.floor = (self._load(part, fixed=True) for part in ("arm", "floor"))
            self.blocks = [self._load("block", fixed=False) for _ in range(BLOCKS)]
            joints = range(self._call("getNumJoints", self.arm))
            fixed = self.p.JOINT_FIXED
            self.joints = [j for j in joints if self._call("getJointInfo", self.arm, j)[2] != fixed]
            if len(self.joints) != JOINTS or len(joints) <= HAND:
                raise UserError(f"{self.models['arm']} is no arm of {JOINTS} joints with a link {HAND}")
            self._call("setGravity", 0, 0, GRAVITY)
            self.loaded = True
        for block in list(self.held):
            self._let_go(block)
        for joint in self.joints:
            self._call("resetJointState", self.arm, joint, 0.0)
        self._place(rng)
        self.flags = np.zeros(BLOCKS)
        return self.state()

    def step(self, command: np.ndarray) -> np.ndarray:
        """Follows a command [39] for `PHYSICS_STEPS`; returns the state [39]."""
        gains = [1.0] * JOINTS
        targets = {"targetPositions": command[:JOINTS].tolist(), "positionGains": gains}
        self._call("setJointMotorControlArray", self.arm, self.joints, self.p.POSITION_CONTROL, **targets)
        self.flags = (blocks_of(command)[:, -1] > 0.5).astype(np.float64)
        for block, hangs in zip(self.blocks, self.flags, strict=True):
            if hangs and block not in self.held:
                self._hang(block)
            elif not hangs:
                self._let_go(block)
                self._call("resetBaseVelocity", block, [0, 0, 0], [0, 0, 0])  # blocks do not roll
        for _ in range(PHYSICS_STEPS):
            self._call("stepSimulation")
        return self.state()

    def release(self) -> np.ndarray:
        """Returns the state [39] at the end of a plan, in which blocks count as loose. The next command may hold them
        again."""
        self.flags = np.zeros(BLOCKS)
        return self.state()

    def state(self) -> np.ndarray:
        """Returns the state [39]: joints, then position, orientation and flag of each block."""
        joints = [joint[0] for joint in self._call("getJointStates", self.arm, self.joints)]
        poses = [np.concatenate(self._call("getBasePositionAndOrientation", block)) for block in self.blocks]
        return np.concatenate([joints, *(np.append(pose, flag) for pose, flag in zip(poses, self.flags, strict=True))])

    def close(self) -> None:
        if self._connected():
            self.p.disconnect(physicsClientId=self.client)

    # ---------- PyBullet ----------

    def _call(self, function: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self.p, function)(*arguments, **options, physicsClientId=self.client)

    def _connected(self) -> bool:
        return bool(self.p.isConnected(physicsClientId=self.client))

    def _load(self, part: str, fixed: bool) -> int:
        try:
            return self._call("loadURDF", str(self.models[part]), useFixedBase=fixed)
        except self.p.error as error:
            raise UserError(f"PyBullet cannot read {self.models[part]} ({error}): take the original file") from error

    def _place(self, rng: Rng) -> None:
        """Places the blocks on a circle around the arm so that none touches another."""
        top, taken = self._call("getAABB", self.floor)[1][2], list[tuple[np.ndarray, np.ndarray]]()
        for block in self.blocks:  # out of the way of those that are placed before them
            self._call("resetBasePositionAndOrientation", block, [10.0 + block, 0, 0], [0, 0, 0, 1])
            self._call("resetBaseVelocity", block, [0, 0, 0], [0, 0, 0])
        for block in self.blocks:
            height = -self._call("getAABB", block)[0][2]  # of its middle above what it lies on
            for _ in range(TRIES):
                direction = rng.uniform((2,), -1, 1, np.float64)
                x, y = RADIUS * direction / np.linalg.norm(direction)
                self._call("resetBasePositionAndOrientation", block, [x, y, top + height], [0, 0, 0, 1])
                low, high = (np.array(corner) for corner in self._call("getAABB", block))
                if all((high < other).any() or (above < low).any() for other, above in taken):
                    taken.append((low, high))
                    break
            else:
                raise UserError(f"the blocks of {self.models['block']} are too large to lie beside each other")

    def _hang(self, block: int) -> None:
        """Fixes a block to the hand where it is."""
        hand = self._call("getLinkState", self.arm, HAND, computeForwardKinematics=True)[:2]
        pose = self._call("getBasePositionAndOrientation", block)
        position, turn = self.p.multiplyTransforms(*self.p.invertTransform(*hand), *pose)
        link, origin, free = (self.arm, HAND, block, -1), [0, 0, 0], [0, 0, 0, 1]
        joint = (self.p.JOINT_FIXED, origin, position, origin, turn, free)
        self.held[block] = self._call("createConstraint", *link, *joint)

    def _let_go(self, block: int) -> None:
        if block in self.held:
            self._call("removeConstraint", self.held.pop(block))
