"""The report: what it says of targets, ops, peers, the trainer, scaling and ceilings, as text, page and pictures."""

import json
import math

import pytest

from benchmarks import records, report, targets
from benchmarks import report_plots as plots
from benchmarks.targets import Finding, Target

MACHINE = {"date": "2026-11-22", "processor": "one", "cores": 2, "threads": 1, "torch": "2.13", "gpu": None}


def line(benchmark: str, case: dict, variant: str, wall: float, **more) -> str:
    spread = {"wall_low": 0.9 * wall, "wall_high": 1.2 * wall, "cpu": wall}
    return json.dumps(
        {"benchmark": benchmark, "case": case, "variant": variant, "wall": wall, **spread, **MACHINE, **more}
    )


def op_lines(count: int) -> list[str]:
    found = []
    for rows in range(1, count + 1):
        for dtype in ("float32", "bfloat16"):
            case = {"rows": rows, "dim": 8, "dtype": dtype}
            rates = {"bytes": 1000, "flops": 8000, "gb_per_s": 2.0, "tflop_per_s": 0.016, "of_bound": 0.5}
            found.append(line("laurel", case, "effkern", 2e-3, **rates))
            found.append(line("laurel", case, "<eager>", 6e-3, bytes=1000, flops=8000))
    return found


OTHERS = [
    line("peers", {"op": "add_norm", "rows": 4}, "effkern", 1e-3, left_out={"Liger": "needs a GPU"}),
    line("peers", {"op": "add_norm", "rows": 4}, "Other", 5e-4, differs="no norm"),
    *(line("scaling", {"op": "laurel", "against": "rows", "rows": n}, "effkern", n * 1e-3, exponent=1.0, error=0.1,
           last=1.1) for n in (1, 2, 4)),
    line("ceilings", {"device": "cpu", "threads": 1, "mib": 1}, "copy", 1.0, bytes=9e9),
    line("ceilings", {"device": "cpu", "threads": 1, "dtype": "float32"}, "mm", 1.0, flops=9e10),
    *(line("end_to_end", {"method": m, "steps": 13}, side, 0.1, tokens_per_s=10.0, loss=7.0, state_mib=2.0,
           peak_mib=3.0, curve=[[3, 9.0], [13, 7.0]], to_base=1.0)
      for m in ("base", "loops") for side in ("plain", "effkern")),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = folder / "lines.jsonl"
    path.write_text("\n".join([*op_lines(2), *OTHERS]))
    assert report.main([str(path), "--out", str(folder)]) == 0
    return folder, (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_the_page_stands_alone(made):
    folder, text, page = made
    pictures = sorted(path.stem for path in folder.glob("*.png"))
    assert pictures == ["end_to_end", "laurel", "peers_add_norm", "roofline_cpu_1", "scaling", "shares"]
    assert page.count("data:image/png;base64,") == len(pictures)
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert all(f"({name}.png)" in text for name in pictures)
    for outside in ("http:", "https:", "<script", "src='", 'src="/'):
        assert outside not in page
    assert "<eager>" not in page
    assert "&lt;eager&gt;" in page
    for _, anchor in (part.split("'", 1) for part in page.split("<a href=")[1:] for part in [part]):
        assert f'id="{anchor.split(chr(39))[0].lstrip("#")}"' in page


def test_every_section_says_its_figures(made):
    _, text, _ = made
    assert "processor one, cores 2, torch 2.13; 2026-11-22" in text
    assert "Every case: dim 8." in text
    row = "| dtype float32, rows 1 | effkern | 2.000 | 1.800-2.400 | 2.000 | 1.00 | 2.0 | 16.0 | 0.50 |"
    assert row in text
    assert "| dtype float32, rows 1 | <eager> | 6.000 | 5.400-7.200 | 6.000 | 3.00 |  |  |  |" in text
    assert "- Liger: left out: needs a GPU" in text
    assert "- Other differs: no norm" in text
    assert "| laurel, rows | 1 2 4 | 0.9 1.8 3.6 | 1.00 +- 0.10 | 1.10 |" in text
    assert "| cpu | 1 | copy | 10.0 GB/s |" in text
    assert "| cpu | 1 | float32 | 100.0 GFLOP/s |" in text
    assert "| loops | effkern | 10 | 100 | 90-120 | 1.00 | 1.00 | 3 | 2 | 7.000 | 1.00 |" in text


def test_every_target_is_a_row_also_when_nothing_was_measured(made):
    _, text, page = made
    table = text.split("## Targets")[1].split("\n## ")[0]
    for target in targets.read():
        assert f"| {target.name} | {target.bound} | - | - | - | not measured |" in table
    assert f"{len(targets.read())} targets: 0 met in every case, 0 missed" in text
    assert page.count("class='v1'") >= len(targets.read())


def finding(figure: float | None, **bound) -> Finding:
    return Finding(Target("t", "w", "b", ("v",), **bound), {"rows": figure or 0}, figure)


def test_the_worst_case_of_a_target_is_what_its_row_says():
    rows = report.summary([finding(1.0, at_most=1.25), finding(1.5, at_most=1.25), finding(0.5, at_most=1.25)])
    assert rows.splitlines()[2] == "| t | <= 1.25 | 1.5 | 0.5 | 2 of 3 | MISSED | rows 1.5 |"
    rows = report.summary([finding(3.0, at_least=2.0), finding(2.5, at_least=2.0)])
    assert rows.splitlines()[2] == "| t | >= 2 | 2.5 | 3 | 2 of 2 | met | rows 2.5 |"
    rows = report.summary([finding(1.0, at_most=1.25), finding(math.nan, at_most=1.25)])
    assert "| nan | 1 | 1 of 2 | MISSED |" in rows
    assert report.strain(finding(0.0, at_most=0)) == 1.0
    assert report.strain(finding(3.0, at_most=0)) > 1.0
    assert report.strain(finding(0.0, at_least=2.0)) == math.inf


def test_many_cases_become_panels_and_none_is_left_out():
    cases = [{"rows": r, "dtype": d, "pass": p} for r in range(12) for d in "ab" for p in "fb"]
    groups = plots.panels(cases)
    assert sorted(i for group in groups for i in group) == list(range(48))
    assert [len(group) for group in groups] == [24, 24]
    assert plots.panels(cases[:20]) == [list(range(20))]
    # Where no field splits them: one panel.
    assert plots.panels([{"rows": r} for r in range(40)]) == [list(range(40))]
    assert set(plots.constant([{"a": 1, "b": 1}, {"a": 1, "b": 2}])) == {"a"}
    assert plots.constant([{"a": 1}]) == []


def test_pictures_of_many_and_of_few_cases(tmp_path):
    import matplotlib.image

    sizes = {}
    for count in (1, 20):
        cases = targets.read_lines(op_lines(count))["laurel"]
        path = tmp_path / f"{count}.png"
        assert plots.ratios("laurel", cases, path)
        sizes[count] = matplotlib.image.imread(path).shape
    assert sizes[20][0] > 1.5 * sizes[1][0]
    alone = targets.read_lines([line("laurel", {"rows": 1}, "effkern", 1.0)])["laurel"]
    assert not plots.ratios("laurel", alone, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_bad_files_are_refused(tmp_path, capsys):
    assert report.main([str(tmp_path / "none.jsonl")]) == 2
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("nothing\n")
    assert report.main([str(tmp_path / "empty.jsonl")]) == 2
    assert "must hold result lines, got none" in capsys.readouterr().err


def test_pictures_stay_in_the_folder_whatever_a_benchmark_is_named(tmp_path, capsys):
    path, folder = tmp_path / "lines.jsonl", tmp_path / "a" / "page"
    names = ("../../out", "a/b", "a b")
    path.write_text("\n".join(line(name, {}, v, 1e-3) for name in names for v in ("effkern", "eager")))
    assert report.main([str(path), "--out", str(folder)]) == 0
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["a-b-.png", "a-b.png", "out.png"]
    assert len(list(folder.glob("*.png"))) == 3
    assert "](a-b-.png)" in (folder / "report.md").read_text()
    capsys.readouterr()
    assert report.main([str(path), "--out", str(path)]) == 2
    assert f"--out must be a folder that can be written, got {path}" in capsys.readouterr().err


# Committed results as lines -------------------------------------------------------------------------------------------


def test_committed_results_become_lines_that_targets_find():
    found = targets.read_lines(records.lines())
    assert set(found) == {"records"}
    of = {json.loads(text)["of"] for text in found["records"]}
    present = {name for file, (name, _) in records.READERS.items() if (records.RESULTS / file).exists()}
    assert of == present
    measured = {f.target.name: f for f in targets.findings(targets.read(), found) if f.figure is not None}
    for name in ("sampled distillation, 500 draws: share of the teacher's bytes",
                 "looped block: recomputing each loop over keeping everything",
                 "LoRA-RITE: invariance error over float32's rounding, 20 steps",
                 "Shampoo, regression with a rotated Hessian: the next best over one-sided"):  # fmt: skip
        assert math.isfinite(measured[name].figure)
    assert all(line["processor"] for variants in found["records"].values() for line in variants.values())


def test_records_count_what_they_say(tmp_path, capsys):
    arms = [("full", 0, 5.0, 100), ("full", 1, 5.2, 100), ("few", 0, 5.1, 10), ("few", 1, 5.3, 30)]
    rows = [dict(zip(("arm", "seed", "loss", "bytes"), arm)) for arm in arms]
    (tmp_path / "sampled_kd.json").write_text(json.dumps({"cpu": "one", "records": rows}))
    modes = [{"part": "memory", "layers": 2, "loops": 4, "mode": "full", "states": 21.0, "formula": 20.0}]
    modes += [{"part": "gradient", "loops": n, "variant": "effkern", "error": e} for n, e in ((4, 1e-3), (32, 3e-3))]
    (tmp_path / "looped_modes_memory.json").write_text(json.dumps({"records": modes}))
    found = {(r["case"]["of"], r["variant"]): r for r in map(json.loads, records.lines(tmp_path)) if "growth" not in r}
    assert found["sampled_kd", "few"]["gap_over_deviation"] == pytest.approx(0.1 / 0.02**0.5)
    assert found["sampled_kd", "few"]["bytes_share"] == pytest.approx(0.2)
    assert found["sampled_kd", "few"]["processor"] == "one"
    assert found["looped_modes", "effkern"]["of_formula"] == pytest.approx(1.05)
    assert any('"growth": 3.0' in text for text in records.lines(tmp_path))
    assert records.main(["--folder", str(tmp_path), "--json", str(tmp_path / "out.jsonl")]) == 0
    assert (tmp_path / "out.jsonl").read_text().splitlines() == records.lines(tmp_path)
    assert records.main(["--folder", str(tmp_path / "no")]) == 2
    assert "must hold one of" in capsys.readouterr().err
