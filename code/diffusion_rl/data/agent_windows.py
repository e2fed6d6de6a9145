"""Data of several agents: episodes, normalisation, and the windows that VAE + Diffusion RL learns from.

Shape letters: T transitions, M windows, B batch, N agents, O observation and A action of one agent, hh rows of history,
H planned actions. What is of all agents lies flat, agent by agent: observations [T,N*O], actions [T,N*A].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from diffusion_rl.data.episodes import Episodes
from diffusion_rl.data.normalizers import IdentityNormalizer, normalizer
from diffusion_rl.data.windows import discounted_returns, require_lengths, require_windows, window_rows, windows_of


@dataclass(frozen=True)
class AgentEpisodes:
    """Episodes in the environment's units; the agents of an episode end together.

    episodes: states [T,N*O], actions [T,N*A] (discrete ones one-hot), rewards [T] (means over the agents).
    legal_actions: [T,N*A] of 0 and 1, of discrete actions; None: all are.
    """

    episodes: Episodes
    n_agents: int
    discrete: bool = False
    legal_actions: np.ndarray | None = None

    @property
    def obs_dim(self) -> int:
        return self.episodes.states.shape[1] // self.n_agents

    @property
    def action_dim(self) -> int:
        return self.episodes.actions.shape[1] // self.n_agents


class AgentNormalizer:
    """Maps observations and actions to what the networks see, and back.

    Args:
        observations, actions: fitted on single agents' rows (`shared`), or on those of all agents side by side.
        obs_dim, action_dim: O and A.
        discrete: actions stay one-hot.
    """

    def __init__(
        self, observations: IdentityNormalizer, actions: IdentityNormalizer, obs_dim: int, action_dim: int, shared: bool
    ):
        self.observations, self.actions = observations, actions
        self.obs_dim, self.action_dim, self.shared = obs_dim, action_dim, shared

    @classmethod
    def fit(cls, data: AgentEpisodes, name: str, shared: bool = True) -> AgentNormalizer:
        """Fits normalizers of a name (see `data.normalizers`) on all rows."""
        dims = data.obs_dim, data.action_dim
        fields = data.episodes.states, data.episodes.actions
        rows = [x.reshape(-1, dim) if shared else x for x, dim in zip(fields, dims, strict=True)]
        kinds = normalizer(name), normalizer("IdentityNormalizer" if data.discrete else name)
        observations, actions = (kind.fit(x.astype(np.float32)) for kind, x in zip(kinds, rows, strict=True))
        return cls(observations, actions, *dims, shared)

    def normalize_obs(self, x: np.ndarray) -> np.ndarray:
        """Normalises observations [...,N*O]."""
        return self._apply(x, self.obs_dim, self.observations.normalize)

    def normalize_actions(self, x: np.ndarray) -> np.ndarray:
        """Normalises actions [...,N*A]."""
        return self._apply(x, self.action_dim, self.actions.normalize)

    def unnormalize_actions(self, x: np.ndarray) -> np.ndarray:
        """Maps actions [...,N*A] back to the environment's units."""
        return self._apply(x, self.action_dim, self.actions.unnormalize)

    def _apply(self, x: np.ndarray, dim: int, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        x = np.asarray(x, np.float32)
        shape = (-1, dim) if self.shared else (-1, x.shape[-1])
        return function(x.reshape(shape)).reshape(x.shape).astype(np.float32)

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the fitted arrays by name."""
        parts = {"observations": self.observations, "actions": self.actions}
        return {f"{part}.{key}": array for part, fitted in parts.items() for key, array in fitted.arrays.items()}

    @classmethod
    def of(
        cls, tensors: Mapping[str, np.ndarray], name: str, obs_dim: int, action_dim: int, discrete: bool, shared: bool
    ) -> AgentNormalizer:
        """Inverts `tensors`."""

        def part(prefix: str, kind: str) -> IdentityNormalizer:
            return normalizer(kind)({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})

        actions = part("actions.", "IdentityNormalizer" if discrete else name)
        return cls(part("observations.", name), actions, obs_dim, action_dim, shared)


class VAESequenceDataset:
    """Windows of the recent past and the next H actions.

    A window's present is its row number hh: rows 0 … hh-1 lie before it, rows hh … hh+H-1 are to be planned. Before an
    episode's first step stand zeros (`use_zero_padding`), or the first observation with zeros for its action; after the
    last one zeros, or the last row. The past that the policy sees ends with the present observation, in whose row zeros
    stand for the action that is not known yet.

    Args:
        data: the episodes.
        normalizer: fitted on them, or another's.
        horizon, history_horizon: H and hh.
        use_padding: windows may run over the end of the episode (starts 0 … L-2; otherwise 0 … L-H-1).
        max_path_length: no episode may be longer.
        discount, returns_scale: of the returns.
        termination_penalty: added to the last reward of episodes that ended.
        act_steps: actions after which Q-learning looks at what came of them.
    """

    def __init__(
        self,
        data: AgentEpisodes,
        normalizer: AgentNormalizer,
        horizon: int,
        history_horizon: int,
        *,
        use_padding: bool = True,
        use_zero_padding: bool = True,
        max_path_length: int = 1000,
        discount: float = 0.99,
        returns_scale: float = 1.0,
        termination_penalty: float = 0.0,
        act_steps: int = 1,
    ):
        episodes = data.episodes
        self.data, self.normalizer = data, normalizer
        self.horizon, self.history_horizon, self.use_zero_padding = horizon, history_horizon, use_zero_padding
        self.max_path_length, self.discount, self.act_steps = max_path_length, discount, act_steps
        lengths = np.asarray(episodes.traj_lengths, np.int64)
        require_lengths(lengths, max_path_length)
        self.observations = normalizer.normalize_obs(episodes.states)
        self.actions = normalizer.normalize_actions(episodes.actions)
        self.rows = agent_rows(self.actions, self.observations, data.n_agents)  # [T,N*(A+O)]
        self.present = agent_rows(np.zeros_like(self.actions), self.observations, data.n_agents)
        self.rewards = np.array(episodes.require_rewards("the data set"), np.float32)
        self.terminals = np.zeros(len(self.rows), bool)
        if episodes.terminals is not None:
            self.terminals = np.asarray(episodes.terminals, bool)
            self.rewards[self.terminals] += np.float32(termination_penalty)
        self.begins, self.ends = episodes.starts, episodes.starts + lengths
        returns = discounted_returns(self.rewards.astype(np.float64), lengths, discount)
        self.returns = returns.astype(np.float32) / returns_scale  # from each step to the end of its episode, [T]
        self.episode, first = windows_of(lengths - 1 if use_padding else lengths - horizon)  # [M]
        self.start = first + self.begins[self.episode]  # [M], rows
        require_windows(lengths, self.episode, horizon)

    def __len__(self) -> int:
        return len(self.start)

    # ---------- batches ----------

    def past(self, row: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """Returns what the policy sees at `row` [...] of episodes that begin at `begin` [...]: [...,hh+1,N*(A+O)]."""
        rows = row[..., None] + np.arange(-self.history_horizon, 0)
        before = (rows < begin[..., None])[..., None]
        first = 0 if self.use_zero_padding else self.present[begin][..., None, :]
        history = np.where(before, first, self.rows[np.maximum(rows, begin[..., None])])
        return np.concatenate([history, self.present[row][..., None, :]], axis=-2).astype(np.float32)

    def batch(self, items: np.ndarray, transitions: bool = False) -> dict[str, np.ndarray]:
        """Returns windows `items` [...]: state [...,hh+1,N*(A+O)], actions [...,H,N*A], mask [...,H,1], returns
        [...,1].

        With `transitions` also those of Q-learning: rewards, alive [...,1], next_state.
        """
        row, begin, end = self.start[items], self.begins[self.episode[items]], self.ends[self.episode[items]]
        future, within = window_rows(row, end, self.horizon)
        inside = within[..., None]
        beyond = 0 if self.use_zero_padding else self.actions[end - 1][..., None, :]
        actions = np.where(inside, self.actions[np.minimum(future, end[..., None] - 1)], beyond)
        window = {
            "state": self.past(row, begin),
            "actions": actions,
            "mask": inside,
            "returns": self.returns[row][..., None],
        }
        if transitions:
            steps, within = window_rows(row, end, self.act_steps)
            earned = (
                self.rewards[np.minimum(steps, end[..., None] - 1)]
                * within
                * self.discount ** np.arange(self.act_steps)
            )
            last = np.minimum(row + self.act_steps, end) - 1
            following = np.minimum(last + 1, end - 1)  # where an episode was cut, its last state stands for the next
            window["rewards"] = earned.sum(axis=-1, keepdims=True)
            window["alive"] = (self.discount**self.act_steps * ~self.terminals[last])[..., None]
            window["next_state"] = self.past(following, begin)
        return {name: array.astype(np.float32) for name, array in window.items()}

    # ---------- single items, under the names of the original ----------

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        """Returns window number `item` under the names of the original.

        x [hh+H,N,A'+O]                   actions (an index where they are discrete: A' = 1), then observations
        actions, observations, next_observations, rewards, dones, legal_actions [hh+H,N,…]
        history_trajectory [max(hh,1),N,A+O], cond {x, masks} [hh+H,N,…], loss_masks, attention_masks [hh+H,N,1]
        returns [1,N], env_ts [hh+H] (outside of the episode: max_path_length)
        """
        n, hh = self.data.n_agents, self.history_horizon
        row, episode = self.start[item], self.episode[item]
        begin, end = self.begins[episode], self.ends[episode]
        rows = row + np.arange(-hh, self.horizon)
        before, after = rows < begin, rows >= end
        inside = ~(before | after)

        def padded(table: np.ndarray, rows: np.ndarray, known_before: bool = True) -> np.ndarray:
            values = table[np.clip(rows, begin, end - 1)]
            blank = (rows < begin) | (rows >= end) if self.use_zero_padding else (rows < begin) & (not known_before)
            return np.where(blank[:, None], 0, values).reshape(len(rows), n, -1).astype(np.float32)

        one_hot, observations = padded(self.actions, rows, False), padded(self.observations, rows)
        actions = one_hot.argmax(-1)[..., None] if self.data.discrete else one_hot
        ones = np.ones((len(rows), n, 1), np.float32)
        cond_masks = np.arange(len(rows)) <= hh
        legal = self.data.legal_actions
        legal = np.ones_like(self.actions) if legal is None else legal
        history = np.concatenate([one_hot, observations], axis=-1)[:hh]
        return {
            "x": np.concatenate([actions, observations], axis=-1).astype(np.float32),
            "actions": actions,
            "observations": observations,
            "next_observations": padded(self.observations, rows + 1),
            "rewards": ones * np.where(inside, self.rewards[np.clip(rows, begin, end - 1)], 0)[:, None, None],
            "dones": ones * (self.terminals[np.clip(rows, begin, end - 1)] & inside)[:, None, None],
            "history_trajectory": history
            if hh
            else np.zeros((1, n, one_hot.shape[-1] + observations.shape[-1]), np.float32),
            "cond": {"x": observations * cond_masks[:, None, None], "masks": ones * cond_masks[:, None, None]},
            "loss_masks": ones * (inside & (np.arange(len(rows)) >= hh))[:, None, None],
            "attention_masks": ones * inside[:, None, None],
            "returns": np.full((1, n), self.returns[row], np.float32),
            "env_ts": np.where(inside, rows - begin, self.max_path_length),
            "legal_actions": padded(legal, rows),
        }


def agent_rows(actions: np.ndarray, observations: np.ndarray, n_agents: int) -> np.ndarray:
    """Joins actions [...,N*A] and observations [...,N*O] to [...,N*(A+O)], agent by agent."""
    lead = actions.shape[:-1]
    parts = (x.reshape(*lead, n_agents, x.shape[-1] // n_agents) for x in (actions, observations))
    return np.concatenate(list(parts), axis=-1).reshape(*lead, actions.shape[-1] + observations.shape[-1])
