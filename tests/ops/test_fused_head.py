"""The output layer's statistics with the logit tile on chip: numbers in the interpreter, resources by compiling."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effkern import token_stats
from effkern.ops.token_stats import reference
from tests.numerics import assert_as_good_as_eager

pytest.importorskip("triton")
from effkern import native
from effkern.ops.distill import fused_head

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows, columns and depth of a tile, warps, stages: several of each at the sizes below.
SMALL = (16, 64, 32, 4, 1)
interpreted = pytest.mark.skipif(
    DEVICE == "cpu" and not native.triton_interprets(), reason="needs a CUDA device or TRITON_INTERPRET=1"
)

SHAPES = {
    # rows, vocabulary, hidden size
    "below_one_tile": (5, 7, 3),
    "exact_tiles": (32, 128, 64),
    "one_over": (17, 65, 33),
    "many_tiles": (37, 301, 50),
    "one_column": (4, 1, 8),
    "empty": (0, 9, 4),
}


@pytest.fixture(autouse=True)
def _wide_products(monkeypatch):
    """The interpreter multiplies the bits of bfloat16 numbers; a GPU forms their products exactly, as float32 does."""
    if DEVICE == "cuda":
        return
    import numpy as np
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widen(x):
        if x.data.dtype != np.uint16:
            return x
        wide = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: plain(self, widen(a), widen(b), *rest),
    )


def make(num_rows, vocab, dim, dtype, whole=False):
    hidden, weight = torch.randn(num_rows, dim), torch.randn(vocab, dim)
    if whole:
        hidden, weight = hidden.mul(2).round().clamp(-4, 4), weight.mul(2).round().clamp(-4, 4)
    labels = torch.randint(vocab, (num_rows,))
    if num_rows > 2:
        labels[1] = -100
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def check(got, hidden, weight, labels, **options):
    truth = reference.token_stats(hidden.double(), weight.double(), labels, **options)
    eager = reference.token_stats(hidden, weight, labels, **options)
    for fast, plain, exact in zip(got[0], eager[:3], truth[:3]):
        assert_as_good_as_eager(fast, plain, exact, ulps=8)
    return truth[3]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(shape, dtype):
    """Whole numbers: every logit is exact in any dtype, so that the ranks are."""
    for whole in (False, True):
        hidden, weight, labels = make(*shape, dtype, whole)
        got = fused_head.label_stats(hidden, weight, None, labels, 1.0, None, -100, SMALL)
        rank = check(got, hidden, weight, labels)
        if whole:
            assert torch.equal(got[1], rank)


@interpreted
def test_splits_of_the_vocabulary_are_merged(monkeypatch):
    monkeypatch.setattr(fused_head, "_multiprocessors", lambda device: 5)
    hidden, weight, labels = make(21, 500, 20, torch.float32, whole=True)
    got = fused_head.label_stats(hidden, weight, None, labels, 1.0, None, -100, SMALL)
    assert torch.equal(got[1], check(got, hidden, weight, labels))


@interpreted
def test_through_the_public_function_with_bias_scale_softcap_and_padding():
    hidden, weight, labels = make(19, 210, 24, torch.bfloat16)
    bias = torch.randn(210, device=DEVICE)
    weight[200:] = bias[200:] = float("nan")
    labels.clamp_(max=199)
    options = {"softcap": 7.0, "logit_scale": 0.6}
    got = token_stats(hidden, weight, labels, bias=bias, vocab_valid=200, impl="triton", **options)
    truth = reference.token_stats(hidden.double(), weight[:200].double(), labels, bias[:200].double(), 7.0, 0.6)
    for fast, exact in zip(got[:3], truth[:3]):
        assert fast.dtype == torch.float32
        torch.testing.assert_close(fast.double(), exact, rtol=2e-6, atol=2e-6)
    assert (got.rank - truth[3]).abs().max() <= 1


@interpreted
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_extreme_logits():
    hidden = torch.eye(5, device=DEVICE)
    weight = torch.zeros(70, 5, device=DEVICE)
    bias = torch.zeros(70, device=DEVICE)
    bias[3], bias[40], bias[69] = 1e4, -math.inf, -1e4
    labels = torch.tensor([3, 40, 69, 0, 12], device=DEVICE)
    hidden[4, 0] = math.nan
    stats, rank = fused_head.label_stats(hidden, weight, bias, labels, 1.0, None, -100, SMALL)
    expected = reference.token_stats(hidden.double(), weight.double(), labels, bias.double())
    torch.testing.assert_close(stats.double(), torch.stack(expected[:3]), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(rank, expected[3])
    masked = torch.full((70,), -math.inf, device=DEVICE)
    stats, _ = fused_head.label_stats(hidden[:1], weight, masked, labels[:1], 1.0, None, -100, SMALL)
    assert stats[1].item() == -math.inf


@interpreted
def test_a_label_outside_is_marked_and_the_others_are_right():
    hidden, weight, labels = make(6, 40, 8, torch.float32, whole=True)
    labels[0], labels[3] = 40, -1
    stats, rank = fused_head.label_stats(hidden, weight, None, labels, 1.0, None, -100, SMALL)
    expected = reference.token_stats(hidden.double(), weight.double(), labels)
    assert torch.equal(rank, expected[3])
    torch.testing.assert_close(stats.double(), torch.stack(expected[:3]), rtol=1e-6, atol=1e-6, equal_nan=True)


@interpreted
def test_gathered_logits_of_a_sparse_teacher():
    hidden, weight, _ = make(9, 33, 20, torch.bfloat16)
    ids = torch.randint(33, (9, 4), device=DEVICE)
    got = fused_head.gathered_logits(hidden, weight, ids, None, 1.0, None)
    exact = (hidden.double() @ weight.double().t()).gather(1, ids)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


@interpreted
def test_refuses_another_layout():
    hidden, weight, labels = make(4, 12, 6, torch.float32)
    with pytest.raises(NotImplementedError) as caught:
        token_stats(hidden.t().contiguous().t(), weight, labels, impl="triton")
    expected = "token_stats: impl='triton' covers stride 1 along D of hidden and weight, got (4, 1)"
    assert str(caught.value) == expected


RESOURCES = """
import json, sys, tempfile
from pathlib import Path
from effkern.ops.distill import fused_head
from tests.native.triton_codegen import CAPABILITIES, measure

with tempfile.TemporaryDirectory() as folder:
    print(json.dumps([
        measure(case, capability, Path(folder))
        for capability in CAPABILITIES
        for case in next(cases for major, cases in fused_head.COMPILE_CASES.items() if capability >= 10 * major)
    ]))
"""


@pytest.mark.slow
def test_compiles_without_spills():
    """In a process of its own: under TRITON_INTERPRET=1 this one has no compiler."""
    from tests.native import resources

    if resources.cuobjdump() is None:
        pytest.skip("cuobjdump not found")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    done = subprocess.run(
        [sys.executable, "-c", RESOURCES], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 6
    assert [row["stack"] for row in rows] == [0] * 6
    # Two stages and more of both operands fit beside each other on every device.
    assert all(row["shared"] <= 100 * 1024 for row in rows)
