"""Scripted experts for robomimic's tasks: they read the simulator and act through the tasks' own actions.

An expert of a task is one plan for each arm. A plan is a generator: each `yield` is the arm's next action [7] (change
of position, change of orientation, gripper) and returns after that action has been executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Plan = Iterator[np.ndarray]
Point = Callable[[], np.ndarray]

OPEN, CLOSED = -1.0, 1.0
METRES, RADIANS = 0.05, 0.5  # that an action of 1 asks for
DOWN = np.array([0.0, 0.0, -1.0])
NEAR = 0.01  # metres
PATIENCE = 120  # steps of one motion, then the plan goes on as if it had arrived


class Arm:
    """One arm: where its gripper is, and the actions that move it.

    sim: robosuite's; index: of the arm; speed: largest share of an action that is used.
    """

    def __init__(self, env: Any, index: int, speed: float = 1.0):
        self.sim, self.speed, self.grip = env.sim, speed, OPEN
        site = env.robots[index].eef_site_id  # robosuite 1.5 has one for each hand of a robot
        self._site, hand = (site["right"], "right_") if isinstance(site, dict) else (site, "")
        self._finger = self.sim.model.joint_name2id(f"gripper{index}_{hand}finger_joint1")

    @property
    def position(self) -> np.ndarray:
        """Returns the point between the finger tips [3]."""
        return np.array(self.sim.data.site_xpos[self._site])

    def action(self, target: np.ndarray, across: np.ndarray | None = None) -> np.ndarray:
        """Returns the action [7] towards `target` [3], pointing down, the fingers closing along `across` [3] (None: no
        turn)."""
        approach = self.sim.data.site_xmat[self._site].reshape(3, 3)[:, 2]
        turn = np.cross(approach, DOWN)
        if across is not None:
            closing = np.array(self.sim.data.xaxis[self._finger])
            angle = np.arctan2(closing[0] * across[1] - closing[1] * across[0], closing[:2] @ across[:2])
            turn = turn + np.array([0.0, 0.0, (angle + np.pi / 2) % np.pi - np.pi / 2])  # either finger may come first
        move = np.clip(0.5 * (target - self.position) / METRES, -self.speed, self.speed)
        return np.concatenate([move, np.clip(turn / RADIANS, -self.speed, self.speed), [self.grip]])

    def go(self, target: Point, across: Point | None = None, near: float = NEAR) -> Plan:
        """Moves until the gripper is `near` (metres) a target that may move."""
        for _ in range(PATIENCE):
            if np.linalg.norm(target() - self.position) < near:
                return
            yield self.action(target(), None if across is None else across())

    def stay(self, steps: int, across: Point | None = None) -> Plan:
        """Holds the place for some steps, while the fingers open or close."""
        here = self.position
        for _ in range(steps):
            yield self.action(here, None if across is None else across())

    def wait(self, until: Callable[[], bool], across: Point | None = None) -> Plan:
        """Holds the place until `until` returns true."""
        here = self.position
        while not until():
            yield self.action(here, None if across is None else across())

    def grasp(self, target: Point, across: Point | None = None, above: float = 0.1) -> Plan:
        """Comes from above and closes the fingers."""
        self.grip = OPEN
        yield from self.go(lambda: target() + [0, 0, above], across, near=0.02)
        yield from self.go(target, across)
        self.grip = CLOSED
        yield from self.stay(8, across)

    def lift(self, height: float) -> Plan:
        """Moves straight up by `height` metres."""
        goal = self.position + [0, 0, height]
        yield from self.go(lambda: goal, near=0.02)

    def release(self) -> Plan:
        """Opens the fingers."""
        self.grip = OPEN
        yield from self.stay(5)


def plans(task: str, env: Any, speed: float = 1.0) -> list[Plan]:
    """Returns the plan of every arm for `task` in robosuite's `env`, just reset."""
    makers = {"lift": _lift, "can": _can, "square": _square, "transport": _transport}
    return makers[task](env, [Arm(env, i, speed) for i in range(len(env.robots))])


def _body(env: Any, name: str) -> Point:
    index = env.sim.model.body_name2id(name)
    return lambda: np.array(env.sim.data.body_xpos[index])


def _body_axis(env: Any, name: str, axis: int) -> Point:
    index = env.sim.model.body_name2id(name)
    return lambda: env.sim.data.body_xmat[index].reshape(3, 3)[:, axis]


def _lift(env: Any, arms: list[Arm]) -> list[Plan]:
    def plan(arm: Arm) -> Plan:
        yield from arm.grasp(_body(env, env.cube.root_body), _body_axis(env, env.cube.root_body, 0))
        yield from arm.lift(0.2)

    return [plan(arms[0])]


def _can(env: Any, arms: list[Arm]) -> list[Plan]:
    def plan(arm: Arm) -> Plan:
        can = _body(env, env.objects[env.object_id].root_body)
        low = env.target_bin_placements[env.object_id] - [0.06, 0.04, 0.0]  # the middle is out of comfortable reach
        yield from arm.grasp(can)
        yield from arm.lift(0.25)
        yield from arm.go(lambda: np.array([low[0], low[1], arm.position[2]]), near=0.02)
        yield from arm.go(lambda: low + [0, 0, 0.1], near=0.02)
        yield from arm.release()
        yield from arm.lift(0.2)

    return [plan(arms[0])]


