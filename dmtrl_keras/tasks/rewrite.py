"""From one way of sharing kernels to another: the layer classes by parameterization."""

from dmtrl_keras.dmtrl.layers import (
    LAFConv1D,
    LAFConv2D,
    LAFConv3D,
    LAFDense,
    TTConv1D,
    TTConv2D,
    TTConv3D,
    TTDense,
    TuckerConv1D,
    TuckerConv2D,
    TuckerConv3D,
    TuckerDense,
)
from dmtrl_keras.mtal.layers import (
    SimilarKernelConv1D,
    SimilarKernelConv2D,
    SimilarKernelConv3D,
)
from dmtrl_keras.tasks.task_layer import NamedSharing

_CLASSES = {
    (cls.__bases__[1], cls._parameterization): cls
    for cls in (
        LAFDense,
        LAFConv1D,
        LAFConv2D,
        LAFConv3D,
        TuckerDense,
        TuckerConv1D,
        TuckerConv2D,
        TuckerConv3D,
        TTDense,
        TTConv1D,
        TTConv2D,
        TTConv3D,
        SimilarKernelConv1D,
        SimilarKernelConv2D,
        SimilarKernelConv3D,
    )
}


def with_sharing(layer, sharing):
    """A new, unbuilt layer like `layer`, with its kernels parameterized otherwise.

    Args:
        layer: a layer with T kernels, such as `TaskConv2D`.
        sharing: a `Parameterization`.

    Returns:
        The named class where there is one (`TuckerConv2D`), else the class of the
        independent layer with `sharing` as its argument.
    """
    config = layer.get_config()
    own = type(layer)
    if isinstance(layer, NamedSharing):
        own = own.__bases__[1]
        for name in layer.sharing.get_config():
            del config[name]
    named = _CLASSES.get((own, type(sharing)))
    if named is not None:
        config.pop("sharing", None)
        return named.from_config({**config, **sharing.get_config()})
    return own.from_config({**config, "sharing": sharing})
