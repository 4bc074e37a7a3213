"""Score against parameters, one panel a task, readable without colour."""

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.tasks.metrics import factor_of, is_error
from kdcli.terminal import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kdcli.compare.report import Block, Report

MARKERS = "osD^vP<>Xphd8H"
LINE = 0.17
"""Inches between two labels, one above the other."""
LETTER = 0.065
"""Inches that a letter of a label takes, about."""
SUFFIXES = ("png", "svg")


def draw(report: "Report") -> dict[str, bytes]:
    """Return the figure as {"png": ..., "svg": ...}; the same report gives the same bytes."""
    from matplotlib import rc_context

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "kdcli"}
    with rc_context(style), warnings.catch_warnings():
        # A font without some letter of a name draws a box: no reason to disturb.
        warnings.simplefilter("ignore")
        figure = drawn(report)
        files = {}
        for suffix in SUFFIXES:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            files[suffix] = buffer.getvalue()
    return files


def drawn(report: "Report") -> "Figure":
    """Return the figure of a report, laid out."""
    # Slow to import, and only the end of a comparison needs it.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = report.all_blocks
    every = [point for block in blocks for point in points_of(block)]
    columns = min(3, len(blocks))
    lines = -(-len(blocks) // columns)
    inside = max(2.2, LINE * max(len(block.rows) + 4 for block in blocks))
    names = max((len(point.name) for point in every), default=0)
    size = (columns * (4.6 + LETTER * names), lines * (inside + 1.2) + 0.3)
    with rc_context({"font.size": 8.5, "axes.titlesize": 10}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, block in zip(panels, blocks, strict=False):
            draw_panel(panel, block, inside)
        for panel in panels[len(blocks) :]:
            panel.set_visible(False)
        if key := key_of(every):
            figure.legend(handles=key, loc="outside lower center", ncols=len(key), frameon=False, handleheight=2.2)
        figure.draw_without_rendering()
    return figure


@dataclass(frozen=True)
class Point:
    """A student: its number in the table, millions of parameters, mean and standard deviation as they are shown.

    seeds: how many scores these are of; std: None for a single one.
    """

    number: int
    label: str
    size: float
    mean: float
    std: float | None
    seeds: int
    is_baseline: bool

    @property
    def name(self) -> str:
        return f"{self.label} (baseline)" if self.is_baseline else self.label


def points_of(block: "Block") -> list[Point]:
    """Return the students of a task that have a score."""
    return [
        Point(
            number,
            visible(row.label),
            row.parameters / 1e6,
            factor_of(block.metric) * row.summary.mean,
            factor_of(block.metric) * row.summary.std if row.summary.std is not None else None,
            row.summary.count,
            row.label == block.baseline,
        )
        for number, row in enumerate(block.rows)
        if row.summary is not None and row.parameters is not None
    ]


def key_of(points: list[Point]) -> list[Any]:
    """Return the legend: what a bar is, and what a mark without one is."""
    from matplotlib.figure import Figure

    elsewhere = Figure().subplots()
    look: dict[str, Any] = {"marker": "o", "markersize": 4.5, "color": "0.4", "markeredgecolor": "black"}
    counts = sorted({point.seeds for point in points if point.std is not None})
    entries: list[Any] = []
    if counts:
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        label = f"mean ± standard deviation over {seeds} seeds"
        entries.append(elsewhere.errorbar(0, 0, yerr=1, capsize=2.5, linestyle="none", label=label, **look))
    if any(point.std is None for point in points):
        entries += elsewhere.plot(0, 0, linestyle="none", label="one seed: no bar", **look)
    return entries


def draw_panel(panel: Any, block: "Block", height: float) -> None:
    """Draw one task. height: of the panel's inside, about, in inches.

    Every mark stands at its size and its score; only the labels, in a column beside the panel, give way to each other.
    """
    panel.set_title(visible(f"{block.title} ({block.metric})" if block.metric else block.title), parse_math=False)
    panel.set_xlabel("parameters at inference (millions)")
    panel.set_ylabel(f"{block.metric} (less is better)" if is_error(block.metric) else "score x 100")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="0.9", linewidth=0.6)
    panel.set_axisbelow(True)
    points = points_of(block)
    if not points:
        panel.text(0.5, 0.5, "no result", ha="center", transform=panel.transAxes)
        return
    marks = [_Mark.of(point) for point in points]
    if block.teacher_score is not None and block.teacher_parameters is not None:
        score = factor_of(block.metric) * block.teacher_score
        marks.append(_Mark("teacher", block.teacher_parameters / 1e6, score, None, "*", "black", "black", 12))
    sizes = [mark.size for mark in marks]
    margin = 0.1 * ((max(sizes) - min(sizes)) or max(sizes))
    panel.set_xlim(min(sizes) - margin, max(sizes) + margin)
    low = min(mark.mean - (mark.std or 0.0) for mark in marks)
    high = max(mark.mean + (mark.std or 0.0) for mark in marks)
    margin = 0.1 * ((high - low) or 1.0)
    limits = (low - margin, high + margin)
    panel.set_ylim(*limits)
    heights = spread([mark.mean for mark in marks], LINE / height * (limits[1] - limits[0]), limits)
    for place, (mark, level) in enumerate(zip(marks, heights, strict=True)):
        # Bars of one size lie upon each other: caps of several widths tell their ends apart.
        mark.draw(panel, level, cap=2.0 + 1.3 * (place % 5))


@dataclass(frozen=True)
class _Mark:
    """What is drawn of one model: where it stands, its shape and its label. shape_size: in points."""

    name: str
    size: float
    mean: float
    std: float | None
    shape: str
    colour: Any
    filling: Any
    shape_size: float
    bold: bool = True

    @classmethod
    def of(cls, point: Point) -> "_Mark":
        from matplotlib import colormaps

        colour = colormaps["tab10"](point.number % 10)
        # Where the shapes begin again, the filling tells two of them apart.
        filling = "white" if point.number // len(MARKERS) % 2 else colour
        shape = MARKERS[point.number % len(MARKERS)]
        return cls(point.name, point.size, point.mean, point.std, shape, colour, filling, 6, point.is_baseline)

    def draw(self, panel: Any, level: float, cap: float) -> None:
        """Draw the mark with its bar, and at the height `level` beside the panel its label, tied to it by a line."""
        look: dict[str, Any] = {
            "marker": self.shape,
            "markersize": self.shape_size,
            "color": self.colour,
            "markerfacecolor": self.filling,
            "markeredgecolor": "black",
            "markeredgewidth": 0.6,
            "zorder": 3,
        }
        panel.errorbar(self.size, self.mean, yerr=self.std, capsize=cap, linewidth=1.0, **look)
        beside = panel.get_yaxis_transform()
        panel.plot(1.03, level, transform=beside, clip_on=False, linestyle="none", **look)
        panel.annotate(
            self.name,
            (self.size, self.mean),
            xytext=(1.055, level),
            textcoords=beside,
            va="center",
            fontweight="bold" if self.bold else "normal",
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": "0.75",
                "linewidth": 0.5,
                # As far as the mark beside the name.
                "shrinkA": 13,
                "shrinkB": 0,
                "relpos": (0, 0.5),
                "zorder": 1,
            },
        )


def spread(heights: list[float], gap: float, limits: tuple[float, float]) -> list[float]:
    """Return places near `heights`, in the same order from low to high, at least `gap` apart and inside `limits`.

    No other places are nearer, in the mean square: those that are in each other's way lie around their middle. Where
    `limits` are too narrow, the places overrun them at the top. Source: isotonic regression by pooling neighbours.
    """
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    # Without the gaps, what is left is to keep the order: neighbours that break it share their mean.
    pools: list[list[float]] = []
    for place, number in enumerate(order):
        pools.append([heights[number] - place * gap])
        while len(pools) > 1 and _mean(pools[-2]) >= _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    top = max(limits[0], limits[1] - gap * (len(heights) - 1))
    levels = [min(max(_mean(pool), limits[0]), top) for pool in pools for _ in pool]
    result = [0.0] * len(heights)
    for place, number in enumerate(order):
        result[number] = levels[place] + place * gap
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
