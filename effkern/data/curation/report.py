"""One page that says what was kept and why: plain HTML, nothing loaded from elsewhere."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from effkern.data.curation.artifact import Artifact, write_bytes
from effkern.data.curation.choose import KEPT, REASONS
from effkern.data.curation.dedup import dropped_examples
from effkern.data.curation.pool import Pool
from effkern.data.curation.steps import pool_of

SAMPLES = 6
CHARACTERS = 280

STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0 } td, th { padding: .2em .8em .2em 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } code, pre { font-size: 13px }
pre { background: #f4f4f4; padding: .5em; white-space: pre-wrap; margin: .2em 0 }
.bar { background: #ddd; width: 16em; height: .8em } .bar div { background: #37c; height: 100% }
"""


def write_report(path: str | Path, steps: Sequence[Artifact]) -> None:
    """Write the page of these steps, in their order.

    Raises:
        ValueError: no steps, or a dataset behind a selection has changed.
    """
    if not steps:
        raise ValueError("report: steps must name at least one finished step, got none")
    body = "".join(_section(step) for step in steps)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Curation</title><style>{STYLE}</style>'
        f"</head><body><h1>What was kept, and why</h1>{body}</body></html>\n"
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), page.encode())


def _section(step: Artifact) -> str:
    parts = [f"<h2>{escape(step.kind)}: {escape(str(step.path))}</h2><p>hash <code>{step.hash}</code></p>"]
    parts.append(_table("made with", step.settings))
    results = dict(step.results)
    by_source = results.pop("by_source", None)
    parts.append(_table("figures", results))
    if step.kind == "selection":
        parts += [_bars({name: (row["kept"], row["of"]) for name, row in by_source.items()}), _selected(step)]
    elif step.kind == "dedup":
        parts.append(_bars({name: (row["kept"], sum(row.values())) for name, row in by_source.items()}))
        parts.append(_duplicates(step))
    parts.append(_table("made from", {name: f"{digest} ({step.places.get(name, '-')})" for name, digest in
                                      step.inputs.items()}))  # fmt: skip
    return "".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        text = value if isinstance(value, str) else json.dumps(value)
        return f"<td>{escape(text)}</td>"
    return f'<td class="number">{f"{value:,}" if isinstance(value, int) else f"{value:.5g}"}</td>'


def _table(title: str, values: dict[str, Any]) -> str:
    rows = []
    for name, value in values.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        rows += [f"<tr><th>{escape(name)}</th><td>{escape(str(key))}</td>{_cell(item)}</tr>" for key, item in nested]
    return f"<h3>{title}</h3><table>{''.join(rows)}</table>" if rows else ""


def _bars(shares: dict[str, tuple[int, int]]) -> str:
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td><div class="bar"><div style="width:{100 * kept / max(of, 1):.1f}%">'
        f'</div></div></td><td class="number">{kept:,} of {of:,}</td></tr>'
        for name, (kept, of) in shares.items()
    )
    return f"<h3>kept of each source</h3><table>{rows}</table>"


def _text(pool: Pool, tokenizer: Any, example: int) -> str:
    ids = pool.tokens(np.array([example], np.int64))[0].tolist()
    return f"<pre>{escape(tokenizer.decode(ids)[:CHARACTERS])}</pre>"


def _selected(step: Artifact) -> str:
    """The first dropped examples of each reason, beside the kept one that stands for them."""
    pool = pool_of(step)
    tokenizer = pool.datasets[0].tokenizer()
    reason, like = step.load("reason"), step.load("like")
    parts = ["<h3>examples</h3>"]
    for code, text in enumerate(REASONS):
        rows = np.flatnonzero(reason == code)
        # Evenly over the corpus.
        for example in rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES].tolist():
            parts.append(f"<p>{escape(text)}: example {example}</p>{_text(pool, tokenizer, example)}")
            if code != KEPT and like[example] >= 0:
                parts.append(f"<p>instead: example {like[example]}</p>{_text(pool, tokenizer, int(like[example]))}")
    return "".join(parts)


def _duplicates(step: Artifact) -> str:
    rows = "".join(
        f'<tr><td class="number">{i}</td><td>{escape(reason)} of</td><td class="number">{like}</td>'
        f'<td class="number">{similarity:.2f}</td></tr>'
        for i, like, reason, similarity in dropped_examples(step, 20)
    )
    head = "<tr><th>document</th><th></th><th>document</th><th>similarity</th></tr>"
    return f"<h3>first dropped documents</h3><table>{head}{rows}</table>" if rows else ""
