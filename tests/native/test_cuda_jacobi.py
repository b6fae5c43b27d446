"""The CUDA kernel of batched_eigh on the host (csrc/cuda/host_cuda.h): errors on hard matrices, races, overruns."""

import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.native.test_cuda_host import MEMORY, THREAD, breaks, execute, program, under  # noqa: F401
from tests.ops.eigh_cases import errors, families

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")

SOURCE = "jacobi_host"


def pack(matrices: Tensor, scratch: bool) -> bytes:
    count, n, _ = matrices.shape
    return struct.pack("4q", matrices.element_size(), count, n, scratch) + matrices.numpy().tobytes()


def solve(program: Path, folder: Path, given: list[tuple[Tensor, bool]], *flags: str):  # noqa: F811
    (folder / "cases").write_bytes(b"".join(pack(*case) for case in given))
    done = execute(program, folder / "cases", folder / "results", *flags)
    data, found = (folder / "results").read_bytes(), []
    for matrices, _ in given if done.returncode == 0 else []:
        count, n, _ = matrices.shape
        parts = []
        for size, dtype in ((count * n, matrices.dtype), (count * n * n, matrices.dtype), (count, torch.int32)):
            raw, data = data[: size * dtype.itemsize], data[size * dtype.itemsize :]
            parts.append(torch.frombuffer(bytearray(raw), dtype=dtype))
        found.append((parts[0].view(count, n), parts[1].view(count, n, n), parts[2]))
    return done, found


def given(dtype: torch.dtype) -> list[tuple[Tensor, bool]]:
    cases = []
    # One warp: one matrix, an odd and an even number of players; vectors in global memory.
    for n, scratch in ((1, False), (2, False), (5, True), (16, False)):
        hard = families(n, dtype, count=1)
        kept = (
            ("graded 1e12", "rank-deficient", "clustered", "zero", "zero diagonal", "huge") if n < 16 else ("random",)
        )
        cases.append((torch.cat([hard[name] for name in kept]), scratch))
    broken = families(3, dtype)["random"]
    broken[1, 2, 0], broken[2, 1, 1] = float("nan"), float("inf")
    return [*cases, (broken, False)]


@under(THREAD, MEMORY, source=SOURCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_and_is_clean(program, tmp_path, dtype):  # noqa: F811
    cases = given(dtype)
    done, found = solve(program, tmp_path, cases)
    assert done.returncode == 0, done.stderr
    for (matrices, _), (values, vectors, status) in zip(cases[:-1], found):
        assert status.tolist() == [0] * len(matrices)
        assert (values.diff() >= 0).all()
        assert max(errors(matrices, values, vectors)) <= 4.0
    values, vectors, status = found[-1]
    assert status.tolist() == [0, 1, 1]
    assert values[1:].isnan().all()
    assert vectors[1:].isnan().all()
    assert max(errors(cases[-1][0][:1], values[:1], vectors[:1])) <= 4.0


@under(MEMORY, source=SOURCE)
def test_several_warps(program, tmp_path):  # noqa: F811
    matrices = families(18, torch.float32, count=1)["random"]
    done, ((values, vectors, status),) = solve(program, tmp_path, [(matrices, False)])
    assert done.returncode == 0, done.stderr
    assert status.tolist() == [0]
    assert max(errors(matrices, values, vectors)) <= 4.0


@under(THREAD, source=SOURCE)
@pytest.mark.parametrize("barrier", range(4))
def test_every_barrier_is_needed(program, tmp_path, barrier):  # noqa: F811
    """After the load, after the identity, and both of the first round."""
    case = [(families(6, torch.float32, count=1)["random"], False)]
    assert breaks(lambda: solve(program, tmp_path, case, "--skip-barrier", str(barrier))[0])
