"""TensorFlow's start without its messages, which would stand above a command's output."""

import contextlib
import os
import re
import sys
import tempfile
import warnings

# What TensorFlow says of itself: its libraries' lines of information and warnings, and that
# there is no GPU. What else is written, such as errors, comes through.
_MESSAGES = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called"
    rb"|[IW]\d{4} \d\d:"
    rb"|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IW] "
    # Those of errors, too; TensorFlow 2.20 begins them with the date.
    rb"|(E\d{4}|\d{4}-\d\d-\d\d) \d\d:.*"
    rb"(failed call to cuInit|Unable to register cu|already registered)"
    rb"|To enable the following instructions: "
)


def start_quietly():
    """Start Keras and TensorFlow without the messages of their libraries.

    It changes nothing where TensorFlow runs already, or where the environment variable
    `TF_CPP_MIN_LOG_LEVEL` says what messages are wanted.
    """
    if "tensorflow" in sys.modules or "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    with _filtered_stderr(), warnings.catch_warnings():
        # Keras 3.13 asks NumPy for `np.object`.
        message = "In the future `np.object` will be defined"
        warnings.filterwarnings("ignore", message, FutureWarning)
        import keras

        if keras.config.backend() == "tensorflow":
            import tensorflow as tf

            # It says at the first use that there is no GPU.
            tf.config.list_physical_devices()


@contextlib.contextmanager
def _filtered_stderr():
    """Leave out these messages of what is written to the process's standard error."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, AttributeError):
        # There is no standard error.
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            others = [line for line in file if not _MESSAGES.match(line)]
            if others:
                os.write(2, b"".join(others))
