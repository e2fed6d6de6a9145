"""The U-Net over action chunks for policies that see images. Shape letters as in `networks.unet1d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from diffusion_rl.core.typing import Array
from diffusion_rl.networks.unet1d import UNetTrunk
from diffusion_rl.networks.vision import Cond, ImageFeatures, SeesImages
from diffusion_rl.networks.vit import VitEncoder


class VisionUnet1D(SeesImages, UNetTrunk):
    """Noise prediction from a noisy chunk, the denoising step, images and the observation history.

    Args:
        backbone, img_cond_steps, spatial_emb, dropout, num_img, augment: see `ImageFeatures`.
        visual_feature_dim: width of the image features with spatial_emb=0. (The reference fails there: it never says
            how wide they are. Its other networks take 128.)
        action_dim, cond_dim: see `UNetTrunk`.
        **unet: of `UNetTrunk`. What comes out of its `cond_mlp_dims` is also what the spatial embedding joins to the
            patches.
    """

    def __init__(
        self,
        backbone: VitEncoder,
        action_dim: int,
        cond_dim: int,
        img_cond_steps: int = 1,
        spatial_emb: int = 0,
        visual_feature_dim: int = 128,
        dropout: float = 0.0,
        num_img: int = 1,
        augment: bool = False,
        **unet: Any,
    ):
        state_dim = (unet.get("cond_mlp_dims") or [cond_dim])[-1]
        vision = ImageFeatures(
            backbone, state_dim, img_cond_steps, spatial_emb, visual_feature_dim, dropout, num_img, augment
        )
        super().__init__(action_dim, cond_dim, image_dim=vision.dim, **unet)
        self.vision = vision

    def proprioception(self, cond: Cond) -> Array:
        """Maps {"state": [B,To,O]} to what the blocks are conditioned on, [B,To*O] or [B,cond_mlp_dims[-1]]."""
        return self.encoded_state({"state": tf.cast(cond["state"], self.vision.compute_dtype)})

    def call(
        self, x: Array, time: Array, cond: Cond, shifts: Array | None = None, keep_masks: Sequence[Array] = ()
    ) -> Array:
        """Maps x [B,H,A], time [B] integers or one for all, cond (plain or encoded) to noise (or x0) [B,H,A]."""
        return self.trunk(x, time, self.encode(cond, shifts, keep_masks)["features"])
