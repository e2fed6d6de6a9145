"""Networks of VAE + Diffusion RL: a VAE of single actions, an encoder of an agent's recent past, a denoiser of latents.

Shape letters: B batch, N agents, To rows of the past (the last is the present), O observation, A action of one agent,
H planned actions, Z latent of one action, C code of the past, D hidden width.
"""

from __future__ import annotations

import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_rng
from diffusion_rl.core.typing import Array
from diffusion_rl.networks.layers import LayerNorm, Linear, Network, sequential, sinusoidal_embedding
from diffusion_rl.networks.mlp import MLP
from diffusion_rl.networks.transformer import SelfAttention

ENCODERS = ("transformer", "lstm", "gru")
BACKBONES = ("mlp", "attention")


class ActionVAE(Network):
    """Variational autoencoder (Kingma & Welling 2014) of one agent's action, shared by the agents.

    Args:
        action_dim: A; of discrete actions their number (one-hot in, logits out).
        latent_dim: Z.
        hidden_dim: D of two ReLU layers on either side.
    """

    def __init__(self, action_dim: int, latent_dim: int = 64, hidden_dim: int = 256):
        super().__init__(dtype=floatx())
        self.action_dim, self.latent_dim = action_dim, latent_dim
        self.encoder = MLP([action_dim, hidden_dim, hidden_dim], activation_type="ReLU", out_activation_type="ReLU")
        self.mean_head, self.log_variance_head = Linear(hidden_dim, latent_dim), Linear(hidden_dim, latent_dim)
        self.decoder = MLP([latent_dim, hidden_dim, hidden_dim, action_dim], activation_type="ReLU")

    def encode(self, actions: Array) -> tuple[Array, Array]:
        """Maps [R,A] to mean and logarithm of the variance of the latent, [R,Z] each."""
        features = self.encoder(actions)
        return self.mean_head(features), self.log_variance_head(features)

    def reparameterize(self, mean: Array, log_variance: Array, noise: Array) -> Array:
        """Returns mean + standard deviation * noise, all [R,Z]."""
        return mean + tf.exp(0.5 * log_variance) * noise

    def decode(self, latents: Array) -> Array:
        """Maps [R,Z] to actions or logits [R,A]."""
        return self.decoder(latents)

    def call(self, actions: Array, noise: Array) -> tuple[Array, Array, Array]:
        """Maps actions [R,A], noise [R,Z] to reconstruction [R,A], mean and log-variance [R,Z]."""
        mean, log_variance = self.encode(actions)
        return self.decode(self.reparameterize(mean, log_variance, noise)), mean, log_variance


def kl_to_standard_normal(mean: Array, log_variance: Array) -> Array:
    """Returns KL(N(mean, variance) || N(0, 1)) = 1/2 sum(mean^2 + variance - 1 - log variance), [R,Z] -> [R]."""
    return 0.5 * tf.reduce_sum(tf.square(mean) + tf.exp(log_variance) - 1 - log_variance, axis=-1)


class EncoderLayer(keras.layers.Layer):
    """Self-attention and a ReLU network of width 2 D, each added and then normalised (Vaswani et al. 2017)."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dtype=floatx())
        self.self_attn = SelfAttention(dim, heads)
        self.linear1, self.linear2 = Linear(dim, 2 * dim), Linear(2 * dim, dim)
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)

    def call(self, x: Array) -> Array:
        """Maps [R,To,D] to [R,To,D]."""
        x = self.norm1(x + self.self_attn(x))
        return self.norm2(x + self.linear2(tf.nn.relu(self.linear1(x))))


class RecurrentLayer(keras.layers.Layer):
    """A bidirectional LSTM or GRU layer; gates in torch's order (i, f, g, o; r, z, n)."""

    def __init__(self, in_dim: int, dim: int, kind: str):
        super().__init__(dtype=floatx())
        self.dim, self.kind, gates = dim, kind, 4 if kind == "lstm" else 3
        self.driven = [Linear(in_dim, gates * dim) for _ in range(2)]
        self.hidden = [Linear(dim, gates * dim) for _ in range(2)]

    def call(self, x: Array) -> Array:
        """Maps [R,To,in] to [R,To,2D], forward and backward."""
        forward, backward = (self._direction(x if i == 0 else x[:, ::-1], i) for i in range(2))
        return tf.concat([forward, backward[:, ::-1]], axis=-1)

    def _direction(self, x: Array, which: int) -> Array:
        driven = tf.unstack(self.driven[which](x), num=x.shape[1], axis=1)
        h = cell = tf.zeros_like(driven[0][:, : self.dim])
        outputs = []
        for step in driven:
            recurrent = self.hidden[which](h)
            if self.kind == "lstm":
                i, f, g, o = tf.split(step + recurrent, 4, axis=-1)
                cell = tf.sigmoid(f) * cell + tf.sigmoid(i) * tf.tanh(g)
                h = tf.sigmoid(o) * tf.tanh(cell)
            else:
                (r, z, n), (rh, zh, nh) = tf.split(step, 3, axis=-1), tf.split(recurrent, 3, axis=-1)
                update = tf.sigmoid(z + zh)
                h = (1 - update) * tf.tanh(n + tf.sigmoid(r + rh) * nh) + update * h
            outputs.append(h)
        return tf.stack(outputs, axis=1)


