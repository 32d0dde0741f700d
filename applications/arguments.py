"""Arguments of the commands: converters, files of settings, devices, names."""

import argparse
import json
import math
import pathlib
import sys

import keras

from dmtrl_keras.distribution import STRATEGIES, divisible, make_strategy

from .results import check_marks

OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "rmsprop": keras.optimizers.RMSprop,
    # With the momentum that is usual for networks.
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
}


def parse_arguments(parser, arguments=None, training=True):
    """Parse a command's arguments, of which a JSON file may hold some.

    With `--config FILE`, the file's settings come first, so that what is given on the
    command line wins. It is an object from the names of arguments, such as
    `{"learning_rate": 0.01, "methods": ["stl", "tt"], "no_bias": true}`.

    The other arguments that all experiments have are `--strategy` and `--replicas`, from
    which the strategy is made.

    Args:
        parser: `argparse.ArgumentParser`.
        arguments: list of strings; None: those of the process.
        training: bool, whether there is a strategy.

    Returns:
        The parsed arguments, without `config` and `replicas`; `strategy` is a
        `tf.distribute.Strategy`.

    Raises:
        SystemExit: on malformed arguments, a file that can't be read, unknown names in
            it, devices that are not there, batches that don't divide among replicas.
    """
    parser.add_argument(
        "--config",
        type=pathlib.Path,
        help="JSON file of settings, such as a search's best ones",
    )
    if training:
        add_strategy(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    alone.add_argument("--config", type=pathlib.Path)
    path = alone.parse_known_args(given)[0].config
    first = [] if path is None else _arguments_of(path, parser)
    options = parser.parse_args([*first, *given])
    del options.config
    if training:
        set_strategy(parser, options)
    return options


def _arguments_of(path, parser):
    """The settings in a file as command line arguments."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"--config: {path} is no JSON file that can be read ({error})")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    if not isinstance(settings, dict) or not set(settings) <= known:
        wrong = sorted(set(settings) - known) if isinstance(settings, dict) else settings
        parser.error(
            f"--config: {path} must be an object of settings from {sorted(known)}. "
            f"Received: {wrong}"
        )
    arguments = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False or value == {}:
            continue
        arguments.append(flag)
        if value is not True:
            if isinstance(value, dict):
                value = [f"{key}={entry}" for key, entry in value.items()]
            values = value if isinstance(value, list) else [value]
            arguments += map(str, values)
    return arguments


def add_strategy(parser):
    """Add the arguments that say on which devices to train."""
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="auto",
        help="'mirrored': data parallel on all GPUs; 'cpu': no GPU; 'auto': mirrored where "
        "there are several GPUs",
    )
    parser.add_argument(
        "--replicas",
        type=in_range(int, 0),
        help="how many GPUs, or logical CPU devices, which are made; all GPUs by default",
    )


def set_strategy(parser, options):
    """Replace the name of the strategy by a `tf.distribute.Strategy`."""
    try:
        options.strategy = make_strategy(options.strategy, options.replicas)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--strategy: {error}")
    replicas = options.strategy.num_replicas_in_sync
    batch_size = getattr(options, "batch_size", replicas)
    if batch_size % replicas:
        parser.error(
            f"--batch-size: {batch_size} does not divide among {replicas} replicas"
        )
    del options.replicas


def add_page(parser):
    """Add the argument that says into which page of the documentation tables go."""
    parser.add_argument(
        "--page",
        type=pathlib.Path,
        help="also write the tables between this file's marks, such as "
        "<!-- mnist:begin --> and <!-- mnist:end -->, and the figures into the folder "
        "`figures` beside its folder, or else beside the file",
    )
    # As it was called at first.
    parser.add_argument("--readme", dest="page", type=pathlib.Path, help=argparse.SUPPRESS)


def check_page(parser, options, blocks):
    """Refuse a page that lacks the marks of some blocks."""
    if options.page is not None:
        try:
            check_marks(options.page, blocks)
        except (OSError, ValueError) as error:
            parser.error(f"--page: {error}")


def add_images(parser, size, first="stage"):
    """Add the arguments of images, which are scaled, and of the network that sees them.

    Args:
        parser: `argparse.ArgumentParser`, or a group of its arguments.
        size: int, the default.
        first: str, what the network's first part is called.
    """
    side = in_range(int, 7)
    parser.add_argument("--size", type=side, default=size, help="side of the images")
    width = in_range(int, 0)
    parser.add_argument("--width", type=width, default=64, help=f"of the first {first}")


def add_training(parser, optimizer):
    """Add the arguments of how an experiment trains.

    Args:
        parser: `argparse.ArgumentParser`.
        optimizer: a key of `OPTIMIZERS`, the default.
    """
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=optimizer)
    parser.add_argument(
        "--loss-weights",
        nargs="+",
        action=ByName,
        type=in_range(float, 0),
        default={},
        metavar="TASK=WEIGHT",
        help="of tasks; 1 by default",
    )


class ByName(argparse.Action):
    """Arguments such as `conv1=0.5 fc=3` as a dict.

    `type` converts the values; a JSON file has them as an object.
    """

    def __init__(self, *arguments, type=str, **options):
        self._convert = type
        super().__init__(*arguments, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        found = {}
        for text in values:
            name, equals, value = text.partition("=")
            try:
                if not (name and equals):
                    raise ValueError("no name, or no '='")
                found[name] = self._convert(value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise argparse.ArgumentError(
                    self, f"expected {self.metavar}, got {text!r} ({error})"
                ) from error
        setattr(namespace, self.dest, found)


def in_range(kind, low, high=math.inf):
    """A converter for `argparse`: numbers above `low`, and `high` at most.

    Args:
        kind: int or float.
        low: number.
        high: number.

    Returns:
        A function from a string to a number.

    Example:

    >>> in_range(int, 0)("3")
    3
    """

    def convert(text):
        value = kind(text)
        if not low < value <= high:
            raise argparse.ArgumentTypeError(
                f"expected more than {low:g} and at most {high:g}, got {text}"
            )
        return value

    return convert


def check_names(argument, given, known, parser=None):
    """Refuse names that are not known.

    Args:
        argument: str, the argument of the command that has them.
        given: iterable of names.
        known: iterable of names.
        parser: the parser whose error it is; without one, a `ValueError` is raised.
    """
    known = list(known)
    unknown = sorted(set(given) - set(known))
    if unknown:
        message = f"{argument}: expected names from {known}, received {unknown}"
        if parser is None:
            raise ValueError(message)
        parser.error(message)


def whole_batches(options, count):
    """How many of `count` examples give batches that divide among the replicas."""
    replicas = options.strategy.num_replicas_in_sync
    return divisible(count, options.batch_size, replicas)
