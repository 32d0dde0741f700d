"""The tensor normal distribution: density, sampling, maximum likelihood."""

from dmtrl_keras.ground.linalg import whitener
from dmtrl_keras.mrn.sparse import graphical_lasso
from dmtrl_keras.mrn.tensor_normal import (
    TensorNormal,
    check_covariance,
    common_mean,
    flip_flop,
    log_density,
    log_determinant,
    mode_covariance,
    mode_products,
    quadratic_form,
    sample,
)

__all__ = [
    "TensorNormal",
    "check_covariance",
    "common_mean",
    "flip_flop",
    "graphical_lasso",
    "log_density",
    "log_determinant",
    "mode_covariance",
    "mode_products",
    "quadratic_form",
    "sample",
    "whitener",
]
