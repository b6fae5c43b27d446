"""python -m tests.scaffold writes an op that builds, passes its own tests and is measured; and those tests see what is
missing.

The tree is a copy with the Python of the package and of the benchmarks; of the C++ it has the new file and what every
module needs, so that the build is one file and not all of them.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import resources
from tests.scaffold import __main__ as command
from tests.scaffold.writing import EXPORTS, SUITE, Refusal, scaffold

ROOT = Path(__file__).parents[1]
NAME = "row_gate"
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")


def copy_tree(to: Path) -> Path:
    """What a scaffolded op touches, is built from and is tested with."""
    here = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", ROOT / "csrc" / "cpu" / "clones.cpp"]
    here += [*(ROOT / "csrc" / "common").glob("*"), *(ROOT / "csrc" / "cpu").glob("*.h")]
    here += [*(ROOT / "effkern").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    here += [*(ROOT / "benchmarks" / "ops").glob("*.py"), ROOT / "benchmarks" / "targets.toml"]
    tests = ("__init__", "conftest", "interpreter", "numerics", "ops/__init__", "native/__init__", "native/resources",
             "native/triton_codegen")  # fmt: skip
    here += [ROOT / "tests" / f"{name}.py" for name in tests]
    for path in here:
        target = to / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return to


def run(tree: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of the tree, of what pytest says to its own processes nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**kept, "PATH": path, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def passes(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def own_tests(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(tree, sys.executable, "-m", "pytest", "-q", *words, f"tests/ops/test_{NAME}.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("scaffolded"))
    scaffold(NAME, tree)
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=str(Path(sys.executable).parent)) else []
    flags = [f"-DPython_EXECUTABLE={sys.executable}", "-DEFFKERN_CUDA=OFF", "-DEFFKERN_DATA=OFF"]
    passes(run(tree, "cmake", "-S", ".", "-B", "build", *generator, *flags))
    passes(run(tree, "cmake", "--build", "build"))
    return tree


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_new_op_passes_its_own_tests_with_every_implementation(built):
    told = passes(own_tests(built, "-vv"))
    assert "skipped" not in re.sub(r"needs a CUDA device", "", told)
    for impl in ("cpp", "triton", "reference"):
        assert f"[{impl}-dtype0-shape4] PASSED" in told, impl


# The benchmark's own check with results that are 1% too large, and its Triton kernels for a GPU that is not here.
WRONG = """
import sys
from benchmarks import harness, suite
from benchmarks.case import WrongResult
op = suite.load("{name}")
(case,) = harness.cases_of(op, harness.parse(op, suite.SMALL["{name}"].split()))
op.check(case)
module = sys.modules[op.module()]
right = module.{name}
module.{name} = lambda *given: 1.01 * right(*given)
try:
    op.check(case)
except WrongResult:
    sys.exit(0)
sys.exit("a wrong result passes")
"""
CODEGEN = """
from pathlib import Path
from tests.native import triton_codegen
from effkern.ops.{name} import triton
for name, case in triton.COMPILE_CASES.items():
    used = triton_codegen.measure(case, 90, Path("."))
    assert used["registers"] > 0 and used["stack"] == 0, (name, used)
