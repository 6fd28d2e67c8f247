"""Pictures of the tasks: curves in panels, one PNG a task; drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SMOOTH = 50  # points of a training curve, each the mean of a stretch


class Picture:
    """A row of panels."""

    def __init__(self, title: str, panels: int = 1):
        self.figure = Figure(figsize=(max(6.5, 5 * panels), 4), layout="constrained")
        self.axes = self.figure.subplots(1, panels, squeeze=False)[0]
        self.figure.suptitle(title, fontsize=9)

    def panel(
        self,
        i: int,
        curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        labels: tuple[str, str],
        log: bool = False,
        lines: Mapping[str, float] | None = None,
    ) -> None:
        """Curves (x, y) by name in panel i, levels as dotted lines; `labels` of the two axes."""
        axes = self.axes[i]
        for name, (x, y) in curves.items():
            axes.plot(x, y, label=name, linewidth=1.2, marker="." if len(x) < SMOOTH else None)
        for name, level in (lines or {}).items():
            axes.axhline(level, color="black", linestyle=":", linewidth=0.9, label=name)
        axes.set(xlabel=labels[0], ylabel=labels[1], yscale="log" if log else "linear")
        axes.grid(linewidth=0.3)
        axes.legend(fontsize=7)

    def save(self, path: Path) -> None:
        """As PNG."""
        self.figure.savefig(path, dpi=130)


def smooth(curve: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and means of at most SMOOTH equal stretches of a training curve."""
    stretches = np.array_split(np.asarray(curve, np.float64), min(SMOOTH, len(curve)))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    return ends, np.array([stretch.mean() for stretch in stretches])
