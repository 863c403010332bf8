"""Quality against time: which points no other point beats in both, and the picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One method at one budget. ``x``: speed, more is better. ``y``: quality, or an error, as the caller says.

    ``text`` stands beside the point.
    """

    label: str
    x: float
    y: float
    text: str = ""


def front(points: Sequence[Point], *, lower_y: bool = False) -> list[Point]:
    """The points that no other beats in speed and quality both, by rising speed.

    Args:
        lower_y: ``y`` is an error: less is better.
    """
    sign = -1 if lower_y else 1
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.x, -sign * p.y)):
        if not out or sign * point.y > sign * out[-1].y:
            out.append(point)
    return out[::-1]


def draw(
    file: Path,
    points: Sequence[Point],
    *,
    x: str,
    y: str,
    title: str = "",
    lower_y: bool = False,
    log_y: bool = False,
) -> None:
    """Draw the points, a line per label, the front behind them, and a line at speed 1: left of it dense is faster.

    Up is always better: with ``lower_y`` the axis is turned over.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.8))
    best = front(points, lower_y=lower_y)
    if len(best) > 1:
        axes.plot([p.x for p in best], [p.y for p in best], color="0.8", linewidth=6, zorder=1, label="best")
    for number, label in enumerate(dict.fromkeys(point.label for point in points)):
        own = sorted((p for p in points if p.label == label), key=lambda p: p.x)
        marker, colour = "osD^vP*X"[number % 8], f"C{number % 10}"
        axes.plot([p.x for p in own], [p.y for p in own], marker, ls="-", lw=1, color=colour, label=label, zorder=2)
        for point in own:
            axes.annotate(point.text, (point.x, point.y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axvline(1, color="0.5", linestyle=":", linewidth=1)
    if log_y:
        axes.set_yscale("log")
    if lower_y:
        axes.invert_yaxis()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
