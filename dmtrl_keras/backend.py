"""The one place where the library speaks to a backend directly.

Everything else uses `keras.ops`, so that the same code runs on TensorFlow,
JAX and PyTorch.
"""

import contextlib

import keras
import numpy as np


def tensorflow():
    """The TensorFlow module, for `tf.data` and `tf.distribute` only."""
    import tensorflow as tf

    return tf


def teach_tf2onnx():
    """Let tf2onnx convert the exact GELU, which Keras computes with `erfc`.

    tf2onnx 1.17 knows `Erf` but copies `Erfc`, which ONNX lacks, into a file that no
    runtime loads.
    """
    import tf2onnx
    from tf2onnx.handler import tf_op

    opsets = tf_op.get_opsets().get("", [])
    if any("Erfc" in opset for opset in opsets if opset):
        return

    class Complement:
        """`erfc(x) = 1 - erf(x)`."""

        @classmethod
        def version_9(cls, ctx, node, **kwargs):
            (source,), output = node.input, node.output[0]
            shape, dtype = ctx.get_shape(output), ctx.get_dtype(output)
            outputs, name = node.output, node.name
            ctx.remove_node(name)
            erf = ctx.make_node("Erf", [source], shapes=[shape], dtypes=[dtype])
            one = np.ones((), tf2onnx.utils.map_onnx_to_numpy_type(dtype))
            one = ctx.make_const(tf2onnx.utils.make_name("one"), one)
            operands = [one.output[0], erf.output[0]]
            ctx.make_node(
                "Sub", operands, name=name, outputs=outputs, shapes=[shape], dtypes=[dtype]
            )

    tf_op("Erfc")(Complement)


def eager_scope():
    """A context in which `keras.ops` return values, not symbolic tensors.

    A layer may be built while its model is traced, but ranks that come from a
    tolerance need the numbers of the start kernel there and then.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return tensorflow().init_scope()
    if backend == "jax":
        import jax

        return jax.ensure_compile_time_eval()
    if backend == "torch":
        # Keras traces on the "meta" device, which holds no values.
        from keras.src.backend.torch.core import device_scope, get_device

        device = get_device()
        return device_scope("cpu" if device == "meta" else device)
    return contextlib.nullcontext()
