"""Plots, one PNG per family and per end-to-end job; drawn without a display."""

import math
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .runner import Row

matplotlib.use("Agg")

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "x")


def speedups(rows: list[Row], peers: tuple[str, ...], title: str, path: Path) -> None:
    """time(peer) / time(ours) per row on a log axis: right of the line at 1 ours is faster."""
    rows = [row for row in rows if row.peers and row.seconds()]
    if not rows:
        return
    figure = Figure(figsize=(9, 1.6 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for peer, colour, marker in zip(peers, COLOURS, MARKERS, strict=False):
        points = [(ratio, i) for i, row in enumerate(rows) if (ratio := row.ratio(peer))]
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, c=colour, marker=marker, label=peer)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_xlabel("time of the peer / time of fastseq")
    axes.set_title(title, fontsize=8, wrap=True)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def loss_curves(losses: dict[str, list[float]], path: Path, title: str) -> None:
    """Loss in bits per character, and below it the distance from torch's curve."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    curves, distance = figure.subplots(2, 1, sharex=True)
    styles = ("-", "--", ":")
    for (name, curve), style in zip(losses.items(), styles, strict=True):
        curves.plot([nats / math.log(2) for nats in curve], style, label=name)
        if name != "torch":
            gap = [abs(a - b) for a, b in zip(curve, losses["torch"], strict=True)]
            distance.plot(gap, style, label=f"|{name} - torch|")
    curves.set_ylabel("training loss, bits per character")
    curves.set_title(title, fontsize=9)
    distance.set_ylabel("nats")
    distance.set_yscale("symlog", linthresh=1e-8)
    distance.set_xlabel("step")
    for axes in (curves, distance):
        axes.legend(fontsize=8)
        axes.grid(linewidth=0.3)
    figure.savefig(path, dpi=130)
