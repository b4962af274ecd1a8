"""The announcement's two charts: all votes, and votes by category, with their intervals."""

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ksr_distill.study.findings import Category
from ksr_distill.study.statistics import BOTH, NEITHER, A, B, Summary

# Left to right; distinguishable for colour-blind readers and in greyscale.
ORDER = (B, BOTH, NEITHER, A)
COLOURS = {A: "#f4a259", B: "#2a78b5", BOTH: "#b9d7ea", NEITHER: "#e3e3e3"}
INK = {A: "#222222", B: "#ffffff", BOTH: "#222222", NEITHER: "#222222"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def overall_chart(overall: Summary, label_a: str, label_b: str) -> str:
    """Return the SVG of one stacked bar with the shares and the intervals of both sides."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 1.9), layout="constrained")
        axes = figure.subplots()
        _bars(axes, [overall], numbers="%.0f %%")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _legend(figure, label_a, label_b)
        return _svg(figure, "overall")


def category_chart(categories: list[Category], label_a: str, label_b: str) -> str:
    """Return the SVG of a stacked bar for each category, beside its difference."""
    summaries = [category.summary for category in categories]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 1.5 + 0.34 * len(categories)), layout="constrained")
        bars, differences = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _bars(bars, summaries, numbers="%.0f")
        names = [category.name for category in categories]
        bars.set_yticks(range(len(names)), names, parse_math=False)
        bars.tick_params(axis="y", length=0)
        _differences(differences, categories)
        differences.set_xlabel(f"{label_b} minus {label_a}, points", parse_math=False)
        _legend(figure, label_a, label_b)
        return _svg(figure, "categories")


def _bars(axes: Axes, summaries: list[Summary], *, numbers: str) -> None:
    rows = range(len(summaries))
    start = [0.0] * len(summaries)
    for outcome in ORDER:
        widths = [100 * summary.shares[outcome].estimate for summary in summaries]
        bars = axes.barh(rows, widths, left=start, height=0.72, color=COLOURS[outcome], linewidth=0)
        # A number wider than its segment would overlap the next one.
        labels = [numbers % width if width >= 6 else "" for width in widths]
        axes.bar_label(bars, labels, label_type="center", color=INK[outcome], fontsize=9)
        start = [left + width for left, width in zip(start, widths, strict=True)]
    for row, summary in enumerate(summaries):
        # The outer segments begin at the edges, so their intervals can be read on the axis.
        _whisker(axes, row, 100 * summary.shares[B].low, 100 * summary.shares[B].high)
        _whisker(axes, row, 100 - 100 * summary.shares[A].high, 100 - 100 * summary.shares[A].low)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(summaries) - 0.45, -0.55)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))


def _whisker(axes: Axes, row: int, low: float, high: float) -> None:
    low, high = max(low, 0.0), min(high, 100.0)
    below = row + 0.26  # below the numbers
    axes.plot([low, high], [below, below], color="#222222", linewidth=1.1, clip_on=False)
    for end in (low, high):
        axes.plot(
            [end, end], [below - 0.07, below + 0.07], color="#222222", linewidth=1.1, clip_on=False
        )


def _differences(axes: Axes, categories: list[Category]) -> None:
    axes.axvline(0, color="#999999", linewidth=1)
    for row, category in enumerate(categories):
        low, high = (100 * max(-1.0, min(1.0, end)) for end in category.summary.difference[1:])
        axes.plot([low, high], [row, row], color="#444444", linewidth=1.4)
        axes.plot(
            100 * category.summary.difference.estimate,
            row,
            marker="o",
            color="#444444",
            markerfacecolor="#444444" if category.is_decided else "#ffffff",
            markersize=6,
        )
    axes.set_title("filled: decided after Holm", fontsize=9, color="#555555")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)


def _legend(figure: Figure, label_a: str, label_b: str) -> None:
    names = {A: f"{label_a} better", B: f"{label_b} better", BOTH: "both good", NEITHER: "neither"}
    patches = [mpl.patches.Patch(color=COLOURS[outcome]) for outcome in ORDER]
    legend = figure.legend(
        patches,
        [names[outcome] for outcome in ORDER],
        loc="outside upper left",
        ncols=4,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _svg(figure: Figure, salt: str) -> str:
    """Return the figure as an svg element; the salt makes its ids unique on the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'<g id="[\w.]+">', "<g>", svg)
