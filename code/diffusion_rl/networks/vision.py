"""Networks that see: images and proprioception to features, and what is built on them.

A policy's network sees an observation once and denoises many times. `encode` turns an observation {"state", "rgb"} into
{"state", "features"}, which the network takes wherever it takes the observation itself; samplers encode once.

Shapes: B batch, To observation history, O observation, C channels, Hi, Wi image, P patches, D embedding, H horizon,
A action, F width of the image features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_rng
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.critics import CriticObs
from diffusion_rl.networks.layers import LayerNorm, Linear, Network, TimeEmbedding, dropped, flatten_state
from diffusion_rl.networks.mlp import MLP, ResidualMLP
from diffusion_rl.networks.spread import SpreadOwner
from diffusion_rl.networks.vit import VitEncoder

Cond = dict[str, Array]


class RandomShiftsAug:
    """Shift images by whole pixels; what comes in repeats the border (DrQ-v2, Yarats et al. 2021).

    The reference pads by replication, then interpolates bilinearly at the pixels of a shifted window. Shifts are whole
    pixels, so its interpolation only ever meets pixel centres and the result is a crop of the padded image: here each
    pixel is picked directly, exactly, in whatever type the images have.

    Args:
        pad: largest shift, in pixels, in every direction.
    """

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, x: Array, shifts: Array) -> Array:
        """x [B,C,Hi,Wi]; shifts: 2 B integers (x, y) in [0, 2 pad], of any shape, `pad` being no shift."""
        shifts = tf.cast(tf.reshape(shifts, [-1, 2]), tf.int32) - self.pad
        rows = _shifted(tf.shape(x)[2], shifts[:, 1:])
        columns = _shifted(tf.shape(x)[3], shifts[:, :1])
        return tf.gather(tf.gather(x, rows, axis=2, batch_dims=1), columns, axis=3, batch_dims=1)


def _shifted(size: Array, shift: Array) -> Array:
    """Returns indices [B,size] of shifted pixels, held at the border; shift [B,1]."""
    return tf.clip_by_value(tf.range(size)[None] + shift, 0, size - 1)


class SpatialEmb(keras.layers.Layer):
    """Patch features to one vector: each of the D channels, seen as an image of P patches and joined by the
    proprioception, is projected, and the projections are summed with learned weights (IBRL, Hu et al. 2023).

    Args:
        num_patch, patch_dim: P and D.
        prop_dim: width of the proprioception; 0: it is not used.
        proj_dim: width of the output.
        dropout: rate; used where a mask is given.
    """

    def __init__(self, num_patch: int, patch_dim: int, prop_dim: int, proj_dim: int, dropout: float):
        super().__init__(dtype=floatx())
        self.num_patch, self.prop_dim, self.proj_dim, self.dropout = num_patch, prop_dim, proj_dim, dropout
        self.weight = tf.Variable(init_rng().normal((1, patch_dim, proj_dim), dtype=floatx()), name="weight")
        self.input_linear = Linear(num_patch + prop_dim, proj_dim)
        self.input_norm = LayerNorm(proj_dim)

    def call(self, feat: Array, prop: Array, keep_masks: Sequence[Array] = ()) -> Array:
        """Maps feat [B,P,D], prop [B,prop_dim] to [B,proj_dim]; `keep_masks`: dropout's one 0/1 mask [B,proj_dim]."""
        kernel, channels = tf.convert_to_tensor(self.input_linear.kernel), feat.shape[-1]
        by_channel = tf.reshape(tf.transpose(feat, [0, 2, 1]), [-1, self.num_patch])
        y = tf.reshape(tf.matmul(by_channel, kernel[: self.num_patch]), [-1, channels, self.proj_dim])
        offset = tf.convert_to_tensor(self.input_linear.bias)
        if self.prop_dim > 0:  # the same for all channels: multiplied once instead of joined to each
            offset = (offset + tf.matmul(prop, kernel[self.num_patch :]))[:, None]
        z = tf.reduce_sum(self.weight * tf.nn.relu(self.input_norm(y + offset)), axis=1)
        return dropped(z, next(iter(keep_masks), None), self.dropout)


