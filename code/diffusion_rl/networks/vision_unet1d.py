"""The U-Net over action chunks for policies that see images. Shape letters as in `networks.unet1d`."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from diffusion_rl.core.keras import floatx
from diffusion_rl.networks.layers import Array, TimeEmbedding
from diffusion_rl.networks.mlp import ResidualMLP
from diffusion_rl.networks.unet1d import UNetTrunk
from diffusion_rl.networks.vision import Cond, ImageFeatures, SeesImages
from diffusion_rl.networks.vit import VitEncoder


class VisionUnet1D(SeesImages, UNetTrunk):
    """Noise prediction from a noisy chunk, the denoising step, images and the observation history.

    Args:
        backbone, img_cond_steps, spatial_emb, dropout, num_img, augment: see `ImageFeatures`.
        visual_feature_dim: width of the image features with spatial_emb=0. (The reference fails there: it never says
            how wide they are. Its other networks take 128.)
        cond_mlp_dims: the observation first goes through a residual MLP of these dimensions, and what comes out is also
            what the spatial embedding joins to the patches.
        action_dim, cond_dim, diffusion_step_embed_dim, smaller_encoder: see `Unet1D`.
        dim, dim_mults, kernel_size, n_groups, activation_type, cond_predict_scale, groupnorm_eps: see `UNetTrunk`.
    """

    def __init__(
        self,
        backbone: VitEncoder,
        action_dim: int,
        img_cond_steps: int = 1,
        cond_dim: int | None = None,
        diffusion_step_embed_dim: int = 32,
        dim: int = 32,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        smaller_encoder: bool = False,
        cond_mlp_dims: Sequence[int] | None = None,
        kernel_size: int = 5,
        n_groups: int | None = None,
        activation_type: str = "Mish",
        cond_predict_scale: bool = False,
        groupnorm_eps: float = 1e-5,
        spatial_emb: int = 0,
        visual_feature_dim: int = 128,
        dropout: float = 0.0,
        num_img: int = 1,
        augment: bool = False,
    ):
        super().__init__(dtype=floatx())
        self.action_dim, self.cond_dim, self.time_dim = action_dim, cond_dim, diffusion_step_embed_dim
        self.has_cond_mlp = cond_mlp_dims is not None
        state_dim = cond_mlp_dims[-1] if cond_mlp_dims is not None else cond_dim
        self.vision = ImageFeatures(
            backbone, state_dim, img_cond_steps, spatial_emb, visual_feature_dim, dropout, num_img, augment
        )
        self.time_mlp = TimeEmbedding(diffusion_step_embed_dim, expansion=4)
        if cond_mlp_dims is not None:
            self.cond_mlp = ResidualMLP([cond_dim, *cond_mlp_dims], activation_type=activation_type)
        self.build_trunk(
            action_dim,
            diffusion_step_embed_dim + self.vision.dim + state_dim,
            dim,
            dim_mults,
            kernel_size,
            n_groups,
            larger_encoder=not (self.has_cond_mlp or smaller_encoder),
            activation_type=activation_type,
            cond_predict_scale=cond_predict_scale,
            groupnorm_eps=groupnorm_eps,
        )

    def proprioception(self, cond: Cond) -> Array:
        state = super().proprioception(cond)
        return self.cond_mlp(state) if self.has_cond_mlp else state

    def call(
        self, x: Array, time: Array, cond: Cond, shifts: Array | None = None, keep_masks: Sequence[Array] = ()
    ) -> Array:
        """x [B,H,A], time [B] integers, cond (plain or encoded) -> noise (or x0) [B,H,A]."""
        features = self.encode(cond, shifts, keep_masks)["features"]
        return self.trunk(x, tf.concat([self.time_mlp(tf.reshape(time, [-1])), features], axis=-1))
