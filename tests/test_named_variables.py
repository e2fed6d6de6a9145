"""Whatever weights Keras knows of a network are trained, saved and loaded under stable names, or it is an error."""

import copy

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import keras
from diffusion_rl.interop import torch_names
from diffusion_rl.networks.layers import Linear, copy_weights, named_variables, variables_of, with_variables


def built(layer, width):
    layer.build((None, width))
    return layer


def sequential(*, private=False):
    layers = [keras.layers.Dense(3), keras.layers.ReLU(), keras.layers.Dropout(0.1), keras.layers.Dense(2)]
    return built(keras.Sequential(layers, name="private" if private else "net"), 4)


class Everywhere(keras.layers.Layer):
    """Weights in public attributes, lists, dictionaries, tuples, private attributes and Sequential."""

    def __init__(self):
        super().__init__()
        self._first = built(keras.layers.Dense(1), 2)
        self.head = Linear(2, 1)
        self.net = sequential()
        self.parts = {"a": built(keras.layers.Dense(1), 2), "b": [Linear(2, 1)]}
        self.pair = (Linear(1, 1), tf.Variable(1.0))
        self._private = sequential(private=True)
        self._scale = tf.Variable(2.0, name="scale")

    def call(self, x):
        a, b = self.parts["a"], self.parts["b"][0]
        seen = self.net(x) + self._private(x)
        y = self.head(seen) + a(seen) + b(seen) + self._first(seen)
        return self._scale * self.pair[1] * self.pair[0](y)


NAMES = [
    *("head.weight", "head.bias", "net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"),
    *("parts.a.weight", "parts.a.bias", "parts.b.0.weight", "parts.b.0.bias", "pair.0.weight", "pair.0.bias", "pair.1"),
    *("_first.weight", "_first.bias"),
    *("_private.0.weight", "_private.0.bias", "_private.3.weight", "_private.3.bias", "_scale"),
]


def test_all_weights_are_named_trained_saved_and_loaded():
    network = Everywhere()
    assert list(torch_names.state_dict(network)) == NAMES
    assert {id(v) for v in variables_of(network)} == {id(v) for v in network.weights}
    x = tf.random.stateless_normal([5, 4], [1, 2])
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(network(x))
    assert all(g is not None for g in tape.gradient(total, variables_of(network)))
    assert list(torch_names.state_dict(network)) == NAMES, "calling changes nothing"
    other = Everywhere()
    torch_names.load_state_dict(other, torch_names.state_dict(network))
    np.testing.assert_array_equal(other(x), network(x))
    cloned = copy.deepcopy(network)
    copy_weights(other, cloned)
    np.testing.assert_array_equal(cloned(x), network(x))


def test_a_functional_model_is_named_by_its_layers():
    entry = keras.Input([3])
    model = keras.Model(entry, keras.layers.Dense(1)(keras.layers.Dense(2)(entry)))
    names = [name for name, _ in named_variables(model)]
    assert names == [f"{i}.{kind}" for i in (1, 2) for kind in ("kernel", "bias")]


class Holder(keras.layers.Layer):
    def __init__(self, part):
        super().__init__()
        self.part = part


@pytest.mark.parametrize(
    "late",
    [
        lambda: keras.layers.Dense(2),
        lambda: keras.Sequential([keras.layers.Dense(2)]),
        lambda: keras.layers.LSTM(2),
        lambda: keras.layers.MultiHeadAttention(1, 2),
        lambda: [keras.layers.LayerNormalization()],
    ],
)
def test_a_layer_without_weights_yet_is_an_error(late):
    with pytest.raises(UserError, match=r"at 'part.* has no weights yet: build it in the network's constructor"):
        variables_of(Holder(late()))


def test_layers_that_never_have_weights_are_none():
    weightless = [keras.layers.Dropout(0.1), keras.layers.Add(), keras.layers.Flatten(), keras.layers.Softmax()]
    assert variables_of(Holder(weightless)) == []


def test_a_weight_that_nothing_holds_is_an_error():
    layer = Holder(None)
    layer.add_weight("lonely", [2])
    with pytest.raises(UserError, match=r"Holder: lonely:0: no attribute, list or dictionary holds these weights"):
        variables_of(layer)


def test_what_cannot_be_replaced_is_an_error():
    doubled = with_variables(Holder({"a": Linear(1, 1)}), lambda _, v: 2 * v)
    assert not isinstance(doubled.part["a"].kernel, tf.Variable)
    for hidden in (Holder(sequential()), Everywhere()):
        with pytest.raises(UserError, match="keep its weights in public attributes or lists of them"):
            with_variables(hidden, lambda _, v: 2 * v)
