"""One page from the lines of a run: python -m benchmarks report [FILE ...] [--out FOLDER]

Writes report.html (one file, pictures inside), report.md and a PNG per picture. First the targets: what is met, missed
and not measured. Then each op: a picture with a row per case and a mark per variant (its time over that of our own
variant in the same case and run, on a logarithmic axis; right of 1 is slower than ours), and a table. Then the peers,
the trainer end to end, cost against size, and the machine's ceilings, as far as the files hold their lines. Without
FILE: everything that is committed in benchmarks/results.
"""

import argparse
import base64
import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import lines, targets
from benchmarks import report_plots as plots
from benchmarks.report_plots import Lines, our_variant
from benchmarks.targets import Cases, Finding

# Their lines have sections of their own.
APART = ("ceilings", "scaling", "records", "peers", "end_to_end")
VERDICTS = ("MISSED", "not measured", "met")
# Columns that only some lines have: field, heading, factor, digits.
MORE = (
    ("gb_per_s", "GB/s", 1.0, 1), ("tflop_per_s", "GFLOP/s", 1e3, 1), ("of_bound", "of bound", 1.0, 2),
    ("share", "of ceiling", 1.0, 2), ("of_floor", "x floor", 1.0, 2), ("peak_mib", "peak MiB", 1.0, 0),
    ("state_mib", "state MiB", 1.0, 1),
)  # fmt: skip


