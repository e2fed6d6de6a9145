"""A Franka Panda with a rod, steered by positions of its tool as in D3IL (Jia et al. 2024, arXiv:2402.14606).

The joints and links are those of the model in the robosuite package. Masses, torque limits and controller are D3IL's;
with them the robot follows D3IL's recordings within a few mrad, mostly a few tenths.

A setpoint (x, y) of the tool holds for 35 ms. Every millisecond an inverse kinematics of its own, which never looks at
the simulated arm, moves joint targets towards the setpoint; a joint-space PD controller that makes up for gravity and
Coriolis forces follows them. The kinematics of all environments is computed together, ahead of the simulation.

Shape letters: E environments, S setpoints, T = 35 S milliseconds.
"""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.tasks.avoiding import FINISH_Y, OBSTACLES, ROD_RADIUS

try:
    import mujoco
except ImportError as error:  # pragma: no cover - depends on the installation
    raise UserError(f'the Panda needs {error.name}: pip install -e ".[d3il]"') from error

JOINTS = 7
MILLISECONDS = 35  # that a setpoint holds
DT = 0.001
HEIGHT = 0.12  # of the tool, which points down: quaternion (0, 1, 0, 0)
START = np.array([-0.35641, 0.42945, -0.13501, -2.05465, 0.09358, 2.48072, 0.23251])

# Inverse kinematics
ITERATIONS, RATE = 3, 0.001
POSITION_GAIN, LARGEST_POSITION_ERROR = np.array([200.0, 200.0, 800.0]), 0.01
ROTATION_GAIN, LARGEST_ROTATION_ERROR = 30.0, 0.1
REST_GAIN, LARGEST_REST_ERROR = 40.0, 0.2
REST = np.array([0, 0.17453292, 0, -0.87266463, 0, 1.22173047, 0.785398126])
EIGENVALUES = (1e-2, 1e2)  # what those of J J^T are clipped to
LARGEST_SPEED = 3.0  # norm of the joint velocity, rad/s
LOWEST = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
HIGHEST = np.array([2.8973, 1.7628, 2.0, -0.0698, 2.8973, 3.7525, 2.8973])

# Joint controller
STIFFNESS = np.array([120.0, 120, 120, 120, 50, 30, 10])  # N m / rad
DAMPING = np.array([10.0, 10, 10, 10, 6, 5, 3])  # N m s / rad
LARGEST_TORQUE = np.array([87.0, 87, 87, 87, 12, 12, 12])  # N m

TABLE_Z = -0.019
FLANGE, TOOL = 0.107, 0.105  # m along the last link's axis to the hand, from there to the tool
HAND_TURN = (0.92388, 0.0, 0.0, -0.382683)
ROD_CENTRE, ROD_HALF_LENGTH = 0.075, 0.15  # from the hand
#: Of link 1 to 7, and of what hangs at the hand (the flange's drive, the hand, two fingers): mass, centre, quaternion
#: `turn` and principal inertias.
_LINKS = Path(__file__).parent / "assets" / "panda_links.json"


def assets() -> Path:
    """Finds the Panda's folder in robosuite, without importing it. Raises UserError if robosuite is not installed."""
    package = importlib.util.find_spec("robosuite")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            'the Panda model comes with robosuite: pip install -e ".[d3il]" (see installation/install_d3il.md)'
        )
    return Path(next(iter(package.submodule_search_locations))) / "models" / "assets" / "robots" / "panda"


def load_model(visible: bool = False) -> mujoco.MjModel:
    """Loads the robot among the obstacles; `visible` adds the looks of the arm, the finish line and light.

    Of the robot only the rod touches anything: obstacles and, where the outstretched arm sags, the table.
    """
    folder = assets()
    try:
        root = ElementTree.parse(folder / "robot.xml").getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"robosuite's Panda cannot be read ({error}): pip install robosuite==1.4.1") from error
    ElementTree.SubElement(root, "compiler", angle="radian", meshdir=str(folder))
    ElementTree.SubElement(root, "option", timestep=str(DT), cone="elliptic", impratio="3", tolerance="1e-10")
    for parent in list(root.iter()):
        for child in list(parent):
            looks = child.tag == "geom" and child.get("group") == "1" or child.tag in ("mesh", "material")
            if child.tag in ("geom", "mesh", "material", "camera") and not (visible and looks):
                parent.remove(child)
    bodies = json.loads(_LINKS.read_text())
    for number, facts in enumerate(bodies["links"], 1):
        link = root.find(f".//body[@name='link{number}']")
        assert link is not None
        for old in link.findall("inertial"):
            link.remove(old)
        link.insert(0, _inertial(**facts))
        link.find("joint").attrib.pop("damping")  # type: ignore[union-attr]
    for motor, torque in zip(root.iter("motor"), LARGEST_TORQUE, strict=True):
        motor.set("ctrlrange", f"{-torque} {torque}")
    _add_hand(root, bodies["hand"])
    _add_scene(root, visible)
    return mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))


