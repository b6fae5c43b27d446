"""The benchmarks' own logic: targets held against measurements, two measurements compared, lines of one file."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import compare, runner, suite, targets


def line(variant: str, wall: float, benchmark: str = "one", **case) -> str:
    return json.dumps({"benchmark": benchmark, "case": case, "variant": variant, "wall": wall, "gpu": None})


def target(**changes) -> targets.Target:
    given = {"name": "t", "why": "w", "benchmark": "one", "variant": ("ours",), "over": ("a", "b"), "at_most": 1.25}
    return targets.Target(**{**given, **changes})


LINES = [
    line("ours", 3.0, rows=1), line("a", 1.0, rows=1), line("b", 1.0, rows=1),
    line("ours", 5.0, rows=8), line("a", 2.0, rows=8), line("b", 2.0, rows=8),
    "a line of text", "{'no': 'JSON'}", line("ours", 1.0, rows=9),
]  # fmt: skip


def figures(t: targets.Target) -> dict:
    return {f.case.get("rows"): (f.figure, f.verdict) for f in targets.findings([t], targets.read_lines(LINES))}


def test_a_target_is_held_against_every_case_that_was_measured():
    assert figures(target()) == {1: (1.5, "MISSED"), 8: (1.25, "met")}
    assert figures(target(case={"rows": [8, 16]})) == {8: (1.25, "met")}
    assert figures(target(case={"rows": 16})) == {16: (None, "not measured")}
    assert figures(target(case={"device": "cuda"})) == {None: (None, "not measured")}
    # A case without all the variants is no measurement.
    assert figures(target(case={"rows": 9})) == {9: (None, "not measured")}
    assert figures(target(benchmark="two")) == {None: (None, "not measured")}


def test_bounds_from_below_and_numbers_that_are_none():
    assert figures(target(variant=("a",), over=("ours",), at_most=None, at_least=0.4)) == {
        1: (pytest.approx(1 / 3), "MISSED"), 8: (0.4, "met"),
    }  # fmt: skip
    # A run without its memory is no measurement of it; a number that is none is one, and a bad one.
    assert figures(target(metric="peak_mib")) == {None: (None, "not measured")}
    broken = targets.read_lines([line("ours", float("nan"), rows=1), line("a", 1.0, rows=1), line("b", 1.0, rows=1)])
    assert [f.verdict for f in targets.findings([target()], broken)] == ["MISSED"]
    assert figures(target(over=(), at_most=4.0)) == {1: (3.0, "met"), 8: (5.0, "MISSED"), 9: (1.0, "met")}
    with pytest.raises(ValueError, match="'t' must have one of at_most and at_least"):
        target(at_least=1.0)


def test_the_last_measurement_of_a_case_counts_and_a_gpu_is_another_machine():
    cases = targets.read_lines([*LINES, line("ours", 2.0, rows=8)])
    assert [f.figure for f in targets.findings([target(case={"rows": 8})], cases)] == [0.5]
    on_gpu = json.loads(line("ours", 1.0, rows=8, device="cuda")) | {"gpu": "one"}
    assert len(targets.read_lines([*LINES, json.dumps(on_gpu)])["one"]) == 4


def test_every_target_names_a_benchmark_that_exists():
    found = targets.read()
    assert len({t.name for t in found}) == len(found)
    root = Path(targets.__file__).parents[1]
    assert set(suite.QUICK) == set(suite.FULL) == {*suite.SMALL, "shampoo_step"}
    for op in suite.FULL:
        assert (root / (suite.module(op).replace(".", "/") + ".py")).exists(), op
    for name in {t.benchmark for t in found} - set(suite.FULL):
        places = (f"ops/{name}.py", f"{name}.py", f"{name}/__main__.py")
        assert any((root / "benchmarks" / place).exists() for place in places), name


def test_check_says_what_is_missed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(LINES))
    for rows, status, said in (
        ([1], 1, "0 met, 1 missed, 0 not measured\nmissed in 1 of 1: t: w"),
        ([8], 0, "1 met, 0 missed"),
    ):
        monkeypatch.setattr(targets, "read", lambda rows=rows: [target(case={"rows": rows})])
        assert command.main(["check", str(path)]) == status
        assert said in capsys.readouterr().out
    assert command.main(["check", str(tmp_path / "none.jsonl")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_compare_takes_ratios_and_not_times(tmp_path, capsys):
    def file(name: str, ours: float, floor: float) -> str:
        path = tmp_path / name
        path.write_text("\n".join([line("effkern", ours, rows=1), line("products", floor, rows=1)]))
        return str(path)

    before, slow_machine, slower = file("a", 1.2, 1.0), file("b", 12.0, 10.0), file("c", 1.4, 1.0)
    assert command.main(["compare", before, slow_machine]) == 0
    assert "| one | device cpu, rows 1 | effkern | 1.20 | 1.20 | 1.00 |" in capsys.readouterr().out
    assert command.main(["compare", before, slower]) == 1
    assert "1 ratios, 1 of ours" in capsys.readouterr().out
    assert compare.floor_of(["effkern", "eager", "products"], None) == "eager"
    assert compare.floor_of(["effkern", "eager"], "products") is None


def test_a_run_keeps_what_other_ops_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / "suite.jsonl"
    path.write_text("\n".join([line("ours", 1.0, "laurel"), line("ours", 2.0, "distill")]))
    monkeypatch.setitem(suite.QUICK, "distill", ["--rounds=3"])
    asked = []

    work = {"bytes": 10, "flops": 600, "flop_dtype": "float32", "threads": 2}
    of_cpu = {"benchmark": "ceilings", "threads": 2}
    rates = [
        {**of_cpu, "case": {"device": "cpu"}, "variant": "copy", "bytes": 8, "wall_low": 2.0},
        {**of_cpu, "case": {"device": "cpu", "dtype": "float32"}, "variant": "mm", "flops": 900, "wall_low": 3.0},
    ]

    class Done:
        returncode, stdout = 0, "machine\n" + json.dumps(json.loads(line("ours", 3.0, "distill")) | work)

    class Ceilings:
        returncode, stdout = 0, "\n".join(map(json.dumps, rates))

    def run(words, **_):
        asked.append(words[2:])
        return Ceilings if "ceilings" in words else Done

    monkeypatch.setattr(suite.subprocess, "run", run)
    assert command.main(["run", "--op", "distill", "--json", str(path)]) == 0
    assert asked == [["benchmarks", "ceilings", "--json"], ["benchmarks.ops.distill", "--json", "--rounds=3"]]
    laurel, copy, mm, distill = map(json.loads, path.read_text().splitlines())
    assert [(r["benchmark"], r["wall"]) for r in (laurel, distill)] == [("laurel", 1.0), ("distill", 3.0)]
    assert [copy, mm] == rates
    # 10 bytes at 4 a second, 600 FLOPs at 300.
    assert (distill["bound_s"], distill["bound_by"]) == (2.5, "memory")
    assert distill["of_bound"] == pytest.approx(2.5 / 3.0)
    Done.returncode = 1
    assert command.main(["run", "--op", "distill", "--json", str(path)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_report_holds_targets_tables_and_pictures(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    both = [(name, wall, rows) for rows in (1, 8) for name, wall in (("effkern", 2e-3), ("<eager>", 6e-3))]
    lines = []
    for name, wall, rows in both:
        more = {"wall_low": wall, "wall_high": wall, "cpu": wall, "date": "2026-11-22"}
        lines.append(json.dumps(json.loads(line(name, wall, "laurel", rows=rows)) | more))
    path.write_text("\n".join(lines))
    assert command.main(["report", str(path), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "report.md").read_text()
    assert "| rows 8 | <eager> | 6.000 | 6.000-6.000 | 6.000 | 3.00 |" in text
    assert "not measured" in text
    assert (tmp_path / "page" / "laurel.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "&lt;eager&gt;" in page
    assert "<eager>" not in page
    assert page.count("data:image/png;base64,") == 1
    path.write_text("nothing")
    assert command.main(["report", str(path)]) == 2
    assert "must hold result lines" in capsys.readouterr().err


def test_a_line_says_the_variants_time_and_the_machine():
    timing = runner.Timing(4.0, 3.0, 5.0, 2.5)
    (text,) = runner.result_lines("one", {"rows": 1}, {"effkern": timing}, {"effkern": {"peak_mib": 7.0}})
    found = json.loads(text)
    assert [found[k] for k in ("wall", "wall_low", "wall_high", "cpu", "peak_mib")] == [4.0, 3.0, 5.0, 2.5, 7.0]
    assert isinstance(found["processor"], str)
