"""An environment that draws from every generator there is; light enough for processes that only simulate."""

import gymnasium
import numpy as np

from diffusion_rl.core.errors import UserError


class Drawn(gymnasium.Env):
    """Draws from all generators there are; says "stop" where an action is far out."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)

    def _drawn(self):
        return np.array([self.np_random.random(), np.random.random(), self.state])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            np.random.seed(seed)
        self.state = self.np_random.standard_normal()
        return self._drawn(), {}

    def step(self, action):
        if action[0] > 5:
            raise UserError("this action is far out")
        self.state += float(action.sum())
        return self._drawn(), self.state, False, False, {}


gymnasium.register("Drawn-v0", Drawn)
