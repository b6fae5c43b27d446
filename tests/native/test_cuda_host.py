"""The CUDA kernels on the host (csrc/cuda/host_cuda.h), under the thread and the address + undefined sanitizer.

Data goes through a file, so that the instrumented program holds no Python and no torch. The sanitizers are tested
too: a planted race and a planted overrun must be reported.
"""

import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effkern.ops.token_stats import reference
from tests.numerics import assert_as_good_as_eager

ROOT = Path(__file__).parents[2]
THREAD, MEMORY = "thread", "address,undefined"
IGNORE = -100

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")


@dataclass
class Case:
    """`storage` is one block of memory, of which rows start at `offset` every `stride` elements."""

    storage: Tensor
    labels: Tensor
    offset: int
    stride: int
    vocab: int
    threads: int

    def rows(self) -> Tensor:
        return self.storage.as_strided((len(self.labels), self.vocab), (self.stride, 1), self.offset)

    def pack(self) -> bytes:
        bits = self.storage.view(torch.int16 if self.storage.element_size() == 2 else torch.int32).numpy().tobytes()
        header = struct.pack(
            "9q", self.storage.element_size(), self.storage.dtype == torch.bfloat16, len(self.labels), self.stride,
            self.offset, self.vocab, IGNORE, self.threads, len(bits),
        )  # fmt: skip
        return header + bits + self.labels.numpy().tobytes()

    def check(self, results: bytes) -> bytes:
        """Compare the head of `results` with the reference; return the rest."""
        num = len(self.labels)
        got = [torch.tensor(struct.unpack_from(f"{num}f", results, 4 * num * i)) for i in range(3)]
        rank = torch.tensor(struct.unpack_from(f"{num}q", results, 12 * num), dtype=torch.int64)
        truth = reference.label_rank(self.rows().double(), self.labels, IGNORE, self.vocab)
        eager = reference.label_rank(self.rows(), self.labels, IGNORE, self.vocab)
        assert torch.equal(rank, truth[3])
        for fast, plain, exact in zip(got, eager, truth):
            finite = torch.isfinite(exact)
            torch.testing.assert_close(fast[~finite], exact[~finite].float(), rtol=0, atol=0, equal_nan=True)
            assert_as_good_as_eager(fast[finite], plain[finite], exact[finite], ulps=4)
        return results[20 * num :]


def make(num_rows: int, vocab: int, dtype: torch.dtype, threads: int, offset: int = 0, gap: int = 0) -> Case:
    # What no row covers is NaN: a read of it would show in the results.
    storage = torch.full((offset + num_rows * (vocab + gap) - gap * (num_rows > 0),), float("nan"), dtype=dtype)
    case = Case(storage, torch.randint(vocab, (num_rows,)), offset, vocab + gap, vocab, threads)
    case.rows().copy_(torch.randn(num_rows, vocab) * 3)
    return case


def cases() -> list[Case]:
    made = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        per_vec = 16 // dtype.itemsize
        made += [
            make(0, 5, dtype, 32),
            make(3, 1, dtype, 32),
            # Shorter than one vector, at every alignment.
            *(make(2, 3, dtype, 32, offset=at) for at in range(per_vec)),
            # Head, vectors and tail; each row at another alignment.
            make(per_vec + 1, 16 * per_vec + 1, dtype, 32, offset=1),
            # An exact multiple of the unrolled loop, then one vector more, then an odd rest.
            make(2, 64 * 2 * per_vec, dtype, 64),
            make(2, 64 * 3 * per_vec, dtype, 64),
            make(3, 64 * 5 * per_vec + 3, dtype, 64, offset=3, gap=5),
            # More warps than the row has vectors for: idle warps must not disturb the merge.
            make(2, 9, dtype, 128, offset=1),
        ]
        extreme = make(12, 200, dtype, 64, offset=2, gap=1)
        rows, labels = extreme.rows(), extreme.labels
        labels.fill_(7)
        labels[0], labels[1], labels[2] = IGNORE, -1, 200
        rows[3] = 0.5
        rows[4] = float("-inf")
        rows[5, 7] = float("-inf")
        rows[6, 150] = float("inf")
        rows[7, 7] = float("inf")
        rows[8, 150] = float("nan")
        rows[9, 7] = float("nan")
        rows[10, :199] = float("-inf")
        rows[11, 7], rows[11, 199] = 1e4, -1e4
        made.append(extreme)
    return made


