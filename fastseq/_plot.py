"""Plots of what the tools measure; matplotlib is imported on first use, no display is needed."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import numpy as np

Array = np.ndarray

VANISHED, EXPLODED = 1e-3, 1e3  # against the last step's norm: the shaded regions begin there


def plot_gradient_flow(norms: Array | Mapping[str, Array], path: str | PathLike) -> None:
    """Draw what `gradient_flow` found: vanishing falls to the left, exploding rises.

        height_t = norm_t / norm at the last step that has a gradient, on a log axis

    Args:
        norms: (T,) as `gradient_flow` returns them, or several by name: {label: (T,)}. A norm of
            0, NaN or infinity is a mark at the edge: it has no place on a log axis.
        path: of the picture; its suffix chooses the format, as matplotlib's savefig does.

    Returns:
        None.

    Raises:
        ValueError: norms are not (T,) with T >= 1.
        ImportError: matplotlib is not installed.

    Accuracy: that of the picture.
    Cost: a second.
    Equivalent to: matplotlib.pyplot.semilogy(norms / norms[-1])
    Source: Pascanu, Mikolov & Bengio, arXiv:1211.5063.
    """
    curves = {"": norms} if not isinstance(norms, Mapping) else dict(norms)
    heights = {label: _relative(curve) for label, curve in curves.items()}
    figure, axes = _figure()
    low, high = _limits(heights.values())
    axes.axhspan(low, VANISHED, color="tab:blue", alpha=0.12, linewidth=0)
    axes.axhspan(EXPLODED, high, color="tab:red", alpha=0.12, linewidth=0)
    axes.axhline(1, color="black", linewidth=0.8)
    for label, height in heights.items():
        (line,) = axes.plot(np.where(_drawable(height), height, np.nan), label=label or None)
        _mark_edges(axes, height, (low, high), line.get_color())
    regions = (("vanishing", VANISHED / 2, "top"), ("exploding", EXPLODED * 2, "bottom"))
    for name, where, side in regions:
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": side}
        axes.annotate(name, (0.99, where), color="0.3", **place)
    axes.set(yscale="log", ylim=(low, high), xlabel="step t", ylabel="||dL/dh_t||, last step = 1")
    axes.grid(linewidth=0.3)
    if any(heights):
        figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def _relative(norms) -> Array:
    norms = np.asarray(norms, np.float64)
    if norms.ndim != 1 or not norms.size:
        raise ValueError(f"plot_gradient_flow: norms must be (T,) with T >= 1, got {norms.shape}")
    usable = np.flatnonzero(_drawable(norms))
    with np.errstate(over="ignore"):
        return norms / norms[usable[-1]] if usable.size else norms


def _drawable(height: Array) -> Array:
    return np.isfinite(height) & (height > 0)


def _limits(heights) -> tuple[float, float]:
    """Of the axis: both regions can be seen, and every curve."""
    seen = np.concatenate([h[_drawable(h)] for h in heights])
    return min(seen.min(initial=1e-5), 1e-5) / 3, max(seen.max(initial=1e5), 1e5) * 3


def _mark_edges(axes, height: Array, edges: tuple[float, float], colour) -> None:
    for where, edge, marker in ((height == 0, edges[0], "v"), (height > 0, edges[1], "^")):
        t = np.flatnonzero(where & ~_drawable(height))
        axes.plot(t, np.full(t.size, edge), marker, color=colour, clip_on=False)
    t = np.flatnonzero(np.isnan(height))
    axes.plot(t, np.full(t.size, edges[1]), "x", color=colour, clip_on=False)


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        needed = "plot_gradient_flow needs matplotlib: pip install matplotlib"
        raise ImportError(f"fastseq: {needed}") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.add_subplot()