class TrajectoryEncoder(Network):
    """The recent past of one agent as a code. No dropout (the published one has 0.1).

    Args:
        row_dim: A + O.
        steps: To, of the learned positions.
        latent_dim, hidden_dim: C and D.
        kind: "transformer" (mean over the rows), "lstm" or "gru" (both directions, the last row).
        layers, heads: of the encoder.
    """

    def __init__(
        self,
        row_dim: int,
        steps: int,
        latent_dim: int = 128,
        hidden_dim: int = 256,
        kind: str = "transformer",
        layers: int = 2,
        heads: int = 8,
    ):
        super().__init__(dtype=floatx())
        if kind not in ENCODERS:
            raise UserError(f"trajectory_encoder: {kind!r} is unknown: choose one of {', '.join(ENCODERS)}")
        if hidden_dim % heads:
            raise UserError(f"trajectory_hidden_dim {hidden_dim} must be a multiple of trajectory_heads {heads}")
        self.kind, wide = kind, hidden_dim if kind == "transformer" else 2 * hidden_dim
        if kind == "transformer":
            self.embed = Linear(row_dim, hidden_dim)
            self.positions = tf.Variable(0.02 * init_rng().normal((1, steps, hidden_dim), floatx()), name="positions")
            self.blocks = [EncoderLayer(hidden_dim, heads) for _ in range(layers)]
        else:
            widths = [row_dim] + [wide] * (layers - 1)
            self.blocks = [RecurrentLayer(width, hidden_dim, kind) for width in widths]
        self.head = MLP([wide, hidden_dim, latent_dim], activation_type="ReLU")

    def call(self, rows: Array) -> Array:
        """Maps [R,To,A+O] to [R,C]."""
        x = self.embed(rows) + self.positions[:, : rows.shape[1]] if self.kind == "transformer" else rows
        x = sequential(self.blocks, x)
        return self.head(tf.reduce_mean(x, axis=1) if self.kind == "transformer" else x[:, -1])


class BackboneLayer(keras.layers.Layer):
    """x -> ReLU(Linear(ReLU(Linear(x)) + Linear(ReLU(t)))).

    With attention among the agents before it, both are added to their inputs and normalised. A single agent has nobody
    to attend to: there attention is left out, the residuals and norms stay.
    """

    def __init__(self, dim: int, time_dim: int, attention: bool, heads: int = 4):
        super().__init__(dtype=floatx())
        self.linear1, self.linear2, self.time = Linear(dim, dim), Linear(dim, dim), Linear(time_dim, dim)
        self.attention = attention
        if attention:
            self.self_attn, self.norm1, self.norm2 = SelfAttention(dim, heads), LayerNorm(dim), LayerNorm(dim)

    def call(self, x: Array, t: Array) -> Array:
        """Maps x [B,N,D], t [B,1,time_dim] to [B,N,D]."""
        if not self.attention:
            return self._mlp(x, t)
        x = self.norm1(x + self.self_attn(x)) if x.shape[1] > 1 else self.norm1(x)
        return self.norm2(x + self._mlp(x, t))

    def _mlp(self, x: Array, t: Array) -> Array:
        return tf.nn.relu(self.linear2(tf.nn.relu(self.linear1(x)) + self.time(tf.nn.relu(t))))


