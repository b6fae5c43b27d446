"""batched_eigh: backward error and orthogonality on hard matrices, against LAPACK; isolation, status, contract."""

import pytest
import torch

import effkern
from effkern import batched_eigh
from effkern.ops.batched_eigh.api import MAX_ORDER
from tests.ops.eigh_cases import errors, families

# In units of n eps, as the docstring promises.
BOUND = 4.0
# One matrix, below one vector of lanes, odd, where LAPACK takes over, the largest of Jacobi's.
ORDERS = [1, 2, 5, 16, 33, 64]
DTYPES = [torch.float32, torch.float64]
SOLVERS = [
    pytest.param({"impl": "cpp", "method": "jacobi"}, id="cpp-jacobi"),
    pytest.param({"impl": "cpp", "method": "lapack"}, id="cpp-lapack"),
    pytest.param({"impl": "cpp"}, id="cpp-auto"),
    pytest.param({"impl": "reference"}, id="reference"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", ORDERS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_hard_matrices(solver, n, dtype):
    for name, matrices in families(n, dtype).items():
        values, vectors, status = batched_eigh(matrices, **solver)
        assert (status == 0).all(), name
        assert (values.diff() >= 0).all(), name
        backward, orthogonality = errors(matrices, values, vectors)
        assert backward <= BOUND, (name, backward)
        assert orthogonality <= BOUND, (name, orthogonality)
        truth = torch.linalg.eigvalsh(matrices.double())
        size = matrices.double().abs().amax((-2, -1), keepdim=True)[..., 0].clamp_min(1e-300)
        # An eigenvalue moves by no more than the backward error, whose size is that of the norm.
        assert ((values.double() - truth).abs() / size).max() <= BOUND * n**2 * torch.finfo(dtype).eps, name


def test_cpp_jacobi_at_its_largest_order():
    matrices = families(MAX_ORDER, torch.float32, count=1)["random"]
    values, vectors, status = batched_eigh(matrices, method="jacobi", impl="cpp")
    assert status.tolist() == [0]
    assert max(errors(matrices, values, vectors)) <= BOUND


def test_cpp_jacobi_keeps_small_eigenvalues_of_graded_matrices():
    """D H D of condition 1e8 in float32: each eigenvalue to a few ulps, where LAPACK keeps no digit of the least."""
    n = 12
    h = families(n, torch.float32)["random"] / 8 + torch.eye(n)
    # Powers of two: D H D is exact.
    scales = 2.0 ** -torch.linspace(0, 13, n).round().roll(5)
    matrices = scales[:, None] * h * scales
    truth = torch.linalg.eigvalsh(matrices.double())
    condition = truth[:, -1] / truth[:, 0]
    assert 1e6 < condition.min() <= condition.max() < 1e9
    jacobi, lapack = (batched_eigh(matrices, method=m, impl="cpp").values.double() for m in ("jacobi", "lapack"))
    assert ((jacobi - truth) / truth).abs().max() < 4 * n * torch.finfo(torch.float32).eps
    assert ((lapack - truth) / truth).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_disturbs_no_other(solver, value):
    matrices = families(6, torch.float64, count=9)["random"]
    clean = batched_eigh(matrices, **solver)
    broken = matrices.clone()
    broken[4, 3, 2] = value
    values, vectors, status = batched_eigh(broken, **solver)
    assert status.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert values[4].isnan().all()
    assert vectors[4].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(values[others], clean.values[others])
    assert torch.equal(vectors[others], clean.vectors[others])


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_the_lower_triangle_is_read(solver):
    matrices = families(7, torch.float32)["random"]
    poisoned = matrices.tril() + torch.full((7, 7), float("nan")).triu(1)
    for got, want in zip(batched_eigh(poisoned, **solver), batched_eigh(matrices, **solver)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_bits_depend_on_neither_batch_nor_threads(dtype):
    matrices = families(10, dtype, count=21)["random"]
    matrices[3] *= 1e-6
    matrices[5] = 0
    together = batched_eigh(matrices, method="jacobi", impl="cpp")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = batched_eigh(matrices, method="jacobi", impl="cpp")
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(again, together):
        assert torch.equal(got, want)
    for i in (0, 3, 20):
        alone = batched_eigh(matrices[i], method="jacobi", impl="cpp")
        assert torch.equal(alone.values, together.values[i])
        assert torch.equal(alone.vectors, together.vectors[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_lapack_bits_depend_on_neither_batch_nor_threads(dtype):
    """An order at which the library would take threads of its own for a single matrix."""
    matrix, results, threads = families(128, dtype, count=1)["random"], [], torch.get_num_threads()
    try:
        for count, batch in ((1, 1), (2, 1), (2, 3)):
            torch.set_num_threads(count)
            results.append(batched_eigh(matrix.expand(batch, 128, 128), method="lapack", impl="cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x[:1], y) for x, y in zip(other, results[0]))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3, 3), (3, 0, 0)])
def test_empty(solver, shape):
    values, vectors, status = batched_eigh(torch.empty(shape), **solver)
    assert (values.shape, vectors.shape, status.shape) == (shape[:-1], shape, shape[:-2])
    assert (status == 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_shapes_and_strides(solver):
    matrices = families(5, torch.float64, count=6)["random"].reshape(2, 3, 5, 5)
    strided = matrices.transpose(0, 1).contiguous().transpose(0, 1)
    got = batched_eigh(strided, **solver)
    assert got.values.shape == (2, 3, 5)
    assert torch.equal(got.values, batched_eigh(matrices, **solver).values)
    assert max(errors(matrices.flatten(0, 1), got.values.flatten(0, 1), got.vectors.flatten(0, 1))) <= BOUND


def test_cpp_above_the_largest_order_of_jacobi():
    matrices = families(MAX_ORDER + 2, torch.float32, count=1)["random"]
    matrices = torch.cat([matrices, matrices * float("nan")])
    values, vectors, status = batched_eigh(matrices, impl="cpp")
    assert status.tolist() == [0, 1]
    assert max(errors(matrices[:1], values[:1], vectors[:1])) <= BOUND


def test_cpp_opcheck():
    matrices = families(4, torch.float64)["random"]
    torch.library.opcheck(torch.ops.effkern.batched_eigh.default, (matrices, 1))


def test_compiles():
    matrices = families(4, torch.float32)["random"]
    compiled = torch.compile(lambda a: batched_eigh(a).values.sum(-1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(matrices), matrices.diagonal(dim1=1, dim2=2).sum(-1))


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ([[1.0]], {}, TypeError, "matrices must be a tensor, got list"),
        (torch.eye(2, dtype=torch.float16), {}, TypeError, "must be float32 or float64, got torch.float16"),
        (torch.zeros(2, 3), {}, ValueError, r"must have shape \[..., n, n\], got \(2, 3\)"),
        (torch.zeros(3), {}, ValueError, r"must have shape \[..., n, n\], got \(3,\)"),
        (torch.eye(2), {"method": "qr"}, ValueError, "method must be one of 'auto', 'jacobi', 'lapack', got 'qr'"),
        (torch.eye(2), {"impl": "fast"}, ValueError, "impl must be one of"),
        (torch.eye(129), {"method": "jacobi"}, ValueError, "n <= 128 for method='jacobi', got 129"),
        (torch.eye(2), {"method": "jacobi", "impl": "reference"}, NotImplementedError, "compiled kernels"),
        (torch.eye(2, requires_grad=True), {}, NotImplementedError, "must not require a gradient"),
    ],
)
def test_errors(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        batched_eigh(arguments, **options)


def test_is_exported():
    assert effkern.batched_eigh is batched_eigh


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*ORDERS, MAX_ORDER])
def test_cuda_hard_matrices(n, dtype):
    for name, matrices in families(n, dtype).items():
        values, vectors, status = (x.cpu() for x in batched_eigh(matrices.cuda(), impl="cuda"))
        assert (status == 0).all(), name
        assert max(errors(matrices, values, vectors)) <= BOUND, name
