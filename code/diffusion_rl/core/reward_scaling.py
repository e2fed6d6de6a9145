"""Scaling of rewards by the running deviation of the discounted return (Engstrom et al. 2020)."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError


class RunningMeanStd:
    """Running mean and variance of a stream of scalars (or of rows), merged batch by batch (Chan et al. 1979).

    The merged variance divides by (count - 1), and the stream begins with a pseudo-count of 1e-4 at variance 1,
    as in the reference.
    """

    def __init__(self, initial_count: float = 1e-4):
        self.mean: Any = 0.0  # a number, or one per column
        self.var: Any = 1.0
        self.count = initial_count

    def update(self, x: np.ndarray) -> None:
        """Merges a batch, x [N, ...]; statistics are over the first axis."""
        batch_mean, batch_var, n = np.mean(x, axis=0), np.var(x, axis=0), len(x)
        delta, total = batch_mean - self.mean, self.count + n
        self.mean = self.mean + delta * n / total
        moment = self.var * self.count + batch_var * n + delta**2 * self.count * n / total
        self.var = moment / (total - 1)
        self.count = total


class RunningRewardScaler:
    """Divides rewards by the running standard deviation of their discounted sum, and clips.

    Args:
        n_envs: number of environments E; each has its own discounted sum, which carries over between calls.
        cliprew: bound on the scaled reward.
        gamma: discount of the sum (its own, not the algorithm's).
        per_env: statistics per column of the reward array instead of joint ones. The reference's spelling: its columns
            are steps, so it only works when there are as many steps as environments.
    """

    def __init__(
        self, n_envs: int, cliprew: float = 10.0, gamma: float = 0.99, epsilon: float = 1e-8, per_env: bool = False
    ):
        self.per_env = per_env
        self.cliprew, self.gamma, self.epsilon = cliprew, gamma, epsilon
        self.statistics = RunningMeanStd()
        self.discounted = np.zeros(n_envs)

    def __call__(self, reward: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Updates the statistics with reward [E,S] (first [E,S] marks the start of episodes) and scales it."""
        if self.per_env and reward.shape[1] != reward.shape[0]:
            raise UserError(
                f"per_env reward scaling needs as many steps as environments, got {reward.shape[::-1]}: leave it off"
            )
        sums = np.zeros_like(reward, dtype=np.float64)
        running = self.discounted
        for t in range(reward.shape[1]):
            running = sums[:, t] = reward[:, t] + (1 - first[:, t]) * self.gamma * running
        self.discounted = sums[:, -1].copy()
        self.statistics.update(sums if self.per_env else sums.reshape(-1))
        scaled = reward / np.sqrt(self.statistics.var + self.epsilon)
        return np.clip(scaled, -self.cliprew, self.cliprew)

    def state(self) -> dict[str, Any]:
        """Returns statistics and running sums as JSON values (floats survive JSON exactly)."""
        s = self.statistics
        return {
            "mean": np.asarray(s.mean).tolist(),
            "var": np.asarray(s.var).tolist(),
            "count": float(s.count),
            "discounted": self.discounted.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned; with another number of environments their sums begin anew."""
        s = self.statistics
        s.mean, s.var, s.count = np.array(state["mean"]), np.array(state["var"]), state["count"]
        if len(state["discounted"]) == len(self.discounted):
            self.discounted = np.array(state["discounted"])