class FlatEmb(keras.layers.Layer):
    """All patch features to one vector: Linear, LayerNorm, dropout, ReLU. The proprioception is not used."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float):
        super().__init__(dtype=floatx())
        self.in_dim, self.dropout = in_dim, dropout
        self.linear = Linear(in_dim, out_dim)
        self.norm = LayerNorm(out_dim)

    def call(self, feat: Array, prop: Array, keep_masks: Sequence[Array] = ()) -> Array:
        """Maps feat [B,P,D] to [B,out]; `keep_masks`: dropout's one 0/1 mask [B,out]."""
        z = self.norm(self.linear(tf.reshape(feat, [-1, self.in_dim])))
        return tf.nn.relu(dropped(z, next(iter(keep_masks), None), self.dropout))


class ImageFeatures(keras.layers.Layer):
    """Recent images and the proprioception to one vector, camera by camera.

    Args:
        backbone: image encoder, shared by the cameras.
        cond_dim: width of the proprioception.
        img_cond_steps: how many of the latest images are used; they are stacked along the channels.
        spatial_emb: width of `SpatialEmb`'s output for each camera; 0: `FlatEmb` instead (one camera only).
        visual_feature_dim: width of `FlatEmb`'s output.
        dropout: rate on the output; used where masks are given.
        num_img: number of cameras. Their channels lie one after another in every image.
        augment: whether shifts may be given.

    Attributes:
        dim: F, width of the output.
    """

    def __init__(
        self,
        backbone: VitEncoder,
        cond_dim: int,
        img_cond_steps: int = 1,
        spatial_emb: int = 0,
        visual_feature_dim: int = 128,
        dropout: float = 0.0,
        num_img: int = 1,
        augment: bool = False,
    ):
        super().__init__(dtype=floatx())
        if spatial_emb == 1 or (num_img > 1 and not spatial_emb):
            raise UserError(f"spatial_emb={spatial_emb} with num_img={num_img}: it is a width, give 2 or more")
        self.backbone = backbone
        self.img_cond_steps, self.num_img, self.augment = img_cond_steps, num_img, augment
        self.aug = RandomShiftsAug(pad=4)
        self.dim = spatial_emb * num_img if spatial_emb else visual_feature_dim
        if spatial_emb:
            first = SpatialEmb(backbone.num_patch, backbone.patch_repr_dim, cond_dim, spatial_emb, dropout)
        else:
            first = FlatEmb(backbone.repr_dim, visual_feature_dim, dropout)
        self._names = ["compress"] if num_img == 1 else [f"compress{i + 1}" for i in range(num_img)]
        for i, name in enumerate(self._names):
            setattr(self, name, copy.deepcopy(first) if i else first)  # all start alike

    def call(self, rgb: Array, state: Array, shifts: Array | None = None, keep_masks: Sequence[Array] = ()) -> Array:
        """Returns features [B,F].

        Args:
            rgb: [B,To,C,Hi,Wi] pixels in [0,255], the latest last.
            state: [B,cond_dim]
            shifts: [B,num_img,2] integers for `RandomShiftsAug`; None: images as they are.
            keep_masks: dropout's 0/1 mask for each camera; none: no dropout.
        """
        if shifts is not None:
            if not self.augment:
                raise UserError("image shifts are given to a network with augment=false")
            shifts = tf.reshape(shifts, [-1, self.num_img, 2])
        parts = []
        for i, images in enumerate(self.cameras(rgb)):
            if shifts is not None:
                images = self.aug(images, shifts[:, i])
            compress = getattr(self, self._names[i])
            parts.append(compress(self.backbone(images), state, keep_masks[i : i + 1]))
        return tf.concat(parts, axis=-1)

    def cameras(self, rgb: Array) -> list[Array]:
        """Returns for each camera its latest images of [B,To,C,Hi,Wi], stacked along the channels
        [B,T*C/num_img,Hi,Wi]."""
        recent = rgb[:, -self.img_cond_steps :]
        _, steps, channels, height, width = recent.shape
        if channels % self.num_img:
            raise UserError(f"images of {channels} channels are not of num_img={self.num_img} cameras")
        per_camera = channels // self.num_img
        stacked = [-1, steps * per_camera, height, width]
        return [tf.reshape(recent[:, :, i * per_camera : (i + 1) * per_camera], stacked) for i in range(self.num_img)]


