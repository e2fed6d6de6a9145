"""robosuite's step with the same numbers, bit for bit, in less time.

An action takes 25 substeps of the simulation. In each, robosuite asks MuJoCo three or four times for what follows
from one state (before the controllers, in every controller, and again by advancing), and looks up names, indices and
limits that never change. Here a substep computes what depends on positions and velocities once, which is all that the
controllers read, then advances by the rest; what never changes is looked up once an action.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np
from robosuite.controllers.base_controller import Controller
from robosuite.robots import SingleArm


@contextlib.contextmanager
def quick(env: Any) -> Iterator[None]:
    """Inside, `step` of robosuite's `env` is quick. It has to be called at most once."""
    sim, whole = env.sim, env._pre_action
    model, data = sim.model._model, sim.data._data
    known = all(_known(robot) for robot in env.robots)
    arms = [_Arm(robot) for robot in env.robots] if known else []
    ends = np.cumsum([0, *(robot.action_dim for robot in env.robots)])
    ready = True

    def forward() -> None:
        nonlocal ready
        if not ready:
            mujoco.mj_step1(model, data)
        ready = True

    def step(with_udd: bool = True) -> None:
        nonlocal ready
        (mujoco.mj_step2 if ready else mujoco.mj_step)(model, data)
        ready = False

    def pre_action(action: np.ndarray, policy_step: bool = False) -> None:
        if policy_step or not known:
            whole(action, policy_step)
            return
        for arm, begin, end in zip(arms, ends, ends[1:], strict=False):
            arm.control(action[begin:end])

    mujoco.mj_forward(model, data)  # with forces and accelerations, which robots note in an action's first substep
    sim.forward, sim.step, env._pre_action = forward, step, pre_action
    try:
        yield
    finally:
        del sim.forward, sim.step, env._pre_action


def _known(robot: Any) -> bool:
    own = type(robot).control is SingleArm.control and type(robot.controller).update is Controller.update
    return own and robot.has_gripper


class _Arm:
    """`SingleArm.control` between the first substep of an action and the next action."""

    def __init__(self, robot: Any):
        self.robot, self.controller, self.gripper = robot, robot.controller, robot.gripper
        self.model, self.data = robot.sim.model._model, robot.sim.data._data
        self.site = robot.sim.model.site_name2id(self.controller.eef_name)
        self.positions, self.velocities = np.array(self.controller.qpos_index), np.array(self.controller.qvel_index)
        self.motors, self.torque_limits = robot._ref_joint_actuator_indexes, robot.torque_limits
        self.fingers = [robot.sim.model.actuator_name2id(name) for name in self.gripper.actuators]
        low, high = self.model.actuator_ctrlrange[self.fingers].T
        self.middle, self.reach = 0.5 * (high + low), 0.5 * (high - low)

    def control(self, action: np.ndarray) -> None:
        self._read()
        self.robot.torques = np.clip(self.controller.run_controller(), *self.torque_limits)
        opening = self.gripper.format_action(action[self.controller.control_dim :])
        self.data.ctrl[self.fingers] = self.middle + self.reach * opening
        self.data.ctrl[self.motors] = self.robot.torques

    def _read(self) -> None:
        """`Controller.update`. Memory layouts are robosuite's: products of matrices round by them."""
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
