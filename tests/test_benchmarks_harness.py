"""How the ops' benchmarks measure: what they declare, wrong results, rotation, ratios to floors, the roofline."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, gpu_session, harness, runner, suite
from benchmarks.case import Axis, Op, Prepared, Work, WrongResult, hold
from benchmarks.explain import explain
from effkern.ops import registry

ROOT = Path(__file__).parents[1]
OPS = [suite.load(name) for name in suite.SMALL]
ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def small(op):
    (case,) = harness.cases_of(op, harness.parse(op, suite.SMALL[op.name].split()))
    return case


def fake(**changes) -> Op:
    given = {
        "name": "fake", "doc": "", "axes": (Axis("n", "--n", (2,)),), "variants": ("a", "b"),
        "check": lambda case: None, "prepare": lambda case, names: Prepared({}), "work": lambda case: Work(6e9, 4e12),
        "floor": {"a": 1.0},
    }  # fmt: skip
    return Op(**{**given, **changes})


def test_every_op_of_the_package_has_a_benchmark():
    covered = {name for op in OPS for name in op.registry}
    import effkern.optim  # noqa: F401  its ops register when they are imported

    assert set(registry.registered()) == covered
    modules = {p.stem for p in (ROOT / "benchmarks" / "ops").glob("*.py") if "OP = Op(" in p.read_text()}
    assert modules == set(suite.SMALL)


@ops
def test_an_op_declares_its_work_and_four_octaves(op):
    case = small(op)
    work = op.work(case)
    assert work.bytes > 0
    assert op.scaling
    for s in op.scaling:
        assert len(s.values) >= 5
        assert max(s.values) / min(s.values) >= 16
        assert s.field in {axis.field for axis in op.axes}
        # More of it is more work, of one kind at least.
        first, last = (op.work({**case, **s.case, s.field: s.values[i]}) for i in (0, -1))
        assert last.bytes > first.bytes or last.flops > first.flops
    assert (op.huge is None) == bool(op.no_huge)
    assert op.floor_of(op.ours)
    for variant in op.variants:
        op.work_of(case, variant)


def test_work_counts_what_the_formulas_say():
    # Two reads and two writes of 512 x 768 floats, A, B and w once; x A and u B.
    case = {"rows": 512, "dim": 768, "rank": 32, "dtype": "float32", "pass": "forward", "device": "cpu"}
    assert suite.load("laurel").work(case) == Work(4 * (4 * 512 * 768 + 2 * 768 * 32 + 768), 4 * 512 * 768 * 32)
    # Hidden states, weight, their gradients, teacher logits, labels; three products.
    case = {"case": "logits", "rows": 8, "dim": 16, "teacher_dim": 99, "vocab": 100, "dtype": "bfloat16"}
    assert suite.load("distill").work(case) == Work(
        2 * (2 * 108 * 16 + 800) + 64, 3 * 2 * 8 * 16 * 100, "bfloat16"
    )  # fmt: skip
    # 36 roots of one decoder are 36 (4/3 + 2 + 1) n^3.
    root = suite.load("shampoo").works({"layers": 6, "width": 384, "ridge": 1e-6})["effkern root"]
    assert root is not None
    assert root.flops == pytest.approx(36 * (4 / 3 + 2 + 1) * 384**3)


def test_all_quoted_options_exist():
    """Of the suite, of the GPU session, and of every command in the documents."""
    given = [(op, options) for table in (suite.QUICK, suite.FULL) for op, many in table.items() for options in many]
    given += list(suite.SMALL.items())
    for part in gpu_session.PARTS:
        for step in gpu_session.steps(part, "build"):
            if step.command[2].startswith("benchmarks.ops."):
                given.append((step.command[2].rpartition(".")[2], " ".join(step.command[3:])))
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = " ".join(page.read_text().split())
        given += re.findall(r"`python -m benchmarks(?:\.ops\.| )(\w+)((?: --?[\w\"= -]+)?)`", text)
    parsed = 0
    for name, options in given:
        # Where there is no GPU, an option that asks for one is right, too.
        words = [w for w in options.replace('"', "").split() if not w.startswith("--device") and w != "--explain"]
        if name in suite.SMALL:
            harness.parse(suite.load(name), words)
            parsed += 1
    assert parsed > 60


def test_a_result_that_is_not_a_number_is_wrong():
    hold([(torch.ones(3), torch.ones(3).double())], 1e-6)
    with pytest.raises(WrongResult, match="relative error nan"):
        hold([(torch.tensor([1.0, math.nan]), torch.ones(2).double())], 1e-6)


def test_inputs_go_round_beyond_the_cache():
    made, called = [], []

    def prepare(case, names):
        number = len(made)
        made.append(number)
        return Prepared({"a": lambda: called.append(number)}, held=runner.ROTATE_BYTES // 3 + 1)

    op = fake(prepare=prepare, rotates=True)
    p = harness.prepare(op, {}, ["a"])
    # Each set has been touched before the first call that may be timed.
    assert (made, called) == ([0, 1, 2], [0, 1, 2])
    for _ in range(4):
        p.variants["a"]()
    assert (called[3:], p.extra["a"]["sets"]) == ([0, 1, 2, 0], 3)
    made.clear()
    assert len(harness.prepare(op, {}, ["a"], warm=True).variants) == len(made) == 1
    made.clear()
    harness.prepare(fake(prepare=lambda c, n: prepare(c, n), rotates=False), {}, ["a"])
    assert len(made) == 1


def test_ratios_are_those_of_the_same_round(monkeypatch):
    # The machine is three times as slow in the second round, and b twice as slow as the floor, a + c / 2, in all.
    rounds = {"a": [(1.0, 1.0), (3.0, 1.0), (1.0, 1.0)], "c": [(2.0, 4.0), (6.0, 4.0), (2.0, 4.0)],
              "b": [(4.0, 6.0), (12.0, 6.0), (4.0, 6.0)]}  # fmt: skip
    monkeypatch.setattr(runner, "rounds_of", lambda *_: rounds)
    monkeypatch.setattr(runner, "repeated", lambda run, least: (run, 2))
    op = fake(floor={"a": 1.0, "c": 0.5}, works=lambda case: {"c": None})
    p = Prepared(dict.fromkeys("abc", lambda: None), sums={"b + c": {"b": 1.0, "c": 1.0}}, extra={"b": {"note": 1}})
    timings, extra = harness.measure(op, {}, p, 3)
    # Each round made two calls.
    assert timings["b"] == runner.Timing(2.0, 2.0, 6.0, 3.0)
    assert timings["b + c"] == runner.Timing(3.0, 3.0, 9.0, 5.0)
    assert (extra["b"]["of_floor"], extra["b"]["of_floor_cpu"], extra["b + c"]["of_floor"]) == (2.0, 2.0, 3.0)
    assert (extra["b"]["gb_per_s"], extra["b"]["tflop_per_s"], extra["b"]["note"]) == (3.0, 2.0, 1)
    assert "gb_per_s" not in extra["c"]


def test_variants_come_with_the_floors_they_need():
    op = suite.load("laurel")
    assert harness.names_of(op, harness.parse(op, ["--variants", "eager"])) == ["add+norm", "products", "eager"]
    op = suite.load("looped_linear_attention")
    assert "paper" not in harness.names_of(op, harness.parse(op, []))
    assert "paper" in harness.names_of(op, harness.parse(op, ["--paper"]))


def record(variant: str, amount: str, value: float, **case) -> dict:
    return {"benchmark": "ceilings", "case": {"device": "cpu", **case}, "variant": variant, "threads": 1,
            amount: value, "wall_low": 2.0}  # fmt: skip


def test_the_roofline_takes_the_larger_time():
    found = ceilings.Ceilings([record("copy", "bytes", 20.0), record("mm", "flops", 200.0, dtype="float32")])
    assert found.bound(Work(50.0, 400.0), "cpu", 1) == (5.0, 5.0, 4.0)
    assert found.bound(Work(10.0, 400.0), "cpu", 1) == (4.0, 1.0, 4.0)
    assert [found.bound(Work(n, 400.0), "cpu", 1).by for n in (50.0, 10.0)] == ["memory", "products"]
    # What was not measured bounds nothing: another type (unless nothing is multiplied), number of threads, device.
    assert found.bound(Work(10.0, 400.0, "bfloat16"), "cpu", 1) is None
    assert found.bound(Work(10.0, 0.0, "bfloat16"), "cpu", 1) == (1.0, 1.0, 0.0)
    assert found.bound(Work(10.0), "cpu", 2) is None
    assert found.bound(Work(10.0), "cuda", 1) is None
    # On a GPU the threads of the process do not count.
    on_gpu = record("copy", "bytes", 20.0)
    on_gpu["case"]["device"] = "cuda"
    assert ceilings.Ceilings([on_gpu]).bound(Work(50.0), "cuda", 7) == (5.0, 5.0, 0.0)
    old = {"benchmark": "laurel", "case": {}, "variant": "effkern", "wall": 1.0, "threads": 1}
    assert found.with_bound(old) == old


def test_ceilings_are_measured_as_lines(monkeypatch):
    monkeypatch.setattr(ceilings, "ORDER", {"cpu": 64})
    monkeypatch.setattr(ceilings, "PIECE_MIB", {"cpu": 1})
    monkeypatch.setattr(ceilings, "COPY_MIB", {"cpu": 4})
    before = torch.get_num_threads()
    lines = ceilings.measure(torch.device("cpu"), [1, 2], ["float32", "float64"], rounds=2)
    assert torch.get_num_threads() == before
    assert [(r["threads"], r["variant"], r["case"].get("dtype")) for r in lines] == [
        (n, *rest) for n in (1, 2) for rest in (("copy", None), ("mm", "float32"), ("mm", "float64"))
    ]
    assert {(r["bytes"], r["flops"]) for r in lines} == {(2 << 20, 0), (0, 2 * 64**3)}
    found = ceilings.Ceilings(json.loads(json.dumps(lines)))
    assert found.bandwidth.keys() == {("cpu", 1), ("cpu", 2)}
    assert found.bound(Work(1e9, 1e9, "float64"), "cpu", 2) is not None


def test_explain_says_bytes_time_and_choice(monkeypatch, capsys):
    rates = [record("copy", "bytes", 20e9), record("mm", "flops", 200e9, dtype="float32")]
    threads = torch.get_num_threads()
    monkeypatch.setattr(ceilings, "measure", lambda *_: [{**r, "threads": threads} for r in rates])
    case = {"batch": 64, "examples": 64, "dim": 20, "loops": 32, "free": False, "pass": "both", "device": "cpu"}
    op = suite.load("looped_linear_attention")
    explain(op, [case])
    said = capsys.readouterr().out
    assert f"copy {10.0} GB/s, float32 100 GFLOP/s" in said
    assert f"{op.work(case).bytes / 1e6:.4g} MB, {op.work(case).flops / 1e9:.4g} GFLOP float32" in said
    assert f"products {op.work(case).flops / 100e9 * 1e3:.4g} ms" in said
    chosen = registry.choose("looped_linear_attention", "auto", torch.device("cpu"))
    assert f"looped_linear_attention takes {chosen}: " in said
    # 2 n d^2 + 8 L d^2 for factors, 2 n d^2 + 4 d^3 + 4 L d^2 in the primal form.
    assert "form primal: the fewest; multiply-adds of a problem, both passes: factors 153,600, primal 134,400" in said


def test_a_run_prints_lines_that_the_targets_can_read(monkeypatch, capsys):
    op = suite.load("label_rank")
    words = "--rows=8 --vocab=64 --json --rounds=2 --least=0 --warm --variants effkern eager --threads=1 --device=cpu"
    before = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["label_rank", *words.split()])
    try:
        harness.main(op)
    finally:
        torch.set_num_threads(before)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["variant"] for line in lines] == ["row maximum", "effkern", "eager"]
    assert all(line["bytes"] == 8 * (64 * 4 + 28) and line["threads"] == 1 for line in lines)
    assert lines[0]["of_floor"] == 1.0
    assert {"wall", "wall_low", "wall_high", "cpu", "load", "torch", "processor"} <= lines[1].keys()


def test_a_device_that_is_not_there_is_a_usage_error(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        harness.parse(suite.load("label_rank"), ["--device=cuda"])
    assert stop.value.code == 2
    assert "torch sees none" in capsys.readouterr().err
    assert suite.main(["--device=cuda", "--op", "laurel"]) == 2
    assert suite.commands("laurel", False, "cuda") == [f"{suite.QUICK['laurel'][0]} --device=cuda"]
    assert suite.commands("shampoo", False, "cuda") == "its benchmark is not for cuda"
