"""Layers that own weights, built at construction (every dimension is known), initialised as torch initialises them.

Weights take the dtype of `core.keras.floatx()` and draw their initial values from `core.noise.init_rng()`.
"""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import floatx, keras
from diffusion_rl.core.noise import init_rng
from diffusion_rl.core.precision import product
from diffusion_rl.core.typing import Array

T = TypeVar("T")


def _softplus(x: Array) -> Array:
    return tf.where(x > 20, x, tf.nn.softplus(tf.minimum(x, 20)))  # linear above 20, as torch


@tf.custom_gradient
def mish(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Returns x tanh(log(1 + e^x)) (Misra 2019), [...], with a single exponential.

    tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2).
    """
    e = tf.exp(tf.minimum(x, 20))  # from there on the factor is 1 to double precision
    n = e * (e + 2)
    inverse = 1 / (n + 2)
    factor = n * inverse

    def gradient(upstream: Array) -> Array:
        return upstream * (factor + x * (4 * e * (e + 1)) * tf.square(inverse))

    return x * factor, gradient


def gelu(x: Array) -> Array:
    """Returns x Phi(x) (Hendrycks & Gimpel 2016), [...], exact. tf.nn.gelu holds its constant in float32 whatever the
    input."""
    return 0.5 * x * (1 + tf.math.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "ReLU": tf.nn.relu,
    "ELU": tf.nn.elu,
    "GELU": gelu,
    "Tanh": tf.tanh,
    "Mish": mish,
    "Identity": tf.identity,
    "Softplus": _softplus,
}


def activation(name: str) -> Callable[[Array], Array]:
    """Returns the elementwise activation [...] -> [...] of that name (the reference's spelling)."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Network(keras.Model):
    """A Keras model whose constructor makes all its layers and weights; actors, critics and planners are made of it.

    `summary`, `count_params`, `get_weights`, `save_weights` and `load_weights` need no example input. Weights are saved
    as NAME.weights.h5, or as a checkpoint of TensorFlow.
    """

    __reduce__ = object.__reduce__  # copies are those of any layer; Keras would go through a SavedModel
    __copy__ = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._checkpoint = tf.train.Checkpoint(root=weakref.ref(copied))
        return copied

    @property
    def built(self) -> bool:
        """Returns that all weights exist."""
        return True

    @built.setter
    def built(self, value: bool) -> None:
        """Does nothing: Keras sets it."""

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints layers and numbers of parameters; arguments of Keras."""
        for part in self._flatten_layers():
            part.built = True  # Keras counts no weights of layers that were never called
        super().summary(*args, **kwargs)

    def save_weights(self, filepath: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves all weights; arguments of Keras.

        Raises:
            UserError: the file's name asks for Keras' older HDF5 format, in which weights of one name cannot lie.
        """
        name = os.fspath(filepath)
        if name.endswith((".h5", ".hdf5", ".keras")) and not name.endswith(".weights.h5"):
            raise UserError(f"{name}: save weights as NAME.weights.h5")
        super().save_weights(filepath, *args, **kwargs)


class Linear(keras.layers.Layer):
    """y = x @ kernel + bias; kernel [in,out], bias [out], both uniform in +-1/sqrt(in).

    With stacked weights (`stacked`), kernel [M,in,out] and bias [M,out], every member makes its own product.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(dtype=floatx())
        bound = 1.0 / math.sqrt(in_dim)
        draw = init_rng().uniform((in_dim + 1, out_dim), -bound, bound, dtype=floatx())
        self.kernel = tf.Variable(draw[:-1], name="kernel")
        self.bias = tf.Variable(draw[-1], name="bias")

    def call(self, x: Array) -> Array:
        """Maps [..., in] to [..., out]; of more than one leading dimension only the first may be unknown.

        Stacked: [B,in], the same for all members, or [M,B,in] -> [M,B,out].
        """
        if self.kernel.shape.rank > 2:
            return tf.matmul(x, self.kernel) + self.bias[:, None]
        if len(x.shape) > 2:  # one product over all rows: a batched one would sum a kernel gradient per batch entry
            rows = tf.reshape(x, [-1, x.shape[-1]])
            return tf.reshape(self(rows), [-1, *x.shape[1:-1], self.kernel.shape[1]])
        return product(x, self.kernel) + self.bias


class LayerNorm(keras.layers.Layer):
    """Normalisation over the last axis with gain and offset; biased variance, epsilon inside the root."""

    axes: tuple[int, ...] = (-1,)

    def __init__(self, dim: int, epsilon: float = 1e-5):
        super().__init__(dtype=floatx())
        self.epsilon = epsilon
        self.gamma = tf.Variable(np.ones(dim, floatx()), name="gamma")
        self.beta = tf.Variable(np.zeros(dim, floatx()), name="beta")

    def call(self, x: Array) -> Array:
        """Maps x [...,dim] to [...,dim]; stacked: [M,B,dim]."""
        mean, variance = tf.nn.moments(x, axes=self.axes, keepdims=True)
        gamma, beta = (w if w.shape.rank == 1 else w[:, None] for w in (self.gamma, self.beta))  # stacked: [M,1,dim]
        return (x - mean) * tf.math.rsqrt(variance + tf.constant(self.epsilon, x.dtype)) * gamma + beta


def sinusoidal_embedding(t: Array, dim: int, dtype: str | tf.DType) -> Array:
    """Returns [sin(t w), cos(t w)] with w_k = 10000^(-k / (dim/2 - 1)) (Vaswani et al. 2017).

    Args:
        t: [B] steps, not scaled.
        dim: even, at least 4 (with 2 the exponent divides by zero).

    Returns:
        [B, dim]
    """
    half = dim // 2
    frequencies = np.exp(np.arange(half).astype(tf.as_dtype(dtype).as_numpy_dtype) * -(math.log(10000) / (half - 1)))
    angles = tf.cast(t, dtype)[:, None] * tf.constant(frequencies, dtype)[None]
    return tf.concat([tf.sin(angles), tf.cos(angles)], axis=-1)


def sequential(layers: Iterable[Any], x: Array) -> Array:
    """Applies layers and functions to x [...], one after the other."""
    for layer in layers:
        x = layer(x)
    return x


def uniform_variable(shape: Sequence[int], bound: float, name: str) -> tf.Variable:
    """Draws a variable [*shape] uniformly within +-bound."""
    return tf.Variable(init_rng().uniform(shape, -bound, bound, dtype=floatx()), name=name)


def normal_linear(in_dim: int, out_dim: int, std: float) -> Linear:
    """Makes a Linear whose weights are drawn from N(0, std^2), without initial bias."""
    linear = Linear(in_dim, out_dim)
    linear.kernel.assign(init_rng().normal((in_dim, out_dim), dtype=floatx()) * std)
    return without_bias(linear)


def without_bias(linear: Linear) -> Linear:
    """Sets the bias of a Linear to zero. Returns the layer."""
    linear.bias.assign(tf.zeros_like(linear.bias))
    return linear


def dropped(x: Array, keep: Array | None, rate: float) -> Array:
    """Drops entries of x [...] at `rate`: x * keep / (1 - rate) with the 0/1 mask `keep` [...]; without one, none."""
    return x * tf.cast(keep, x.dtype) / (1 - rate) if rate and keep is not None else x


class TimeEmbedding(keras.layers.Layer):
    """Sinusoidal embedding followed by Linear(dim, expansion * dim), Mish, Linear(expansion * dim, dim)."""

    def __init__(self, dim: int, expansion: int = 2):
        super().__init__(dtype=floatx())
        if dim < 4 or dim % 2:
            raise UserError(f"time_dim={dim}: the sinusoidal embedding needs an even dimension of at least 4")
        self.dim = dim
        self.expand = Linear(dim, expansion * dim)
        self.project = Linear(expansion * dim, dim)

    def call(self, t: Array) -> Array:
        """Maps t [B] to [B,dim]."""
        return self.project(mish(self.expand(sinusoidal_embedding(t, self.dim, self.expand.kernel.dtype))))


# Where Keras itself keeps what also stands in an attribute, and whose `build` makes no weights.
_TRACKED = {"_trainable_weights", "_non_trainable_weights", "_initial_weights", "_self_tracked_trackables"}
_WEIGHTLESS = {"Layer", "Model", "Sequential", "Functional", "BaseRandomLayer", "_Merge", "Concatenate", "Dot"}


def named_variables(module: object, prefix: str = "") -> Iterator[tuple[str, tf.Variable]]:
    """Yields every variable of a module with its attribute path ("mlp_mean.layers.0.kernel"), in order of definition.

    A Keras layer's come last where they do not stand in public attributes: those of private ones under their names,
    those of `keras.Sequential` under the number of their layer ("net.0.kernel").

    Raises:
        UserError: Keras knows a weight that has no such name, or a layer has not made its weights yet.
    """
    seen: set[int] = set()
    for name, value in vars(module).items():
        if not name.startswith("_"):
            for path, variable in _named(value, f"{prefix}{name}"):
                seen.add(id(variable))
                yield path, variable
    if isinstance(module, keras.layers.Layer):
        yield from _hidden_variables(module, prefix, seen)


def _hidden_variables(layer: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, tf.Variable]]:
    """Yields those that Keras knows and that are not `seen` in public attributes."""
    _require_weights(layer, prefix)
    left = {id(weight): weight for weight in _keras_weights(layer) if id(weight) not in seen}
    is_graph = any(cls.__name__ == "Functional" for cls in type(layer).__mro__)  # Sequential is one, too
    parts = [(str(i), part) for i, part in enumerate(layer.layers)] if is_graph else []
    parts += [(k, v) for k, v in vars(layer).items() if k.startswith("_") and k not in _TRACKED]
    for name, value in parts:
        for path, variable in _named(value, f"{prefix}{name}"):
            if left.pop(id(variable), None) is not None:
                yield path, variable
    if left:
        lost = ", ".join(weight.name for weight in left.values())
        raise UserError(f"{_described(layer, prefix)}: {lost}: no attribute, list or dictionary holds these weights")


def _require_weights(layer: Any, prefix: str) -> None:
    """Raises UserError if a layer makes its weights when it is first called, and has not been."""
    maker = next(cls.__name__ for cls in type(layer).__mro__ if "build" in vars(cls))
    late = maker not in _WEIGHTLESS or isinstance(layer, keras.layers.MultiHeadAttention)
    if late and not layer.built and not _keras_weights(layer):
        raise UserError(f"{_described(layer, prefix)} has no weights yet: build it in the network's constructor")


def _keras_weights(layer: Any) -> list[tf.Variable]:
    """Returns the weights that Keras knows; none of models that still have to be built, which refuse to say."""
    try:
        return layer.weights
    except ValueError:
        return []


def _described(layer: Any, prefix: str) -> str:
    return f"{type(layer).__name__} at {prefix[:-1]!r}" if prefix else type(layer).__name__


def _named(value: object, path: str) -> Iterator[tuple[str, tf.Variable]]:
    if isinstance(value, tf.Variable):
        yield path, value
    elif isinstance(value, keras.layers.Layer):
        yield from named_variables(value, path + ".")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _named(item, f"{path}.{i}")
    elif _is_of_layer(value):
        for key, item in value.items():  # type: ignore[attr-defined]
            yield from _named(item, f"{path}.{key}")


def _is_of_layer(value: object) -> bool:
    """Returns whether it is a dictionary that is an attribute of a Keras layer."""
    return isinstance(value, dict) and isinstance(value, tf.__internal__.tracking.TrackableDataStructure)


def with_variables(module: T, change: Callable[[str, tf.Variable], tf.Variable | Array], prefix: str = "") -> T:
    """Returns a copy of a module that computes with change(path, variable) [...] in place of each variable [...].

    Raises:
        UserError: variables stand elsewhere than in public attributes and their lists.
    """
    copied = copy.copy(module)
    for name, value in vars(module).items():
        if not name.startswith("_"):
            copied.__dict__[name] = _changed(value, f"{prefix}{name}", change)
    if isinstance(module, keras.layers.Layer):
        public = {id(v) for name, value in vars(module).items() if name[0] != "_" for _, v in _named(value, name)}
        if any(id(weight) not in public for weight in _keras_weights(module)):
            raise UserError(f"{_described(module, prefix)}: keep its weights in public attributes or lists of them")
        copied.__dict__.update((name, []) for name in _TRACKED & vars(module).keys())
    return copied


def _changed(value: Any, path: str, change: Callable[[str, tf.Variable], tf.Variable | Array]) -> Any:
    if isinstance(value, (tf.Variable, tf.Tensor)):
        return change(path, value)
    if isinstance(value, keras.layers.Layer):
        return with_variables(value, change, path + ".")
    if isinstance(value, (list, tuple)):
        return [_changed(item, f"{path}.{i}", change) for i, item in enumerate(value)]
    if _is_of_layer(value):
        return {key: _changed(item, f"{path}.{key}", change) for key, item in value.items()}
    return value


def variables_of(module: object) -> list[tf.Variable]:
    """Returns the variables of a module in order of definition: the order of every optimizer and gradient list."""
    return [v for _, v in named_variables(module)]


def dtype_of(module: object) -> tf.DType:
    """Returns the type of a module's first variable, without a walk to all the others; float32 where there is none."""
    return next((variable.dtype for _, variable in named_variables(module)), tf.float32)


def trainable_of(module: object) -> list[tf.Variable]:
    """Returns the variables of a module that are trained, in order of definition."""
    return [v for v in variables_of(module) if v.trainable]


def copy_weights(source: object, target: object) -> None:
    """Gives `target` the weights of `source` (same architecture)."""
    for a, b in zip(variables_of(source), variables_of(target), strict=True):
        b.assign(a)


def clone(network: T) -> T:
    """Copies a network: the same architecture and weights, in variables of its own."""
    return copy.deepcopy(network)


def flatten_state(cond: dict[str, Array]) -> Array:
    """Flattens the observation history to one row: {"state": [B,To,O]} -> [B, To*O]."""
    state = cond["state"]
    return tf.reshape(state, [-1, state.shape[-2] * state.shape[-1]]) if len(state.shape) > 2 else state