class SeesImages:
    """What networks with `vision` (an `ImageFeatures`) have in common."""

    vision: ImageFeatures

    def shifts_shape(self, batch: int) -> tuple[int, int, int] | None:
        """Returns the shape of the shifts that training draws, integers in [0, 2 pad]; None without augmentation.

        The reference shifts also when it evaluates a network with augment=true; here the caller decides, by giving
        shifts or not.
        """
        return (batch, self.vision.num_img, 2) if self.vision.augment else None

    def proprioception(self, cond: Cond) -> Array:
        """Returns what the network makes of {"state": [B,To,O]}: [B,cond_dim]."""
        return tf.cast(flatten_state(cond), self.vision.compute_dtype)

    def encode(self, cond: Cond, shifts: Array | None = None, keep_masks: Sequence[Array] = ()) -> Cond:
        """Returns the observation as the rest of the network needs it: {"state", "features": [B,F+cond_dim]}.

        The result takes the place of `cond` in calls of the same network (and of no other: weights differ).

        Args:
            cond: {"state": [B,To,O], "rgb": [B,To,C,Hi,Wi]}; what is encoded already comes back unchanged.
            shifts, keep_masks: see `ImageFeatures.call`.
        """
        if "features" in cond:
            return cond
        if "rgb" not in cond:
            raise UserError('this network sees images: the observation needs "rgb" [B,To,C,H,W] beside "state"')
        state = self.proprioception(cond)
        features = self.vision(cond["rgb"], state, shifts, keep_masks)
        return {"state": cond["state"], "features": tf.concat([features, state], axis=-1)}


def check_images(network: Any, shape: Sequence[int] | None, whose: str) -> None:
    """Holds images [C,Hi,Wi] (None: there are none) to what `network` sees; nothing if it does not see.

    Raises UserError naming both shapes; whose: where the images come from.
    """
    vision = getattr(network, "vision", None)
    if not isinstance(vision, ImageFeatures):
        return
    channels, height, width = vision.backbone.image_shape
    seen = [channels * vision.num_img // vision.img_cond_steps, height, width]
    if shape is None:
        raise UserError(f"{whose}: no images in it, and the network sees images [C,H,W] = {seen}")
    if list(shape) != seen:
        cure = "crop or scale them, or build the network for them (img_h, img_w, num_channel)"
        if sorted(shape) == sorted(seen):
            cure = "channels come first, then height, then width"
        raise UserError(f"{whose}: images [C,H,W] = {list(shape)}, and the network is built for {seen}: {cure}")


class VisionDiffusionMLP(SeesImages, Network):
    """`DiffusionMLP` with images (DPPO, Ren et al. 2024, appendix).

    Args:
        action_dim, horizon_steps: A and H.
        cond_dim: see `ImageFeatures`.
        time_dim, mlp_dims, activation_type, out_activation_type, use_layernorm, residual_style: see `DiffusionMLP`.
        **vision: of `ImageFeatures`.
    """

    ALSO_TAKES = (ImageFeatures.__init__,)

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        time_dim: int = 16,
        mlp_dims: Sequence[int] = (256, 256),
        activation_type: str = "Mish",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
        residual_style: bool = False,
        **vision: Any,
    ):
        super().__init__(dtype=floatx())
        self.action_dim, self.horizon_steps = action_dim, horizon_steps
        self.cond_dim, self.time_dim = cond_dim, time_dim
        self.vision = ImageFeatures(cond_dim=cond_dim, **vision)
        self.time_embedding = TimeEmbedding(time_dim)
        output_dim = action_dim * horizon_steps
        self.mlp_mean = (ResidualMLP if residual_style else MLP)(
            [time_dim + output_dim + self.vision.dim + cond_dim, *mlp_dims, output_dim],
            activation_type=activation_type,
            out_activation_type=out_activation_type,
            use_layernorm=use_layernorm,
        )

    def call(
        self, x: Array, time: Array, cond: Cond, shifts: Array | None = None, keep_masks: Sequence[Array] = ()
    ) -> Array:
        """Maps x [B,H,A], time [B] integers, cond (plain or encoded) to noise (or x0) [B,H,A]."""
        features = self.encode(cond, shifts, keep_masks)["features"]
        flat = tf.reshape(x, [-1, self.horizon_steps * self.action_dim])
        out = self.mlp_mean(tf.concat([flat, self.time_embedding(tf.reshape(time, [-1])), features], axis=-1))
        return tf.reshape(out, [-1, self.horizon_steps, self.action_dim])


