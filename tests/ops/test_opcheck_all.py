"""torch.library.opcheck for every operator of the package, on arguments that the public ops give to them.

What opcheck holds together: the schema (what is written, what shares memory), the shape function against the kernel,
autograd, and a trace with dynamic shapes.
"""

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch

import effkern.ops
from effkern import native
from tests.ops.inside import InsideOps
from tests.ops.op_calls import CALLS, Make
from tests.ops.operator_samples import Samples, operator_samples

NEEDS_CUDA = {"lora_rite_reduce", "lora_rite_rebase_tiles_"}
# By hand: what no public op calls with small tensors, or at all on a machine with other units.
BY_HAND: dict[str, Callable[[], list[tuple]]] = {
    "advise_huge_pages": lambda: [(torch.ones(8),)],
    "bf16_mm_nt_": lambda: [(torch.zeros(5, 40), *(torch.randn(n, 6).bfloat16() for n in (5, 40)))],
    "f32_mm_nt_": lambda: [(torch.zeros(5, 40), torch.randn(5, 6), torch.randn(40, 6))],
    "bf16_add_tn_": lambda: [(torch.zeros(40, 6), *(torch.randn(5, n).bfloat16() for n in (40, 6)), False)],
}
# They tell or choose what this process runs with: no tensors, so that there is nothing to check but the schema.
WITHOUT_TENSORS = {"cpu_clone", "bf16_gemm_kernel", "bf16_gemm_choose", "shampoo_lapack", "shampoo_tiles"}
# Samples of one operator; the kinds beyond them differ in a dtype or a flag.
MOST = 6
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def every_op() -> list[str]:
    for module in pkgutil.walk_packages(effkern.ops.__path__, "effkern.ops."):
        if "triton" not in module.name.rpartition(".")[2]:
            importlib.import_module(module.name)
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("effkern::") for n in names if n.startswith("effkern::"))


OPS = every_op()


@pytest.fixture(scope="module")
def samples() -> Samples:
    return operator_samples()


def test_every_operator_has_a_sample(samples):
    assert len(OPS) > 40
    assert set(OPS) == set(samples) | set(BY_HAND) | WITHOUT_TENSORS | NEEDS_CUDA


@pytest.mark.parametrize("name", [n for n in OPS if n not in WITHOUT_TENSORS | NEEDS_CUDA])
def test_opcheck(name, samples):
    op = getattr(torch.ops.effkern, name).default
    given = BY_HAND[name]() if name in BY_HAND else samples[name]
    # Triton's interpreter is slow, and takes no symbolic shapes.
    most, full = (2, False) if "triton" in name else (MOST, True)
    for i, args in enumerate(given[:most]):
        torch.library.opcheck(op, args, test_utils=TESTS if full and i == 0 else TESTS[:3])


@pytest.mark.parametrize("name", sorted(WITHOUT_TENSORS))
@pytest.mark.skipif(native.load("_C") is not None, reason="they are effkern._C's")
def test_operators_without_tensors_answer_whatever_the_device(name):
    op = getattr(torch.ops.effkern, name)
    if "wanted" in str(op.default._schema):
        before = op(False)
        assert op(before) is False
    elif "kernel)" in str(op.default._schema):
        op(torch.ops.effkern.bf16_gemm_kernel())
    else:
        assert op() == op()


@pytest.mark.gpu
def test_opcheck_of_operators_for_cuda_alone(samples):
    """lora_rite's r x r work of the tiles of its Triton kernels."""
    assert native.load("_C_cuda") is None
    found: dict[str, tuple] = {}
    with InsideOps(lambda op, args, kwargs: found.setdefault(op.name().removeprefix("effkern::"), args)):
        CALLS["lora_rite"].run(Make("cuda"), "triton")
    for name in sorted(NEEDS_CUDA):
        torch.library.opcheck(getattr(torch.ops.effkern, name).default, found[name], test_utils=TESTS[:3])
