"""Arguments of the commands: converters, files of settings, devices, names."""

import argparse
import json
import pathlib
import reprlib
import sys

import keras

from dmtrl_keras.distribution import STRATEGIES, divisible, make_strategy

from .reading import DataError, reason, shortened
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
    `{"learning_rate": 0.01, "methods": ["stl", "tt"], "no_bias": true}`: a number or a
    string for an argument of one value, a list for one of several, an object for
    `name=value`, true or false for one without; null leaves the default.

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
    if options.config != path:
        parser.error("--config: expected this argument in full")
    del options.config
    if training:
        set_strategy(parser, options)
    return options


def _arguments_of(path, parser):
    """The settings in a file as command line arguments."""
    try:
        settings = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        parser.error(f"--config: {path} is no JSON file that can be read ({reason(error)})")
    # The first name of an argument is the one that `--help` shows.
    known = {action.dest: action for action in reversed(parser._actions)}
    del known["config"]
    known.pop("help", None)
    if not isinstance(settings, dict) or not set(settings) <= set(known):
        wrong = settings
        if isinstance(settings, dict):
            wrong = sorted(set(settings) - set(known))
        parser.error(
            f"--config: {path} must be an object of settings from {sorted(known)}. "
            f"Received: {reprlib.repr(wrong)}"
        )
    arguments = []
    for name, value in settings.items():
        try:
            arguments += _arguments_from(known[name], value)
        except ValueError as error:
            parser.error(
                f"--config: {path}: {name}: expected {error}, received "
                f"{reprlib.repr(value)}"
            )
    return arguments


def _arguments_from(action, value):
    """One setting as command line arguments, of which its values are never others.

    Raises:
        ValueError: with what was expected, if the value is of a wrong type.
    """
    flag = action.option_strings[0]
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return [flag] if value else []
    if action.nargs == "?" and value is True:
        return [flag]
    several = action.nargs not in (None, "?")
    if isinstance(action, ByName) and isinstance(value, dict):
        value = [f"{key}={_word(entry)}" for key, entry in value.items()]
        if not value:
            return []
    if not several:
        return [f"{flag}={_word(value)}"]
    words = [_word(entry) for entry in (value if isinstance(value, list) else [value])]
    if any(word.startswith("-") for word in words):
        raise ValueError("strings that do not begin with '-'")
    return [flag, *words]


def _word(value):
    """A number or a string as a string."""
    known = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if isinstance(value, str) and "\0" in value:
        raise ValueError("strings without a NUL character")
    # `argparse` takes the last one away.
    if not known or value == "--":
        raise ValueError("a number or a string, or a list of them for several")
    # A blank, so that a negative number is not taken for an option.
    return value if isinstance(value, str) else f"{'' if value >= 0 else ' '}{value}"


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
        type=whole(1, 256),
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
    parser.add_argument("--size", type=whole(8), default=size, help="side of the images")
    parser.add_argument("--width", type=whole(1), default=64, help=f"of the first {first}")


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
        type=real(above=0),
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
                if not (name and equals) or name in found:
                    raise ValueError("no name, or no '=', or a name again")
                found[name] = self._convert(value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise argparse.ArgumentError(
                    self, f"expected {self.metavar}, got {shortened(text)!r} ({error})"
                ) from error
        setattr(namespace, self.dest, found)


def whole(least, most=2**31 - 1):
    """A converter for `argparse`: whole numbers from `least` to `most`.

    Example:

    >>> whole(1)("3")
    3
    """
    return _converter(
        int, lambda value: least <= value <= most, f"a whole number from {least} to {most}"
    )


def real(least=None, most=None, above=None, below=None):
    """A converter for `argparse`: finite numbers, as float32 has them, within bounds.

    Args:
        least: number, the least value.
        most: number, the largest value.
        above: number that all values are greater than.
        below: number that all values are less than.

    Example:

    >>> real(above=0, most=1)("0.5")
    0.5
    """
    tests = {
        "at least": (least, float.__ge__),
        "above": (above, float.__gt__),
        "at most": (most, float.__le__),
        "below": (below, float.__lt__),
    }
    tests = {name: test for name, test in tests.items() if test[0] is not None}
    bounds = " and ".join(f"{name} {bound:g}" for name, (bound, _) in tests.items())

    def fits(value):
        # NaN is not less than anything.
        finite = abs(value) < _INFINITE
        return finite and all(test(value, float(bound)) for bound, test in tests.values())

    return _converter(float, fits, f"a finite number {bounds}".strip())


# Of float32.
_INFINITE = 3.4e38


def _converter(kind, fits, expected):
    def convert(text):
        try:
            value = kind(text)
            right = fits(value)
        except ValueError:
            right = False
        if not right:
            raise argparse.ArgumentTypeError(
                f"expected {expected}, got {shortened(text.strip())!r}"
            )
        return value

    return convert


# Of a moving mean.
MOMENTUM = real(least=0, below=1)
# Random numbers of other libraries take seeds up to 2**32, to which repeats add.
SEED = whole(0)
REPEATS = whole(1, 10**6)


def check_names(argument, given, known, parser=None):
    """Refuse names that are not known.

    Args:
        argument: str, the argument of the command that has them.
        given: iterable of names.
        known: iterable of names.
        parser: the parser whose error it is; without one, a `DataError` is raised.
    """
    known = list(known)
    unknown = sorted(set(given) - set(known))
    if unknown:
        message = f"{argument}: expected names from {known}, received {unknown}"
        if parser is None:
            raise DataError(message)
        parser.error(message)


def whole_batches(options, count):
    """How many of `count` examples give batches that divide among the replicas."""
    replicas = options.strategy.num_replicas_in_sync
    return divisible(count, options.batch_size, replicas)
