"""Composition, contraction and task matrices, for all parameterizations at once."""

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import parameterizations
from dmtrl_keras.kernels.plan import Geometry, apply_plan, fold, plan_flops, unfold_tasks
from dmtrl_keras.layers import TaskConv2D, TaskDense
from dmtrl_keras.parameterizations import LAF, TT, Tucker

FACTORIZED = (LAF, Tucker, TT)
SHAPES = [(6, 5, 4), (3, 2, 4, 5, 3), (3, 4, 5, 6)]


def tensors(values):
    """NumPy arrays as float32 tensors."""
    return {k: ops.convert_to_tensor(v, "float32") for k, v in values.items()}


def shapes_of(values):
    """The shapes of a dict of arrays."""
    return {k: v.shape for k, v in values.items()}


@pytest.mark.parametrize("name", parameterizations.names())
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_kernels(name, shape, rng):
    """decompose, then compose: the independent kernels, if nothing is truncated."""
    kernel = rng.normal(size=shape)
    sharing = parameterizations.get(name)
    if name == "hard":
        kernel = np.repeat(kernel[..., :1], shape[-1], axis=-1)
    elif name == "similar":
        # No two of these kernels are that similar.
        sharing = type(sharing)(threshold=1.0)
    elif name not in ("independent", "parts"):
        sharing = type(sharing)(rank=1.0)
    values = sharing.decompose(kernel)
    composed = ops.convert_to_numpy(sharing.compose(tensors(values), shape[-1]))
    np.testing.assert_allclose(np.moveaxis(composed, 0, -1), kernel, atol=1e-5)


@pytest.mark.parametrize("kind", FACTORIZED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.3, 0.6, 1.0])
def test_compose_is_the_formula(kind, shape, fraction, rng):
    """Eq. 2, 3 and 6 written out element by element."""
    sharing = kind(rank=fraction)
    values = sharing.decompose(rng.normal(size=shape))
    composed = ops.convert_to_numpy(sharing.compose(tensors(values), shape[-1]))
    for _ in range(20):
        index = tuple(int(rng.integers(d)) for d in shape)
        if kind is LAF:
            latent, matrix = values["latent"], values["task_matrix"]
            expected = sum(
                latent[(*index[:-1], k)] * matrix[k, index[-1]] for k in range(len(matrix))
            )
        elif kind is Tucker:
            core = values["core"]
            expected = 0.0
            for ranks in np.ndindex(core.shape):
                term = core[ranks]
                for n, (d, k) in enumerate(zip(index, ranks), start=1):
                    term = term * values[f"factor_{n}"][d, k]
                expected += term
        else:
            row = values["core_1"][index[0]]
            for n, d in enumerate(index[1:-1], start=2):
                row = row @ values[f"core_{n}"][:, d, :]
            expected = row @ values[f"core_{len(shape)}"][:, index[-1]]
        actual = composed[(index[-1], *index[:-1])]
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", parameterizations.names())
@pytest.mark.parametrize("shared_input", [False, True])
@pytest.mark.parametrize("window", [(), (3, 2)])
def test_every_plan_gives_the_same(name, shared_input, window, rng):
    """All contractions equal the composed kernels, dense and convolutional."""
    tasks, inputs, outputs = 4, 5, 6
    kernel = rng.normal(size=(*window, inputs, outputs, tasks))
    sharing = parameterizations.get(name)
    if issubclass(type(sharing), parameterizations.FactorizedParameterization):
        sharing = type(sharing)(rank=0.6)
    values = sharing.decompose(kernel)
    factors = tensors(values)
    composed = ops.convert_to_numpy(sharing.compose(factors, tasks))
    channels = inputs if shared_input else inputs * tasks
    x = rng.normal(size=(2, 5, 6, channels)).astype("float32")

    def convolve(x, kernel):
        return ops.conv(x, kernel, padding="same", data_format="channels_last")

    expected = []
    for t in range(tasks):
        own = x if shared_input else x[..., t * inputs : (t + 1) * inputs]
        if window:
            out = convolve(own, composed[t])
        else:
            out = own @ composed[t]
        expected.append(ops.convert_to_numpy(out))
    expected = np.concatenate(expected, axis=-1)
    plans = sharing.contractions(shapes_of(values))
    assert plans or name in ("independent", "lora", "parts", "similar")
    for plan in plans:
        actual = apply_plan(
            plan,
            ops.convert_to_tensor(x),
            factors,
            tasks=tasks,
            shared_input=shared_input,
            convolve=convolve if window else None,
        )
        np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, atol=2e-4)


