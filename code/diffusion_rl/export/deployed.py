"""A policy as one program from raw observation to raw action: what an export consists of.

Shapes: B batch, To observation history, O observation, Ti images, C,Hi,Wi image, H planned actions, Ta executed ones,
A action. "Raw" means the units of the environment; images are bytes.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from diffusion_rl.core.noise import normal_inside, uniform_inside
from diffusion_rl.core.typing import Array
from diffusion_rl.data.normalizers import MinMaxNormalizer
from diffusion_rl.networks.convolution import plain_convolutions
from diffusion_rl.policies.diffusion import DiffusionPolicy
from diffusion_rl.policies.flow import FlowPolicy
from diffusion_rl.policies.gaussian import GaussianPolicy
from diffusion_rl.policies.gmm import GMMPolicy

Policy = DiffusionPolicy | FlowPolicy | GaussianPolicy | GMMPolicy
Shapes = dict[str, tuple[int | None, ...]]


def noise_shapes(policy: Policy, batch: int | None) -> Shapes:
    """Returns what one decision draws: "noise", standard normal, and for mixtures "uniform" in [0, 1), which picks the
    mode.

    Diffusion [sampling_steps + 1, B, H, A]; flow [B, H, A]; Gaussian [B, H*A]; mixture [B, M, H*A] and [B].
    """
    shapes: Shapes = {"noise": policy.noise_shape(batch)}
    return shapes | {"uniform": (batch,)} if isinstance(policy, GMMPolicy) else shapes


def observation_shapes(policy: Policy, obs_dim: int, cond_steps: int, batch: int | None) -> Shapes:
    """Returns "state" [B,To,O] and, where the network sees, "rgb" [B,Ti,C,Hi,Wi] (cameras one after another along
    C)."""
    shapes: Shapes = {"state": (batch, cond_steps, obs_dim)}
    if vision := getattr(policy.network, "vision", None):
        channels, height, width = vision.backbone.image_shape
        channels = channels // vision.img_cond_steps * vision.num_img
        shapes["rgb"] = (batch, vision.img_cond_steps, channels, height, width)
    return shapes


def deterministic_plan(policy: Policy, cond: dict[str, Array], noise: dict[str, Array]) -> Array:
    """Returns the plan [B,H,A] in [-1, 1], chosen as evaluation chooses; noise as in `noise_shapes`."""
    with plain_convolutions():  # other programs, TFLite's for one, round otherwise: the plain ones magnify it less
        if isinstance(policy, DiffusionPolicy):
            return policy.sample(cond, noise["noise"], deterministic=True).trajectories
        if isinstance(policy, FlowPolicy):
            return policy.sample(cond, noise["noise"]).trajectories
        if isinstance(policy, GMMPolicy):
            return policy.sample(cond, noise["noise"], noise["uniform"], deterministic=True)
        return policy.sample(cond, noise["noise"], deterministic=True)[0]


class DeployedPolicy(tf.Module):
    """The programs `act` and `act_with_noise`, with weights, normalization and number of denoising steps inside.

    Both take the raw observation by name ("state", "rgb") and give {"actions": [B,Ta,A], "plan": [B,H,A]}: what to
    execute now, and the whole plan that it is the beginning of. `act` draws its own noise.

    Args:
        policy: whose present weights are used.
        normalizer: bounds of observations and actions, float32.
        cond_steps, act_steps: To and Ta.
        batch: B; None: any.
    """

    def __init__(
        self, policy: Policy, normalizer: MinMaxNormalizer, cond_steps: int, act_steps: int, batch: int | None = None
    ):
        super().__init__()
        self._policy, self._normalizer, self._act_steps = policy, normalizer, act_steps
        observations = observation_shapes(policy, normalizer.obs_dim, cond_steps, batch)
        specs: dict[str, Any] = {
            name: tf.TensorSpec(shape, tf.uint8 if name == "rgb" else tf.float32, name)
            for name, shape in observations.items()
        }
        noise = {name: tf.TensorSpec(shape, tf.float32, name) for name, shape in noise_shapes(policy, batch).items()}
        self.act = tf.function(self._act, input_signature=[specs], autograph=False).get_concrete_function()
        self.act_with_noise = tf.function(
            self._act_with_noise, input_signature=[specs, noise], autograph=False
        ).get_concrete_function()
        # What the programs read must hang on this object to be saved with it; critics, for one, need not.
        self.weights = list({id(v): v for f in (self.act, self.act_with_noise) for v in f.variables}.values())

    def _act(self, observation: dict[str, Array]) -> dict[str, Array]:
        batch = observation["state"].shape[0] or tf.shape(observation["state"])[0]
        draw = {"noise": normal_inside, "uniform": uniform_inside}
        noise = {name: draw[name](shape, tf.float32) for name, shape in noise_shapes(self._policy, batch).items()}
        return self._act_with_noise(observation, noise)

    def _act_with_noise(self, observation: dict[str, Array], noise: dict[str, Array]) -> dict[str, Array]:
        cond = {**observation, "state": self._normalizer.normalize_obs(observation["state"])}
        plan = self._normalizer.unnormalize_action(deterministic_plan(self._policy, cond, noise))
        return {"actions": plan[:, : self._act_steps], "plan": plan}