def _text(values: Any) -> str:
    return " ".join(str(float(value)) for value in values)


def _inertial(mass: float, centre: Sequence, inertia: Sequence, turn: Sequence = (1, 0, 0, 0)) -> ElementTree.Element:
    return ElementTree.Element(
        "inertial", mass=str(mass), pos=_text(centre), quat=_text(turn), diaginertia=_text(inertia)
    )


def _add_hand(root: ElementTree.Element, parts: Sequence[dict[str, Any]]) -> None:
    hand = root.find(".//body[@name='right_hand']")
    assert hand is not None
    hand.set("pos", _text((0, 0, FLANGE)))
    hand.set("quat", _text(HAND_TURN))
    for child in list(hand):
        hand.remove(child)
    for facts in parts:
        ElementTree.SubElement(hand, "body", name=facts.pop("name")).append(_inertial(**facts))
    ElementTree.SubElement(hand, "body", name="tool", pos=_text((0, 0, TOOL)))
    rod = ElementTree.SubElement(hand, "body", name="rod")
    size = _text((ROD_RADIUS, ROD_HALF_LENGTH))
    ElementTree.SubElement(rod, "geom", name="rod", type="cylinder", size=size, pos=_text((0, 0, ROD_CENTRE)))
    tip = _text((0, 0, ROD_CENTRE + ROD_HALF_LENGTH))
    ElementTree.SubElement(rod, "geom", type="sphere", size=str(ROD_RADIUS), pos=tip, contype="0", conaffinity="0")


def _add_scene(root: ElementTree.Element, visible: bool) -> None:
    world = root.find("worldbody")
    assert world is not None
    table: dict[str, Any] = {"solref": "0.002 1", "solimp": "0.999 0.999 0.001", "rgba": "0.8 0.655 0.45 1"}
    ElementTree.SubElement(world, "geom", type="plane", size="1 1 0.1", pos=f"0.5 0 {TABLE_Z}", **table)
    for i, (x, y, radius, half_height) in enumerate(OBSTACLES):
        place: dict[str, Any] = {"size": _text((radius, half_height)), "pos": _text((x, y, 0)), "rgba": "1 0 0 1"}
        ElementTree.SubElement(world, "geom", name=f"obstacle{i}", type="cylinder", **place)
    if visible:
        line: dict[str, Any] = {"size": "0.5 0.01 0.005", "pos": f"0.4 {FINISH_Y} 0", "rgba": "0 1 0 0.3"}
        ElementTree.SubElement(world, "geom", type="box", contype="0", conaffinity="0", **line)
        ElementTree.SubElement(world, "light", pos="0.5 0 2", dir="0 0 -1")