def under(*sanitizers: str, source: str = "label_rank_host") -> pytest.MarkDecorator:
    builds = [pytest.param((source, sanitizer), id=f"{source}-{sanitizer}") for sanitizer in sanitizers]
    return pytest.mark.parametrize("program", builds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def program(request, tmp_path_factory) -> Path:
    """A driver compiled under one sanitizer."""
    source, sanitizer = request.param
    path = tmp_path_factory.mktemp("cuda_host") / source
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", "-pthread",
         str(ROOT / "tests" / "native" / f"{source}.cpp"), "-o", str(path)],
        check=True,
    )  # fmt: skip
    return path


def execute(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    # Without address randomisation: the thread sanitizer of older compilers refuses some layouts.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"},
    )


def run(program: Path, folder: Path, given: list[Case], *flags: str) -> tuple[subprocess.CompletedProcess, bytes]:
    (folder / "cases").write_bytes(b"".join(case.pack() for case in given))
    done = execute(program, folder / "cases", folder / "results", *flags)
    return done, (folder / "results").read_bytes()


def reports_race(attempt: Callable[[], subprocess.CompletedProcess]) -> bool:
    """In one of five runs: two accesses in the very same moment can pass the thread sanitizer unseen."""
    runs = (attempt() for _ in range(5))
    return any(done.returncode != 0 and "ThreadSanitizer: data race" in done.stderr for done in runs)


def breaks(attempt: Callable[[], subprocess.CompletedProcess]) -> bool:
    """A barrier left out shows as a race or as the crash of a thread that has read an index before it was written."""
    runs = (attempt() for _ in range(5))
    signs = ("ThreadSanitizer: data race", "ThreadSanitizer:DEADLYSIGNAL")
    return any(done.returncode != 0 and any(sign in done.stderr for sign in signs) for done in runs)


@under(THREAD, MEMORY, source="host_cuda_selftest")
def test_host_build_computes_what_cuda_defines(program):
    done = execute(program, "values")
    assert done.returncode == 0, done.stderr


@under(THREAD, source="host_cuda_selftest")
@pytest.mark.parametrize("race", ["race-global", "race-warp", "race-read"])
def test_host_build_shows_races(program, race):
    assert reports_race(lambda: execute(program, race))


@under(MEMORY, source="host_cuda_selftest")
def test_host_build_refuses_a_shuffle_from_a_lane_that_has_ended(program):
    done = execute(program, "absent-lane")
    assert done.returncode != 0
    assert "reads a lane that is not there" in done.stderr


@under(THREAD, MEMORY)
def test_label_rank_agrees_and_is_clean(program, tmp_path):
    given = cases()
    done, results = run(program, tmp_path, given)
    assert done.returncode == 0, done.stderr
    for case in given:
        results = case.check(results)
    assert results == b""


@under(THREAD)
def test_planted_race_is_reported(program, tmp_path):
    """The kernel's one barrier is needed, and the thread sanitizer sees that it is missing."""
    given = [make(2, 600, torch.float32, 128)]
    assert run(program, tmp_path, given)[0].returncode == 0
    assert breaks(lambda: run(program, tmp_path, given, "--skip-barrier", "0")[0])


@under(MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_planted_overrun_is_reported(program, tmp_path, dtype):
    """Logits one element short: the kernel's last read is one past the end of the heap block."""
    given = [make(2, 601, dtype, 64)]
    assert run(program, tmp_path, given)[0].returncode == 0
    done, _ = run(program, tmp_path, given, "--cut", str(dtype.itemsize))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@under(MEMORY)
def test_planted_misaligned_vector_is_reported(program, tmp_path):
    """Rows that start at half an element: whatever the kernel loads is misaligned for its type."""
    done, _ = run(program, tmp_path, [make(1, 64, torch.float32, 32)], "--shift", "2")
    assert done.returncode != 0
    assert "misaligned address" in done.stderr