class GaussianVisionMLP(SeesImages, SpreadOwner):
    """Mean and standard deviation of an action chunk from images.

    Unlike in `GaussianMLP`, the mean is always squashed by tanh, and a predicted log-variance has a network of its own
    (as deep as one of `mlp_dims`' layers) and is clamped.

    Args:
        action_dim, horizon_steps, mlp_dims, activation_type, residual_style, use_layernorm: see `GaussianMLP`.
        fixed_std, learn_fixed_std, std_min, std_max: see `SpreadOwner.init_spread`.
        cond_dim, **vision: of `ImageFeatures`.
    """

    ALSO_TAKES = (ImageFeatures.__init__,)

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        mlp_dims: Sequence[int] = (256, 256, 256),
        activation_type: str = "Mish",
        residual_style: bool = False,
        use_layernorm: bool = False,
        fixed_std: float | None = None,
        learn_fixed_std: bool = False,
        std_min: float = 0.01,
        std_max: float = 1.0,
        **vision: Any,
    ):
        super().__init__(dtype=floatx())
        self.action_dim, self.horizon_steps = action_dim, horizon_steps
        self.init_spread(action_dim, fixed_std, learn_fixed_std, std_min, std_max)
        self.vision = ImageFeatures(cond_dim=cond_dim, **vision)
        input_dim, output_dim = self.vision.dim + cond_dim, action_dim * horizon_steps
        common: dict[str, Any] = {"activation_type": activation_type, "use_layernorm": use_layernorm}
        build = ResidualMLP if residual_style else MLP
        self.mlp_mean = build([input_dim, *mlp_dims, output_dim], **common)
        if fixed_std is None:
            self.mlp_logvar = MLP([input_dim, mlp_dims[-1], output_dim], **common)

    def call(self, cond: Cond, shifts: Array | None = None, keep_masks: Sequence[Array] = ()) -> tuple[Array, Array]:
        """Maps cond (plain or encoded) to mean, standard deviation, both [B,H*A], step by step."""
        features = self.encode(cond, shifts, keep_masks)["features"]
        mean = tf.tanh(self.mlp_mean(features))
        if self.fixed_std is None:
            return mean, self.clamped_std(self.mlp_logvar(features))
        return mean, self.constant_std(mean, self.horizon_steps)


class ViTCritic(SeesImages, CriticObs):
    """State value from images and proprioception.

    Args:
        backbone, cond_dim, img_cond_steps, spatial_emb, dropout, augment, num_img: see `ImageFeatures`.
        **kwargs: of `CriticObs`.
    """

    def __init__(
        self,
        backbone: VitEncoder,
        cond_dim: int,
        img_cond_steps: int = 1,
        spatial_emb: int = 128,
        dropout: float = 0.0,
        augment: bool = False,
        num_img: int = 1,
        **kwargs: Any,
    ):
        super().__init__(cond_dim=spatial_emb * num_img + cond_dim, **kwargs)
        if spatial_emb < 2:
            raise UserError(f"spatial_emb={spatial_emb}: the critic needs a width of 2 or more")
        self.vision = ImageFeatures(
            backbone, cond_dim, img_cond_steps, spatial_emb, dropout=dropout, num_img=num_img, augment=augment
        )

    def call(
        self,
        cond: Cond,
        no_augment: bool = False,
        shifts: Array | None = None,
        keep_masks: Sequence[Array] = (),
    ) -> Array:
        """Maps cond (plain or encoded) to [B,1]; `no_augment`: shifts are not used."""
        return self.Q1(self.encode(cond, None if no_augment else shifts, keep_masks)["features"])
