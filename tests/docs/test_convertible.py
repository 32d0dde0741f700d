"""The table of what converts, and each row of it."""

import pytest

from docs import convertible

EXAMPLES = convertible.examples()
QUICK = ("Dense", "GroupedQueryAttention", "PReLU", "ReversibleEmbedding", "SimpleRNN")


def test_nothing_is_left_out():
    """Every layer that Keras ships is tried, or has its reason."""
    every = set(convertible.keras_layers())
    assert every <= set(EXAMPLES) | set(convertible.WITHOUT)
    assert not set(EXAMPLES) & set(convertible.WITHOUT)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in EXAMPLES],
)
def test_equal(name):
    """The outputs of all tasks, and of one alone, are the backbone's, as the page says."""
    if name == "TextVectorization" or EXAMPLES[name].of_ids == "string":
        pytest.importorskip("tensorflow")
    way, error = convertible.how(EXAMPLES[name])
    assert error < 1e-4
    page = convertible.PAGE.read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| {way} |"))
    assert f"`{name}`" in row
