"""Trained policies in Python: raw observations in, raw actions out.

Shapes: B batch, To observation history, O observation, H planned actions, Ta executed ones, A action, F denoising steps
of the chain. "Raw" means the units of the environment. Where a policy sees pictures, an observation is a mapping with
"state" [(B,)To,O] and "rgb" [(B,)Ti,C,Hi,Wi] bytes instead of an array.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diffusion_rl.config.compose import compose_job, plain_copy
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.core.typing import Array, Rng
from diffusion_rl.export.deployed import DeployedPolicy, noise_shapes, observation_shapes
from diffusion_rl.export.saved import Exported, export_policy, open_policy
from diffusion_rl.policies.diffusion import DiffusionPolicy, FineTunedDiffusionPolicy
from diffusion_rl.policies.gmm import GMMPolicy
from diffusion_rl.training.policy_files import SAMPLING, find_checkpoint

Observation = np.ndarray | Mapping[str, np.ndarray]
Randomness = int | Rng | None


def load_policy(
    source: str | os.PathLike[str], config: str | Mapping[str, Any] | None = None, *, allow: Collection[str] = ()
) -> LoadedPolicy:
    """Loads a trained policy.

    Args:
        source: a name of what ships in the data folder ("gym/hopper-medium-v2/pre_diffusion_mlp"), a checkpoint
            (.safetensors, or the PyTorch reference's .pt), or a run folder, of which the newest checkpoint is taken.
        config: for a .pt, which does not hold it: the name below cfg/ of the configuration it was trained with, or the
            resolved configuration itself.
        allow: classes of networks of your own that the checkpoint may name ("my_networks.Denoiser"); a checkpoint alone
            never has anything imported.

    Raises:
        UserError: there is no such policy, it is damaged, or it is of a kind that cannot act alone.
    """
    settings = plain_copy(compose_job(config)) if isinstance(config, str) else config
    return LoadedPolicy(_found(source), settings, allow)


def _found(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    named = path.is_dir() or path.suffix in (".safetensors", ".pt")
    return find_checkpoint(path if named else f"{path}.safetensors", "source")


def _source_of(rng: Randomness) -> Rng:
    seed = int.from_bytes(os.urandom(8), "little") if rng is None else rng
    return NoiseSource(seed) if isinstance(seed, int) else seed


class LoadedPolicy:
    """A trained policy; made by `load_policy`.

    Attributes:
        path: of the checkpoint.
        policy: the policy itself (`diffusion_rl.policies`), on normalised observations and actions.
        normalizer: bounds of observations and actions.
        cond_steps: To, observations that it sees.
        horizon_steps: H, actions that it plans.
        act_steps: Ta, actions of a plan that are executed.
    """

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None, allow: Collection[str] = ()):
        source = open_policy(path, config, allow)
        self._config, self._allow = config, allow
        self.path, self.policy, self.normalizer = path, source.policy, source.normalizer
        self.cond_steps, self.act_steps = source.cond_steps, source.act_steps
        self.horizon_steps: int = self.policy.horizon_steps
        self.obs_dim, self.action_dim = self.normalizer.obs_dim, self.normalizer.action_dim
        self._shapes = observation_shapes(self.policy, self.obs_dim, self.cond_steps, None)
        self._program: DeployedPolicy | None = None
        self._exploring: Any = None

    def __repr__(self) -> str:
        return (
            f"LoadedPolicy({self.path}: {type(self.policy).__name__}, obs_dim={self.obs_dim}, "
            f"action_dim={self.action_dim}, cond_steps={self.cond_steps}, act_steps={self.act_steps})"
        )

    @property
    def network(self) -> Any:
        """Returns the network that acts (of a fine-tuned diffusion policy the fine-tuned one)."""
        return getattr(self.policy, "actor_ft", self.policy.network)

    def act(self, observation: Observation, rng: Randomness = None) -> np.ndarray:
        """Decides as evaluation does, in one compiled program; returns the actions to execute, [Ta,A] or [B,Ta,A].

        Args:
            observation: raw, [To,O] or [B,To,O]; [O] where To is 1.
            rng: a seed or a source of randomness for the noise that denoising begins with; None: fresh noise.
        """
        return self.plan(observation, rng)[..., : self.act_steps, :]

    def plan(self, observation: Observation, rng: Randomness = None) -> np.ndarray:
        """Decides as `act` does; returns the whole plan, [H,A] or [B,H,A]."""
        if self._program is None:
            self._program = DeployedPolicy(self.policy, self.normalizer, self.cond_steps, self.act_steps)
        inputs, alone = self._batch(observation)
        noise = self._noise(len(inputs["state"]), rng)
        plan = self._program.act_with_noise(
            {name: tf.constant(value) for name, value in inputs.items()},
            {name: tf.constant(value) for name, value in noise.items()},
        )["plan"].numpy()
        return plan[0] if alone else plan

    def sample(self, observation: Observation, rng: Randomness = None, return_chain: bool = False) -> Any:
        """Draws plans as training does when it explores: raw, [H,A] or [B,H,A].

        Args:
            return_chain: also return what `log_prob` takes: of a diffusion policy the chain of its denoising steps
                [(B,)F+1,H,A] (all of them, or the fine-tuned ones), of others the plan itself, both normalised.
        """
        inputs, alone = self._batch(observation)
        noise = {name: tf.constant(value) for name, value in self._noise(len(inputs["state"]), rng).items()}
        policy, cond = self._explorer(), self._cond(inputs)
        if isinstance(policy, DiffusionPolicy):
            steps: Any = policy.sample(cond, noise["noise"])
            plan, chain = steps.trajectories, steps.chains
        else:
            drawn: Any = policy.sample(cond, **noise)
            plan = chain = drawn[0] if isinstance(drawn, tuple) else drawn
        raw = self.normalizer.unnormalize_action(plan.numpy())
        parts = (raw, chain.numpy()) if return_chain else (raw,)
        parts = tuple(part[0] for part in parts) if alone else parts
        return parts if return_chain else parts[0]

    def log_prob(self, observation: Observation, chain: np.ndarray) -> np.ndarray:
        """Returns the log-density [B] (one number for a single observation) of what `sample` returned as the chain.

        Of a diffusion policy it is that of the whole chain of denoising steps, their standard deviations floored as in
        PPO's log-probabilities; the density of its actions alone has no closed form.
        """
        if not hasattr(self.policy, "log_probs") and not isinstance(self.policy, DiffusionPolicy):
            raise UserError(f"{self.path}: a flow's plans are a function of its noise, and have no density here")
        inputs, alone = self._batch(observation)
        chain = np.asarray(chain, self.policy.dtype.as_numpy_dtype)
        policy, batch = self._explorer(), len(inputs["state"])
        steps = (policy.ft_denoising_steps + 1,) if isinstance(policy, FineTunedDiffusionPolicy) else ()
        expected = (batch, *steps, self.horizon_steps, self.action_dim)
        chain = chain[None] if alone else chain
        if chain.shape != expected:
            raise UserError(
                f"the chain has shape {list(chain.shape)}, needed is {list(expected)}, as sample returns it"
            )
        log_probs = policy.log_probs(self._cond(inputs), tf.constant(chain))[0].numpy()
        if isinstance(policy, DiffusionPolicy):
            total = log_probs.reshape(batch, -1).sum(axis=1)
        else:
            total = log_probs * (1 if isinstance(policy, GMMPolicy) else self.horizon_steps * self.action_dim)
        return total[0] if alone else total

    def export(self, kind_of_file: str, output: str | os.PathLike[str], force: bool = False) -> Exported:
        """Writes it as `diffusion_rl.export_policy` does; kind_of_file: savedmodel or tflite."""
        return export_policy(self.path, kind_of_file, Path(output), self._config, force, self._allow)

    def session(self, rng: Randomness = None) -> Session:
        """Begins to act in one environment, observation by observation."""
        return Session(self, rng)

    # ---------- between raw and normalised ----------

    def _batch(self, observation: Observation) -> tuple[dict[str, np.ndarray], bool]:
        """Returns an observation by name with a batch axis, and whether it had none."""
        given = dict(observation) if isinstance(observation, Mapping) else {"state": observation}
        if set(given) != set(self._shapes):
            raise UserError(
                f"the observation has {', '.join(sorted(given))}; needed: {', '.join(sorted(self._shapes))}"
            )
        arrays, alone = {}, set()
        for name, shape in self._shapes.items():
            array = np.asarray(given[name], np.uint8 if name == "rgb" else np.float32)
            if name == "state" and array.ndim == 1 and self.cond_steps == 1:
                array = array[None]
            alone.add(array.ndim == len(shape) - 1)
            array = array[None] if array.ndim == len(shape) - 1 else array
            if array.shape[1:] != shape[1:]:
                raise UserError(
                    f"{name} of the observation has shape {list(np.shape(given[name]))}, needed is "
                    f"{list(shape[1:])}, or [B, {', '.join(map(str, shape[1:]))}]"
                )
            arrays[name] = array
        if len(alone) > 1 or len({len(array) for array in arrays.values()}) > 1:
            raise UserError("the parts of the observation differ in their number of rows")
        return arrays, alone.pop()

    def _cond(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Array]:
        state = self.normalizer.normalize_obs(inputs["state"])
        return {name: tf.constant(value) for name, value in {**inputs, "state": state}.items()}

    def _noise(self, batch: int, rng: Randomness) -> dict[str, np.ndarray]:
        source = _source_of(rng)
        draws: dict[str, Any] = {"noise": source.normal, "uniform": source.uniform}
        return {name: draws[name](shape) for name, shape in noise_shapes(self.policy, batch).items()}

    def _explorer(self) -> Any:
        """Returns the policy that `sample` draws from: a pre-trained one with all steps in its chain."""
        if self._exploring is None:
            policy: Any = self.policy
            if isinstance(policy, DiffusionPolicy) and not isinstance(policy, FineTunedDiffusionPolicy):
                facts = (*SAMPLING, "horizon_steps", "obs_dim", "action_dim", "denoising_steps")
                settings = {name: getattr(policy, name) for name in facts}
                steps = policy.sampling_steps
                policy = FineTunedDiffusionPolicy(actor=policy.network, ft_denoising_steps=steps, **settings)
            self._exploring = policy
        return self._exploring


class Session:
    """Acts in one environment: keeps the history of observations and the plan that is being executed.

        session = policy.session(rng=0)
        action = session.act(observation)   # after every step of the environment

    Args:
        policy: that decides, every `act_steps` actions.
        rng: a seed or a source of randomness; None: fresh noise.
    """

    def __init__(self, policy: LoadedPolicy, rng: Randomness = None):
        self._policy = policy
        self._rng = _source_of(rng)
        self.reset()

    def reset(self) -> None:
        """Forgets the past: the next observation is the first of an episode."""
        self._past: deque[np.ndarray] = deque(maxlen=self._policy.cond_steps)
        self._left: list[np.ndarray] = []

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Returns the next action [A] for the present raw observation [O]; before the first one lie copies of it."""
        observation = np.asarray(observation, np.float32)
        if observation.shape != (self._policy.obs_dim,):
            raise UserError(f"the observation has shape {list(observation.shape)}, needed is [{self._policy.obs_dim}]")
        self._past.extend([observation] * (1 if self._past else self._policy.cond_steps))
        if not self._left:
            self._left = list(self._policy.act(np.stack(self._past), self._rng))
        return self._left.pop(0)
