"""The functions that draw the paper's Fig. 5 and 6, for the record's plot and for the benchmarks."""

import math

import numpy as np
import pytest

from entropy_attn.entropy import plots


def test_the_line_is_fitted_over_ln_n():
    N = [16, 64, 256, 1024]
    line = plots.fit_line(N, 0.9 * np.log(N) - 0.2)
    assert line == pytest.approx((0.9, -0.2, 1))
    assert plots.equation(line) == "0.900 ln N − 0.20, R² 1.0000"


def test_r_squared_is_the_squared_correlation():
    generator = np.random.default_rng(0)
    N, entropy = generator.integers(16, 4096, 20), generator.normal(size=20)
    assert plots.fit_line(N, entropy).r_squared == pytest.approx(np.corrcoef(np.log(N), entropy)[0, 1] ** 2)


@pytest.mark.parametrize("tokens", [[16], [16, 16]])
def test_no_line_without_two_sizes(tokens):
    assert plots.fit_line(tokens, [1.0] * len(tokens)) is None


def test_means_keep_the_order_of_the_rows():
    rows = [
        {"layer": layer, "step": step, "entropy": entropy}
        for layer, step, entropy in (("b", 0, 1.0), ("a", 0, 5.0), ("b", 1, 3.0))
    ]
    assert list(plots.mean_entropy(rows, "layer").items()) == [("b", 2.0), ("a", 5.0)]
    assert plots.mean_entropy(rows, "step") == {0: 3.0, 1: 3.0}


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [([784, 4096, 9216, 2304], [784, 4096, 9216]), ([4096, 784], [784, 4096]), ([784, 3600, 9216], [784, 3600, 9216])],
)
def test_three_sizes_are_shown(sizes, shown):
    assert plots.shown_sizes(sizes, 4096) == shown


def test_points_and_lines_are_drawn():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    fits, lines = figure.subplots(1, 2)
    look = {"color": "tab:red", "marker": "s"}
    groups = [plots.Points("λ", [16, 256], [1.0, 3.0], look), plots.Points("one size", [64], [2.0], look)]
    plots.plot_fits(fits, groups, lambda line: f"{line.slope:.2f}")
    line, points, *_ = fits.get_lines()
    assert line.get_xdata() == pytest.approx([math.log(16), math.log(256)])
    assert line.get_ydata() == pytest.approx([1, 3])
    assert points.get_xdata() == pytest.approx([math.log(16), math.log(256)])
    assert points.get_linestyle() == "None"
    assert fits.get_legend_handles_labels()[1] == [f"λ: {2 / math.log(16):.2f}", "one size"]
    plots.plot_lines(lines, [plots.Line("λ", [1.0, 2.0, 1.5], look), plots.Line(None, [0.0, 0.0, 0.0], look)])
    assert [list(line.get_ydata()) for line in lines.get_lines()] == [[1.0, 2.0, 1.5], [0.0, 0.0, 0.0]]
    assert lines.get_legend_handles_labels()[1] == ["λ"]
