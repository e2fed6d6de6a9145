"""Settings for making data of the locomotion tasks (`generate.gym`), without TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion_rl.config.schema import require_range, require_seed
from diffusion_rl.tasks.registry import TASKS

#: Of the policies: about D4RL's medium ones, and a little below its experts.
MEDIUM_RETURN, EXPERT_RETURN = (
    {task.name: task.made_returns[i] for task in TASKS if task.made_returns} for i in (0, 1)
)
FLAVOURS = ("medium", "expert", "medium-replay", "medium-expert")


@dataclass(frozen=True)
class Settings:
    """The settings of the training: the reference's SAC hyper-parameters, but many environments share each update."""

    seed: int = 0
    n_envs: int = 10
    n_eval_envs: int = 16
    batch_size: int = 256
    replay_ratio: float = 0.5  # gradient steps for each environment step
    updates_per_call: int = 32
    explore_steps: int = 10_000  # uniformly random actions before the first gradient step
    buffer_size: int = 1_000_000
    max_updates: int = 500_000
    eval_every: int = 2_500  # gradient steps between evaluations
    hidden: int = 256  # width of the two hidden layers of every network
    critic_layernorm: bool = False  # steadier where the plain critics overestimate (Ball et al. 2023)

    def check(self) -> None:
        """Raises UserError for a number that cannot work."""
        require_seed(self.seed)
        for name in ("n_envs", "n_eval_envs", "hidden", "updates_per_call"):
            require_range(_option(name), getattr(self, name), 1, 10_000)
        for name in ("batch_size", "eval_every"):
            require_range(_option(name), getattr(self, name), 1)
        require_range("--explore-steps", self.explore_steps, 0)
        require_range("--replay-ratio", self.replay_ratio, above=0)
        require_range("--buffer-size", self.buffer_size, self.batch_size, 100_000_000)
        require_range("--max-updates (which --eval-every must fit into)", self.max_updates, self.eval_every)
        first = self.explore_steps + self.updates_per_call / self.replay_ratio
        require_range("--batch-size (with these --explore-steps)", self.batch_size, 1, int(first))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
