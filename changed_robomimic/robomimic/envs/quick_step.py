"""robosuite's step with the same numbers, bit for bit, in less time.

An action takes 25 substeps of the simulation. What robosuite repeats or looks up in each is done once here:

* MuJoCo's forward dynamics of a state, three times a substep (with two arms four times): a substep computes what
  depends on positions and velocities, which is all that the controllers read, then advances by the rest.
* Names, indices and limits: once an episode or once an action.
* Operational space control, some eighty calls for small arrays: its sums are compiled functions, and of the mass
  matrix an arm's own entries are gathered. Products and inverses stay calls of the same libraries for arrays in the
  same memory layouts, by both of which they round.
* Clocks of observables that are not read yet: they are set to where they will stand.
* Contacts as objects of Python, by name: their geoms' numbers are compared.

The objects of robosuite are left as its own step leaves them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mujoco
import numpy as np
from robosuite.controllers.base_controller import Controller
from robosuite.controllers.osc import OperationalSpaceController
from robosuite.environments.base import MujocoEnv
from robosuite.environments.robot_env import RobotEnv
from robosuite.models.base import MujocoModel
from robosuite.models.grippers.panda_gripper import PandaGripper
from robosuite.robots import SingleArm
from robosuite.utils import sim_utils
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error
from robosuite.utils.numba import jit_decorator
from robosuite.utils.observables import Observable
from robosuite.utils.transform_utils import mat2quat

_CHECK_CONTACT = sim_utils.check_contact


class QuickStep:
    """Inside `with`, `step` of robosuite's `env` is quick. It has to be called at most once."""

    def __init__(self, env: Any):
        self.env = env
        self.arms: list[_Arm] = []

    def __enter__(self) -> None:
        env, sim = self.env, self.env.sim
        self.sim, self.model, self.data = sim, sim.model._model, sim.data._data
        self.known = type(env)._pre_action is RobotEnv._pre_action and all(map(_known, env.robots))
        if self.known and [arm.parts for arm in self.arms] != [_parts(robot) for robot in env.robots]:
            self.arms = [_arm(robot) for robot in env.robots]
        self.ready, self.counted = True, 0
        usual = type(env).step is MujocoEnv.step and type(env)._update_observables is MujocoEnv._update_observables
        self.left = int(env.control_timestep / env.model_timestep) if usual else 0
        mujoco.mj_forward(self.model, self.data)  # with forces, which robots note in an action's first substep
        self.pre_action, self.update_observables = env._pre_action, env._update_observables
        sim.forward, sim.step = self._forward, self._step
        env._pre_action, env._update_observables = self._pre_action, self._update_observables
        sim_utils.check_contact = check_contact

    def __exit__(self, *error: object) -> None:
        sim_utils.check_contact = _CHECK_CONTACT
        del self.sim.forward, self.sim.step, self.env._pre_action, self.env._update_observables
        for arm in self.arms if self.known else []:
            arm.end()

    def _forward(self) -> None:
        if not self.ready:
            mujoco.mj_step1(self.model, self.data)
        self.ready = True

    def _step(self, with_udd: bool = True) -> None:
        (mujoco.mj_step2 if self.ready else mujoco.mj_step)(self.model, self.data)
        self.ready = False

    def _pre_action(self, action: np.ndarray, policy_step: bool = False) -> None:
        if not self.known or len(action) != self.env.action_dim:
            self.pre_action(action, policy_step)
            return
        if not policy_step:
            for arm in self.arms:
                arm.control()
            return
        begin = 0
        for arm in self.arms:
            end = begin + arm.robot.action_dim
            arm.begin(action[begin:end])
            begin = end

    def _update_observables(self, force: bool = False) -> None:
        if not self.counted and not force:
            self.counted = _count(self.env._observables.values(), self.env.model_timestep, self.left)
        if self.counted and not force:
            self.counted -= 1
        else:
            self.update_observables(force)
        self.left -= 1


