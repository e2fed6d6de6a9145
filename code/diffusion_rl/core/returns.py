"""Returns and advantages."""

from __future__ import annotations

import numpy as np


def rewards_to_go(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Returns the discounted sum of an episode's rewards from each step on, [T] -> [T] float64."""
    to_go = np.array(rewards, np.float64)
    for t in reversed(range(len(to_go) - 1)):
        to_go[t] += gamma * to_go[t + 1]
    return to_go


def td_lambda(
    rewards: np.ndarray,
    terminated: np.ndarray,
    values: np.ndarray,
    gamma: float = 0.99,
    alpha: float = 0.95,
    lam: float = 0.95,
) -> np.ndarray:
    """Returns TD(lambda) targets of state values, with the temporal-difference error scaled by alpha.

        delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t)
        A_t     = alpha delta_t + gamma lambda (1 - terminated_t) A_{t+1}

    After the last step its own state's value stands in for the next one's, which is not known.

    Args:
        rewards, terminated, values: [S,E]

    Returns:
        A + V, [S,E] float32.
    """
    targets = np.zeros_like(values, np.float32)
    following = np.where(terminated[-1].astype(bool), 0, values[-1])
    accumulated: np.ndarray | float = 0.0
    for t in reversed(range(len(rewards))):
        alive = 1 - terminated[t]
        if t < len(rewards) - 1:
            following = values[t + 1] * alive
        error = rewards[t] + gamma * following - values[t]
        accumulated = alpha * error + gamma * lam * alive * accumulated
        targets[t] = accumulated + values[t]
    return targets


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    gamma: float,
    gae_lambda: float,
    reward_scale_const: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes generalized advantage estimates (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma V(s_{t+1}) (1 - terminated_t) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - terminated_t) A_{t+1}

    Only termination cuts the bootstrap; at a truncation the value of the next observation (already that of the new
    episode) is used, as in the reference.

    Args:
        rewards, values, terminated: [S,E]
        next_values: [E] or [1,E], values after the last step.
        reward_scale_const: factor on the rewards.

    Returns:
        advantages and returns = advantages + values, [S,E] float64.
    """
    rewards, values = np.asarray(rewards, np.float64), np.asarray(values, np.float64)
    nonterminal = 1.0 - np.asarray(terminated, np.float64)
    # The last row is discounted in the critic's own precision (float32 in a run), as the reference does.
    bootstrap = gamma * np.asarray(next_values).reshape(1, -1)
    discounted_next = np.concatenate([gamma * values[1:], bootstrap.astype(np.float64)])
    advantages = np.zeros_like(rewards)
    last = np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] * reward_scale_const + discounted_next[t] * nonterminal[t] - values[t]
        advantages[t] = last = delta + gamma * gae_lambda * nonterminal[t] * last
    return advantages, advantages + values
