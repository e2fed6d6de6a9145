"""Furniture-Bench's simulator at the other end of a pipe: `python furniture_server.py FILE_DESCRIPTOR`.

IsaacGym runs in Python 3.8 at most, so this file is started in an interpreter of its own and imports nothing of this
package. It is written for Python 3.8. A message is an npz archive: a `call` and its arguments, or results, or an
`error`. Observations and actions are normalised here with the reference's statistics (`normalization.pth`).
Shape letters: E environments, Ta actions of a chunk, O observation, A action.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

CLAMP = 5.0  # of normalised observations


def pack(**arrays: Any) -> bytes:
    """Turns arrays, numbers and texts by name into bytes that any numpy reads."""
    buffer = io.BytesIO()
    np.savez(buffer, **{key: np.asarray(value) for key, value in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(message: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays by name that `pack` wrote. Never runs code."""
    with np.load(io.BytesIO(message), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


class Simulation:
    """Executes chunks of normalised actions on Furniture-Bench's batched environment.

    env: FurnitureRLSimEnv. to_6d: proprioception with the orientation as a quaternion -> with six of its matrix's
    entries. statistics: arrays `stats.{observations,actions}.{min,max}` [1, O or A]. sparse_reward: a reward for every
    assembled pair; otherwise each pair is rewarded in every later step too.
    """

    def __init__(self, env: Any, to_6d: Any, statistics: dict[str, np.ndarray], sparse_reward: bool):
        self.env = env
        self.to_6d = to_6d
        self.sparse_reward = sparse_reward
        self._observations = (statistics["stats.observations.min"], statistics["stats.observations.max"])
        self._actions = (statistics["stats.actions.min"], statistics["stats.actions.max"])
        self._assembled: Any = None
        self._tensor: Any = None  # one of the simulator's, to make others like it

    def spaces(self) -> dict[str, int]:
        """Returns the sizes O and A of observation and action."""
        return {"obs_dim": self._observations[0].shape[-1], "action_dim": self._actions[0].shape[-1]}

    def reset(self) -> dict[str, np.ndarray]:
        """Begins episodes everywhere; returns `state` [E,O]."""
        observation = self.env.reset()
        self._tensor = observation["robot_state"]
        self._assembled = 0.0
        return {"state": self._state(observation)}

    def step(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        """Executes all actions [E,Ta,A] of a chunk.

        An episode continues after its last pair is assembled.

        Returns:
            `state` [E,O], `rewards` [E], `truncated` [E] at the time limit.
        """
        low, high = self._actions
        chunk = self._tensor.new_tensor((actions + 1) / 2 * (high - low) + low)
        total: Any = 0.0
        for k in range(chunk.shape[1]):
            observation, reward, _, _ = self.env.step(chunk[:, k])
            reward = reward.reshape(-1)
            self._assembled = self._assembled + reward
            total = total + (reward if self.sparse_reward else self._assembled)
        truncated = (self.env.env_steps >= self.env.max_env_steps).reshape(-1)
        return {"state": self._state(observation), "rewards": _array(total), "truncated": _array(truncated)}

    def _state(self, observation: dict[str, Any]) -> np.ndarray:
        parts = [self.to_6d(observation["robot_state"]), observation["parts_poses"]]
        state = np.concatenate([_array(part) for part in parts], axis=-1)
        low, high = self._observations
        return np.clip(2 * ((state - low) / (high - low)) - 1, -CLAMP, CLAMP)


def _array(tensor: Any) -> np.ndarray:
    return tensor.cpu().numpy()


def build(options: dict[str, Any]) -> Simulation:
    """Builds the simulation that `options` (JSON of envs/furniture.py) describe. Needs isaacgym and furniture_bench."""
    from furniture_bench.controllers.control_utils import proprioceptive_quat_to_6d_rotation
    from furniture_bench.envs.furniture_rl_sim_env import FurnitureRLSimEnv
    from furniture_bench.envs.observation import DEFAULT_STATE_OBS

    env = FurnitureRLSimEnv(
        furniture=options["furniture"],
        randomness=options["randomness"],
        num_envs=options["n_envs"],
        max_env_steps=options["max_episode_steps"],
        headless=options["headless"],
        gpu_id=options["gpu_id"],
        observation_space="state",
        obs_keys=DEFAULT_STATE_OBS,
        concat_robot_state=True,
        act_rot_repr="rot_6d",
        action_type="pos",
        ctrl_mode="diffik",
        pos_scalar=1,
        rot_scalar=1,
        stiffness=1000,
        damping=200,
        april_tags=False,
        record=False,
    )
    statistics = load(options["normalization_path"])
    return Simulation(env, proprioceptive_quat_to_6d_rotation, statistics, options["sparse_reward"])


def load(path: str) -> dict[str, np.ndarray]:
    """Reads the reference's statistics as arrays."""
    import torch  # not before isaacgym, which would refuse to be imported

    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def serve(connection: Connection) -> None:
    """Answers calls until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other end's to handle
    try:
        simulation = build(json.loads(str(unpack(connection.recv_bytes())["options"])))
        connection.send_bytes(pack(**simulation.spaces()))
        while True:
            message = unpack(connection.recv_bytes())
            result = getattr(simulation, str(message.pop("call")))(**message)
            connection.send_bytes(pack(**result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the other end has hung up
    except Exception:
        connection.send_bytes(pack(error=traceback.format_exc()))


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose modules are not for this interpreter
    serve(Connection(int(sys.argv[1])))
