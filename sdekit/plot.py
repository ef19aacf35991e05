"""Pictures of samples and of log-likelihoods with their errors.

Figures are made as objects and drawn by Agg, never by pyplot: no window, no global state. Needs matplotlib, which comes
with `pip install "sdekit[demo]"`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_INK, _SOFT, _MARK = "#1f3b57", "#9db4c8", "#c2542d"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` times `height` inches that is drawn by Agg."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def require_picture(path: str | Path) -> None:
    """Raises ValueError unless a picture can be written in the format that the suffix names."""
    place, known = Path(path), FigureCanvasAgg.filetypes
    if place.suffix.lstrip(".").lower() not in known:
        raise ValueError(f"{str(path)!r} ends in {place.suffix!r}; one of {sorted(known)} is needed.")


def save(figure: Figure, path: str | Path, dpi: int = 130) -> None:
    """Writes `figure` to `path`, in the format of its suffix.

    Raises:
        ValueError: The suffix is of no format that can be written.
    """
    require_picture(path)
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=dpi)


def as_images(x: Tensor) -> np.ndarray:
    """(n, H, W) or (n, H, W, 3) float64 of images (n, H, W), (n, 1, H, W) or (n, 3, H, W), scaled to [0, 1] together.

    What is not finite has no part in the scale: NaN stays NaN, which is drawn as nothing, infinities become 0 and 1.

    Raises:
        ValueError: Another shape.
    """
    values = x.detach().cpu().double()
    if values.dim() == 4 and values.shape[1] == 1:
        values = values[:, 0]
    elif values.dim() == 4 and values.shape[1] == 3:
        values = values.permute(0, 2, 3, 1)
    elif values.dim() != 3:
        raise ValueError(f"x.shape={tuple(x.shape)}; images (n, H, W), (n, 1, H, W) or (n, 3, H, W) are needed.")
    finite = values[values.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
    return np.asarray(((values - low) / (high - low or 1.0)).clamp(0.0, 1.0).numpy())


def draw_images(axes: Axes, x: Tensor, columns: int | None = None) -> None:
    """Draws images as one mosaic, row by row.

    Args:
        axes: Where.
        x: (n, H, W), (n, 1, H, W) or (n, 3, H, W), n >= 1.
        columns: Images in a row; default about the square root of n.
    """
    images = as_images(x)
    wide = columns if columns is not None else math.ceil(math.sqrt(len(images)))
    high = math.ceil(len(images) / wide)
    height, width = images.shape[1] + 1, images.shape[2] + 1
    mosaic = np.ones((high * height - 1, wide * width - 1, *images.shape[3:]))
    for number, image in enumerate(images):
        top, left = (number // wide) * height, (number % wide) * width
        mosaic[top : top + height - 1, left : left + width - 1] = image
    axes.imshow(mosaic, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_axis_off()


def _finite(x: Tensor) -> np.ndarray:
    """Those of the values that are finite, float64."""
    values = x.detach().cpu().double()
    return np.asarray(values[values.isfinite()].numpy())


def draw_histogram(axes: Axes, values: Tensor, label: str, lines: Sequence[tuple[float, str]] = ()) -> None:
    """Draws a histogram of the finite `values`.

    Args:
        axes: Where.
        values: (n,).
        label: Of the axis, with its unit.
        lines: Places to mark, each with its name.
    """
    finite = _finite(values)
    axes.hist(finite, bins=min(40, max(5, len(finite) // 8)), color=_SOFT, edgecolor="white", linewidth=0.5)
    for (place, name), colour in zip(lines, (_INK, _MARK, "#5b8c5a", "#777777"), strict=False):
        axes.axvline(place, color=colour, linewidth=1.5, label=f"{name} {place:.3f}")
    if lines:
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend above the bars
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_xlabel(label)
    axes.set_ylabel("samples")


def draw_error_bars(axes: Axes, values: Tensor, errors: Tensor, label: str) -> None:
    """Draws `values` sorted, each with an interval of 1.96 `errors`.

    Args:
        axes: Where.
        values: (n,); those that are not finite are left out.
        errors: (n,) standard errors, in the unit of `values`.
        label: Of the axis, with its unit.
    """
    value, error = values.detach().cpu().double(), errors.detach().cpu().double()
    good = value.isfinite() & error.isfinite()
    value, error = value[good], error[good]
    order = value.argsort()
    y, half = value[order].numpy(), 1.96 * error[order].numpy()
    place = np.arange(len(y))
    axes.errorbar(place, y, half, fmt="none", ecolor=_SOFT, elinewidth=0.7, label="95% interval of the trace")
    axes.plot(place, y, ".", color=_INK, markersize=2.5, label="sample")
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("samples, sorted")
    axes.set_ylabel(label)


def draw_intervals(
    axes: Axes, names: Sequence[str], values: Sequence[float], bars: Sequence[tuple[str, Sequence[float]]], label: str
) -> None:
    """Draws one value a line, from top to bottom, with intervals of 1.96 standard errors of one or two kinds.

    Args:
        axes: Where.
        names: Of the lines.
        values: One a line.
        bars: What each kind of standard error is of, and its values, in the unit of `values`; the widest first.
        label: Of the axis, with its unit.
    """
    place = np.arange(len(names))
    for (kind, errors), colour, width in zip(bars, (_SOFT, _MARK), (5.0, 2.0), strict=False):
        half = 1.96 * np.asarray(errors)
        axes.errorbar(values, place, xerr=half, fmt="none", ecolor=colour, elinewidth=width, label=kind)
    axes.plot(values, place, "o", color=_INK, markersize=4)
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel(label)


def samples_figure(x: Tensor) -> Figure:
    """A picture of samples: a mosaic of images, points in the plane, or histograms of the first dimensions.

    Args:
        x: (n, *event), n >= 1. Values that are not finite are left out.

    Raises:
        ValueError: There are no samples.
    """
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x.shape={tuple(x.shape)}; at least one sample is needed for a picture.")
    figure = new_figure(6.0, 6.0)
    axes = figure.add_subplot()
    if x.dim() == 3 or (x.dim() == 4 and x.shape[1] in (1, 3)):
        draw_images(axes, x)
        return figure
    flat = x.detach().reshape(x.shape[0], -1).cpu().double()
    if flat.shape[1] == 2:
        axes.plot(flat[:, 0].numpy(), flat[:, 1].numpy(), ".", color=_INK, markersize=3)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel("x0")
        axes.set_ylabel("x1")
        return figure
    for dimension in range(min(4, flat.shape[1])):
        axes.hist(_finite(flat[:, dimension]), bins=40, histtype="step", label=f"x{dimension}")
    axes.legend(frameon=False)
    axes.set_ylabel("samples")
    return figure


def demo_figure(
    samples: Tensor, bits: Tensor, errors: Tensor, marks: Sequence[tuple[float, str]], title: str
) -> Figure:
    """The demo's picture: samples, the histogram of bits/dim, and every image's error bar.

    Args:
        samples: (n, H, W) images.
        bits: (N,) bits/dim of the held-out images.
        errors: (N,) standard errors of `bits` from the trace's probes.
        marks: Places to mark in the histogram, each with its name.
        title: Above all.
    """
    figure = new_figure(13.0, 4.4)
    figure.suptitle(title, fontsize=10)
    left, middle, right = figure.subplots(1, 3)
    draw_images(left, samples)
    left.set_title("samples", fontsize=9)
    draw_histogram(middle, bits, "bits/dim", marks)
    middle.set_title("held-out images", fontsize=9)
    draw_error_bars(right, bits, errors, "bits/dim")
    right.set_title("each image with the error of its one probe", fontsize=9)
    return figure
