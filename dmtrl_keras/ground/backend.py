"""The one place where the library speaks to a backend.

Everything else uses `keras.ops` and Keras's public interface, so that the same code runs
on TensorFlow, JAX and PyTorch.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from dmtrl_keras.ground.keras_private import MASK, attach, attached, torch_scope
from dmtrl_keras.ground.types import Tensor


def tensorflow() -> Any:
    """The TensorFlow module, for `tf.data` and `tf.distribute` only."""
    import tensorflow as tf

    return tf


def has_tensorflow() -> bool:
    """Whether TensorFlow is installed, which other backends don't need."""
    return importlib.util.find_spec("tensorflow") is not None


def makes_batches(dataset: Any) -> bool:
    """Whether a `tf.data.Dataset` is known to be batched, and not unbatched afterwards."""
    while True:
        kind = type(dataset).__name__
        if "Unbatch" in kind or "FlatMap" in kind or "Interleave" in kind:
            return False
        if "Batch" in kind:
            return True
        # No public name leads to what a data set is made from.
        sources: list[Any] = getattr(dataset, "_inputs", list)()
        if len(sources) != 1:
            return False
        (dataset,) = sources


def teach_tf2onnx() -> None:
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
        def version_9(cls, ctx: Any, node: Any, **kwargs: Any) -> None:
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


def assert_true(condition: Tensor, message: str) -> None:
    """Raise if a boolean tensor is false, wherever the backend can.

    Args:
        condition: boolean scalar tensor.
        message: str.

    Raises:
        ValueError: or, in a graph of TensorFlow, `tf.errors.InvalidArgumentError`. Nothing
            is raised in code that XLA compiles.
    """
    if _in_graph():
        tensorflow().debugging.Assert(condition, [message])
        return
    try:
        failed = not bool(condition)
    except Exception:  # A traced value: JAX has a type of its own for that.
        return
    if failed:
        raise ValueError(message)


def _in_graph() -> bool:
    """Whether what is computed becomes a graph of TensorFlow."""
    on_tensorflow = keras.backend.backend() == "tensorflow"
    return on_tensorflow and not tensorflow().executing_eagerly()


def checked(value: Tensor, condition: Tensor, message: str) -> Tensor:
    """A value that is used only after a check, by the gradients that depend on it too.

    TensorFlow runs operations in any order that their inputs allow: what would fail by
    itself, or abort the process, must depend on the check.

    Args:
        value: tensor.
        condition: boolean scalar tensor.
        message: str.

    Returns:
        The value.

    Raises:
        ValueError: as `assert_true`.
    """
    if not _in_graph():
        assert_true(condition, message)
        return value
    tf = tensorflow()
    with tf.control_dependencies([tf.debugging.Assert(condition, [message])]):
        return tf.identity(value)


def full_precision(dtype: str) -> str:
    """The dtype for linear algebra beside weights of a dtype: float32, or float64."""
    return "float64" if dtype == "float64" else "float32"


def eager_scope() -> contextlib.AbstractContextManager[Any]:
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
        return torch_scope()
    return contextlib.nullcontext()


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that runs as one compiled loop, where the backend does not fuse by itself.

    Args:
        function: function of tensors, without state, whose gradient is never taken.
    """
    compiled: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def call(*arguments: Tensor) -> Tensor:
        if keras.backend.backend() != "tensorflow":
            return function(*arguments)
        # TensorFlow warns of one function that it traces for the shapes of many layers.
        key = tuple((tuple(x.shape), x.dtype) for x in arguments)
        if key not in compiled:
            own = functools.partial(function)
            compiled[key] = tensorflow().function(own, jit_compile=True)
        return compiled[key](*arguments)

    return call


def replicas_in_sync() -> int:
    """The number of replicas of the strategy that is in scope; 1 without any."""
    if keras.backend.backend() != "tensorflow":
        return 1
    return tensorflow().distribute.get_strategy().num_replicas_in_sync


def all_reduce_sum(x: Any) -> Any:
    """The sum of a tensor over all replicas, where there are several; or of a list."""
    return _all_reduce(x, "SUM")


def mean_over_replicas(x: Tensor) -> Tensor:
    """The mean of a tensor over all replicas, where there are several."""
    return _all_reduce(x, "MEAN")


def _all_reduce(x: Any, how: str) -> Any:
    if replicas_in_sync() == 1:
        return x
    distribute = tensorflow().distribute
    context = distribute.get_replica_context()
    return x if context is None else context.all_reduce(distribute.ReduceOp[how], x)


def share_of_replica(x: Tensor) -> Tensor:
    """A loss that all replicas have in common, divided among them.

    Keras sums the losses of the replicas.
    """
    return x / replicas_in_sync()


def check_replicas(outputs: Tensor, owner: str) -> Tensor:
    """Outputs of a replica that has examples: statistics of none of them are NaN.

    Args:
        outputs: tensor, whose first axis are the examples of this replica.
        owner: str, for the message.

    Returns:
        The outputs, to compute the loss from.

    Raises:
        tf.errors.InvalidArgumentError: if there are none.
    """
    if replicas_in_sync() == 1:
        return outputs
    found = checked(
        outputs,
        keras.ops.shape(outputs)[0] > 0,
        f"{owner}: a replica got no example. With {replicas_in_sync()} replicas "
        "every batch, also the last one, must have as many examples at least: use "
        "batch(n, drop_remainder=True), or see distribution.divisible.",
    )
    attach(found, MASK, attached(outputs, MASK))
    return found
