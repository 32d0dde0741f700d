"""The one place where the library speaks to a backend directly.

Everything else uses `keras.ops`, so that the same code runs on TensorFlow,
JAX and PyTorch.
"""

import contextlib

import keras


def tensorflow():
    """The TensorFlow module, for `tf.data` and `tf.distribute` only."""
    import tensorflow as tf

    return tf


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
