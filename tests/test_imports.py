"""What an import brings along, and what is said where something is missing."""

import ast
import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import import_time, lines, targets
from effkern import cli, extras

ROOT = Path(__file__).parents[1]
ADVICE = "is not installed, which the extra train brings: pip install 'effkern[train]'"


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def answer(code: str) -> list:
    """The last line that `code` prints, which is JSON."""
    done = python(code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_loads_torch_and_itself_alone():
    """Neither an optional library nor a part of torch that torch leaves for later (dynamo, inductor); ops are there."""
    known, first, then = answer(
        "import json, sys, torch; before = set(sys.modules);"
        "import effkern; first = sorted(set(sys.modules) - before);"
        "known = torch.ops.effkern.linear_distill_fwd.default._schema.name; effkern.nn, effkern.models;"
        "from effkern.optim import LoRARite, Shampoo;"
        "print(json.dumps([known, first, sorted(set(sys.modules) - before)]))"
    )
    assert known == "effkern::linear_distill_fwd"
    # Other floors, Triton kernels and compiled modules wait until they are used.
    assert {".".join(name.split(".")[:2]) for name in first} == {"effkern", "effkern.native", "effkern.ops"}
    assert [name for name in first if "triton" in name.rpartition(".")[2]] == []
    assert {"effkern.nn", "effkern.models", "effkern.optim.shampoo"} <= set(then)
    assert [name for name in then if name.split(".")[0] != "effkern"] == []


def test_one_class_of_curation_brings_no_other():
    loaded = answer(
        "import json, sys; from effkern.data.curation.selected_order import SelectedOrder;"
        "print(json.dumps([m for m in sys.modules if m.startswith('effkern.')]))"
    )
    assert "effkern.data.curation.artifact" in loaded
    assert not {"effkern.models", "effkern.data.curation.embed", "effkern.data.curation.linkage"} & set(loaded)


def test_names_for_later_are_those_that_type_checkers_see():
    name = "effkern.data.curation"
    module = import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {key: f"{name}.{home}" for key, home in module._HOME.items()}
    for key, home in seen.items():
        assert getattr(module, key) is getattr(import_module(home), key)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_a_name_for_later_is_never_that_of_a_module():
    """Which would stand in its place once anything has imported it: `Trainer` brings the module of `evaluate` along."""
    for package in ("effkern.train", "effkern.optim", "effkern.data.curation"):
        module = import_module(package)
        names = getattr(module, "_HOME", None) or module._HOMES
        assert len(names) > 5
        assert set(names) & {found.name for found in pkgutil.iter_modules(module.__path__)} == set()
    from effkern.train import Trainer, evaluate

    assert callable(evaluate)
    assert evaluate.__module__ != Trainer.__module__ == "effkern.train.loop"


def test_the_extras_are_those_of_the_distribution():
    text = (ROOT / "pyproject.toml").read_text()
    table = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", text, re.DOTALL)
    assert table is not None
    declared = {}
    for extra, listed in re.findall(r"^(\w+) = \[(.*?)\]$", table[1], re.DOTALL | re.MULTILINE):
        names = re.findall(r'^\s*"([\w-]+)|(?<=[\[ ])"([\w-]+)', listed, re.MULTILINE)
        declared[extra] = {(a or b).replace("-", "_") for a, b in names}
    for extra, libraries in extras.EXTRAS.items():
        assert set(libraries) == declared[extra], extra


def test_only_missing_libraries_get_advice():
    assert extras.advice(ModuleNotFoundError("x", name="nothing_known")) is None
    assert extras.advice(ModuleNotFoundError("x")) is None
    assert extras.advice(ImportError("cannot import name", name="transformers")) is None
    said = extras.advice(ModuleNotFoundError("x", name="lm_eval.api"))
    assert said == "lm_eval is not installed, which the extra eval brings: pip install 'effkern[eval]'"


@pytest.mark.parametrize("command", ["train --preset demo", "data build --out x", "generate --checkpoint x", "demo"])
def test_commands_name_the_extra_they_need(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(command.split()) == 1
    assert capsys.readouterr().err == f"effkern {command.split()[0]}: error: tyro {ADVICE}\n"


def test_without_any_extra_help_and_doctor_work_and_the_rest_says_what_it_needs():
    names = sorted({library for libraries in extras.EXTRAS.values() for library in libraries})
    done = python(
        f"import sys; sys.modules.update(dict.fromkeys({names!r})); from effkern import cli; import effkern;"
        "assert cli.main(['--help']) == cli.main(['doctor']) == 0; effkern.data"
    )
    assert "linear_distill_loss on cpu" in done.stdout
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: effkern.data: numpy {ADVICE}"


def test_an_older_torch_is_refused():
    code = """
import json, torch
said = []
for torch.__version__ in ("2.10.1", "1.13.0+cu117", "2.9.0a0+git"):
    try:
        import effkern
    except ImportError as error:
        said.append(str(error))
torch.__version__ = "2.11.0a0+git"
import effkern
print(json.dumps(said))
"""
    rule = "effkern needs torch >= 2.11, got {}: pip install --upgrade torch"
    assert answer(code) == [rule.format(version) for version in ("2.10.1", "1.13.0+cu117", "2.9.0a0+git")]


def test_help_of_doctor(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--help"])
    assert stop.value.code == 0
    assert "usage: effkern doctor [-h] [--json]" in capsys.readouterr().out


def test_the_benchmark_takes_ratios_within_a_round(monkeypatch, tmp_path, capsys):
    """A machine that becomes half as slow again each round changes no ratio."""
    clock = iter(range(100))
    own = {"torch": (2.0, 1.0), "effkern": (2.2, 1.2)}

    def seconds(arguments):
        slow = 1.5 ** (next(clock) // len(import_time.VARIANTS))
        name = next(name for name, given in import_time.VARIANTS.items() if given == arguments)
        return tuple(slow * x for x in own.get(name, (0.1, 0.1)))

    monkeypatch.setattr(import_time, "seconds", seconds)
    monkeypatch.setattr(import_time, "loaded", lambda arguments: len(str(arguments)))
    assert benchmarks.main(["import_time", "--rounds", "3", "--json", str(tmp_path / "lines.jsonl")]) == 0
    records = {r["variant"]: r for r in lines.of_files([tmp_path / "lines.jsonl"])}
    assert records["effkern"]["of_torch"] == pytest.approx(1.1)
    assert records["effkern"]["of_torch_cpu"] == pytest.approx(1.2)
    # The first round of four is not counted.
    assert records["torch"]["wall"] == pytest.approx(2.0 * 1.5**2)
    assert "effkern --help" in capsys.readouterr().out
    (target,) = [t for t in targets.read() if t.benchmark == "import_time"]
    (finding,) = targets.findings([target], targets.gathered(records.values()))
    assert finding.figure == pytest.approx(1.1)


def test_the_benchmark_refuses_a_process_that_fails(capsys):
    assert min(import_time.seconds(["-c", "pass"])) > 0
    with pytest.raises(RuntimeError, match="must exit with 0, got 3"):
        import_time.seconds(["-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit):
        import_time.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