class Page:
    """The same sections as Markdown and as HTML."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.text, self.html = folder, list[str](), list[str]()
        self.contents: list[tuple[str, str]] = []
        self.pictures: dict[str, str] = {}

    def heading(self, title: str, level: int = 2) -> None:
        anchor = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
        if level == 2:
            self.contents.append((anchor, title))
        self.text.append(f"{'#' * level} {title}")
        self.html.append(f'<h{level} id="{anchor}">{html.escape(title)}</h{level}>')

    def say(self, text: str) -> None:
        self.text.append(text)
        self.html.append(f"<p>{html.escape(text)}</p>")

    def table(self, table: str, folded: str = "") -> None:
        """`folded`: what the line says behind which it hides in the browser."""
        self.text.append(table)
        made = table_html(table)
        count = table.count("\n") - 1
        self.html.append(
            f"<details><summary>{html.escape(folded)} ({count} rows)</summary>{made}</details>" if folded else made
        )

    def picture(self, name: str, draw: Callable[[Path], bool], says: str) -> None:
        # A line may name its benchmark as it likes; the file stays in the folder, and two names have two files.
        stem = re.sub("[^A-Za-z0-9_-]+", "-", name).strip("-") or "picture"
        while self.pictures.setdefault(stem, name) != name:
            stem += "-"
        path = self.folder / f"{stem}.png"
        if draw(path):
            self.text.append(f"![{says}]({path.name})")
            data = base64.b64encode(path.read_bytes()).decode()
            self.html.append(f'<img alt="{html.escape(says)}" src="data:image/png;base64,{data}">')


def table_html(table: str) -> str:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    right = [cell.endswith(":") for cell in rows[1]]

    def row(cells: list[str], tag: str) -> str:
        found = []
        for cell, to_right in zip(cells, right):
            verdict = f"v{VERDICTS.index(cell)}" if tag == "td" and cell in VERDICTS else ""
            kind = " ".join(filter(None, ("r" if to_right else "", verdict)))
            found.append(f"<{tag}{f' class={kind!r}' if kind else ''}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(row(cells, "td") for cells in rows[2:])
    return f"<div class='t'><table><thead>{row(rows[0], 'th')}</thead><tbody>{body}</tbody></table></div>"


STYLE = """
body{font:14px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1c2833;background:#fff}
h1{margin-bottom:0}h2{margin-top:2em;border-bottom:1px solid #d5d8dc;padding-bottom:.2em}
nav{margin:1em 0;line-height:2;display:flex;flex-wrap:wrap}
nav a{margin-right:.9em;color:#1f618d;text-decoration:none;white-space:nowrap}
.t{overflow-x:auto;margin:.6em 0}details .t{max-height:75vh;overflow-y:auto}
table{border-collapse:collapse;font-size:12px}td,th{border:1px solid #e5e8e8;padding:2px 8px;text-align:left}
th{background:#f4f6f7;position:sticky;top:0}td:not(:first-child):not(:last-child){white-space:nowrap}
tbody tr:nth-child(even){background:#fafbfb}
td.r,th.r{text-align:right;font-variant-numeric:tabular-nums}
.v0{background:#fadbd8;color:#922b21;font-weight:600}.v1{color:#7b7d7d}.v2{background:#d5f5e3;color:#196f3d}
img{max-width:100%;display:block;margin:.6em 0}summary{cursor:pointer;color:#1f618d;margin:.4em 0}
"""


def machines(cases: Cases) -> list[str]:
    """What the lines say about where they were measured, each place once."""
    known = ("processor", "gpu", "cores", "torch", "effkern", "python")
    found: dict[str, set[str]] = {}
    for group in cases.values():
        for variants in group.values():
            for line in variants.values():
                where = ", ".join(f"{name} {line[name]}" for name in known if line.get(name) is not None)
                if where:
                    found.setdefault(where, set()).add(str(line.get("date", "")))
    return [f"{where}; {' to '.join(sorted({min(days), max(days)} - {''}))}" for where, days in found.items()]


# Targets --------------------------------------------------------------------------------------------------------------


def strain(found: Finding) -> float:
    """How far the figure is from its bound: at most 1 is met, also where the bound is 0."""
    assert found.figure is not None
    t = found.target
    if t.at_most is not None:
        return found.figure / t.at_most if t.at_most else 1.0 + found.figure
    return (t.at_least or 0.0) / found.figure if found.figure else float("inf")


def summary(found: Iterable[Finding]) -> str:
    """A row per target: the worst of its cases."""
    groups: dict[str, list[Finding]] = {}
    for f in found:
        groups.setdefault(f.target.name, []).append(f)
    rows = ["| target | bound | worst | best | met | | worst case |", "| --- | --- | ---: | ---: | ---: | --- | --- |"]
    for name, members in groups.items():
        measured = [f for f in members if f.figure is not None]
        bound = members[0].target.bound
        if not measured:
            rows.append(f"| {name} | {bound} | - | - | - | not measured | |")
            continue
        # NaN is the worst.
        worst = max(measured, key=lambda f: (strain(f) != strain(f), strain(f)))
        best = min(measured, key=strain)
        met = sum(f.verdict == "met" for f in measured)
        same = plots.constant([f.case for f in measured])
        case = plots.brief(worst.case, same) if len(measured) > 1 else ""
        rows.append(
            f"| {name} | {bound} | {worst.figure:.3g} | {best.figure:.3g} | {met} of {len(measured)} | "
            f"{'met' if met == len(measured) else 'MISSED'} | {case} |"
        )
    return "\n".join(rows)


def target_section(page: Page, cases: Cases) -> None:
    found = list(targets.findings(targets.read(), cases))
    page.heading("Targets")
    by_name: dict[str, list[Finding]] = {}
    for f in found:
        by_name.setdefault(f.target.name, []).append(f)
    state = {
        name: next(v for v in VERDICTS if any(f.verdict == v for f in members)) for name, members in by_name.items()
    }
    counts = {v: sum(s == v for s in state.values()) for v in VERDICTS}
    page.say(
        f"{len(state)} targets: {counts['met']} met in every case, {counts['MISSED']} missed in at least one, "
        f"{counts['not measured']} not measured."
    )
    page.table(summary(found))
    values = [(name, [strain(f) for f in members if f.figure is not None]) for name, members in by_name.items()]
    page.picture("targets", lambda path: plots.bounds([(n, v) for n, v in values if v], path), "figures over bounds")
    measured = [f for f in found if f.figure is not None]
    if measured:
        page.table(targets.markdown(measured), folded="every case")


# Ops ------------------------------------------------------------------------------------------------------------------


def figures(cases: Mapping[str, Lines]) -> str:
    """A row per case and variant; columns that no line has are left out."""
    more = [c for c in MORE if any(line.get(c[0]) for v in cases.values() for line in v.values())]
    head = ["case", "variant", "ms", "spread", "CPU ms", "x ours", *(title for _, title, _, _ in more)]
    rows = [f"| {' | '.join(head)} |", f"| --- | --- | ---: | --- | ---: | ---: |{' ---: |' * len(more)}"]
    fixed = plots.constant([json.loads(text) for text in cases])
    for text, variants in cases.items():
        ours = our_variant(variants)
        for name, line in variants.items():
            ratio = f"{line['wall'] / variants[ours]['wall']:.2f}" if ours else "-"
            low, high = 1e3 * (line.get("wall_low") or line["wall"]), 1e3 * (line.get("wall_high") or line["wall"])
            cells = [
                plots.label(json.loads(text), fixed), name, f"{1e3 * line['wall']:.3f}", f"{low:.3f}-{high:.3f}",
                f"{1e3 * line.get('cpu', float('nan')):.3f}", ratio,
            ]  # fmt: skip
            given = [(line.get(key), factor, digits) for key, _, factor, digits in more]
            cells += [f"{factor * value:.{digits}f}" if value else "" for value, factor, digits in given]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def timed(cases: Mapping[str, Lines]) -> Mapping[str, Lines]:
    """Cases with at least one time."""
    found = {text: {n: line for n, line in v.items() if line.get("wall")} for text, v in cases.items()}
    return {text: v for text, v in found.items() if v}


def op_section(page: Page, benchmark: str, cases: Mapping[str, Lines]) -> None:
    page.heading(benchmark)
    same = [json.loads(text) for text in cases]
    common = {name: same[0][name] for name in dict.fromkeys(plots.constant(same))}
    if said := plots.label(common):
        page.say(f"Every case: {said}.")
    page.picture(benchmark, lambda path: plots.ratios(benchmark, cases, path), f"{benchmark}: time over ours")
    page.table(figures(cases), folded="all figures")


def peer_section(page: Page, cases: Mapping[str, Lines]) -> None:
    page.heading("Peers")
    by_op: dict[str, dict[str, Lines]] = {}
    for text, variants in cases.items():
        case = json.loads(text)
        by_op.setdefault(case.pop("op"), {})[json.dumps(case)] = variants
    for op, found in by_op.items():
        page.heading(f"Peers: {op}", 3)
        page.picture(f"peers_{op}", lambda path, op=op, found=found: plots.ratios(op, found, path), f"{op}: peers")  # type: ignore[misc]
        page.table(figures(found), folded="all figures")
        members = [line for variants in found.values() for line in variants.values()]
        left_out = {name: why for line in members for name, why in line.get("left_out", {}).items()}
        notes = [f"{name}: left out: {why}" for name, why in left_out.items()]
        differing = {line["variant"]: line["differs"] for line in members if "differs" in line}
        notes += [f"{name} differs: {how}" for name, how in differing.items()]
        if notes:
            page.text.append("\n".join(f"- {note}" for note in notes))
            page.html.append(f"<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>")


def end_to_end_section(page: Page, cases: Mapping[str, Lines]) -> None:
    # What is quoted is this package's trainer; torch is loaded by no other section.
    from benchmarks.end_to_end import table

    page.heading("The trainer end to end")
    page.say(
        "Each method in this package's trainer and in plain torch with torch.compile, same weights, tokens and rates; "
        "'to base': time to the loss that plain AdamW ends with, over its own time."
    )
    by_size: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}
    for text, variants in cases.items():
        case = json.loads(text)
        rows = by_size.setdefault(case.get("vocab", 0), {})
        rows.update({(case["method"], side): line for side, line in variants.items() if side in ("plain", "effkern")})
    for size, rows in by_size.items():
        complete = {key: row for key, row in rows.items() if (key[0], "plain") in rows}
        if size:
            page.heading(f"Vocabulary of {size}", 3)
        page.picture(
            f"end_to_end_{size}" if size else "end_to_end",
            lambda path, rows=complete: plots.end_to_end(rows, path),  # type: ignore[misc]
            "speed and loss of each method",
        )
        page.table(table(complete))


def scaling_section(page: Page, cases: Mapping[str, Lines]) -> None:
    page.heading("Cost against size")
    points: dict[str, list[tuple[float, float]]] = {}
    fits: dict[str, dict[str, Any]] = {}
    for text, variants in cases.items():
        case = json.loads(text)
        line = next(iter(variants.values()))
        name = f"{case['op']}, {case['against']}"
        points.setdefault(name, []).append((case[case["against"]], (line.get("wall_low") or line["wall"])))
        fits[name] = line
    exponents = {name: line["exponent"] for name, line in fits.items() if "exponent" in line}
    page.picture("scaling", lambda path: plots.scaling(points, exponents, path), "time against size")
    rows = ["| op, against | sizes | ms | exponent | last octave |", "| --- | --- | --- | --- | ---: |"]
    for name, found in points.items():
        line = fits[name]
        sizes = " ".join(f"{x:g}" for x, _ in sorted(found))
        ms = " ".join(f"{1e3 * y:.3g}" for _, y in sorted(found))
        slope = f"{line['exponent']:.2f} +- {line.get('error', 0.0):.2f}" if "exponent" in line else ""
        rows.append(f"| {name} | {sizes} | {ms} | {slope} | {line.get('last', float('nan')):.2f} |")
    page.table("\n".join(rows))


def ceiling_section(page: Page, cases: Cases) -> None:
    page.heading("What the machine can do")
    rates: dict[tuple[str, int], dict[str, float]] = {}
    rows = ["| device | threads | what | rate |", "| --- | ---: | --- | ---: |"]
    for text, variants in cases["ceilings"].items():
        case = json.loads(text)
        for name, line in variants.items():
            amount, what = (line["bytes"], "copy") if name == "copy" else (line["flops"], case.get("dtype", name))
            rate = amount / (line.get("wall_low") or line["wall"])
            where = case["device"], line.get("threads", case.get("threads"))
            rates.setdefault(where, {})[what] = rate
            unit = "GB/s" if name == "copy" else "GFLOP/s"
            rows.append(f"| {where[0]} | {where[1]} | {what} | {rate / 1e9:.1f} {unit} |")
    page.table("\n".join(rows))
    shares: dict[str, list[float]] = {}
    points: dict[tuple[str, int], dict[str, list[tuple[float, float]]]] = {}
    for benchmark, found in cases.items():
        for text, variants in found.items():
            ours = our_variant(variants)
            if ours is None or benchmark in APART:
                continue
            line, device = variants[ours], json.loads(text).get("device", "cpu")
            if line.get("of_bound"):
                shares.setdefault(benchmark, []).append(line["of_bound"])
            if line.get("flops") and line.get("bytes") and line.get("wall"):
                point = line["flops"] / line["bytes"], line["flops"] / line["wall"]
                points.setdefault((device, line.get("threads", 0)), {}).setdefault(benchmark, []).append(point)
    page.picture("shares", lambda path: plots.shares(shares, path), "share of the limit, by op")
    for (device, threads), group in points.items():
        known = dict(rates.get((device, threads), {}))
        bandwidth = known.pop("copy", None)
        if bandwidth is not None:
            page.heading(f"Roofline: {device}, {threads} threads", 3)
            page.picture(
                f"roofline_{device}_{threads}",
                lambda path, g=group, b=bandwidth, k=known: plots.roofline(g, b, k, path),  # type: ignore[misc]
                f"roofline of {device} with {threads} threads",
            )


def write(cases: Cases, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(folder)
    target_section(page, cases)
    for benchmark, found in cases.items():
        measured = timed(found)
        if benchmark not in APART and measured:
            op_section(page, benchmark, measured)
    for name, section in (
        ("peers", peer_section), ("end_to_end", end_to_end_section), ("scaling", scaling_section),
    ):  # fmt: skip
        if given := timed(cases.get(name, {})):
            section(page, given)
    if "ceilings" in cases:
        ceiling_section(page, cases)
    where = machines(cases)
    links = "".join(f"<a href='#{anchor}'>{html.escape(title)}</a>" for anchor, title in page.contents)
    top = "<h1>Benchmarks</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in where) + f"<nav>{links}</nav>"
    document = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>Benchmarks</title><style>{STYLE}</style>{top}{''.join(page.html)}</html>"
    )
    text = "\n\n".join(["# Benchmarks", *where, *page.text]) + "\n"
    for name, content in (("report.md", text), ("report.html", document)):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(content)
        os.replace(temporary, folder / name)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all of benchmarks/results")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER", help="default: runs/bench")
    a = parser.parse_args(arguments)
    try:
        cases = targets.gathered(lines.given(a.files))
        write(cases, a.out)
    except lines.Unusable as error:
        print(f"benchmarks report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"benchmarks report: --out must be a folder that can be written, got {a.out}: {error}", file=sys.stderr)
        return 2
    print(f"{a.out / 'report.html'}, {a.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