"""


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_new_op_is_measured_and_no_wrong_result_is(built):
    words = ("--rows", "64", "--dims", "32", "--dtypes", "float32", "--pass", "both", "--rounds", "1", "--threads", "1")
    told = passes(run(built, sys.executable, "-m", f"benchmarks.ops.{NAME}", "--variants", "effkern", "eager", *words))
    assert "effkern" in told
    passes(run(built, sys.executable, "-c", WRONG.format(name=NAME)))


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_new_op_is_clean(built):
    passes(run(built, sys.executable, "-m", "ruff", "check", "."))
    passes(run(built, sys.executable, "-m", "ruff", "format", "--check", "."))
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    passes(run(built, sys.executable, "-c", code, "--no-cache"))
    code = (built / "docs" / "ops" / f"{NAME}.md").read_text().split("```python\n")[1].split("```")[0]
    passes(run(built, sys.executable, "-c", code))
    if importlib.util.find_spec("triton") and resources.cuobjdump() is not None:
        cache = str(built / "build" / "triton")
        passes(
            run(built, sys.executable, "-c", CODEGEN.format(name=NAME), TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
        )


# What is taken out of the new files, and the tests that must see it.
PIECES = {
    "fake registration": ("schema.py", "        torch.library.register_fake(_op, _fake, lib=_library)", "        pass"),
    "a factor of the gradient": ("triton.py", "2.0 * relu * up * grad", "relu * up * grad"),
}


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("piece", PIECES)
def test_what_is_missing_is_seen(built, piece):
    name, there, instead = PIECES[piece]
    path = built / "effkern" / "ops" / NAME / name
    text = path.read_text()
    assert text.count(there) == 1, piece
    path.write_text(text.replace(there, instead))
    try:
        done = own_tests(built, "-x")
    finally:
        path.write_text(text)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


def test_the_files_and_the_lines_that_it_writes(tmp_path, capsys):
    tree = copy_tree(tmp_path)
    before = {path: path.read_text() for path in tree.rglob("*.py")}
    assert command.main(["zz_last", "--root", str(tree)]) == 0
    assert "python -m pytest tests/ops/test_zz_last.py" in capsys.readouterr().out
    new = {path for path in tree.rglob("*") if path.is_file() and path not in before and "zz_last" in str(path)}
    assert {str(path.relative_to(tree)) for path in new} == {
        *(f"effkern/ops/zz_last/{part}.py" for part in ("__init__", "api", "reference", "schema", "triton")),
        "csrc/cpu/zz_last.cpp", "tests/ops/test_zz_last.py", "benchmarks/ops/zz_last.py", "docs/ops/zz_last.md",
    }  # fmt: skip
    assert not [path for path in new if "op_name" in path.read_text()]
    changed = {path for path, text in before.items() if path.read_text() != text}
    assert changed == {tree / EXPORTS, tree / SUITE}
    # Only lines that name the op are new, and no line is gone.
    for path in changed:
        old, now = before[path].splitlines(), path.read_text().splitlines()
        assert [line for line in now if "zz_last" not in line] == old
        assert len(now) - len(old) == {tree / EXPORTS: 2, tree / SUITE: 3}[path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Row", "NAME must be lower-case words joined by underscores, and no keyword, got 'Row'"),
        ("row-gate", "NAME must be lower-case words"),
        ("_row", "NAME must be lower-case words"),
        ("2d", "NAME must be lower-case words"),
        ("lambda", "NAME must be lower-case words"),
        ("x" * 41, "NAME must have at most 40 letters"),
        ("op_name", "NAME must have at most 40 letters and not be the placeholder"),
        ("kmeans", "NAME must be free, got 'kmeans': effkern/ops/kmeans exists"),
        ("optim", "NAME must be free, got 'optim': effkern/optim exists"),
        ("native", "NAME must be free, got 'native': effkern/native.py exists"),
        ("clones", "NAME must be free, got 'clones': csrc/cpu/clones.cpp exists"),
        ("kmeans_assign", "NAME must be free, got 'kmeans_assign': effkern exports it"),
    ],
)
def test_names_that_are_refused(name, message, tmp_path, capsys):
    tree = copy_tree(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    assert command.main([name, "--root", str(tree)]) == 2
    assert f"scaffold: {message}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


def test_changes_that_are_not_committed_are_refused(tmp_path):
    tree = copy_tree(tmp_path)
    git = ("git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@example.org")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "start")):
        subprocess.run([*git, *words], check=True, capture_output=True)
    with (tree / SUITE).open("a") as suite:
        suite.write("# mine\n")
    with pytest.raises(Refusal, match=r"no changes that are not committed, got benchmarks/suite\.py$"):
        scaffold(NAME, tree)
    assert not (tree / "effkern" / "ops" / NAME).exists()
    subprocess.run([*git, "checkout", "-q", str(SUITE)], check=True)
    scaffold(NAME, tree)


def test_a_failure_leaves_the_tree_as_it_was(tmp_path, monkeypatch):
    from tests.scaffold import writing

    tree = copy_tree(tmp_path)
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    monkeypatch.setattr(writing.sys, "executable", shutil.which("false"))
    with pytest.raises(Refusal, match="ruff must be there and accept the files"):
        scaffold(NAME, tree)
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before
    assert not (tree / "effkern" / "ops" / NAME).exists()


def test_another_folder_is_no_repository(tmp_path, capsys):
    assert command.main([NAME, "--root", str(tmp_path)]) == 2
    assert "--root must be the repository, got" in capsys.readouterr().err