class DiffusionBackbone(Network):
    """Noise of the agents' latents from the noisy latents, the codes of their pasts, the step, and the return.

    Args:
        latent_dim, code_dim: H*Z and C.
        hidden_dim, layers: D, and the number of blocks.
        time_dim: width of the step's embedding.
        kind: "attention" or "mlp".
        returns_condition: the wanted return is an input.
    """

    def __init__(
        self,
        latent_dim: int,
        code_dim: int,
        hidden_dim: int = 256,
        layers: int = 4,
        time_dim: int = 128,
        kind: str = "attention",
        returns_condition: bool = False,
    ):
        super().__init__(dtype=floatx())
        if kind not in BACKBONES:
            raise UserError(f"backbone: {kind!r} is unknown: choose one of {', '.join(BACKBONES)}")
        self.time_dim, self.returns_condition = time_dim, returns_condition
        self.time_mlp = MLP([time_dim // 4, time_dim, time_dim], activation_type="ReLU")
        if returns_condition:
            self.return_mlp = MLP([1, time_dim // 2, time_dim], activation_type="ReLU")
        self.embed = Linear(latent_dim + code_dim, hidden_dim)
        self.blocks = [BackboneLayer(hidden_dim, time_dim, kind == "attention") for _ in range(layers)]
        self.project = Linear(hidden_dim, latent_dim)

    def call(
        self, latents: Array, t: Array, codes: Array, returns: Array | None = None, keep: Array | None = None
    ) -> Array:
        """Maps latents [B,N,H*Z], t [B], codes [B,N,C], returns [B,1], keep [B,1] (0: without returns) to [B,N,H*Z]."""
        embedded = self.time_mlp(sinusoidal_embedding(t, self.time_dim // 4, latents.dtype))
        if returns is not None:
            wanted = self.return_mlp(returns)
            embedded += wanted if keep is None else keep * wanted
        x = self.embed(tf.concat([latents, codes], axis=-1))
        for block in self.blocks:
            x = block(x, embedded[:, None])
        return self.project(x)


class LatentDenoiser(Network):
    """Trajectory encoder and backbone as a network of `policies.diffusion`: (x [B,H,N*Z], t [B], cond) -> noise.

    cond is {"state": [B,To,N*(A+O)]}, agent by agent its action and observation, or what `encode` made of it. With
    "returns" [B,1] and "keep" [B,1] in it (training), the noise is that for these returns; otherwise, if returns are an
    input at all, it is guided without a classifier (Ho & Salimans 2022): free + w (conditioned - free).

    Args:
        encoder, backbone: shared by the agents.
        n_agents, horizon: N and H.
        centralised: agents see each other's codes and latents (through the backbone's attention).
        target_return, guidance: the return asked for when acting, and w.
    """

    def __init__(
        self,
        encoder: TrajectoryEncoder,
        backbone: DiffusionBackbone,
        n_agents: int,
        horizon: int,
        centralised: bool = False,
        target_return: float = 1.0,
        guidance: float = 1.2,
    ):
        super().__init__(dtype=floatx())
        self.encoder, self.backbone = encoder, backbone
        self.n_agents, self.horizon, self.centralised = n_agents, horizon, centralised
        self.target_return, self.guidance = float(target_return), float(guidance)

    def encode(self, cond: dict[str, Array]) -> dict[str, Array]:
        """Maps {"state": [B,To,N*(A+O)]} to {"code": [B,N*C]}, each agent's from its own past."""
        state = cond["state"]
        steps, width = state.shape[1], state.shape[2] // self.n_agents
        rows = tf.transpose(tf.reshape(state, [-1, steps, self.n_agents, width]), [0, 2, 1, 3])
        codes = self.encoder(tf.reshape(rows, [-1, steps, width]))
        return {"code": tf.reshape(codes, [-1, self.n_agents * codes.shape[-1]])}

    def call(self, x: Array, t: Array, cond: dict[str, Array]) -> Array:
        """Maps x [B,H,N*Z], t [B], cond (see the class) to noise [B,H,N*Z]."""
        code = cond["code"] if "code" in cond else self.encode(cond)["code"]
        if "returns" in cond:
            return self._noise(x, t, code, cond["returns"], cond["keep"])
        if not self.backbone.returns_condition:
            return self._noise(x, t, code)
        free = self._noise(x, t, code)
        conditioned = self._noise(x, t, code, tf.fill([tf.shape(x)[0], 1], tf.constant(self.target_return, x.dtype)))
        return free + self.guidance * (conditioned - free)

    def _noise(self, x: Array, t: Array, code: Array, returns: Array | None = None, keep: Array | None = None) -> Array:
        n, h, z = self.n_agents, self.horizon, x.shape[-1] // self.n_agents
        latents = tf.reshape(tf.transpose(tf.reshape(x, [-1, h, n, z]), [0, 2, 1, 3]), [-1, n, h * z])
        codes = tf.reshape(code, [-1, n, code.shape[-1] // n])
        if not self.centralised and n > 1:  # every agent is a row of its own
            latents, codes = (tf.reshape(tensor, [-1, 1, tensor.shape[-1]]) for tensor in (latents, codes))
            t, returns, keep = (
                None if tensor is None else tf.repeat(tensor, n, axis=0) for tensor in (t, returns, keep)
            )
        noise = tf.reshape(self.backbone(latents, t, codes, returns, keep), [-1, n, h, z])
        return tf.reshape(tf.transpose(noise, [0, 2, 1, 3]), [-1, h, n * z])