class Kinematics:
    """Computes where the tool is for joint angles of many arms at once. The frames are read from the model."""

    def __init__(self, model: mujoco.MjModel):
        frames = np.zeros((JOINTS, 4, 4))
        for i in range(JOINTS):
            body = model.body(f"link{i + 1}").id
            turn = np.zeros(9)
            mujoco.mju_quat2Mat(turn, model.body_quat[body])
            frames[i, :3, :3], frames[i, :3, 3], frames[i, 3, 3] = turn.reshape(3, 3), model.body_pos[body], 1
        self._frames = frames
        turn = np.zeros(9)
        mujoco.mju_quat2Mat(turn, np.array(HAND_TURN) / np.linalg.norm(HAND_TURN))
        self._hand = turn.reshape(3, 3)

    def __call__(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Computes the tool's position [E,3], orientation [E,3,3] and Jacobian [E,6,7] (linear before angular velocity)
        for joint angles [E,7]."""
        cos, sin = np.cos(q)[..., None], np.sin(q)[..., None]
        links = np.empty((len(q), JOINTS, 4, 4))
        links[...] = self._frames
        x, y = self._frames[:, :, 0], self._frames[:, :, 1]
        links[..., 0] = x * cos + y * sin
        links[..., 1] = y * cos - x * sin
        for i in range(1, JOINTS):
            np.matmul(links[:, i - 1], links[:, i], out=links[:, i])
        axes, last = links[:, :, :3, 2], links[:, -1]
        position = last[:, :3, 3] + (FLANGE + TOOL) * last[:, :3, 2]
        arms = position[:, None] - links[:, :, :3, 3]
        jacobian = np.empty((len(q), 6, JOINTS))
        for i, (j, k) in enumerate(((1, 2), (2, 0), (0, 1))):
            jacobian[:, i] = axes[..., j] * arms[..., k] - axes[..., k] * arms[..., j]
        jacobian[:, 3:] = axes.transpose(0, 2, 1)
        return position, last[:, :3, :3] @ self._hand, jacobian


class InverseKinematics:
    """Moves joint targets towards setpoints of the tool: damped least squares with a pull to a rest posture."""

    def __init__(self, kinematics: Kinematics):
        self._kinematics = kinematics

    def follow(self, q: np.ndarray, setpoints: np.ndarray) -> np.ndarray:
        """Returns the targets [E,T,7] after each millisecond, from targets q [E,7], for setpoints [E,S,2] of 35 ms
        each."""
        targets = np.empty((len(q), setpoints.shape[1] * MILLISECONDS, JOINTS))
        goals = np.concatenate([setpoints, np.full((*setpoints.shape[:2], 1), HEIGHT)], axis=-1)
        for t in range(targets.shape[1]):
            for _ in range(ITERATIONS):
                q = np.clip(q + RATE * self._velocity(q, goals[:, t // MILLISECONDS]), LOWEST, HIGHEST)
            targets[:, t] = q
        return targets

    def _velocity(self, q: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Returns joint velocities [E,7] at joint angles q [E,7] for goals [E,3]."""
        position, turn, jacobian = self._kinematics(q)
        twist = np.empty((len(q), 6))
        twist[:, :3] = POSITION_GAIN * np.clip(goal - position, -LARGEST_POSITION_ERROR, LARGEST_POSITION_ERROR)
        error = np.clip(_rotation_error(turn), -LARGEST_ROTATION_ERROR, LARGEST_ROTATION_ERROR)
        twist[:, 3:] = ROTATION_GAIN * error
        rest = REST_GAIN * np.clip(REST - q, -LARGEST_REST_ERROR, LARGEST_REST_ERROR)
        twist -= (jacobian @ rest[..., None])[..., 0]
        transposed = jacobian.transpose(0, 2, 1)
        velocity = (transposed @ _solve_clipped(jacobian @ transposed, twist)[..., None])[..., 0] + rest
        speed = np.sqrt(np.sum(velocity * velocity, axis=-1, keepdims=True))
        return velocity * (LARGEST_SPEED / np.maximum(speed, LARGEST_SPEED))


def _rotation_error(turn: np.ndarray) -> np.ndarray:
    """Returns the vector part [E,3] of the quaternion from orientations [E,3,3] to the tool pointing down, (0, 1, 0,
    0).

    With the orientation's quaternion (w, x, y, z), x >= 0, that is (w, z, -y).
    """
    x = np.sqrt(np.maximum(1 + turn[:, 0, 0] - turn[:, 1, 1] - turn[:, 2, 2], 1e-12))
    error = np.empty((len(turn), 3))
    error[:, 0] = turn[:, 2, 1] - turn[:, 1, 2]
    error[:, 1] = turn[:, 0, 2] + turn[:, 2, 0]
    error[:, 2] = -(turn[:, 0, 1] + turn[:, 1, 0])
    return error / (2 * x[:, None])


def _solve_clipped(matrices: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solves A x = b for symmetric A [E,6,6] whose eigenvalues are first clipped to `EIGENVALUES`; b, x [E,6].

    None is ever large (the arm is short). Only rows with a small one need the eigenvectors, which are slow.
    """
    solved = np.linalg.solve(matrices, right[..., None])[..., 0]
    try:
        np.linalg.cholesky(matrices - EIGENVALUES[0] * np.eye(6))
    except np.linalg.LinAlgError:
        small = np.flatnonzero(np.linalg.eigvalsh(matrices)[:, 0] < EIGENVALUES[0])
        values, vectors = np.linalg.eigh(matrices[small])
        values = np.clip(values, *EIGENVALUES)
        inside = (vectors.transpose(0, 2, 1) @ right[small, :, None]) / values[..., None]
        solved[small] = (vectors @ inside)[..., 0]
    return solved


@dataclass
class ArmStates:
    """The states of E arms; the arrays may have more axes between E and the last.

    position, velocity [E, 7] of the joints; bias [E, 7] forces of gravity and motion a millisecond ago, warmstart
    [E, 7] of the constraint solver, target [E, 7] of the inverse kinematics; tool [E, 2] in x, y, a millisecond ago, as
    D3IL reads it; touching [E] whether the rod was in contact then.
    """

    position: np.ndarray
    velocity: np.ndarray
    bias: np.ndarray
    warmstart: np.ndarray
    target: np.ndarray
    tool: np.ndarray
    touching: np.ndarray

    @classmethod
    def empty(cls, *shape: int) -> ArmStates:
        """Returns zeros with these leading axes."""
        joints = {name: np.zeros((*shape, JOINTS)) for name in ("position", "velocity", "bias", "warmstart", "target")}
        return cls(**joints, tool=np.zeros((*shape, 2)), touching=np.zeros(shape, dtype=bool))

    def __getitem__(self, index: Any) -> ArmStates:
        index = index if isinstance(index, tuple) else (index,)
        return ArmStates(
            **{name: array[(*index, ...)] for name, array in self.arrays().items()}
        )  # views, never scalars

    def __setitem__(self, index: Any, other: ArmStates) -> None:
        for name, array in self.arrays().items():
            array[index] = getattr(other, name)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays by name, not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class PandaPhysics:
    """Moves any number of independent arms.

    On one core: most of the time goes into short numpy calls, which hold Python's lock, and threads made it slower.
    """

    def __init__(self) -> None:
        self.model = load_model()
        self._data = mujoco.MjData(self.model)
        self._kinematics = InverseKinematics(Kinematics(self.model))
        self._tool = self.model.body("tool").id
        self._obstacles = {self.model.geom(f"obstacle{i}").id for i in range(len(OBSTACLES))}
        self._data.qpos[:] = START
        mujoco.mj_forward(self.model, self._data)
        self.start = ArmStates.empty()  # the first state of every episode, without the axis E
        self.start.target[...] = START
        self._read(self.start)

    def move(self, states: ArmStates, setpoints: np.ndarray) -> ArmStates:
        """Moves from states [E] towards setpoints [E,S,2], 35 ms each; returns the states [E,S] after each."""
        targets = self._kinematics.follow(states.target, setpoints)
        before = np.concatenate([states.target[:, None], targets[:, :-1]], axis=1)
        pulls = STIFFNESS * targets + DAMPING * ((targets - before) / DT)
        after = ArmStates.empty(*setpoints.shape[:2])
        after.target[...] = targets[:, MILLISECONDS - 1 :: MILLISECONDS]
        for row in range(len(setpoints)):
            self._load(states[row])
            for s in range(setpoints.shape[1]):
                self._simulate(pulls[row, s * MILLISECONDS : (s + 1) * MILLISECONDS])
                self._read(after[row, s])
        return after

    def _simulate(self, pulls: np.ndarray) -> None:
        """Steps through [T, 7] what the joint controller pulls with apart from the present position and velocity."""
        model, data, step = self.model, self._data, mujoco.mj_step
        position, velocity, bias, torque = data.qpos, data.qvel, data.qfrc_bias, data.ctrl
        for pull in pulls:
            torque[:] = pull - STIFFNESS * position - DAMPING * velocity + bias
            step(model, data)

    def _load(self, state: ArmStates) -> None:
        data = self._data
        mujoco.mj_resetData(self.model, data)
        data.qpos[:], data.qvel[:], data.qfrc_bias[:] = state.position, state.velocity, state.bias
        data.qacc_warmstart[:] = state.warmstart

    def _read(self, state: ArmStates) -> None:
        """Copies the simulation's state into a state without the axis E."""
        data = self._data
        state.position[...], state.velocity[...], state.bias[...] = data.qpos, data.qvel, data.qfrc_bias
        state.warmstart[...] = data.qacc_warmstart
        state.tool[...] = data.xpos[self._tool, :2]
        state.touching[...] = any(not self._obstacles.isdisjoint(pair) for pair in data.contact.geom)