def _count(observables: Iterable[Observable], seconds: float, most: int) -> int:
    """Update all observables as often as they only count `seconds`, at most `most` times. Returns how often."""
    enabled = [observable for observable in observables if observable._enabled]
    if most < 1 or not all(o._sampled and type(o).update is Observable.update for o in enabled):
        return 0
    clocks = {(o._time_since_last_sample, o._sampling_timestep): o._time_since_last_sample for o in enabled}
    times, due = 0, False  # whether one is to be read in the next update
    while times < most and not due:
        times += 1
        for start, period in clocks:
            clocks[start, period] += seconds
            due = due or clocks[start, period] >= period
    for o in enabled:
        clock, period = clocks[o._time_since_last_sample, o._sampling_timestep], o._sampling_timestep
        o._time_since_last_sample, o._sampled = (clock % period, False) if clock >= period else (clock, True)
    return times


def check_contact(sim: Any, geoms_1: Any, geoms_2: Any = None) -> bool:
    """`robosuite.utils.sim_utils.check_contact`, by the numbers of geoms."""
    first = _numbers(sim.model, geoms_1)
    second = None if geoms_2 is None else _numbers(sim.model, geoms_2)
    for a, b in sim.data._data.contact.geom.tolist():
        if (a in first and (second is None or b in second)) or (b in first and (second is None or a in second)):
            return True
    return False


def _numbers(model: Any, geoms: Any) -> set[int]:
    names = [geoms] if isinstance(geoms, str) else geoms.contact_geoms if isinstance(geoms, MujocoModel) else geoms
    return {model._geom_name2id[name] for name in names if name in model._geom_name2id}


# ---------- arms


def _known(robot: Any) -> bool:
    own = type(robot).control is SingleArm.control and type(robot.controller).update is Controller.update
    return own and robot.has_gripper


def _parts(robot: Any) -> tuple[Any, ...]:
    """What is new in another episode or simulation."""
    return robot, robot.sim, robot.controller, robot.gripper


def _arm(robot: Any) -> _Arm:
    c, gripper = robot.controller, robot.gripper
    plain = type(c) is OperationalSpaceController and c.interpolator_pos is None and c.interpolator_ori is None
    two_fingers = type(gripper).format_action is PandaGripper.format_action and len(gripper.actuators) == 2
    return (_PlainArm if plain and c.uncoupling and two_fingers else _Arm)(robot)


class _Arm:
    """`SingleArm.control`. It has to be called in every substep of an action."""

    def __init__(self, robot: Any):
        self.parts = _parts(robot)
        self.robot, self.sim, self.controller, self.gripper = self.parts
        self.model, self.data = self.sim.model._model, self.sim.data._data
        self.site = self.sim.model.site_name2id(self.controller.eef_name)
        self.positions, self.velocities = np.array(self.controller.qpos_index), np.array(self.controller.qvel_index)
        self.motors = np.array(robot._ref_joint_actuator_indexes)
        self.fingers = np.array([self.sim.model.actuator_name2id(name) for name in self.gripper.actuators])

    def begin(self, action: np.ndarray) -> None:
        """Control the first substep of an action [A]."""
        self.robot.control(action, policy_step=True)
        self._note(action)

    def control(self) -> None:
        """Control another substep."""
        self._read()
        self.robot.torques = np.clip(self.controller.run_controller(), *self.torque_limits)
        opening = self.gripper.format_action(self.finger_action)
        self.data.ctrl[self.fingers] = self.middle + self.reach * opening
        self.data.ctrl[self.motors] = self.robot.torques

    def end(self) -> None:
        """Leave the robot as its own control does."""

    def _note(self, action: np.ndarray) -> None:
        """Keep what stays the same during an action [A]."""
        self.finger_action = action[self.controller.control_dim :]
        low, high = self.model.actuator_ctrlrange.T
        self.torque_limits = low[self.motors], high[self.motors]
        low, high = low[self.fingers], high[self.fingers]
        self.middle, self.reach = 0.5 * (high + low), 0.5 * (high - low)

    def _read(self) -> None:
        """`Controller.update`."""
        c, data, n = self.controller, self.data, self.model.nv
        forward, turning, mass = np.zeros((3, n)), np.zeros((3, n)), np.empty((n, n))
        mujoco.mj_jacSite(self.model, data, forward, turning, self.site)
        mujoco.mj_fullM(self.model, mass, data.qM)
        c.ee_pos, c.ee_ori_mat = np.array(data.site_xpos[self.site]), data.site_xmat[self.site].reshape(3, 3).copy()
        c.ee_pos_vel, c.ee_ori_vel = forward @ data.qvel, turning @ data.qvel
        c.joint_pos, c.joint_vel = data.qpos[self.positions], data.qvel[self.velocities]
        c.J_pos, c.J_ori = forward[:, self.velocities], turning[:, self.velocities]
        c.J_full = np.vstack([c.J_pos, c.J_ori])
        c.mass_matrix = mass[self.velocities, :][:, self.velocities]
        c.new_update = False


