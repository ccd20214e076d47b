"""The functions that draw the paper's Fig. 5 and 6, for the record's plot and for the benchmarks."""

import math

import numpy as np
import pytest
import torch

from entropy_attn.entropy import EntropyRecord, Moment, plots
from entropy_attn.entropy.heads import HeadSlope, head_slopes
from entropy_attn.entropy.tokens import Tokens


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


def head_rows(slopes, tokens=(64, 256, 1024), T=256, multiplier=1.0):
    """Rows of a layer whose heads have these slopes, and the entropy 3 at N = 256."""
    return [
        {"run": (N, multiplier), "layer": "a", "head": head, "tokens": N, "train_tokens": T, "multiplier": multiplier,
         "entropy": 3 + slope * math.log(N / 256)}
        for N in tokens
        for head, slope in enumerate(slopes)
    ]  # fmt: skip


def test_slopes_and_sharpness_of_heads():
    found = head_slopes([*head_rows([1.0, 0.1]), *head_rows([5.0, 5.0], multiplier=0.9)])
    assert [(head.layer, head.head, head.train_tokens) for head in found] == [("a", 0, 256), ("a", 1, 256)]
    assert [head.slope for head in found] == pytest.approx([1.0, 0.1])
    assert [head.sharpness for head in found] == pytest.approx([1 - 3 / math.log(256)] * 2)
    [nearest] = head_slopes(head_rows([1.0], tokens=(64, 300)))
    assert nearest.sharpness == pytest.approx(1 - (3 + math.log(300 / 256)) / math.log(300))


def test_a_size_has_one_point_however_many_runs():
    runs = [((16, 0), 1.0), ((16, 1), 2.0), ((64, 0), 2.0), ((64, 1), 3.0), ((256, 0), 4.0)]
    rows = [row | {"run": run, "tokens": run[0], "entropy": H} for run, H in runs for row in head_rows([0], (1,), 64)]
    [head] = head_slopes(rows)
    assert head.slope == pytest.approx(plots.fit_line([16, 64, 256], [1.5, 2.5, 4.0]).slope)
    assert head.sharpness == pytest.approx(1 - 2.5 / math.log(64))


def test_no_run_counts_in_which_another_layer_is_scaled():
    [scaled] = head_rows([1.0], tokens=(2048,))
    assert head_slopes([*head_rows([0.5]), scaled, scaled | {"layer": "b", "multiplier": 0.9}]) == head_slopes(
        head_rows([0.5])
    )


def test_a_head_of_one_token_is_uniform():
    [head] = head_slopes([row | {"entropy": math.log(row["tokens"])} for row in head_rows([1.0], (1, 4), T=1)])
    assert (head.sharpness, head.slope) == (0, pytest.approx(1))


def test_heads_without_a_slope_are_left_out():
    cross = [row | {"train_tokens": None} for row in head_rows([1.0])]
    assert head_slopes([*cross, *head_rows([1.0], tokens=(64,))]) == []


def test_heads_are_drawn():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    plots.plot_heads(axes, [HeadSlope("a", 0, 64, 0.1, 0.9), HeadSlope("b", 0, 256, 0.5, 0.2)])
    coarse, fine, *lines = axes.get_lines()
    assert (list(coarse.get_xdata()), list(coarse.get_ydata())) == ([0.5], [0.2])
    assert (list(fine.get_xdata()), list(fine.get_ydata())) == ([0.1], [0.9])
    assert coarse.get_color() != fine.get_color()
    assert [line.get_ydata()[0] for line in lines] == [1, 0]
    said = axes.get_legend_handles_labels()[1]
    assert said == ["T = 256", "T = 64", "1: Eq. 5", "0: the entropy does not follow N"]


def test_the_record_draws_heads_if_there_are_two_sizes():
    pytest.importorskip("matplotlib")
    record = EntropyRecord()
    session = record.open_session("trained scale")
    for run, N in enumerate((64, 256)):
        session.add("a", Moment(run=run), Tokens(N, 256), torch.full((1, 2, N), 0.9 * math.log(N)), 1.0, 1)
        assert len(record.plot().axes) == (2 if run == 0 else 3)
