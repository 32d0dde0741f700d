"""Hyperparameters of each family, declared once for experiments and users' own models."""

# Rates that suit an optimizer, relative to Adam's.
_RATES = {"adam": 1, "adamw": 1, "rmsprop": 1, "sgd": 10}


def explore(hp, declare, methods):
    """Declare the hyperparameters of all methods that `Space.chosen` chooses from.

    Args:
        hp: `keras_tuner.HyperParameters`, which have the default values afterwards.
        declare: function of `hp`, which declares those of the chosen method.
        methods: list of names.
    """
    for name in methods:
        set_defaults(hp, {"method": name} if len(methods) > 1 else {})
        declare(hp)
    set_defaults(hp)


def set_defaults(hp, others=()):
    """Give all active hyperparameters their defaults, but for other values of some."""
    hp.values = dict(others)
    for one in hp.space:
        if hp.is_active(one):
            hp.values.setdefault(one.name, one.default)


def of_method(values):
    """Values of hyperparameters as the chosen method alone has them, a dict."""
    own = f"{values['method']}/"
    return {name.removeprefix(own): value for name, value in values.items()}


class Space:
    """Declares hyperparameters, and gives their values.

    The first trial of a search has the defaults.

    Args:
        hp: `keras_tuner.HyperParameters`.
        tune: collection of what is searched for, of which `"optimizer"`, `"learning_rate"`
            and `"loss_weights"` matter here.
        per_layer: bool, whether a rank or a threshold for each layer is searched, too.
    """

    def __init__(self, hp, tune=(), per_layer=False):
        self.hp = hp
        self.tune = tune
        self.per_layer = per_layer

    def chosen(self, methods, declare):
        """One of several methods, and what is declared for it alone.

        Of several, the hyperparameter `method` says which; those of each have its name
        before their own, and are active only where it is chosen. A method's are declared
        when it is the chosen one, as Keras Tuner's searches and `explore` expect.

        Args:
            methods: list of names.
            declare: function of a name that declares hyperparameters.

        Returns:
            `(name, found)`: the chosen one, and what `declare` returned for it.
        """
        if len(methods) == 1:
            return methods[0], declare(methods[0])
        chosen, found = self.hp.Choice("method", list(methods)), None
        for name in methods:
            with self.hp.conditional_scope("method", [name]), self.hp.name_scope(name):
                if name == chosen:
                    found = declare(name)
        return chosen, found

    def around(self, name, default, factor):
        """A positive number, from `default / factor` to `default * factor`, logarithmic."""
        low, high = default / factor, default * factor
        return self.hp.Float(name, low, high, sampling="log", default=default)

    def integer(self, name, low, high, default):
        """An int, from `low` to `high`."""
        return self.hp.Int(name, low, high, default=default)

    def optimizer_and_rate(self, optimizer, rate):
        """The optimizer and its learning rate.

        Args:
            optimizer: str, the default one's name.
            rate: float, its default learning rate; for others the range is moved.

        Returns:
            `(name, rate)`.
        """
        chosen = optimizer
        if "optimizer" in self.tune:
            chosen = self.hp.Choice("optimizer", sorted(_RATES), default=optimizer)
        rates = {name: rate * scale / _RATES[optimizer] for name, scale in _RATES.items()}
        if "learning_rate" not in self.tune:
            return chosen, rates[chosen]
        if "optimizer" not in self.tune:
            return chosen, self.around("learning_rate", rate, 10)
        found = {}
        for name in sorted(_RATES):
            with self.hp.conditional_scope("optimizer", [name]):
                found[name] = self.around(f"learning_rate/{name}", rates[name], 10)
        return chosen, found[chosen]

    def loss_weights(self, tasks, given):
        """A weight for each task's loss, a dict; what was given where it's not searched.

        Args:
            tasks: function without arguments that returns the tasks' names.
            given: dict from task to weight.
        """
        if "loss_weights" not in self.tune:
            return dict(given)
        return {
            task: self.around(f"loss_weight/{task}", given.get(task, 1.0), 10)
            for task in tasks()
        }

    def factorization(self, layers, tolerance, highest=0.7):
        """How kernels are approximated; a rank of a layer is a fraction of its weights.

        Args:
            layers: names of the layers.
            tolerance: float, the default error.
            highest: float, the most of the tolerances: kernels that aren't trained yet have
                nearly full rank, and only a large one saves anything.

        Returns:
            `(tolerance, ranks)`: a float and None, or None and a dict from layer to rank.
        """
        if not self.per_layer:
            return self._tolerance(tolerance, highest), None
        by = self.hp.Choice("ranks", ["tolerance", "layers"])
        with self.hp.conditional_scope("ranks", ["tolerance"]):
            found = self._tolerance(tolerance, highest)
        with self.hp.conditional_scope("ranks", ["layers"]):
            ranks = {
                layer: self.hp.Float(f"rank/{layer}", 0.05, 1, sampling="log", default=0.5)
                for layer in layers
            }
        return (found, None) if by == "tolerance" else (None, ranks)

    def task_rank(self, tasks, default=None):
        """The rank of the tasks, where there is a rank by layer: from 2 to T.

        With two tasks there is nothing to choose, since their kernels would be multiples of
        each other with a task rank of 1.

        Args:
            tasks: int, T.
            default: int, fraction or None (full), the default.

        Returns:
            As `default`, or an int.
        """
        if not self.per_layer or tasks < 3 or isinstance(default, float):
            return default
        with self.hp.conditional_scope("ranks", ["layers"]):
            return self.hp.Int("task_rank", 2, tasks, default=default or tasks)

    def _tolerance(self, default, highest):
        low, high = min(0.01, default), max(highest, default)
        return self.hp.Float("tolerance", low, high, sampling="log", default=default)

    def threshold(self, default, blocks):
        """MTAL's thresholds.

        Args:
            default: float.
            blocks: names of the parts of the network that may have their own.

        Returns:
            A list: one threshold, or one for each block.
        """

        def number(name):
            low, high = min(0.1, default), max(0.9, default)
            return self.hp.Float(name, low, high, default=default)

        if not self.per_layer:
            return [number("threshold")]
        by = self.hp.Choice("thresholds", ["one", "blocks"])
        with self.hp.conditional_scope("thresholds", ["one"]):
            one = [number("threshold")]
        with self.hp.conditional_scope("thresholds", ["blocks"]):
            several = [number(f"threshold/{block}") for block in blocks]
        return one if by == "one" else several

    def prior(self, strength, epsilon):
        """Strength and ridge of a tensor-normal prior, two floats.

        Where relations pay, the best strengths are from 0.1 to 1, with losses that are
        means.
        """
        low, high = min(1e-4, strength), max(10, strength)
        found = self.hp.Float("strength", low, high, sampling="log", default=strength)
        return found, self.around("epsilon", epsilon, 100)

    def relation(self, weights, momentum):
        """TRN's lambda of each layer, and the momentum of its covariances.

        Args:
            weights: dict from a layer's name to the default lambda.
            momentum: float.

        Returns:
            `(weights, momentum)`, a dict and a float.
        """
        found = {
            name: self.around(f"lambda/{name}", weight or 1e-3, 100)
            for name, weight in weights.items()
        }
        momenta = sorted({0.5, 0.9, 0.99, 0.999, momentum})
        return found, self.hp.Choice("momentum", momenta, default=momentum)
