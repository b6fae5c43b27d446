"""The compiled modules as they are, under other versions of torch: python -m tests.native.torch_versions 2.11.0 2.15.0

Makes a virtual environment per version, installs torch and pytest there (gigabytes where that torch is one for CUDA),
and runs `effkern doctor` and tests on this checkout, nothing built anew. Prints a table; exit status 1 if a test failed
or a module that is there did not load, 2 if an environment could not be made.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]

# Every kernel of the compiled module, and what of torch this package stands on: operators with their fakes and opcheck,
# compile, autograd functions, optimizers, modules, tensor subclasses.
TESTS = (
    "tests/test_doctor.py", "tests/native/test_lapack.py", "tests/nn",
    "tests/ops/test_batched_eigh.py", "tests/ops/test_distill.py", "tests/ops/test_distill_autograd.py",
    "tests/ops/test_kmeans.py", "tests/ops/test_label_rank.py", "tests/ops/test_laurel.py",
    "tests/ops/test_loop_similarity.py", "tests/ops/test_loop_step.py", "tests/ops/test_looped_linear_attention.py",
    "tests/ops/test_lora_rite.py", "tests/ops/test_mean_pool.py", "tests/ops/test_shampoo.py",
    "tests/ops/test_soft_labels.py", "tests/ops/test_token_stats.py",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What one version did."""

    torch: str
    python: str
    modules: dict[str, str | None]
    """Why each did not load, or None."""
    passed: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float

    @property
    def good(self) -> bool:
        fits = ("was not built", "this torch has no CUDA")
        problems = [p for p in self.modules.values() if p and not any(reason in p for reason in fits)]
        return not problems and not self.failed and self.passed > 0

    def row(self) -> str:
        modules = ", ".join(name for name, problem in self.modules.items() if problem is None)
        return (
            f"| {self.torch} | {self.python} | {modules or 'none'} | {self.passed} | {len(self.failed)} | "
            f"{self.skipped} | {self.seconds:.0f} |"
        )


HEAD = "| torch | Python | modules that load | passed | failed | skipped | s |\n|" + " --- |" * 7


def made(folder: Path, version: str, python: str) -> Path:
    """The interpreter of an environment with that torch; one from an earlier call is taken as it is."""
    place = folder / f"{Path(python).name}-torch-{version}"
    interpreter = place / "bin" / "python"
    if not (place / "complete").exists():
        subprocess.run([python, "-m", "venv", str(place)], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
        # The interpreter of Triton 3.6 calls what NumPy 2.4 no longer has.
        subprocess.run([*pip, f"torch=={version}", "numpy<2.4", "pytest>=8", "expecttest", "hypothesis"], check=True)
        (place / "complete").write_text("")
    return interpreter


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}


def checked(interpreter: Path, tests: Sequence[str], limit: float) -> Result:
    """Raises subprocess.TimeoutExpired: the tests took longer than `limit` seconds."""
    start = time.perf_counter()
    doctor = [str(interpreter), "-m", "effkern", "doctor", "--json"]
    said = json.loads(subprocess.run(doctor, cwd=ROOT, env=environment(), stdout=-1, check=True).stdout)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(interpreter), "-m", "pytest", "-q", "--tb=short", "-m", "not slow and not gpu", *tests]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment(), timeout=limit, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [
        f"{c.get('classname')}::{c.get('name')}"
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    modules = {name: module["problem"] for name, module in said["modules"].items()}
    versions = said["versions"]
    return Result(
        versions["torch"], versions["python"], modules, len(cases) - skipped - len(bad), skipped, tuple(bad),
        time.perf_counter() - start,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.native.torch_versions", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of torch, as pip knows it")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environments")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "effkern-torch-versions")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="in place of the usual choice")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for the tests of one version")
    a = parser.parse_args(arguments)
    results = []
    for version in a.versions:
        try:
            results.append(checked(made(a.folder, version, a.python), a.tests, a.limit))
        except (subprocess.SubprocessError, OSError, ElementTree.ParseError) as error:
            print(f"torch_versions: torch {version}: {error}", file=sys.stderr)
            return 2
    print("\n".join([HEAD, *(result.row() for result in results)]))
    for result in results:
        for name in result.failed:
            print(f"torch {result.torch}: failed: {name}")
        for name, problem in result.modules.items():
            if problem:
                print(f"torch {result.torch}: {name}: {problem}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
