"""One page from the lines of a run: python -m benchmarks report [FILE ...] [--out FOLDER]

Writes report.html (one file, pictures inside), report.md and one PNG per benchmark. Each picture has a row per case and
a dot per variant: its wall time over that of our own variant in the same case and run, on a logarithmic axis, so that
what lies left of 1 is faster than we are. The targets come first.
"""

import argparse
import base64
import html
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.targets import LATEST, Cases

# Names that our own variant may have, in the order in which one is looked for.
OURS = ("effkern", "LoRA-RITE", "ours, roots every step", "auto")
# Rows of one picture.
MOST_ROWS = 40


def our_variant(variants: dict[str, Any]) -> str | None:
    return next((name for name in OURS if name in variants), None)


def title(case: str) -> str:
    given = json.loads(case)
    return ", ".join(f"{k} {v}" for k, v in given.items() if v is not None and (k, v) != ("device", "cpu"))


def markdown(benchmark: str, cases: dict[str, dict[str, Any]]) -> str:
    rows = ["| case | variant | ms | spread | CPU ms | x ours |", "| --- | --- | ---: | --- | ---: | ---: |"]
    for case, variants in cases.items():
        ours = our_variant(variants)
        for name, line in variants.items():
            ratio = f"{line['wall'] / variants[ours]['wall']:.2f}" if ours else "-"
            low, high = 1e3 * line["wall_low"], 1e3 * line["wall_high"]
            rows.append(
                f"| {title(case)} | {name} | {1e3 * line['wall']:.3f} | {low:.3f}-{high:.3f} | "
                f"{1e3 * line['cpu']:.3f} | {ratio} |"
            )
    return f"## {benchmark}\n\n" + "\n".join(rows)


def picture(benchmark: str, cases: dict[str, dict[str, Any]], path: Path) -> bool:
    """Whether there was something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [(case, v, ours) for case, v in cases.items() if (ours := our_variant(v)) and len(v) > 1][:MOST_ROWS]
    if not drawn:
        return False
    names = list(dict.fromkeys(name for _, variants, _ in drawn for name in variants))
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.3 * len(drawn)), layout="constrained")
    for place, name in enumerate(names):
        points = [(v[name]["wall"] / v[ours]["wall"], row) for row, (_, v, ours) in enumerate(drawn) if name in v]
        marker = "o" if name in OURS else "sD^vP*Xphd"[place % 10]
        axes.plot(*zip(*points), marker, label=name, markersize=6, alpha=0.85)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(drawn)), [title(case) for case, _, _ in drawn], fontsize=8)
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlabel("wall time over ours (left of 1: faster than ours)")
    axes.set_title(benchmark)
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def table_html(table: str) -> str:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]

    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(rows[0], 'th')}{''.join(row(cells, 'td') for cells in rows[2:])}</table>"


STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #ccc;padding:2px 8px;text-align:left}"
    "img{max-width:100%}summary{cursor:pointer}"
)


def machine(cases: Cases) -> str:
    line = next(v for c in cases.values() for variants in c.values() for v in variants.values())
    known = ("date", "processor", "cores", "threads", "gpu", "torch", "effkern", "python")
    return ", ".join(f"{name} {line[name]}" for name in known if line.get(name) is not None)


def write(cases: Cases, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    held = targets.markdown(targets.findings(targets.read(), cases))
    text = [f"# Benchmarks\n\n{machine(cases)}", f"## Targets\n\n{held}"]
    page = [f"<h1>Benchmarks</h1><p>{html.escape(machine(cases))}</p><h2>Targets</h2>{table_html(held)}"]
    for benchmark, found in cases.items():
        table = markdown(benchmark, found)
        text.append(table)
        page.append(f"<h2>{html.escape(benchmark)}</h2>")
        path = folder / f"{benchmark}.png"
        if picture(benchmark, found, path):
            page.append(f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">')
        page.append(f"<details><summary>all figures</summary>{table_html(table)}</details>")
    document = f"<!doctype html><meta charset='utf-8'><title>Benchmarks</title><style>{STYLE}</style>{''.join(page)}"
    for name, content in (("report.md", "\n\n".join(text) + "\n"), ("report.html", document)):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(content)
        os.replace(temporary, folder / name)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, default=[LATEST], metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    a = parser.parse_args(arguments)
    try:
        cases = targets.read_lines(line for path in a.files for line in path.read_text().splitlines())
    except OSError as error:
        print(f"benchmarks report: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    if not cases:
        print(f"benchmarks report: {', '.join(map(str, a.files))} must hold result lines, got none", file=sys.stderr)
        return 2
    write(cases, a.out)
    print(f"{a.out / 'report.html'}, {a.out / 'report.md'}")
    return 0
