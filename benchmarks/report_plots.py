"""The report's pictures, each a PNG: ratios to our own variant, shares of the limit, rooflines, targets, curves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = Mapping[str, dict[str, Any]]
"""Variants of one case."""

# Names that our own variant may have, in the order in which one is looked for.
OURS = ("effkern", "LoRA-RITE", "ours, roots every step", "effkern step", "auto", "effkern one-sided Shampoo",
        "effkern LoRA-RITE", "logits")  # fmt: skip
COLOURS = ("#c0392b", "#2471a3", "#7d8c93", "#b9770e", "#7d3c98", "#117864", "#a04000", "#515a5a", "#d35400", "#1f618d",
           "#943126", "#6c3483")  # fmt: skip
MARKERS = "sD^vP*Xphd<>"
OUR_COLOUR = "#1e8449"
DPI = 110
# Rows of one panel, panels of one picture, and what a label may take.
MOST_ROWS, MOST_PANELS, MOST_LETTERS = 26, 4, 60
# Further left of ours nothing is placed to scale: floors of tiny cases, which are no competitors.
LEAST_RATIO = 0.05
# Up to so many cases a picture has a bar per variant instead of a row per case.
FEW_CASES = 2


def our_variant(variants: Lines) -> str | None:
    return next((name for name in OURS if name in variants), None)


def label(case: Mapping[str, Any], leave: Sequence[str] = ()) -> str:
    """Fields of a case in words, without those in `leave` and what says nothing."""
    shown = {k: v for k, v in case.items() if v is not None and (k, v) != ("device", "cpu") and k not in leave}
    return ", ".join(f"{k} {v}" for k, v in shown.items())


def brief(case: Mapping[str, Any], leave: Sequence[str] = ()) -> str:
    """As `label`, where a word stands for itself: "rows 512, float32, forward"."""
    shown = {k: v for k, v in case.items() if v is not None and (k, v) != ("device", "cpu") and k not in leave}
    return ", ".join(v if isinstance(v, str) else f"{k} {v}" for k, v in shown.items())


def varying(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields that do not have one value in all cases."""
    names = dict.fromkeys(key for case in cases for key in case)
    return [name for name in names if len({json.dumps(case.get(name)) for case in cases}) > 1]


