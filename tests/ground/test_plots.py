"""Diagrams of how tasks are related; the matrices are tested with the regularizer."""

import numpy as np
import pytest
import scipy.linalg

from dmtrl_keras import plot_eigenvectors, plot_heat_map, plot_hinton

MATRIX = np.array([[1.0, -0.25, 0.0], [-0.25, 1.0, 0.49], [0.0, 0.49, 0.64]])
NAMES = ["amazon", "webcam", "dslr"]


def test_hinton_diagram(tmp_path):
    """Areas are proportional to the values; colour is the sign; names on both axes."""
    figure = plot_hinton(MATRIX, NAMES, tmp_path / "hinton.png")
    (axes,) = figure.axes
    assert (tmp_path / "hinton.png").stat().st_size > 1000
    areas = np.reshape([p.get_width() * p.get_height() for p in axes.patches], (3, 3))
    np.testing.assert_allclose(areas, 0.95**2 * np.abs(MATRIX), atol=1e-12)
    centres = [p.get_center() for p in axes.patches]
    np.testing.assert_allclose(centres[1], (1, 0))
    colours = [p.get_facecolor() for p in axes.patches]
    assert colours[1] == colours[3] != colours[5] == colours[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == NAMES
    assert [t.get_text() for t in axes.get_yticklabels()] == NAMES


def test_heat_map(tmp_path):
    """The values themselves, on a scale that is symmetric about zero."""
    figure = plot_heat_map({"fc7": MATRIX, "fc8": MATRIX * 2}, path=tmp_path / "map.png")
    assert (tmp_path / "map.png").exists()
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["fc7", "fc8"]
    (image,) = panels[1].images
    np.testing.assert_array_equal(image.get_array(), MATRIX * 2)
    assert image.get_clim() == (-1, 1)
    figure = plot_heat_map(MATRIX, NAMES, limits=None)
    assert figure.axes[0].images[0].get_clim() == (-1, 1)


def test_eigenvectors(rng, tmp_path):
    """Those of SciPy, falling, the largest entry positive; names on one axis only."""
    half = rng.normal(size=(3, 5))
    covariance = half @ half.T
    figure = plot_eigenvectors({"fc8": covariance}, NAMES, tmp_path / "vectors.png", 2)
    assert (tmp_path / "vectors.png").exists()
    axes = figure.axes[0]
    drawn = np.asarray(axes.images[0].get_array())
    values, vectors = scipy.linalg.eigh(covariance, subset_by_index=(1, 2))
    expected = vectors[:, ::-1]
    np.testing.assert_allclose(np.abs(drawn), np.abs(expected), atol=1e-6)
    assert (drawn[np.abs(drawn).argmax(axis=0), range(2)] > 0).all()
    shares = [f"{n}\n{v / np.trace(covariance):.0%}" for n, v in enumerate(values[::-1], 1)]
    assert [t.get_text() for t in axes.get_xticklabels()] == shares
    assert [t.get_text() for t in axes.get_yticklabels()] == NAMES
    with pytest.raises(ValueError, match=r"`count` must be .*count=4"):
        plot_eigenvectors(covariance, count=4)
    unnamed = plot_heat_map(np.eye(100)).axes[0]
    assert len(unnamed.get_yticklabels()) < 100


@pytest.mark.parametrize("plot", [plot_hinton, plot_heat_map, plot_eigenvectors])
def test_bad_arguments(plot):
    """What is no square matrix, and wrong names."""
    with pytest.raises(ValueError, match=r"square matrices.*\(2, 3\)"):
        plot(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="finite"):
        plot({"fc8": np.full((2, 2), np.nan)})
    with pytest.raises(ValueError, match=r"`names` must be .* one for each task.*'b'"):
        plot(MATRIX, ["a", "b"])
