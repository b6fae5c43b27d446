"""Peers: who is left out and why, results before times, and each installed peer against the reference it names."""

import json

import pytest
import torch

from benchmarks.peers import __main__ as command
from benchmarks.peers import peer as peers
from benchmarks.peers.peer import Family, Peer, Trial

FAMILIES = {name: command.family_of(name) for name in command.FAMILIES}
# A compiler takes seconds for each of these; the benchmark itself checks them before it times them.
COMPILED = ("torch.compile", "Liger chunked, compiled", "cut-cross-entropy, torch_compile")


@pytest.mark.parametrize(("name", "which"), [(n, p.name) for n, f in FAMILIES.items() for p in f.peers])
def test_each_peer_equals_the_reference_it_names(name, which):
    family = FAMILIES[name]
    peer = next(p for p in family.peers if p.name == which)
    if which in COMPILED:
        pytest.skip("compiled; the benchmark checks it")
    if reason := peer.missing("cpu"):
        pytest.skip(reason)
    case = family.cases(True)[0]
    assert peers.wrong(family, peer, case, "cpu") == ""


def test_references_tell_the_definitions_apart():
    for name in ("matrix_optimizers", "lora_optimizers"):
        family = FAMILIES[name]
        problem = family.make({**family.cases(True)[0], **family.small}, "cpu")
        truths = {key: reference(problem) for key, reference in family.references.items()}
        for first, a in truths.items():
            for second, b in truths.items():
                if first != second and len(a) == len(b):
                    errors = [peers.relative_error(x, y) for x, y in zip(a, b)]
                    assert max(errors) > 0.05, (name, first, second)


def doubled(x: torch.Tensor) -> Trial:
    return Trial(lambda: None, lambda: [2 * x])


def family_of(*members: Peer, **more) -> Family:
    return Family(
        "one", "x times two", lambda quick: [{"rows": 4, "dtype": "float32"}],
        lambda case, device: torch.arange(1.0, 1 + case["rows"]), {"rows": 3},
        {"float64": lambda x: [2 * x.double()]}, members, **more,
    )  # fmt: skip


def test_a_peer_that_cannot_run_says_why():
    def reason(device="cpu", **given):
        return Peer("p", doubled, **given).missing(device)

    assert reason() == ""
    assert reason(package="no-such-package-here") == "not installed: pip install --no-deps no-such-package-here"
    assert reason(devices=("cuda",), why_not="Triton") == "Triton"
    assert reason(devices=("cuda",)) == "needs one of cuda, got cpu"
    assert "pytest" in reason(package="pytest", module="pytest.no_such_module")
    assert reason(package="pytest") == ""


def test_no_number_on_a_wrong_result(capsys):
    right = Peer("right", doubled)
    wrong = Peer("wrong", lambda x: Trial(lambda: None, lambda: [2.001 * x]))
    nan = Peer("nan", lambda x: Trial(lambda: None, lambda: [x * torch.nan]))
    short = Peer("short", lambda x: Trial(lambda: None, list))
    timings, _, left_out = peers.measure(family_of(right, wrong, nan, short), {"rows": 4}, "cpu", 1)
    assert list(timings) == ["right"]
    assert left_out["wrong"].startswith("wrong result: relative error 5.0e-04")
    assert left_out["nan"] == "wrong result: not finite"
    assert left_out["short"] == "wrong result: 0 tensors instead of 1"
    assert "left out: one: wrong" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="one: effkern: wrong result"):
        peers.measure(family_of(Peer("effkern", wrong.build)), {"rows": 4}, "cpu", 1)


def test_a_peer_that_breaks_is_left_out_and_this_package_is_not():
    def broken(x):
        raise AttributeError("no such option\nmore")

    def late(x):
        def step():
            if len(x) > 3:
                raise MemoryError("too large")

        return Trial(step, lambda: [2 * x])

    members = (Peer("right", doubled), Peer("broken", broken), Peer("late", late))
    timings, extra, left_out = peers.measure(family_of(*members), {"rows": 4}, "cpu", 1)
    assert list(timings) == list(extra) == ["right"]
    assert left_out == {"broken": "failed: AttributeError: no such option", "late": "failed: MemoryError: too large"}
    with pytest.raises(AttributeError, match="no such option"):
        peers.measure(family_of(Peer("effkern", broken)), {"rows": 4}, "cpu", 1)