def constant(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields that may be left out of a row's label, as they are the same everywhere; none where there is one case."""
    if len(cases) < 2:
        return []
    differ = varying(cases)
    return [name for case in cases for name in case if name not in differ]


def panels(cases: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Places of the cases in groups of at most MOST_ROWS where a field allows it, by the field with fewest values."""
    if len(cases) <= MOST_ROWS:
        return [list(range(len(cases)))]
    best: list[list[int]] = []
    for name in varying(cases):
        groups: dict[str, list[int]] = {}
        for i, case in enumerate(cases):
            groups.setdefault(json.dumps(case.get(name)), []).append(i)
        found = list(groups.values())
        if len(found) <= MOST_PANELS and (not best or max(map(len, found)) < max(map(len, best))):
            best = found
    return best or [list(range(len(cases)))]


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save(figure: Any, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=DPI, format="png", bbox_inches="tight")
    temporary.replace(path)
    pyplot().close(figure)


def log_axis(axis: Any, low: float, high: float) -> None:
    """Logarithmic from below `low` to above `high`, with a few plain numbers under it."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    low, high = low / 1.25, high * 1.25
    axis.axes.set_xscale("log")
    axis.axes.set_xlim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    axis.set_major_locator(FixedLocator([m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def short(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "\u2026"


def rows_of(axes: Any, labels: Sequence[str]) -> None:
    """One line of the axis per label, from top to bottom."""
    axes.set_yticks(range(len(labels)), [short(text) for text in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    for row in range(0, len(labels), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f4f6f7", zorder=0)


def style_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker by variant; ours is a green dot in every picture."""
    others = [name for name in names if name not in OURS]
    found = {
        name: {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]} for i, name in enumerate(others)
    }
    return found | {name: {"marker": "o", "color": OUR_COLOUR} for name in names if name in OURS}


def ratios(title: str, cases: Mapping[str, Lines], path: Path) -> bool:
    """A row per case, a mark per variant: its time over ours, with the spread of ours. False: nothing to draw."""
    drawn = [(json.loads(text), v, ours) for text, v in cases.items() if (ours := our_variant(v)) and len(v) > 1]
    if not drawn:
        return False
    if len(drawn) <= FEW_CASES:
        return bars(title, drawn, path)
    plt = pyplot()
    groups = panels([case for case, _, _ in drawn])
    fixed = constant([case for case, _, _ in drawn])
    names = list(dict.fromkeys(name for _, variants, _ in drawn for name in variants))
    styles = style_of(names)
    values = [v[n]["wall"] / v[o]["wall"] for _, v, o in drawn for n in v]
    low = max(min(*values, 0.9), LEAST_RATIO)
    tallest = max(map(len, groups))
    insides = [constant([drawn[i][0] for i in group]) if len(groups) > 1 else fixed for group in groups]
    labels = [[brief(drawn[i][0], inside) for i in group] for group, inside in zip(groups, insides)]
    # Said once where all panels have the same rows.
    once = all(found == labels[0] for found in labels)
    figure, every = plt.subplots(
        1, len(groups), figsize=((3.3 if once else 5.2) * len(groups) + 2.6, 1.4 + 0.26 * tallest), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for place, (axes, group) in enumerate(zip(every[0], groups)):
        chosen = [drawn[i] for i in group]
        rows_of(axes, labels[place] if place == 0 or not once else [""] * len(group))
        for row, (_, variants, ours) in enumerate(chosen):
            own = variants[ours]
            if "wall_low" in own:
                spread = [own["wall_low"] / own["wall"], own["wall_high"] / own["wall"]]
                axes.plot(spread, [row, row], color=OUR_COLOUR, linewidth=3, alpha=0.25, solid_capstyle="butt")
        for name in names:
            points = [(v[name]["wall"] / v[o]["wall"], row) for row, (_, v, o) in enumerate(chosen) if name in v]
            inner = [point for point in points if point[0] >= low]
            axes.plot(*(zip(*inner) if inner else ([], [])), linestyle="", markersize=6, alpha=0.9, label=name,
                      **styles[name])  # fmt: skip
            beyond = [(low / 1.12, row) for x, row in points if x < low]
            if beyond:
                axes.plot(*zip(*beyond), linestyle="", marker="<", markersize=4, alpha=0.6, color=styles[name]["color"])
        axes.axvline(1.0, color="black", linewidth=0.8)
        log_axis(axes.xaxis, low, max(*values, 1.1))
        axes.set_xlabel("time over ours (right: slower)")
        if len(groups) > 1:
            axes.set_title(brief({name: chosen[0][0].get(name) for name in insides[place] if name not in fixed}))
    handles = dict(zip(*reversed(every[0][0].get_legend_handles_labels())))
    columns = min(4, len(handles))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    common = label({name: drawn[0][0][name] for name in dict.fromkeys(fixed)})
    figure.suptitle(f"{title}\n{common}" if common else title, fontsize=10)
    save(figure, path)
    return True


def bars(title: str, drawn: Sequence[tuple[dict[str, Any], Lines, str]], path: Path) -> bool:
    """A panel per case, a bar per variant from the fastest to the slowest."""
    plt = pyplot()
    fixed = constant([case for case, _, _ in drawn])
    most = max(len(variants) for _, variants, _ in drawn)
    figure, every = plt.subplots(
        1, len(drawn), figsize=(6.2 * len(drawn), 1.3 + 0.27 * most), squeeze=False, layout="constrained"
    )
    for axes, (case, variants, ours) in zip(every[0], drawn):
        order = sorted(variants, key=lambda name: variants[name]["wall"])
        values = [variants[name]["wall"] / variants[ours]["wall"] for name in order]
        rows_of(axes, order)
        left = min(*values, 0.9) / 1.3
        for row, (name, value) in enumerate(zip(order, values)):
            colour = OUR_COLOUR if name == ours else "#85929e"
            axes.barh(row, value - left, left=left, height=0.6, color=colour)
            axes.annotate(
                f"{value:.2f}", (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.axvline(1.0, color="black", linewidth=0.8)
        log_axis(axes.xaxis, left * 1.25, max(values) * 2)
        axes.set_xlabel(f"time over ours, {1e3 * variants[ours]['wall']:.3g} ms (right: slower)")
        axes.set_title(brief(case, fixed), fontsize=9)
    common = label({name: drawn[0][0][name] for name in dict.fromkeys(fixed)})
    figure.suptitle(f"{title}\n{common}" if common else title, fontsize=10)
    save(figure, path)
    return True


def shares(found: Mapping[str, Sequence[float]], path: Path) -> bool:
    """By op: which share of what the machine's ceilings allow each of our cases reaches."""
    if not found:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(found)), layout="constrained")
    rows_of(axes, list(found))
    for row, values in enumerate(found.values()):
        axes.plot(values, [row] * len(values), "o", color=OUR_COLOUR, alpha=0.35, markersize=6)
        middle = sorted(values)[len(values) // 2]
        axes.plot([middle], [row], "|", color="black", markersize=14, markeredgewidth=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlim(0, max(1.1, *(max(v) for v in found.values())) * 1.03)
    axes.set_xlabel("share of the bound by bytes and FLOPs (a dot per case, a bar the median; above 1: in the cache)")
    save(figure, path)
    return True


def roofline(
    points: Mapping[str, Sequence[tuple[float, float]]], bandwidth: float, rates: Mapping[str, float], path: Path
) -> bool:
    """FLOP/s against FLOPs per byte: roofs by copy bandwidth and product rates, our cases below them."""
    if not points:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    intensities = [x for group in points.values() for x, _ in group]
    low, high = min(*intensities, 0.1) / 2, max(*intensities, 10.0) * 2
    for i, (name, rate) in enumerate(sorted(rates.items(), key=lambda item: -item[1])):
        edge = rate / bandwidth
        inside = [x for x in (low, edge, high) if low <= x <= high]
        line = [low, *inside, high]
        axes.plot(line, [min(x * bandwidth, rate) / 1e9 for x in line], color=f"{0.15 + 0.25 * i:.2f}", linewidth=1.2)
        axes.annotate(
            f"{name} {rate / 1e9:.0f} GFLOP/s", (high, rate / 1e9), xytext=(-4, 3), textcoords="offset points",
            ha="right", fontsize=8,
        )  # fmt: skip
    axes.annotate(
        f"copy {bandwidth / 1e9:.1f} GB/s", (low, low * bandwidth / 1e9), xytext=(8, 12), textcoords="offset points",
        rotation=30, fontsize=8,
    )  # fmt: skip
    for i, (name, group) in enumerate(points.items()):
        marker, colour = MARKERS[i % len(MARKERS)], COLOURS[i % len(COLOURS)]
        xs, ys = zip(*group)
        attained = [y / 1e9 for y in ys]
        axes.plot(xs, attained, linestyle="", marker=marker, color=colour, alpha=0.8, markersize=6, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOPs per byte that must move")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_ylabel("GFLOP/s")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
    return True


def bounds(found: Sequence[tuple[str, Sequence[float]]], path: Path) -> bool:
    """A row per target, a dot per case: how far the figure is from its bound; left of 1 is met."""
    if not found:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9.5, 1.2 + 0.23 * len(found)), layout="constrained")
    axes.set_yticks(range(len(found)), [name for name, _ in found], fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    for row, (_, values) in enumerate(found):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color="#f4f6f7", zorder=0)
        for value in values:
            axes.plot([value], [row], "o", color=OUR_COLOUR if value <= 1 else "#c0392b", alpha=0.45, markersize=5)
    axes.axvline(1.0, color="black", linewidth=0.9)
    every = [v for _, values in found for v in values]
    log_axis(axes.xaxis, max(min(*every, 0.9), 1e-2), max(*every, 1.1))
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_xlabel("figure over bound, or bound over figure (left of 1: met)")
    save(figure, path)
    return True


def scaling(found: Mapping[str, Sequence[tuple[float, float]]], exponents: Mapping[str, float], path: Path) -> bool:
    """Time against size over the smallest size, a line per op and what grows, the fitted exponent beside its name."""
    if not found:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for i, (name, points) in enumerate(found.items()):
        text = f"{name}: {exponents[name]:.2f}" if name in exponents else name
        xs, ys = zip(*sorted(points))
        axes.plot(
            [x / xs[0] for x in xs], [1e3 * y for y in ys], marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)], markersize=4, linewidth=1, label=text,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("size over the smallest")
    axes.set_ylabel("ms")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="op against: exponent")
    save(figure, path)
    return True


def end_to_end(rows: Mapping[tuple[str, str], dict[str, Any]], path: Path) -> bool:
    """Speed over plain by method, and validation loss against seconds of training."""
    known = dict.fromkeys(method for method, _ in rows)
    methods = [m for m in known if (m, "plain") in rows and (m, "effkern") in rows]
    if not methods:
        return False
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1, 1.5))
    speed = [rows[m, "plain"]["wall"] / rows[m, "effkern"]["wall"] for m in methods]
    rows_of(left, methods)
    left.barh(range(len(methods)), speed, color=OUR_COLOUR, height=0.6)
    for row, s in enumerate(speed):
        left.annotate(f"{s:.2f}", (s, row), xytext=(4, 0), textcoords="offset points", va="center")
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlim(0, max(*speed, 1.0) * 1.15)
    left.set_xlabel("tokens/s over plain torch, the same method")
    drawn: list[tuple[str, str]] = [("base", "plain"), *((m, "effkern") for m in methods)]
    for i, key in enumerate(k for k in drawn if k in rows):
        curve, step = rows[key].get("curve"), rows[key]["wall"]
        if not curve:
            continue
        name = "plain base" if key[1] == "plain" else key[0]
        right.plot(
            [n * step for n, _ in curve], [loss for _, loss in curve], color="black" if i == 0 else COLOURS[i - 1],
            linestyle="--" if i == 0 else "-", marker=MARKERS[i % len(MARKERS)], markersize=4, label=name,
        )  # fmt: skip
    right.set_xlabel("seconds of training steps")
    right.set_ylabel("validation loss, nats")
    right.grid(linewidth=0.4, alpha=0.6)
    right.legend(frameon=False, fontsize=8)
    save(figure, path)
    return True