def _square(env: Any, arms: list[Arm]) -> list[Plan]:
    nut = next(nut for nut in env.nuts if "Square" in nut.name)
    site = env.sim.model.site_name2id(nut.important_sites["handle"])
    centre, peg = _body(env, nut.root_body), _body(env, "peg1")

    def handle() -> np.ndarray:
        return np.array(env.sim.data.site_xpos[site])

    def along() -> np.ndarray:
        """Returns the way from the nut's centre to its handle [3]."""
        return (handle() - centre()) * [1, 1, 0]

    def across() -> np.ndarray:
        x, y, _ = along()
        return np.array([-y, x, 0.0])

    def plan(arm: Arm) -> Plan:
        yield from arm.grasp(handle, across)
        yield from arm.lift(0.15)
        quarter = np.round(np.arctan2(along()[1], along()[0]) / (np.pi / 2))  # of a turn: the peg's nearest side
        if quarter == 0:
            quarter = 1  # with the handle beyond the peg, the hand would be out of reach
        square = np.array([-np.sin(quarter * np.pi / 2), np.cos(quarter * np.pi / 2), 0.0])

        def over(height: float) -> Point:
            """Returns where the gripper has to be for the nut to hang over the peg."""
            return lambda: arm.position + (peg() - centre()) * [1, 1, 0] + [0, 0, peg()[2] + height - centre()[2]]

        yield from arm.go(over(0.2), lambda: square, near=0.005)
        yield from arm.go(over(0.12), lambda: square, near=0.005)
        yield from arm.go(over(0.0), lambda: square)
        yield from arm.release()
        yield from arm.lift(0.1)

    return [plan(arms[0])]


class _Transport:
    """robosuite's transport: the giving arm clears the lid and offers the payload, the taking arm brings it away."""

    def __init__(self, env: Any, giving: Arm, taking: Arm):
        self.group, self.giving, self.taking = env.transport, giving, taking
        self.lid, self.lid_axis = _geom(env, self.group.lid.handle_geoms[0])
        handle = next(name for name in self.group.payload.contact_geoms if name.endswith("handle"))
        self.shaft, self.shaft_axis = _geom(env, handle)
        self.table = env.sim.data.body_xpos[env.sim.model.body_name2id("table0")][2]
        self.done: set[str] = set()  # what one arm waits for the other to do

    def across(self) -> np.ndarray:
        """Returns a direction across the handle [3]."""
        x, y, _ = self.shaft_axis(2)
        return np.array([-y, x, 0.0])

    def on_shaft(self, offset: float) -> Point:
        """Finds the point of the handle that lies `offset` metres from its middle towards the taking arm."""
        return lambda: self.shaft() + offset * self.shaft_axis(2) * np.sign(self.shaft_axis(2)[1])

    def carry(self, arm: Arm, thing: Point, goal: Point, height: float) -> Plan:
        """Brings a thing over the goal, down to `height` above it, and lets go."""
        up = arm.position * [1, 1, 0] + [0, 0, self.table + 0.35]
        yield from arm.go(lambda: up, _along_x, near=0.03)

        def over(above: float) -> Point:
            return lambda: arm.position + (goal() + [0, 0, above] - thing())

        yield from arm.go(over(0.32), _along_x, near=0.03)
        yield from arm.go(over(height), _along_x, near=0.03)
        yield from arm.release()
        yield from arm.lift(0.2)

    def give(self) -> Plan:
        """Puts the lid aside and offers the payload."""
        arm, aside = self.giving, self.lid() * [-1, 1, 1] - [0, 0, self.group.bin_size[2] - 0.02]
        meeting = np.array([0.0, 0.0, self.table + 0.25])  # of the middle of the payload's handle
        yield from arm.grasp(self.lid, lambda: self.lid_axis(0))
        yield from arm.lift(0.1)
        yield from arm.go(lambda: np.array([*aside[:2], arm.position[2]]), near=0.03)
        yield from arm.go(lambda: aside, near=0.02)
        yield from arm.release()
        yield from arm.lift(0.2)
        yield from arm.grasp(self.on_shaft(-0.055), self.across, above=0.25)
        yield from arm.lift(0.3)
        yield from arm.go(lambda: arm.position + meeting - self.shaft(), self.across, near=0.02)
        self.done.add("offered")
        yield from arm.wait(lambda: "taken" in self.done)
        yield from arm.release()
        yield from arm.lift(0.15)
        self.done.add("free")
        yield from arm.go(lambda: np.array([0.0, -0.4, self.table + 0.4]), near=0.05)

    def take(self) -> Plan:
        """Clears the trash, then takes the payload and brings it to its bin."""
        arm, group = self.taking, self.group
        yield from arm.grasp(lambda: group.trash_pos, _along_x, above=0.25)
        yield from self.carry(arm, lambda: group.trash_pos, lambda: group.trash_bin_pos, 0.12)
        yield from arm.wait(lambda: "offered" in self.done)
        yield from arm.grasp(self.on_shaft(0.08), self.across, above=0.15)
        self.done.add("taken")
        yield from arm.wait(lambda: "free" in self.done)
        yield from self.carry(arm, self.shaft, lambda: group.target_bin_pos, 0.1)


def _transport(env: Any, arms: list[Arm]) -> list[Plan]:
    transport = _Transport(env, *arms)
    return [transport.give(), transport.take()]


def _along_x() -> np.ndarray:
    return np.array([1.0, 0.0, 0.0])


def _geom(env: Any, name: str) -> tuple[Point, Callable[[int], np.ndarray]]:
    """Returns functions for the position [3] of a geom, and for the direction [3] of one of its axes."""
    data, index = env.sim.data, env.sim.model.geom_name2id(name)
    return lambda: np.array(data.geom_xpos[index]), lambda axis: data.geom_xmat[index].reshape(3, 3)[:, axis]
