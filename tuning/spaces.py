"""Hyperparameters of each family, declared once for experiments and users' own models.

Every function takes Keras Tuner's `HyperParameters` and default values, and
returns values. The first trial of a search has the defaults.
"""

# Rates that suit an optimizer, relative to Adam's.
_RATES = {"adam": 1, "adamw": 1, "rmsprop": 1, "sgd": 10}


def around(hp, name, default, factor):
    """A positive number, from `default / factor` to `default * factor`, logarithmic."""
    low, high = default / factor, default * factor
    return hp.Float(name, low, high, sampling="log", default=default)


def optimizer_and_rate(hp, optimizer, rate, tune):
    """The optimizer and its learning rate.

    Args:
        hp: `keras_tuner.HyperParameters`.
        optimizer: str, the default one's name.
        rate: float, its default learning rate; for others the range is moved.
        tune: collection of what is searched for, of which `"optimizer"` and
            `"learning_rate"` matter here.

    Returns:
        `(name, rate)`.
    """
    chosen = optimizer
    if "optimizer" in tune:
        chosen = hp.Choice("optimizer", sorted(_RATES), default=optimizer)
    rates = {name: rate * scale / _RATES[optimizer] for name, scale in _RATES.items()}
    if "learning_rate" not in tune:
        return chosen, rates[chosen]
    if "optimizer" not in tune:
        return chosen, around(hp, "learning_rate", rate, 10)
    found = {}
    for name in sorted(_RATES):
        with hp.conditional_scope("optimizer", [name]):
            found[name] = around(hp, f"learning_rate/{name}", rates[name], 10)
    return chosen, found[chosen]


def loss_weights(hp, tasks, given, tune):
    """A weight for each task's loss, a dict; those that were given if it's not searched."""
    if "loss_weights" not in tune:
        return dict(given)
    return {
        task: around(hp, f"loss_weight/{task}", given.get(task, 1.0), 10) for task in tasks
    }


def factorization(hp, layers, tolerance, per_layer, highest=0.7):
    """How kernels are approximated.

    Args:
        hp: `keras_tuner.HyperParameters`.
        layers: names of the layers.
        tolerance: float, the default error.
        per_layer: bool, whether a rank for each layer is searched, too: a fraction of its
            full ranks.
        highest: float, the most of the tolerances: kernels that aren't trained yet have
            nearly full rank, and only a large one saves anything.

    Returns:
        `(tolerance, ranks)`: a float and None, or None and a dict from layer to rank.
    """
    by = hp.Choice("ranks", ["tolerance", "layers"]) if per_layer else "tolerance"
    if not per_layer:
        return _tolerance(hp, tolerance, highest), None
    with hp.conditional_scope("ranks", ["tolerance"]):
        found = _tolerance(hp, tolerance, highest)
    with hp.conditional_scope("ranks", ["layers"]):
        ranks = {
            layer: hp.Float(f"rank/{layer}", 0.05, 1.0, sampling="log", default=0.5)
            for layer in layers
        }
    return (found, None) if by == "tolerance" else (None, ranks)


def _tolerance(hp, default, highest):
    low, high = min(0.01, default), max(highest, default)
    return hp.Float("tolerance", low, high, sampling="log", default=default)


def threshold(hp, default, blocks, per_layer):
    """MTAL's thresholds.

    Args:
        hp: `keras_tuner.HyperParameters`.
        default: float.
        blocks: names of the parts of the network that may have their own.
        per_layer: bool, whether these are searched, too.

    Returns:
        A list: one threshold, or one for each block.
    """

    def number(name):
        low, high = min(0.1, default), max(0.9, default)
        return hp.Float(name, low, high, default=default)

    if not per_layer:
        return [number("threshold")]
    by = hp.Choice("thresholds", ["one", "blocks"])
    with hp.conditional_scope("thresholds", ["one"]):
        one = [number("threshold")]
    with hp.conditional_scope("thresholds", ["blocks"]):
        several = [number(f"threshold/{block}") for block in blocks]
    return one if by == "one" else several


def prior(hp, strength, epsilon):
    """Strength and relative ridge of a tensor-normal prior, two floats."""
    return around(hp, "strength", strength, 100), around(hp, "epsilon", epsilon, 100)


def relation(hp, weights, momentum):
    """TRN's lambda of each layer, and the momentum of its covariances.

    Args:
        hp: `keras_tuner.HyperParameters`.
        weights: dict from a layer's name to the default lambda.
        momentum: float.

    Returns:
        `(weights, momentum)`, a dict and a float.
    """
    found = {
        name: around(hp, f"lambda/{name}", weight or 1e-3, 100)
        for name, weight in weights.items()
    }
    momenta = sorted({0.5, 0.9, 0.99, 0.999, momentum})
    return found, hp.Choice("momentum", momenta, default=momentum)
