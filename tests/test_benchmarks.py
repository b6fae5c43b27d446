"""The benchmarks' own logic: targets held against measurements, two measurements compared, lines of one file."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import compare, lines, runner, suite, targets


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


def test_nothing_over_nothing_is_no_measurement():
    def found(ours: float, other: float | None) -> list:
        cases = targets.read_lines([line("ours", ours), line("a", other), line("b", 0.0)])
        return [(f.figure, f.verdict) for f in targets.findings([target()], cases)]

    assert found(0.0, 0.0) == found(1.0, None) == [(None, "not measured")]
    assert found(1.0, 0.0) == [(float("inf"), "MISSED")]


@pytest.mark.parametrize("name", ["check", "report", "compare"])
def test_a_broken_line_is_named_and_no_traceback(name, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    words = [name, str(path), *([str(path)] if name == "compare" else [])]
    for text, said in (
        (f"text\n{LINES[0]}\n{LINES[1][:30]}", f"{path}, line 3: a result line must be one JSON object"),
        ('{"variant": "v", "case": {}}', f"{path}, line 1: a result line must have benchmark and case"),
        ("", f"{path} must hold result lines, got none"),
    ):
        path.write_text(text)
        assert command.main(words) == 2
        assert said in capsys.readouterr().err
    path.write_bytes(b"\xff")
    assert command.main(words) == 2
    assert f"cannot read {path}: 'utf-8'" in capsys.readouterr().err


def test_without_files_all_that_is_committed_counts(tmp_path, capsys):
    found = {record["benchmark"] for record in lines.given([])}
    assert {"laurel", "peers", "end_to_end", "scaling", "records"} <= found
    (tmp_path / "peers.jsonl").write_text(line("ours", 1.0, "peers"))
    # Its reader in benchmarks/records.py knows this one, whose lines are of a shape of their own.
    (tmp_path / "laurel_memory.jsonl").write_text(
        json.dumps({"case": {"dtype": "float32", "rows": 1, "rank": 1}, "variant": "add+norm", "peak_mib": 1.0})
    )
    assert [r["benchmark"] for r in lines.committed(tmp_path)] == ["records", "peers"]
    for text, said in (
        ("{}", "laurel_memory.jsonl: KeyError: 'variant'"),
        ('{"var', "laurel_memory.jsonl: JSONDecode"),
    ):
        (tmp_path / "laurel_memory.jsonl").write_text(text)
        with pytest.raises(lines.Unusable, match=said):
            lines.committed(tmp_path)
        assert command.main(["records", "--folder", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


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
    assert compare.floor_of("one", ["effkern", "eager", "products"], None) == "eager"
    assert compare.floor_of("one", ["effkern", "eager"], "products") is None


def test_compare_knows_ours_of_every_op_and_what_is_missing(tmp_path, capsys):
    def file(name: str, *text: str) -> str:
        path = tmp_path / name
        path.write_text("\n".join(text))
        return str(path)

    for op in suite.SMALL:
        assert compare.is_ours(op, suite.load(op).ours), op
    assert not compare.is_ours("gemm_bf16", "torch.mm, logits")
    floor = line("torch.mm, logits", 1.0, "gemm_bf16", rows=1)
    before = file(
        "a", floor, line("logits", 1.0, "gemm_bf16", rows=1), line("add", 1.0, "gemm_bf16", rows=1),
        line("logits", 1.0, "gemm_bf16", rows=2), line("effkern", 1.0, "laurel"), line("effkern", 1.0, "laurel", rows=1)
    )  # fmt: skip
    after = file("b", floor, line("logits", 2.0, "gemm_bf16", rows=1))
    assert command.main(["compare", before, after]) == 1
    said = capsys.readouterr().out
    assert "1 ratios, 1 of ours" in said
    assert [row.removeprefix(f"missing in {after}: ") for row in said.splitlines() if row.startswith("missing")] == [
        "gemm_bf16: device cpu, rows 1: add", "gemm_bf16: device cpu, rows 2", "laurel, all 2 cases",
    ]  # fmt: skip
    assert command.main(["compare", before, file("c", line("effkern", 1.0, "laurel", rows=7))]) == 2
    assert "must have a case in common, got none" in capsys.readouterr().err


RATE = {
    "benchmark": "ceilings",
    "threads": 2,
    "case": {"device": "cpu"},
    "variant": "copy",
    "bytes": 8,
    "wall_low": 2.0,
}


class Done:
    """What stands for a finished process."""

    def __init__(self, *records: dict | str, returncode: int = 0) -> None:
        self.stdout = "machine\n" + "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
        self.returncode = returncode


@pytest.fixture
def processes(monkeypatch):
    """By the module that is run: what it prints; and the commands that were asked for."""
    made, asked = {"ceilings": Done(returncode=1)}, []

    def run(words, **_):
        asked.append(words[2:])
        return made["ceilings" if "ceilings" in words else words[2].rsplit(".", 1)[-1]]

    monkeypatch.setattr(suite.subprocess, "run", run)
    return made, asked


def test_a_run_adds_bounds_and_keeps_what_other_ops_measured(tmp_path, monkeypatch, processes):
    path = tmp_path / "suite.jsonl"
    path.write_text("\n".join([line("ours", 1.0, "laurel"), line("ours", 2.0, "distill")]))
    monkeypatch.setitem(suite.QUICK, "distill", ["--rounds=3"])
    made, asked = processes
    work = {"bytes": 10, "flops": 600, "flop_dtype": "float32", "threads": 2}
    product = {"case": {"device": "cpu", "dtype": "float32"}, "variant": "mm", "flops": 900, "wall_low": 3.0}
    rates = [RATE, {**RATE, **product}]
    made["ceilings"] = Done(*rates)
    made["distill"] = Done(json.loads(line("ours", 3.0, "distill")) | work)
    assert command.main(["run", "--op", "distill", "--json", str(path)]) == 0
    assert asked == [["benchmarks", "ceilings", "--json"], ["benchmarks.ops.distill", "--json", "--rounds=3"]]
    laurel, copy, mm, distill = map(json.loads, path.read_text().splitlines())
    assert [(r["benchmark"], r["wall"]) for r in (laurel, distill)] == [("laurel", 1.0), ("distill", 3.0)]
    assert [copy, mm] == rates
    # 10 bytes at 4 a second, 600 FLOPs at 300.
    assert (distill["bound_s"], distill["bound_by"]) == (2.5, "memory")
    assert distill["of_bound"] == pytest.approx(2.5 / 3.0)


def test_a_line_goes_only_when_a_new_one_has_come(tmp_path, processes, capsys):
    path, (made, _) = tmp_path / "suite.jsonl", processes
    old = [
        json.dumps(RATE), "text", line("ours", 1.0, "laurel", rows=1),
        line("eager", 1.0, "laurel", rows=1), line("ours", 1.0, "laurel", rows=8),
        line("ours", 1.0, "laurel", rows=1, device="cuda"), line("ours", 1.0, "distill"),
    ]  # fmt: skip
    words = ["run", "--op", "laurel", "--json", str(path)]

    def after(done: Done) -> tuple[int, list[str]]:
        path.write_text("\n".join(old))
        made["laurel"] = done
        return command.main(words), path.read_text().splitlines()

    assert after(Done(returncode=1)) == (1, old)
    assert "failed: ceilings, laurel" in capsys.readouterr().out
    # One that is wrong in its second case, or was cut off, still measured the first.
    new, half = line("ours", 2.0, "laurel", rows=1, device="cpu"), line("ours", 2.0, "laurel", rows=8)[:50]
    want = [*old[:2], *old[3:], new]
    assert after(Done(new, half, returncode=-9)) == (1, want)
    made["ceilings"] = Done(old[0])
    assert after(Done(new)) == (0, [*want[1:-1], old[0], new])
    old.append(half)
    assert after(Done(new)) == (0, [*want[1:-1], old[0], new])
    assert f"{path}, line 8 is dropped: a result line must be one JSON object" in capsys.readouterr().err


def test_an_op_that_cannot_run_here_is_left_out(tmp_path, processes, capsys):
    path, (made, _) = tmp_path / "suite.jsonl", processes
    made["ceilings"] = Done(RATE)
    made["gemm_bf16"] = Done("left out: no AVX512-BF16", returncode=suite.LEFT_OUT)
    assert command.main(["run", "--op", "gemm_bf16", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "left out    0.0 s  gemm_bf16" in said
    assert "left out: no AVX512-BF16" in said
    assert "failed: none" in said


def test_skip_is_an_exit_status_of_its_own_and_says_why(monkeypatch, capsys):
    from benchmarks import harness
    from benchmarks.ops import gemm_bf16, laurel_gpu

    assert runner.Skip("why").code == suite.LEFT_OUT
    monkeypatch.setattr(gemm_bf16.gemm_schema, "bf16_gemm", lambda: False)
    monkeypatch.setattr(harness.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(harness.torch, "set_num_threads", lambda count: None)
    for words, main in (
        (["--rows=64", "--fresh"], lambda: harness.main(gemm_bf16.OP)),
        (["--device=cuda"], lambda: runner.told(laurel_gpu.main)),
    ):
        monkeypatch.setattr("sys.argv", ["x", *words])
        with pytest.raises(runner.Skip):
            main()
        assert capsys.readouterr().out.splitlines()[-1].startswith("left out: ")


def test_all_ops_run_though_one_fails(monkeypatch, capsys):
    monkeypatch.setattr(command, "OPS", ["one", "two", "three"])
    statuses = {"one": suite.LEFT_OUT, "two": 3, "three": 0}

    def run(words, **_):
        return Done(returncode=statuses[words[2].rsplit(".", 1)[-1]])

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main([]) == 1
    said = capsys.readouterr()
    assert said.out.split() == ["==", "one", "==", "two", "==", "three"]
    assert said.err == "benchmarks: failed: two\n"
    assert command.main(["one"]) == suite.LEFT_OUT
    statuses["two"] = 0
    assert command.main([]) == 0


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, processes, capsys):
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path, "it is a folder"), (tmp_path / "file" / "below", "exists")):
        assert command.main(["run", "--op", "laurel", "--json", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"--json must be a file that can be written, got {path}: " in said
        assert why in said
    (tmp_path / "file").write_bytes(b"\xff")
    assert command.main(["run", "--op", "laurel", "--json", str(tmp_path / "file")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert processes[1] == []


def test_times_outlive_a_memory_that_cannot_be_measured(monkeypatch, capsys):
    from benchmarks import harness
    from benchmarks.ops import token_stats

    def killed(*_):
        raise runner.subprocess.CalledProcessError(-9, "x", stderr="warning\nout of memory")

    monkeypatch.setattr(harness.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(runner, "in_fresh_process", killed)
    words = "--rows=16 --dim=8 --vocab=50 --rounds=1 --least=0 --variants effkern --memory --warm --json --fresh"
    monkeypatch.setattr("sys.argv", ["x", *words.split()])
    harness.main(token_stats.OP)
    said = capsys.readouterr()
    found = {record["variant"]: record for record in lines.measured(said.out)}
    assert found["effkern"]["wall"] > 0
    assert "peak_mib" not in found["effkern"]
    assert "no peak memory of effkern: CalledProcessError: " in said.err
    assert said.err.strip().endswith("out of memory")


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
