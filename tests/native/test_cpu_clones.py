"""Every CPU clone of effkern._C with the C++ tests of all ops, the widest under the address and undefined-behaviour
sanitizers.

An installed module holds all clones and the CPU picks one, so the others would never run: here each is built alone
into build/clones/<clone> (incremental; the first time takes a minute each) and given to the tests by --native-dir. The
clones are one source, so that the sanitizers, which double the time, watch the one with the longest vectors.

The interpreter is not instrumented, hence LD_PRELOAD of the sanitizers' libraries. torch's OpenMP pool and MKL work
under them as they are. Leaks are not looked for: Python and torch keep memory until the end of the process.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEATURES = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
SANITIZERS = "address,undefined"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the clones are for x86-64"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found"),
]


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Two threads, whatever this process has: bounds of single rows come from what eager rounds, which depends on it.
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "2", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess:
    libraries = [run("g++", f"-print-file-name=lib{name}.so").stdout.strip() for name in ("asan", "ubsan")]
    return run(
        sys.executable,
        *arguments,
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )


def missing(clone: str) -> set[str]:
    return FEATURES[clone] - set(Path("/proc/cpuinfo").read_text().split())


def build(clone: str, sanitizers: str) -> Path:
    if lacks := missing(clone):
        pytest.skip(f"this CPU cannot run {clone}: no {', '.join(sorted(lacks))}")
    folder = ROOT / "build" / "clones" / clone
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DEFFKERN_OUTPUT_DIR={folder / 'out'}", f"-DEFFKERN_CPU_CLONE={clone}",
         f"-DEFFKERN_SANITIZE={sanitizers}", "-DEFFKERN_CUDA=OFF", "-DEFFKERN_DATA=OFF"],
        ["cmake", "--build", folder],
    ):  # fmt: skip
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


WIDEST = next(clone for clone in reversed(FEATURES) if not missing(clone)) if platform.system() == "Linux" else "x86-64"


@pytest.fixture(scope="module")
def sanitized_dir() -> Path:
    return build(WIDEST, SANITIZERS)


# What does not depend on the clone, or only on its speed.
CHOSEN = "cpp and not compile and not operator and not beyond_int32"


def arguments(folder: Path) -> list[str]:
    return ["-m", "pytest", "-q", "-m", "not slow", "-k", CHOSEN, "tests/ops", f"--native-dir={folder}"]


def check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("clone", [clone for clone in FEATURES if clone != WIDEST])
def test_ops_agree(clone):
    check(run(sys.executable, *arguments(build(clone, ""))))


def test_ops_agree_and_are_clean(sanitized_dir):
    check(run_sanitized(*arguments(sanitized_dir)))


def test_planted_overrun_is_reported(sanitized_dir):
    """The control: a tensor whose memory was taken away under it."""
    script = f"""
import importlib.util, pathlib, torch, effkern.ops.token_stats
(path,) = pathlib.Path({str(sanitized_dir)!r}).glob("_C.*so")
spec = importlib.util.spec_from_file_location("effkern._C", path)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
logits, labels = torch.zeros(4, 999), torch.zeros(4, dtype=torch.int64)
torch.ops.effkern.label_rank(logits, labels, -100, 999)
print("sound call passed", flush=True)
logits.untyped_storage().resize_(4 * 999 * 4 - 4)
torch.ops.effkern.label_rank(logits, labels, -100, 999)
"""
    done = run_sanitized("-c", script)
    assert "sound call passed" in done.stdout, done.stderr
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "label_rank.cpp" in done.stderr