class _PlainArm(_Arm):
    """The same for operational space control without interpolation, and a gripper of two fingers.

    What the controller, the robot and the gripper note in every substep is written to them once an action.
    """

    def __init__(self, robot: Any):
        super().__init__(robot)
        model, data, c = self.model, self.data, self.controller
        numbered = np.empty((model.nv, model.nv))
        mujoco.mj_fullM(model, numbered, np.arange(1.0, len(data.qM) + 1))  # 0 for entries that are always zero
        self.entries = numbered[np.ix_(self.velocities, self.velocities)].astype(int) - 1
        self.tip, self.frame = data.site_xpos[self.site], data.site_xmat[self.site].reshape(3, 3)
        self.qpos, self.qvel = data.qpos, data.qvel
        layouts = (c.J_pos, c.J_ori, c.J_full, c.mass_matrix)
        self.matrices = tuple(np.zeros_like(matrix) for matrix in layouts)
        self.jacobians, self.speeds, self.pull = np.zeros((2, 3, model.nv)), np.zeros((2, 3)), np.zeros((2, 3))
        self.wrench, self.opening = np.zeros(6), np.zeros(2)
        self.joint_pos, self.joint_vel, self.torques, self.clipped = np.zeros((4, len(self.velocities)))
        names = [self.gripper.important_sensors[name] for name in ("force_ee", "torque_ee")]
        starts = [model.sensor_adr[self.sim.model.sensor_name2id(name)] for name in names]
        self.felt = np.concatenate([start + np.arange(3) for start in starts])
        self.changed = False

    def begin(self, action: np.ndarray) -> None:
        c = self.controller
        if not c.new_update:  # in an episode's first substep it goes by what it read when it was made, before that
            super().begin(action)
            return
        c.ee_pos, c.ee_ori_mat, c.new_update = self.tip.copy(), self.frame.copy(), False  # which a goal is set from
        c.set_goal(action[: c.control_dim])
        self._note(action)
        self.control()
        self.end()
        self._remember(action)

    def _note(self, action: np.ndarray) -> None:
        super()._note(action)
        c, gripper, data, J_full, mass = self.controller, self.gripper, self.data, *self.matrices[2:]
        self.opening[:] = gripper.current_action
        finger_step = np.array([-1.0, 1.0]) * gripper.speed * np.sign(self.finger_action)
        goal = (c.goal_pos, c.goal_ori, c.kp, c.kd)
        whole_model = (self.velocities, self.jacobians, data.qM, self.entries)
        self.of_pull = (*goal, self.tip, self.frame, self.speeds, *whole_model, *self.matrices, self.pull)
        joints = (c.initial_joint, self.qpos, self.positions, self.qvel, self.velocities)
        results = (self.joint_pos, self.joint_vel, self.torques, self.clipped, self.motors, data.ctrl)
        self.of_arm = (data.qfrc_bias, mass, *joints, *self.torque_limits, *results)
        self.of_fingers = (self.opening, finger_step, self.middle, self.reach, self.fingers, data.ctrl)
        self.views = (*self.jacobians, *self.speeds, *self.pull, self.wrench[:3], self.wrench[3:], J_full.T)

    def control(self) -> None:
        forward, turning, speed, spin, force, torque, pulling, twisting, to_joints = self.views
        mujoco.mj_jacSite(self.model, self.data, forward, turning, self.site)
        forward.dot(self.qvel, speed)
        turning.dot(self.qvel, spin)
        lambda_pos, lambda_ori, nullspace = _pull(*self.of_pull)
        lambda_pos.dot(force, pulling)
        lambda_ori.dot(torque, twisting)
        _move_arm(to_joints.dot(self.wrench), nullspace, *self.of_arm)
        _move_fingers(*self.of_fingers)
        self.changed = True

    def end(self) -> None:
        if not self.changed:
            return
        c = self.controller
        c.ee_pos, c.ee_ori_mat, c.ee_pos_vel, c.ee_ori_vel = self.tip.copy(), self.frame.copy(), *self.speeds.copy()
        c.J_pos, c.J_ori, c.J_full, c.mass_matrix = (matrix.copy(order="K") for matrix in self.matrices)
        c.joint_pos, c.joint_vel, c.torques = self.joint_pos.copy(), self.joint_vel.copy(), self.torques.copy()
        c.new_update = True
        self.robot.torques, self.gripper.current_action = self.clipped.copy(), self.opening.copy()
        self.changed = False

    def _remember(self, action: np.ndarray) -> None:
        """Push what a robot keeps of its last actions."""
        robot, velocity = self.robot, self.speeds.ravel()
        robot.recent_qpos.push(self.joint_pos)
        robot.recent_actions.push(action)
        robot.recent_torques.push(self.clipped)
        robot.recent_ee_forcetorques.push(self.data.sensordata[self.felt])
        robot.recent_ee_pose.push(np.concatenate((self.tip, mat2quat(self.frame))))
        robot.recent_ee_vel.push(velocity)
        robot.recent_ee_vel_buffer.push(velocity)
        changes = robot.control_freq * np.diff(robot.recent_ee_vel_buffer.buf, axis=0)
        columns = np.vstack([robot.recent_ee_acc.current, changes]).transpose()
        tenth = np.ones(10) / 10.0
        robot.recent_ee_acc.push([np.convolve(column, tenth, mode="valid")[0] for column in columns])