def test_a_peer_with_a_definition_of_its_own_must_at_least_move():
    def stepped(by: float) -> Peer:
        return Peer(
            "own", lambda x: Trial(lambda: x.add_(by), lambda: [x]), reference="", differs="it adds", package="pytest"
        )

    still, moved = stepped(0.0), stepped(1.0)
    assert peers.wrong(family_of(still), still, {}, "cpu") == "wrong result: 1 of 1 parameters did not move"
    assert peers.wrong(family_of(moved), moved, {}, "cpu") == ""
    _, extra, _ = peers.measure(family_of(moved, shared=False), {"rows": 4}, "cpu", 1)
    assert extra["own"]["differs"] == "it adds"
    assert extra["own"]["package"] == f"pytest {pytest.__version__}"
    with pytest.raises(ValueError, match="'p' must have one of reference and differs"):
        Peer("p", doubled, differs="both are given")


def test_what_a_build_refuses_is_a_reason_and_gradients_turn():
    def refuse(x):
        raise NotImplementedError("float32 is not covered")

    seen = []

    def counted(x):
        return Trial(lambda: seen.append("step"), lambda: [2 * x], turn=seen.append)

    family = family_of(Peer("refuses", refuse), Peer("counts", counted), steps=2)
    assert peers.wrong(family, family.peers[1], {"rows": 4}, "cpu") == ""
    assert seen == [0, "step", 1, "step"]
    timings, _, left_out = peers.measure(family, {"rows": 4}, "cpu", 1, only=["refuses", "counts"])
    assert left_out == {"refuses": "float32 is not covered"}
    assert timings["counts"].wall > 0


def test_the_command_writes_lines_that_name_the_case_and_the_left_out(tmp_path, monkeypatch, capsys):
    family = family_of(Peer("effkern", doubled), Peer("absent", doubled, package="no-such-package-here"))
    monkeypatch.setattr(command, "family_of", lambda name: family)
    threads = torch.get_num_threads()
    path = tmp_path / "lines.jsonl"
    try:
        words = ["--op", "add_norm", "--rounds", "1", "--device", "cpu", "--set", "rows=6", "--json"]
        assert command.main([*words, str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert line["benchmark"] == "peers"
    assert line["case"] == {"op": "one", "rows": 6, "dtype": "float32", "device": "cpu"}
    assert line["variant"] == "effkern"
    assert line["left_out"]["absent"].startswith("not installed")
    assert "effkern" in capsys.readouterr().out
    assert command.main(["--list", "--device", "cpu"]) == 0
    assert "absent" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for bad, said in (
        (["--set", "rows"], "NAME=VALUE, got 'rows'"),
        (["--set", "rows=x"], "--set: invalid literal"),
        (["--set", "rows=0"], "--set: rows must be at least 1, got 0"),
        (["--set", "rows=6", "rowz=8"], "--set must name one of dtype, rows, got 'rowz=8'"),
        (["--set", "dtype=float77"], "--set: dtype of one must be one of bfloat16, float32, got float77"),
        (["--device", "cuda"], "--device must be one that is there, got 'cuda', and torch sees none"),
        (["--json", str(tmp_path)], f"--json must be a file that can be written, got {tmp_path}: it is a folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(["--op", "add_norm", "--device", "cpu", *bad])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    torch.set_num_threads(threads)


def test_requirements_and_extra_list_the_packages_of_all_peers():
    root = command.Path(command.__file__).parents[2]
    listed = (root / "benchmarks" / "peers" / "requirements.txt").read_text()
    extra = (root / "pyproject.toml").read_text().split("peers = [")[1].split("]")[0]
    for family in FAMILIES.values():
        for peer in family.peers:
            if peer.package and peer.devices:
                assert f"\n{peer.package}>=" in listed, peer.package
                assert f'"{peer.package}>=' in extra, peer.package
    assert "torch" not in "".join(line for line in listed.splitlines() if not line.startswith("#")).replace(
        "pytorch", ""
    )
