"""The directive `measured`: an op's charts, drawn from the committed results when the site is built.

    ```{measured} laurel_residual
    ```

Each chart is an SVG inside the page whose ink is the page's own colour, so that it follows light and dark; below them
stand the machine, the date and the commands, and the numbers as a table.
"""

import html
import io
import math
import re
from typing import Any

import charts
import matplotlib
from docutils import nodes
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

# Replaced by the page's text colour; no other element has it.
INK = "#010203"
OUR_COLOUR = "#23976a"
WIDTH = 4.1
# A longer name stands on the page as its beginning.
LETTERS = 46


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bars(chart: charts.Bars) -> Any:
    """From the smallest to the largest, the name above its bar."""
    order = sorted(chart.values.items(), key=lambda item: item[1])
    figure, axes = plt.subplots(figsize=(WIDTH, 0.62 + 0.40 * len(order)), layout="constrained")
    largest = order[-1][1]
    # Beside one that is thirty times as long a bar could not be seen.
    logarithmic = largest > 30 * order[0][1]
    left = order[0][1] / 2 if logarithmic else 0.0
    for row, (name, value) in enumerate(order):
        mine = name in chart.own
        axes.barh(
            row, value - left, left=left, height=0.36, color=OUR_COLOUR if mine else INK, alpha=1 if mine else 0.32
        )
        style = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": INK}
        axes.annotate(name[:LETTERS], (left, row), xytext=(0, 11), weight="bold" if mine else "normal", **style)
        axes.annotate(number(value), (value, row), xytext=(4, 0), **style)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(left, left * (largest / left) ** 1.18)
    else:
        axes.set_xlim(0, largest * 1.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.set_ylim(len(order) - 0.55, -0.85)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{chart.unit}{', logarithmic' if logarithmic else ''}")
    return figure


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two, a few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [
        [m * 10.0**d for d in decades for m in steps] for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
    ]
    found = [[x for x in choice if low <= x <= high] for choice in choices]
    return next((choice for choice in found if len(choice) >= 3), found[-1])


def curve(chart: charts.Curve) -> Any:
    figure, axes = plt.subplots(figsize=(WIDTH, 2.5), layout="constrained")
    xs, ys = zip(*chart.points)
    axes.plot(xs, ys, color=OUR_COLOUR, linewidth=2, marker="o", markersize=5)
    for x, y in (chart.points[0], chart.points[-1]):
        axes.annotate(
            number(y), (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8.5, color=INK
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.margins(x=0.08, y=0.18)
    axes.yaxis.set_major_locator(FixedLocator(ticks(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())
    axes.grid(linewidth=0.5, alpha=0.18, color=INK)
    axes.set_xlabel(f"{chart.size}, logarithmic")
    axes.set_ylabel("ms, logarithmic")
    return figure


def drawn(chart: charts.Bars | charts.Curve, salt: str) -> str:
    """The SVG, its ink the colour of the text around it."""
    style = {
        "font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": salt,
        "svg.fonttype": "path", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
        "ytick.color": INK, "savefig.transparent": True,
    }  # fmt: skip
    with plt.rc_context(style):
        figure = bars(chart) if isinstance(chart, charts.Bars) else curve(chart)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)
    # Without the XML head, and with names of its own for what it refers to.
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|="#|url\(#)', rf"\g<1>{salt}-", text).replace(INK, "currentColor")
    said = html.escape(f"{chart.title}, {chart.unit}")
    return text.replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1)


def source(chart: charts.Bars | charts.Curve) -> str:
    """What was measured, and by which command."""
    command = f"; <code>python -m {html.escape(chart.command)}</code>" if chart.command else "; computed, not measured"
    count = chart.machine.get("threads")
    threads = f"; {count} thread{'s' * (count > 1)}" if count else ""
    return f"<b>{html.escape(chart.title)}</b>: {html.escape(chart.case)}{threads}{command}.<br>"


def machines(found: list[charts.Bars | charts.Curve]) -> str:
    said: dict[str, set[str]] = {}
    for chart in found:
        m = chart.machine
        if m:
            where = f"{m['processor']}, {m['cores']} cores" if not m.get("gpu") else str(m["gpu"])
            said.setdefault(f"{where}, torch {m['torch']}", set()).add(m["date"])
    return " ".join(f"{html.escape(where)}; {' and '.join(sorted(days))}." for where, days in said.items())


def table(found: list[charts.Bars | charts.Curve]) -> str:
    rows = []
    for chart in found:
        values = chart.values.items() if isinstance(chart, charts.Bars) else chart.points
        for name, value in values:
            name = name if isinstance(name, str) else f"{chart.size} {name:g}"  # type: ignore[union-attr]
            cells = (chart.title, name, number(value), chart.unit)
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<details class="measured-numbers"><summary>The numbers</summary><div class="table-wrapper">'
        f'<table class="docutils"><tbody>{body}</tbody></table></div></details>'
    )


class Measured(SphinxDirective):
    """Charts of one op; see the head of this file."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        op = self.arguments[0]
        try:
            found = charts.charts(op)
        except ValueError as error:
            raise self.error(f"measured: {error}") from None
        for path in charts.lines.RESULTS.glob("*.json*"):
            self.env.note_dependency(str(path))
        if not found:
            text = "Nothing of this op is among the committed results yet; python -m benchmarks run measures it."
            return [nodes.paragraph("", "", nodes.emphasis("", text))]
        panels = "".join(
            f'<div class="panel"><p class="panel-title">{html.escape(chart.title)}</p>{drawn(chart, f"{op}-{i}")}</div>'
            for i, chart in enumerate(found)
        )
        notes = " ".join(map(source, found))
        page = (
            f'<figure class="measured"><div class="panels">{panels}</div>'
            f"<figcaption>{notes} {machines(found)} Shorter is better; green is this package.</figcaption>"
            f"{table(found)}</figure>"
        )
        return [nodes.raw("", page, format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    matplotlib.use("Agg")
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True, "version": "1"}
