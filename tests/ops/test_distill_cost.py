"""The cost model: each coefficient by counting operands launch by launch, its limits, and what it chooses."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from effkern import cli, linear_distill_loss
from effkern.ops.distill import ceilings, chunked, cost, fused_cost, gemm
from effkern.ops.distill.cost import METHODS, Problem, candidates, choose, peak, plan
from effkern.ops.distill.explain import explain, main

H100 = ceilings.known("h100")
LLAMA = Problem(8192, 128256, 4096, "hidden", 4096)
KINDS = {
    "none": {},
    "sparse": {"teacher": "sparse"},
    "logits": {"teacher": "logits"},
    "hidden": {"teacher": "hidden", "teacher_dim": 24},
    "three_passes": {"teacher": "hidden", "teacher_dim": 24, "passes": 3},
    "row_on_chip": {"teacher": "hidden", "teacher_dim": 24, "row_resident": True},
    "float32": {"element_bytes": 4, "weight_grad_bytes": 4},
    "master_weights": {"weight_grad_bytes": 4},
}


def without_hidden_size(bytes_of) -> float:
    """Bytes per entry that remain as the hidden sizes go to 0; every count is linear in them."""
    return 2 * bytes_of(1) - bytes_of(2)


def count_rows(p: Problem, rows: int) -> tuple[float, float]:
    """FLOPs and bytes of the chunked loss, operand by operand, as its loop launches them."""
    flops = moved = 0
    e, z, v, d = p.element_bytes, p.logit_bytes, p.vocab, p.dim
    starts = range(0, p.num_rows, rows)
    for n in starts:
        c = min(rows, p.num_rows - n)
        hidden, weight, logits, grad = e * c * d, e * v * d, z * c * v, e * c * v
        teacher = p.teacher_logit_bytes * c * v if p.teacher == "logits" else 0
        flops += 3 * 2 * c * v * d
        moved += hidden + weight + logits
        if p.teacher == "hidden":
            flops += 2 * c * v * p.teacher_dim
            teacher = logits
            moved += e * p.teacher_dim * (c + v) + teacher
        for _ in range(1 if p.row_resident else p.passes):
            moved += logits + teacher
        moved += grad
        moved += grad + weight + hidden
        moved += grad + hidden
        if len(starts) == 1:
            moved += p.weight_grad_bytes * v * d
        else:
            moved += 4 * v * d * (1 if n == 0 else 2)
    if len(starts) > 1 and p.weight_grad_bytes != 4:
        moved += (4 + p.weight_grad_bytes) * v * d
    return flops, moved


def count_columns(p: Problem, columns: int) -> tuple[float, float]:
    """The same of the streamed loss."""
    flops = moved = 0
    e, z, n, d = p.element_bytes, p.logit_bytes, p.num_rows, p.dim
    for sweep in ("statistics", "gradients"):
        for first in range(0, p.vocab, columns):
            b = min(columns, p.vocab - first)
            hidden, weight, logits, grad = e * n * d, e * b * d, z * n * b, e * n * b
            teacher = p.teacher_logit_bytes * n * b if p.teacher == "logits" else 0
            flops += 2 * n * b * d
            moved += hidden + weight + logits
            if p.teacher == "hidden":
                flops += 2 * n * b * p.teacher_dim
                teacher = logits
                moved += e * p.teacher_dim * (n + b) + teacher
            moved += logits + teacher
            if sweep == "gradients":
                flops += 2 * 2 * n * b * d
                moved += grad
                moved += grad + weight + 4 * n * d * (1 if first == 0 else 2)
                moved += grad + hidden + p.weight_grad_bytes * b * d
    return flops, moved + ((4 + e) * n * d if e != 4 else 0)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("rows", [32, 33, 96, 97, 200])
def test_row_chunks_are_what_counting_gives(options, rows):
    p = Problem(97, 301, 40, **options)
    kernels = cost.row_chunks(p, rows)
    assert (sum(k.flops for k in kernels), sum(k.bytes for k in kernels)) == count_rows(p, rows)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("three_passes", "row_on_chip")])
@pytest.mark.parametrize("columns", [30, 100, 151])
def test_column_chunks_are_what_counting_gives(name, columns):
    p = Problem(97, 301, 40, **KINDS[name])
    kernels = cost.column_chunks(p, columns)
    assert (sum(k.flops for k in kernels), sum(k.bytes for k in kernels)) == count_columns(p, columns)


def test_flops_and_chunks_are_those_of_the_driver(monkeypatch):
    """Every product that chunked.run asks for, against the prediction."""
    flops, chunks = 0, 0
    product, hidden_grad, add_weight_grad = gemm.logits, gemm.hidden_grad, gemm.add_weight_grad

    def logits(hidden, weight, buffer):
        nonlocal flops, chunks
        flops, chunks = flops + 2 * hidden.numel() * weight.shape[0], chunks + 1
        return product(hidden, weight, buffer)

    def grad(grad_CV, weight, out):
        nonlocal flops
        flops += 2 * grad_CV.numel() * weight.shape[1]
        hidden_grad(grad_CV, weight, out)

    def weight_grad(total, grad_CV, hidden, **options):
        nonlocal flops
        flops += 2 * grad_CV.numel() * hidden.shape[1]
        add_weight_grad(total, grad_CV, hidden, **options)

    for name, function in {"logits": logits, "hidden_grad": grad, "add_weight_grad": weight_grad}.items():
        monkeypatch.setattr(gemm, name, function)
    hidden, weight = torch.randn(50, 12, requires_grad=True), torch.randn(70, 12, requires_grad=True)
    linear_distill_loss(hidden, weight, torch.randint(70, (50,)), impl="reference", chunk_bytes=70 * 4 * 20)
    found = plan(Problem(50, 70, 12, element_bytes=4, weight_grad_bytes=4), chunk_bytes=70 * 4 * 20)
    assert (flops, chunks) == (found.flops, found.num_chunks)
    assert chunks == 3


@pytest.mark.parametrize(
    ("options", "wide", "narrow"),
    [
        ({"teacher": "hidden"}, 30, 18),
        ({"teacher": "hidden", "passes": 3}, 38, 22),
        ({"teacher": "hidden", "row_resident": True}, 22, 14),
        ({"teacher": "hidden", "row_resident": True, "passes": 3}, 22, 14),
        ({"teacher": "sparse"}, 18, 12),
        ({"teacher": "sparse", "row_resident": True}, 14, 10),
    ],
)
def test_bytes_per_entry_without_the_weights(options, wide, narrow):
    """Counts of two bfloat16 gradient reads, its write, and float32 (bfloat16) logits written and read per pass."""
    for logit_bytes, expected in ((4, wide), (2, narrow)):

        def per_entry(dim: int, logit_bytes=logit_bytes) -> float:
            teacher_dim = dim if options["teacher"] == "hidden" else 0
            p = Problem(1000, 2000, dim, teacher_dim=teacher_dim, logit_bytes=logit_bytes, **options)
            return sum(k.bytes for k in cost.row_chunks(p, 100)) / (1000 * 2000)

        assert without_hidden_size(per_entry) == pytest.approx(expected, rel=1e-12)


def weight_traffic(p: Problem, rows: int) -> float:
    """Bytes per entry of both weights and the accumulators inside the loop, as if the first chunk read them too."""
    kernels = [k for k in cost.row_chunks(p, rows) if "rounded" not in k.name]
    hidden = p.element_bytes * p.num_rows * (3 * p.dim + p.teacher_dim)
    entries = p.num_rows * p.vocab
    return (sum(k.bytes for k in kernels) - hidden + 4 * p.vocab * p.dim) / entries - 30


def test_weight_traffic_of_a_small_chunk():
    """(12 D + 2 Dt) / C. A public rule, C = N / ceil(V / D) rounded up to a power of 2, gives 16 times as much."""
    theirs = 2 ** math.ceil(math.log2(8192 / math.ceil(LLAMA.vocab / LLAMA.dim)))
    assert theirs == 256
    assert weight_traffic(LLAMA, theirs) == pytest.approx(224, rel=1e-12)
    assert weight_traffic(LLAMA, 4096) == pytest.approx(14, rel=1e-12)
    narrow_teacher = replace(LLAMA, teacher_dim=1024)
    assert weight_traffic(narrow_teacher, 1024) == pytest.approx((12 * 4096 + 2 * 1024) / 1024, rel=1e-12)
    # max(1024, 2 D) rows bound it.
    assert weight_traffic(replace(LLAMA, num_rows=65536), 2 * 4096) == pytest.approx(6 + 1, rel=1e-12)


def test_one_chunk_writes_the_weight_gradient_once():
    *_, last = cost.row_chunks(LLAMA, 8192)
    assert last.name == "weight gradient"
    assert last.bytes == 2 * 8192 * 128256 + 2 * 8192 * 4096 + 2 * 128256 * 4096


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("teacher_dim", [0, 512])
@pytest.mark.parametrize("weight_grad_bytes", [2, 4])
def test_when_one_chunk_is_smaller_and_faster(weight_grad_bytes, teacher_dim, in_place):
    """N <= C + (a - w) D / b: accumulators of a bytes go, the returned gradient of w stays, b bytes per buffer entry.

    With b = 4 and w = 2 that is N <= C + D / 2; N <= C + D would hold if the returned gradient cost nothing.
    """
    dim, rows, vocab = 768, 1536, 5000
    teacher = "hidden" if teacher_dim else "none"
    base = Problem(1, vocab, dim, teacher, teacher_dim, 2, weight_grad_bytes, grad_in_place=in_place)
    buffer = 4 + (4 if teacher_dim else 0) + (0 if in_place else 2)
    assert base.buffer_bytes == buffer
    edge = rows + (4 - weight_grad_bytes) * dim // buffer
    for num_rows in (edge, edge + 1):
        p = replace(base, num_rows=num_rows)
        smaller = peak(p, "one_chunk", num_rows) <= peak(p, "chunked", rows)
        assert smaller == (num_rows == edge)
        one, many = (cost.make(p, m, s, H100, math.inf) for m, s in (("one_chunk", num_rows), ("chunked", rows)))
        if num_rows > rows:
            assert one.seconds < many.seconds
            assert one.seconds_apart < many.seconds_apart
            assert one.bytes < many.bytes
        assert one.flops == many.flops

    p = replace(base, num_rows=edge)
    assert plan(p, H100, chunk_bytes=rows * vocab * 4).method == "one_chunk"


@pytest.mark.parametrize(
    ("num_rows", "vocab", "dim", "mib", "rows"),
    [
        (700, 32000, 512, 1024, 700),
        (8192, 32000, 512, 1024, 1024),
        (8192, 32000, 4096, 4096, 8192),
        (20_000, 32000, 4096, 4096, 6667),
        (8192, 32000, 4096, 400, 2731),
        (1024, 32000, 512, 32, 256),
        (1000, 32000, 512, 32, 250),
        (1000, 100_000, 512, 4, 10),
        (1000, 1 << 21, 512, 4, 1),
    ],
    ids=["all", "2x512", "2x4096", "equal_chunks", "bounded", "cpu_default", "remnant", "below_a_tile", "one_row"],
)
def test_default_follows_the_rule(num_rows, vocab, dim, mib, rows):
    """max(1024, 2 D) rows, within the buffer (33 rows and more: whole tiles of 32), in chunks of one size."""
    p = Problem(num_rows, vocab, dim, weight_grad_bytes=4)
    found = plan(p, H100, chunk_bytes=mib << 20)
    assert found.fits
    assert found.rows == rows
    assert cost.rule_rows(p, mib << 20) * vocab * 4 <= max(mib << 20, vocab * 4)


def test_a_budget_is_used_and_kept():
    sizes = []
    for mib in (2600, 3000, 6000, 12_000):
        found = plan(LLAMA, H100, budget=mib << 20)
        assert found.fits
        assert found.peak_bytes <= mib << 20
        sizes.append(found.rows)
    assert sizes == sorted(sizes)
    assert plan(LLAMA, H100, budget=12_000 << 20).method == "one_chunk"

    # The accumulators alone are larger: nothing fits, and chunks take no more than their rounding.
    least = plan(LLAMA, H100, budget=100 << 20)
    assert not least.fits
    assert least.peak_bytes == 4 * 128256 * 4096
    assert least.rows > 256


def test_among_equally_fast_plans_the_smallest_is_chosen():
    found = candidates(LLAMA, H100, budget=80 << 30)
    chosen = choose(found)
    fastest = min(x.seconds for x in found)
    assert chosen.seconds <= fastest * 1.01
    assert all(x.peak_bytes >= chosen.peak_bytes for x in found if x.seconds <= fastest * 1.01)


def test_streaming_is_the_answer_where_accumulators_do_not_fit():
    p = Problem(2048, 256_000, 4096, "sparse")
    budget = 1 << 30
    assert not plan(p, H100, budget=budget).fits
    found = plan(p, H100, budget=budget, methods=METHODS)
    assert found.method == "streamed"
    assert found.peak_bytes <= budget
    assert found.flops == 8 * 2048 * 256_000 * 4096
    assert "streamed" not in {x.method for x in candidates(replace(p, passes=3), H100, budget, methods=METHODS)}


def test_larger_chunks_are_never_slower():
    times = [cost.make(LLAMA, "chunked", c, H100, math.inf) for c in (256, 512, 1024, 2048, 4096)]
    for small, large in pairwise(times):
        assert large.bytes < small.bytes
        assert large.seconds <= small.seconds
        assert large.seconds <= large.seconds_apart


def test_time_is_the_larger_of_both_in_a_kernel_and_the_sum_over_kernels():
    device = ceilings.Ceilings("unit", {2: 1.0}, 1.0, 1)
    found = cost.make(LLAMA, "chunked", 2048, device, math.inf)
    assert found.seconds == sum(max(k.flops, k.bytes) for k in found.kernels)
    assert found.seconds_apart == found.flops + found.bytes


def test_on_a_cpu_the_measured_rule_alone_decides():
    cpu = ceilings.of_device(torch.device("cpu"))
    found = plan(Problem(1024, 32000, 512, element_bytes=4, weight_grad_bytes=4), cpu)
    assert found.rows == 256
    assert found.seconds is None
    assert cpu.chunk_bytes == 32 << 20 == chunked.chunk_bytes(torch.device("cpu"))
    assert plan(Problem(1024, 32000, 512, element_bytes=4, weight_grad_bytes=4), cpu, budget=1 << 40).rows == 256
    assert plan(Problem(7, 100, 8), cpu).method == "one_chunk"


def test_an_unknown_device_is_planned_by_bytes():
    found = plan(LLAMA, None, chunk_bytes=1 << 30)
    assert found.seconds is None
    assert found.rows == plan(LLAMA, H100, chunk_bytes=1 << 30).rows


def test_no_rows():
    found = plan(Problem(0, 100, 8), H100)
    assert (found.method, found.flops, found.num_chunks) == ("one_chunk", 0, 1)


def test_published_ceilings():
    """Reachable rates: 0.75 and 0.9 of the data sheets."""
    assert H100.matrix[2] == pytest.approx(0.75 * 989e12)
    assert H100.bandwidth == pytest.approx(0.9 * 3.35e12)
    assert ceilings.known("h200").bandwidth / H100.bandwidth == pytest.approx(4.8 / 3.35)
    assert H100.chunk_bytes == 1_250_000_000
    with pytest.raises(ValueError, match="device must be one of h100, h200, a100, a100-40, b200, got 'v100'"):
        ceilings.known("v100")
    assert ceilings.of_device(torch.device("meta")) is None


def test_measured_ceilings_are_those_of_a_computer():
    found = ceilings.measure(torch.device("cpu"), torch.float32)
    assert 1e8 < found.matrix[4] < 1e15
    assert 1e8 < found.bandwidth < 1e14
    assert found.is_cpu


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": -1}, "plan: num_rows must be >= 0, got -1"),
        ({"vocab": 0}, "plan: vocab must be >= 1, got 0"),
        ({"teacher": "other"}, "plan: teacher must be none, logits, hidden or sparse, got 'other'"),
        ({"teacher": "hidden"}, "plan: teacher_dim must be > 0 for a hidden teacher, else 0, got 0"),
        ({"passes": 4}, "plan: passes must be 2 or 3, got 4"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError) as caught:
        Problem(**{"num_rows": 1, "vocab": 2, "dim": 3, **options})
    assert str(caught.value) == message


def test_fused_kernels_count_their_recomputed_logits():
    p = Problem(100, 1000, 64, "hidden", 32)
    entry = 100 * 1000
    flops = {f: sum(k.flops for k in f(p)) / entry for f in (fused_cost.fully_fused, fused_cost.fused_logit_gradient)}
    assert flops[fused_cost.fully_fused] == 10 * 64 + 6 * 32
    assert flops[fused_cost.fused_logit_gradient] == 8 * 64 + 4 * 32
    assert fused_cost.statistics(p).flops == sum(k.flops for k in fused_cost.chunked_statistics(p))


def test_explain_marks_the_choice(capsys):
    assert main(["--dim", "1024", "--teacher-dim", "512", "--fused"]) == 0
    printed = capsys.readouterr().out
    p = Problem(8192, 128256, 1024, "hidden", 512)
    assert printed.strip() == explain(p, H100, fused=True)
    (line,) = [line for line in printed.splitlines() if line.endswith("<- chosen")]
    chosen = plan(p, H100)
    assert line.split()[:2] == [chosen.method, str(chosen.rows)]
    assert f"{chosen.seconds * 1e3:.2f}" in line
    assert "only with memory_limit" in printed
    assert "predicted and not measured" in printed
    assert "rates of the device not known" in explain(p, ceilings.of_device(torch.device("cpu")), fused=True)


def test_commands_print_the_same_table(capsys):
    arguments = ["distill", "--explain", "--rows", "512", "--vocab", "1000", "--dim", "64", "--device", "a100"]
    assert cli.main(["bench", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("512 rows x 1000 entries")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == printed


def test_a_wrong_option_is_one_line(capsys):
    assert cli.main(["bench", "distill", "--explain", "--vocab", "0"]) == 1
    assert capsys.readouterr().err == "effkern bench: error: plan: vocab must be >= 1, got 0\n"