@pytest.mark.parametrize("kind", FACTORIZED)
def test_task_matrix_is_linear(kind, rng):
    """Permuting S's columns permutes the tasks; scaling one scales that kernel."""
    kernel = rng.normal(size=(3, 4, 5))
    sharing = kind(rank=0.8)
    values = sharing.decompose(kernel)
    name = list(values)[-1]
    matrix = ops.convert_to_numpy(sharing.task_matrix(tensors(values), 5))
    assert matrix.shape == (sharing.rank(shapes_of(values))[-1], 5)
    composed = ops.convert_to_numpy(sharing.compose(tensors(values), 5))
    order = rng.permutation(5)
    scale = rng.normal(size=5)
    axis = 0 if kind is Tucker else -1
    changed = np.take(values[name], order, axis=axis)
    changed = changed * (scale[:, None] if kind is Tucker else scale)
    again = sharing.compose(tensors({**values, name: changed}), 5)
    expected = composed[order] * scale[:, None, None]
    np.testing.assert_allclose(ops.convert_to_numpy(again), expected, atol=1e-4)


@pytest.mark.parametrize("kind", FACTORIZED)
def test_task_rank_one_means_multiples(kind, rng):
    """With task rank 1, all kernels are multiples of one another."""
    sharing = kind(task_rank=1)
    composed = sharing.compose(tensors(sharing.decompose(rng.normal(size=(4, 5, 6)))), 6)
    rows = ops.convert_to_numpy(composed).reshape(6, -1)
    assert np.linalg.matrix_rank(rows, tol=1e-4) == 1


def test_flops_of_plain_layers():
    """The count is 2 * batch * positions * taps * channels in and out, per task."""
    layer = TaskDense(6, tasks=3, shared_input=True)
    layer.build((8, 5))
    sizes = dict(geometry=Geometry(8, 1, 1), window=1)
    flops = plan_flops(layer.stacked.plan, tasks=3, shared_input=True, **sizes)
    assert flops == 2 * 8 * 5 * 6 * 3
    layer = TaskConv2D(6, 3, tasks=3)
    layer.build((8, 7, 7, 12))
    sizes = dict(geometry=Geometry(8, 49, 25), window=9)
    flops = plan_flops(layer.stacked.plan, tasks=3, shared_input=False, **sizes)
    assert flops == 2 * 8 * 25 * 9 * 4 * 6 * 3


def test_auto_takes_the_cheaper_order():
    """Small ranks are contracted, full ranks composed."""
    small = TaskDense(256, 8, shared_input=True, sharing=Tucker(rank=2))
    small.build((64, 256))
    assert len(small.stacked.plan) > 1
    large = TaskDense(256, 8, sharing=LAF(rank=1.0))
    large.build((64, 8 * 256))
    assert len(large.stacked.plan) == 1


def test_fold_and_unfold(rng):
    """unfold_tasks undoes fold, and fold puts each task's batch together."""
    x = rng.normal(size=(2, 3, 4, 10)).astype("float32")
    folded = ops.convert_to_numpy(fold(ops.convert_to_tensor(x), 5))
    np.testing.assert_array_equal(folded[2 * 3 : 2 * 4], x[..., 6:8])
    again = unfold_tasks(ops.convert_to_tensor(folded), 5)
    np.testing.assert_array_equal(ops.convert_to_numpy(again), x)


@pytest.mark.parametrize("name", parameterizations.names())
def test_registry_and_serialization(name):
    """By name, by config and by itself it is the same."""
    sharing = parameterizations.get(name)
    assert sharing.name == name
    assert parameterizations.get(sharing) is sharing
    config = keras.saving.serialize_keras_object(sharing)
    assert config["registered_name"] == f"dmtrl_keras>{type(sharing).__name__}"
    assert parameterizations.get(config).get_config() == sharing.get_config()
    assert type(sharing).__name__ in repr(sharing)


def test_registry_errors():
    """Unknown names, bad implementations and double registration."""
    with pytest.raises(ValueError, match=r"'tucker'.*'cp'"):
        parameterizations.get("cp")
    with pytest.raises(ValueError, match="fast"):
        Tucker(rank=1, implementation="fast")
    with pytest.raises(ValueError, match="registered already"):
        parameterizations.register(LAF)
    assert parameterizations.get(None).name == "independent"
    # Without a rank and a tolerance as with 0.5.
    shape = (16, 8, 4)
    found = [shapes_of(one.decompose(np.ones(shape))) for one in (Tucker(), Tucker(0.5))]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", parameterizations.names())