@jit_decorator
def _pull(
    goal_pos, goal_ori, kp, kd, tip, frame, speeds, columns, jacobians, qM, entries, J_pos, J_ori, J_full, mass, pull
):
    """Gather an arm's Jacobians [3, n], [6, n] and mass matrix [n, n]; compute the force and the torque [2, 3] that
    pull the gripper to its goal. Returns what they are multiplied with [3, 3], and the map to the null space [n, n].
    """
    for i, column in enumerate(columns):
        for axis in range(3):
            J_pos[axis, i] = J_full[axis, i] = jacobians[0, axis, column]
            J_ori[axis, i] = J_full[3 + axis, i] = jacobians[1, axis, column]
        for j in range(len(columns)):
            mass[i, j] = qM[entries[i, j]] if entries[i, j] >= 0 else 0.0
    turn = orientation_error(goal_ori, frame)
    for axis in range(3):
        pull[0, axis] = (goal_pos[axis] - tip[axis]) * kp[axis] + -speeds[0, axis] * kd[axis]
        pull[1, axis] = turn[axis] * kp[3 + axis] + -speeds[1, axis] * kd[3 + axis]
    return opspace_matrices(mass, J_full, J_pos, J_ori)[1:]


@jit_decorator
def _move_arm(
    pulled, nullspace, bias, mass, initial_joint, qpos, positions, qvel, velocities, low, high,
    joint_pos, joint_vel, torques, clipped, motors, ctrl,
):  # fmt: skip
    """Set an arm's motors to the torques [n] that pull the gripper, carry the arm and turn it to its first posture."""
    for i in range(len(motors)):
        joint_pos[i], joint_vel[i] = qpos[positions[i]], qvel[velocities[i]]
    back = nullspace_torques(mass, nullspace, initial_joint, joint_pos, joint_vel)
    for i, motor in enumerate(motors):
        torques[i] = pulled[i] + bias[velocities[i]] + back[i]
        clipped[i] = min(max(torques[i], low[i]), high[i]) if torques[i] == torques[i] else torques[i]
        ctrl[motor] = clipped[i]


@jit_decorator
def _move_fingers(opening, step, middle, reach, fingers, ctrl):
    """Move the opening [2] by a step within -1 and 1, and set the fingers' motors to it."""
    for i, finger in enumerate(fingers):
        opening[i] = min(max(opening[i] + step[i], -1.0), 1.0)
        ctrl[finger] = middle[i] + reach[i] * opening[i]
