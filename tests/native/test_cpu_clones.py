"""Every CPU clone of effkern._C under the address and undefined-behaviour sanitizers, with the C++ tests of all ops.

An installed module holds all clones and the CPU picks one, so the others would never run: here each is built alone
into build/clones/<clone> (incremental; the first time takes a minute each) and given to the tests by --native-dir.

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the clones are for x86-64"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found"),
]


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
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


@pytest.fixture(scope="module", params=FEATURES)
def native_dir(request) -> Path:
    clone = request.param
    missing = FEATURES[clone] - set(Path("/proc/cpuinfo").read_text().split())
    if missing:
        pytest.skip(f"this CPU cannot run {clone}: no {', '.join(sorted(missing))}")
    folder = ROOT / "build" / "clones" / clone
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DEFFKERN_OUTPUT_DIR={folder / 'out'}", f"-DEFFKERN_CPU_CLONE={clone}",
         "-DEFFKERN_SANITIZE=address,undefined", "-DEFFKERN_CUDA=OFF", "-DEFFKERN_DATA=OFF"],
        ["cmake", "--build", folder],
    ):  # fmt: skip
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def test_ops_agree_and_are_clean(native_dir):
    done = run_sanitized(
        "-m", "pytest", "-q", "-m", "not slow", "-k", "cpp", "tests/ops", f"--native-dir={native_dir}"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


def test_planted_overrun_is_reported(native_dir):
    """The control: a tensor whose memory was taken away under it."""
    script = f"""
import importlib.util, pathlib, torch, effkern.ops.token_stats
(path,) = pathlib.Path({str(native_dir)!r}).glob("_C.*so")
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