@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 4, 5), (3, 4, 5), (1, 1, 2, 1)])
def test_replicate_gives_equal_kernels(name, shape, rng):
    """Every task's kernel is the given one, at full rank; the task rank is full too."""
    tasks, kernel = 4, rng.normal(size=shape)
    sharing = parameterizations.get(name)
    factorized = isinstance(sharing, parameterizations.FactorizedParameterization)
    if factorized:
        sharing = type(sharing)(rank=1.0)
    elif name == "similar":
        sharing = type(sharing)(threshold=1.0)
    values = sharing.replicate(kernel, tasks)
    composed = ops.convert_to_numpy(sharing.compose(tensors(values), tasks))
    np.testing.assert_allclose(composed, np.stack([kernel] * tasks), atol=1e-5)
    if not factorized:
        return
    matrix = ops.convert_to_numpy(sharing.task_matrix(tensors(values), tasks))
    size = kernel.size
    assert matrix.shape == (min(tasks, size), tasks)
    gram = tasks * np.eye(len(matrix))
    np.testing.assert_allclose(matrix @ matrix.T, gram, atol=1e-5)


@pytest.mark.parametrize("kind", FACTORIZED)
@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_replicate_keeps_the_tolerance(kind, tolerance, rng):
    """The error of one kernel is within the tolerance, with fewer ranks; T tasks remain."""
    tasks, kernel = 3, rng.normal(size=(3, 3, 8, 2)) @ rng.normal(size=(2, 12))
    sharing = kind(tolerance=tolerance)
    values = sharing.replicate(kernel, tasks)
    composed = ops.convert_to_numpy(sharing.compose(tensors(values), tasks))
    error = np.linalg.norm(composed - kernel) / np.linalg.norm(kernel) / np.sqrt(tasks)
    assert error <= tolerance + 1e-6
    rank = sharing.rank(shapes_of(values))
    assert rank[-1] == tasks
    assert np.prod(rank) < 9 * 8 * 12 * tasks
    # A saved layer comes back with these ranks, from a draw of the same shape.
    again = sharing.with_rank(rank).decompose(rng.normal(size=(*kernel.shape, tasks)))
    assert shapes_of(again) == shapes_of(values)


@pytest.mark.parametrize("kind", FACTORIZED)
def test_replicate_takes_every_kind_of_rank(kind, rng):
    """An int is a cap at any size; the task rank is full, but in a tuple, or by itself."""
    kernel, tasks = rng.normal(size=(3, 3, 8, 12)), 4
    ranks = {
        rank: kind(rank=rank).rank(shapes_of(kind(rank=rank).replicate(kernel, tasks)))
        for rank in (2, 1000, 0.5)
    }
    assert max(ranks[2][:-1], default=2) == 2
    assert ranks[2][-1] == (2 if kind is LAF else tasks)
    assert ranks[1000][-1] == tasks
    assert ranks[0.5][-1] == (2 if kind is LAF else tasks)
    few = kind(task_rank=3)
    assert few.rank(shapes_of(few.replicate(kernel, tasks)))[-1] == 3
    exact = {1: (3,), 5: (2, 3, 4, 5, 3), 4: (2, 3, 4, 3)}[len(ranks[2])]
    values = kind(rank=exact).replicate(kernel, tasks)
    assert kind(rank=exact).rank(shapes_of(values)) == exact
    if kind is not LAF:
        with pytest.raises(ValueError, match="rank"):
            kind(rank=(*exact[:-2], 500, 3)).replicate(kernel, tasks)


@pytest.mark.parametrize("kind", FACTORIZED)
@pytest.mark.parametrize(
    ("units", "choice"),
    [(5, {"tolerance": 0.5}), (1, {"tolerance": 0.5}), (5, {"rank": 0.5})],
)
def test_replicated_tasks_can_differ(kind, units, choice, rng):
    """The first gradient step already takes the tasks apart, other than by scale."""
    from dmtrl_keras.tasks.rewrite import with_sharing

    tasks, kernel = 3, rng.normal(size=(6, units))
    sharing = kind(**choice)
    values = sharing.replicate(kernel, tasks)
    sharing = sharing.with_rank(sharing.rank(shapes_of(values)))
    layer = with_sharing(TaskDense(units, tasks, shared_input=True), sharing)
    layer.start_from(values)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x, y = rng.normal(size=(32, 6)), rng.normal(size=(32, 3 * units))
    model.fit(x, y, verbose=0)
    kernels = ops.convert_to_numpy(layer.kernel).reshape(-1, tasks)
    unit = kernels / np.linalg.norm(kernels, axis=0)
    cosines = (unit.T @ unit)[np.triu_indices(tasks, 1)]
    assert np.all(cosines < 0.9999), cosines
