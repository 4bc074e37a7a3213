"""Score against parameters, one panel a task, readable without colour."""

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.terminal import visible

if TYPE_CHECKING:
    from kdcli.compare.report import Block, Report

MARKERS = "osD^vP<>Xphd8H"
LINE = 0.17
"""Inches between two labels, one above the other."""
SUFFIXES = ("png", "svg")


def draw(report: "Report") -> dict[str, bytes]:
    """Return the figure as {"png": ..., "svg": ...}; the same report gives the same bytes."""
    # Slow to import, and only the end of a comparison needs it.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = report.all_blocks
    columns = min(3, len(blocks))
    lines = -(-len(blocks) // columns)
    height = max(3.4, LINE * max(len(block.rows) + 4 for block in blocks) + 1.2)
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "kdcli", "font.size": 8.5, "axes.titlesize": 10}
    with rc_context(style), warnings.catch_warnings():
        # A font without some letter of a name draws a box: no reason to disturb.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(5.6 * columns, height * lines), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, block in zip(panels, blocks, strict=False):
            _panel(panel, block, height - 1.2)
        for panel in panels[len(blocks) :]:
            panel.set_visible(False)
        files = {}
        for suffix in SUFFIXES:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            files[suffix] = buffer.getvalue()
    return files


@dataclass(frozen=True)
class Point:
    """A student: its number in the table, millions of parameters, mean and standard deviation in hundredths."""

    number: int
    label: str
    size: float
    mean: float
    std: float
    is_baseline: bool


def points_of(block: "Block") -> list[Point]:
    """Return the students of a task that have a score."""
    return [
        Point(
            number,
            visible(row.label),
            row.parameters / 1e6,
            100 * row.summary.mean,
            100 * (row.summary.std or 0.0),
            row.label == block.baseline,
        )
        for number, row in enumerate(block.rows)
        if row.summary is not None and row.parameters is not None
    ]


def _panel(panel: Any, block: "Block", height: float) -> None:
    """Draw one task. height: of the panel's inside, about, in inches."""
    panel.set_title(visible(f"{block.title} ({block.metric})" if block.metric else block.title), parse_math=False)
    panel.set_xlabel("parameters at inference (millions)")
    panel.set_ylabel("score x 100")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    points = points_of(block)
    if not points:
        panel.text(0.5, 0.5, "no result", ha="center", transform=panel.transAxes)
        return
    teacher = None
    if block.teacher_score is not None and block.teacher_parameters is not None:
        teacher = (block.teacher_parameters / 1e6, 100 * block.teacher_score)
    sizes = [point.size for point in points] + ([teacher[0]] if teacher else [])
    width = (max(sizes) - min(sizes)) or max(sizes)
    low = min([point.mean - point.std for point in points] + ([teacher[1]] if teacher else []))
    high = max([point.mean + point.std for point in points] + ([teacher[1]] if teacher else []))
    margin = 0.1 * ((high - low) or 1.0)
    limits = (low - margin, high + margin)
    panel.set_ylim(*limits)
    gap = LINE / height * (limits[1] - limits[0])
    clusters = clusters_of(points, 0.04 * width)
    step = min(0.03, 0.3 / max(map(len, clusters))) * width
    right = max([max(sizes), *(_cluster(panel, cluster, step, gap, limits) for cluster in clusters)])
    if teacher is not None:
        panel.plot(*teacher, marker="*", markersize=14, color="black", linestyle="none", zorder=4)
        panel.annotate(
            "teacher", teacher, xytext=(0, -9), textcoords="offset points", ha="center", va="top", fontweight="bold"
        )
    panel.set_xlim(min(sizes) - 0.25 * width, right + (0.2 if right <= max(sizes) else 0.6) * width)


def _cluster(panel: Any, cluster: list[Point], step: float, gap: float, limits: tuple[float, float]) -> float:
    """Draw students of about one size side by side, their labels in a column beside them; return its place."""
    from matplotlib import colormaps

    colours = colormaps["tab10"]
    middle = sum(point.size for point in cluster) / len(cluster)
    places = [middle + (place - (len(cluster) - 1) / 2) * step for place in range(len(cluster))]
    column = places[-1] + 1.5 * step
    heights = spread([point.mean for point in cluster], gap, limits)
    for place, point, height in zip(places, cluster, heights, strict=True):
        colour = colours(point.number % 10)
        panel.errorbar(
            place,
            point.mean,
            yerr=point.std or None,
            marker=MARKERS[point.number % len(MARKERS)],
            markersize=6,
            color=colour,
            # Where the shapes begin again, the filling tells two of them apart.
            markerfacecolor="white" if point.number // len(MARKERS) % 2 else colour,
            markeredgecolor="black",
            markeredgewidth=0.6,
            capsize=2.5,
            linewidth=1.0,
            zorder=3,
        )
        panel.plot([place, column], [point.mean, height], color="0.7", linewidth=0.5, zorder=1)
        name = f" {point.label} (baseline)" if point.is_baseline else f" {point.label}"
        weight = "bold" if point.is_baseline else "normal"
        panel.text(column, height, name, va="center", fontweight=weight, parse_math=False)
    return column


def clusters_of(points: list[Point], reach: float) -> list[list[Point]]:
    """Return the points in groups, in which each is at most `reach` larger than the one before, in millions."""
    clusters: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.size):
        if clusters and point.size - clusters[-1][-1].size <= reach:
            clusters[-1].append(point)
        else:
            clusters.append([point])
    # Side by side as they were given: the order says nothing about sizes that are nearly equal.
    return [sorted(cluster, key=lambda point: point.number) for cluster in clusters]


def spread(heights: list[float], gap: float, limits: tuple[float, float]) -> list[float]:
    """Return places near `heights`, in the same order from low to high, at least `gap` apart and inside `limits`.

    Where `limits` are too narrow for that, the places overrun them at the top.
    """
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    placed: list[float] = []
    for number in order:
        placed.append(max(heights[number], placed[-1] + gap if placed else limits[0]))
    ceiling = max(limits[1], limits[0] + gap * (len(heights) - 1))
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], ceiling)
        ceiling = placed[place] - gap
    result = [0.0] * len(heights)
    for place, number in enumerate(order):
        result[number] = placed[place]
    return result
