"""Act with an exported policy. Needs TensorFlow and nothing of this repository.

python script/examples/act.py state_999_savedmodel (or state_999.tflite)
"""

import sys

import numpy as np
import tensorflow as tf

path = sys.argv[1]
if path.endswith(".tflite"):
    act = tf.lite.Interpreter(path).get_signature_runner("serving_default")
    inputs = {name: (spec["shape"], spec["dtype"]) for name, spec in act.get_input_details().items()}
else:
    policy = tf.saved_model.load(path)
    act = policy.signatures["serving_default"]
    specs = act.structured_input_signature[1]
    inputs = {name: ([n or 1 for n in spec.shape], spec.dtype.as_numpy_dtype) for name, spec in specs.items()}
observation = {name: np.zeros(shape, dtype) for name, (shape, dtype) in inputs.items()}  # put the environment's here
outputs = act(**{name: tf.constant(value) for name, value in observation.items()})
print(np.array(outputs["actions"]))  # [batch, steps to execute, action_dim] in the environment's units
