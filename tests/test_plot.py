"""Pictures show the numbers they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdekit import plot


def test_a_mosaic_holds_every_image_row_by_row():
    images = torch.arange(3 * 2 * 2, dtype=torch.float32).reshape(3, 2, 2)
    axes = plot.new_figure(2, 2).add_subplot()
    plot.draw_images(axes, images, columns=2)
    mosaic = np.asarray(axes.get_images()[0].get_array())
    assert mosaic.shape == (5, 5)
    for number, (top, left) in enumerate([(0, 0), (0, 3), (3, 0)]):
        np.testing.assert_allclose(mosaic[top : top + 2, left : left + 2], images[number].numpy() / 11)


@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 1, 4, 4), (5, 3, 4, 4), (5, 2), (5, 7), (5, 2, 4, 4)])
def test_samples_of_every_shape_are_drawn(tmp_path, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plot.save(plot.samples_figure(x), tmp_path / "x.png", dpi=40)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_error_bars_are_sorted_and_leave_out_what_failed():
    axes = plot.new_figure(2, 2).add_subplot()
    values = torch.tensor([3.0, float("nan"), 1.0, 2.0])
    plot.draw_error_bars(axes, values, torch.tensor([0.3, 0.1, 0.1, 0.2]), "bits/dim")
    points = next(line for line in axes.get_lines() if line.get_label() == "sample")
    assert list(points.get_ydata()) == [1.0, 2.0, 3.0]
    segments = axes.collections[0].get_segments()
    np.testing.assert_allclose(
        [part[1, 1] - part[0, 1] for part in segments], 2 * 1.96 * np.array([0.1, 0.2, 0.3]), rtol=1e-5
    )


def test_intervals_stand_on_their_lines_from_top_to_bottom():
    axes = plot.new_figure(2, 2).add_subplot()
    plot.draw_intervals(axes, ["first", "second"], [1.0, 3.0], [("wide", [0.4, 0.2]), ("close", [0.1, 0.0])], "bits")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    assert axes.yaxis_inverted()
    wide, close = (part.get_segments() for part in axes.collections)
    np.testing.assert_allclose(wide, [[[1 - 0.784, 0], [1 + 0.784, 0]], [[3 - 0.392, 1], [3 + 0.392, 1]]])
    np.testing.assert_allclose(close[0], [[1 - 0.196, 0], [1 + 0.196, 0]])


def test_a_histogram_counts_every_finite_value():
    axes = plot.new_figure(2, 2).add_subplot()
    values = torch.cat((torch.linspace(0, 1, 50), torch.tensor([float("nan")])))
    plot.draw_histogram(axes, values, "x", [(0.5, "here")])
    assert sum(bar.get_height() for bar in axes.patches) == 50


def test_what_is_not_finite_does_not_spoil_the_scale():
    x = torch.tensor([[[0.0, 1.0], [2.0, float("nan")]], [[4.0, float("inf")], [-float("inf"), 1.0]]])
    nan = float("nan")
    np.testing.assert_array_equal(plot.as_images(x), [[[0, 0.25], [0.5, nan]], [[1, 1], [0, 0.25]]])


@pytest.mark.parametrize("shape", [(6, 7), (6, 2), (6, 3, 4)])
def test_samples_that_are_not_finite_are_left_out(tmp_path, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[2] = float("inf")
    x[3] = float("nan")
    plot.save(plot.samples_figure(x), tmp_path / "x.png", dpi=40)


def test_values_of_any_kind_are_drawn():
    values = torch.linspace(0, 1, 50)
    for kind in (values.clone().requires_grad_(), values.bfloat16()):
        axes = plot.new_figure(2, 2).add_subplot()
        plot.draw_histogram(axes, kind, "x")
        assert sum(bar.get_height() for bar in axes.patches) == 50
        plot.draw_error_bars(axes, kind, kind, "x")


def test_the_demo_s_picture_is_drawn(tmp_path):
    bits = torch.linspace(1, 3, 40)
    figure = plot.demo_figure(torch.zeros(9, 1, 8, 8), bits, 0.1 * bits, [(2.0, "network")], "title")
    plot.save(figure, tmp_path / "demo.pdf")
    assert (tmp_path / "demo.pdf").read_bytes().startswith(b"%PDF")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.txt"):
        plot.save(plot.new_figure(1, 1), tmp_path / "x.txt")
    with pytest.raises(ValueError, match=r"x.shape=\(0, 3\); at least one sample"):
        plot.samples_figure(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"\(2, 5, 3, 3\)"):
        plot.as_images(torch.zeros(2, 5, 3, 3))
