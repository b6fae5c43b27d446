"""soft_labels: entries against plain Python, draws against their distribution, C++ against the reference."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import effkern
from effkern.ops import registry
from effkern.ops.distill import gemm
from effkern.ops.soft_labels import SoftLabels, driver, reference, soft_labels, soft_labels_from_logits
from effkern.ops.soft_labels.rows import RowOptions

IMPLS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpp", "cpu", id="cpp"),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
]
METHODS = [{"method": "topk", "k": 5}, {"method": "sampled", "draws": 50}, {"method": "stratified", "k": 4, "draws": 9}]
# A block of the C++ kernel is 256 entries, its lanes are 16.
VOCABS = {
    "one": 1,
    "two": 2,
    "below_lanes": 7,
    "below_a_block": 255,
    "exact_block": 256,
    "one_over": 257,
    "odd_several_blocks": 4099,
    "real_vocabulary": 32000,
}


def skip_unless_available(impl: str, device: str) -> None:
    reason = {i.name: i for i in registry.registered()["soft_labels"]}[impl].unavailable(torch.device(device))
    if reason is not None:
        pytest.skip(reason)


@dataclass
class Row:
    """The oracle's distribution of one row, from Python's own arithmetic."""

    p: list[float]
    lse: float

    @staticmethod
    def of(logits: Tensor, temperature: float) -> "Row":
        x = [v / temperature for v in logits.double().tolist()]
        top = max(x)
        lse = top + math.log(math.fsum(math.exp(v - top) for v in x))
        return Row([math.exp(v - lse) for v in x], lse)

    def order(self, logits: Tensor) -> list[int]:
        return sorted(range(len(self.p)), key=lambda i: (-logits[i].item(), i))


def mix(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def draws_of(p: list[float], seed: int, position: int, draws: int) -> dict[int, int]:
    """Counts of ids: inverse distribution function at the uniforms of (seed, position), in Python integers."""
    mask = (1 << 64) - 1
    start = mix((mix(seed & mask) + position) & mask)
    counts: dict[int, int] = {}
    total = math.fsum(p)
    for j in range(1, draws + 1):
        target = (mix((start + j * 0x9E3779B97F4A7C15) & mask) >> 11) * 2.0**-53 * total
        upto, last = 0.0, 0
        for i, share in enumerate(p):
            if share == 0:
                continue
            upto, last = upto + share, i
            if upto > target:
                break
        counts[last] = counts.get(last, 0) + 1
    return dict(sorted(counts.items()))


def filled(labels: SoftLabels, row: int) -> dict[int, float]:
    """id -> log-probability, in the order of the slots; empty slots are -1 and -inf."""
    empty = labels.ids[row] < 0
    assert (labels.ids[row][empty] == -1).all()
    assert (labels.logprobs[row][empty] == -math.inf).all()
    return dict(zip(labels.ids[row][~empty].tolist(), labels.logprobs[row][~empty].double().tolist()))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("vocab", VOCABS.values(), ids=VOCABS.keys())
@pytest.mark.parametrize("temperature", [1.0, 0.25, 4.0])
def test_head_is_the_largest_probabilities(impl, device, vocab, temperature):
    skip_unless_available(impl, device)
    logits = (torch.randn(3, vocab) * 3).to(device)
    got = soft_labels_from_logits(logits, k=5, temperature=temperature, impl=impl)
    assert got.ids.shape == got.logprobs.shape == (3, min(5, vocab))
    assert (got.ids.dtype, got.logprobs.dtype) == (torch.int32, torch.float32)
    for r in range(3):
        row = Row.of(logits[r], temperature)
        expected = row.order(logits[r])[:5]
        entries = filled(got, r)
        assert list(entries) == expected
        for i, logprob in entries.items():
            assert logprob == pytest.approx(math.log(row.p[i]), rel=2e-7, abs=2e-7)
        tail = math.fsum(p for i, p in enumerate(row.p) if i not in entries)
        assert got.tail[r].item() == pytest.approx(tail, rel=2e-6, abs=1e-15)
        assert got.lse[r].item() == pytest.approx(row.lse, rel=2e-7)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("vocab", [1, 2, 7, 256, 4099])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_draws_are_a_function_of_seed_and_position(impl, device, vocab, seed):
    skip_unless_available(impl, device)
    logits = (torch.randn(3, vocab) * 2).to(device)
    positions = torch.tensor([0, 5, 2**40 + 3], device=device)
    got = soft_labels_from_logits(logits, method="sampled", draws=11, seed=seed, positions=positions, impl=impl)
    assert got.ids.shape == (3, min(11, vocab))
    for r, position in enumerate(positions.tolist()):
        row = Row.of(logits[r], 1.0)
        counts = draws_of(row.p, seed, position, 11)
        entries = filled(got, r)
        assert list(entries) == list(counts)
        for i, logprob in entries.items():
            assert logprob == pytest.approx(math.log(counts[i] / 11), rel=2e-7, abs=1e-12)
        tail = math.fsum(p for i, p in enumerate(row.p) if i not in counts)
        assert got.tail[r].item() == pytest.approx(tail, rel=2e-6, abs=1e-15)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("vocab", [2, 4, 5, 300, 4099])
def test_stratified_is_an_exact_head_and_a_drawn_tail(impl, device, vocab):
    skip_unless_available(impl, device)
    logits = (torch.randn(2, vocab) * 2).to(device)
    got = soft_labels_from_logits(logits, method="stratified", k=4, draws=9, temperature=0.5, seed=3, impl=impl)
    assert got.ids.shape == (2, min(4, vocab) + min(9, vocab))
    for r in range(2):
        row = Row.of(logits[r], 0.5)
        head = row.order(logits[r])[:4]
        rest = [0.0 if i in head else p for i, p in enumerate(row.p)]
        tail = math.fsum(rest)
        expected = {i: math.log(row.p[i]) for i in head}
        if tail > 0:
            expected |= {i: math.log(tail * c / 9) for i, c in draws_of(rest, 3, r, 9).items()}
        entries = filled(got, r)
        assert list(entries) == list(expected)
        assert list(entries.values()) == pytest.approx(list(expected.values()), rel=1e-6, abs=1e-6)
        assert got.tail[r].item() == pytest.approx(tail, rel=2e-6, abs=1e-15)


@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
@pytest.mark.parametrize("vocab", VOCABS.values(), ids=VOCABS.keys())
def test_compiled_code_draws_what_the_reference_draws(options, vocab):
    skip_unless_available("cpp", "cpu")
    logits = torch.randn(64, vocab) * torch.linspace(0.01, 30, 64)[:, None]
    logits[1] = 0
    logits[2, vocab // 2 :] = logits[2, 0]
    fast, plain = (soft_labels_from_logits(logits, **options, impl=impl) for impl in ("cpp", "reference"))
    assert torch.equal(fast.ids, plain.ids)
    for got, expected in zip(fast[1:], plain[1:]):
        # float64 inside, so at most the last bit of the one rounding differs; tails near 1e-16 are rounding alone.
        torch.testing.assert_close(got, expected, rtol=2.4e-7, atol=1e-15)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("options", METHODS[1:], ids=lambda o: o["method"])
def test_mean_of_the_targets_is_the_teacher(impl, device, options):
    """Every id within 4 standard errors, over 20000 tokens with one distribution."""
    skip_unless_available(impl, device)
    num, vocab, draws = 20000, 40, options["draws"]
    logits = torch.randn(vocab) * 1.5
    p = logits.double().softmax(0)
    got = soft_labels_from_logits(logits.expand(num, vocab).contiguous().to(device), **options, seed=7, impl=impl)
    target = torch.zeros(num, vocab + 1, dtype=torch.float64)
    ids = got.ids.cpu().long()
    target.scatter_add_(1, torch.where(ids < 0, vocab, ids), got.logprobs.cpu().double().exp())
    target = target[:, :vocab]
    # Sums are 1 in every row, not on average.
    torch.testing.assert_close(target.sum(1), torch.ones(num, dtype=torch.float64), rtol=0, atol=1e-6)
    if options["method"] == "sampled":
        share = p
        variance = p * (1 - p) / draws
    else:
        head = p.topk(options["k"]).indices
        rest = p.clone()
        rest[head] = 0
        tail = rest.sum()
        share = rest / tail
        variance = tail**2 * share * (1 - share) / draws
        torch.testing.assert_close(target[:, head], p[head].expand(num, -1), rtol=1e-6, atol=0)
    sigmas = (target.mean(0) - p).abs() / (variance / num).sqrt().clamp_min(1e-8)
    assert sigmas.max() < 4
    # And as noisy as it should be: no draws are shared between tokens.
    often = share * num * draws > 2000
    ratio = target.var(0)[often] / variance[often]
    assert often.any()
    assert ((ratio - 1).abs() < 0.15).all()


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_chunks_batches_and_order_do_not_matter(impl, device, options):
    skip_unless_available(impl, device)
    hidden, weight = torch.randn(50, 8, device=device), torch.randn(300, 8, device=device)
    positions = torch.randperm(1000, device=device)[:50]
    # Small integers: products are exact however the library cuts them.
    hidden, weight = hidden.mul(4).round(), weight.mul(4).round() / 16
    whole = soft_labels(hidden, weight, **options, positions=positions, impl=impl)
    for chunk_bytes in (1, 300 * 4 * 7):
        chunked = soft_labels(hidden, weight, **options, positions=positions, impl=impl, chunk_bytes=chunk_bytes)
        assert all(torch.equal(a, b) for a, b in zip(chunked, whole))
    order = torch.randperm(50, device=device)[:13]
    part = soft_labels(hidden[order], weight, **options, positions=positions[order], impl=impl)
    assert all(torch.equal(a, b[order]) for a, b in zip(part, whole))
    if options["method"] != "topk":
        other = soft_labels(hidden, weight, **options, positions=positions, seed=1, impl=impl)
        assert not torch.equal(other.ids, whole.ids)


def test_logits_exist_a_chunk_at_a_time(monkeypatch):
    seen = []
    real = driver.cpp_rows if registry.choose("soft_labels", "auto", torch.device("cpu")) == "cpp" else None
    name = "cpp_rows" if real else "reference_rows"
    real = getattr(driver, name)
    monkeypatch.setattr(driver, name, lambda z, *rest: seen.append(tuple(z.shape)) or real(z, *rest))
    soft_labels(torch.randn(50, 8), torch.randn(300, 8), k=3, chunk_bytes=300 * 4 * 8)
    assert max(rows for rows, _ in seen) <= 8
    assert sum(rows for rows, _ in seen) == 50


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_layer_is_part_of_the_op(impl, device, dtype):
    """Bias, scale, softcap and padding, in this order, on float32 logits."""
    skip_unless_available(impl, device)
    hidden, weight = torch.randn(9, 16).to(device, dtype), torch.randn(70, 16).to(device, dtype)
    bias = torch.randn(70).to(device, dtype)
    got = soft_labels(
        hidden, weight, k=6, temperature=0.5, bias=bias, softcap=4.0, logit_scale=1.5, vocab_valid=61, impl=impl
    )
    z = gemm.logits(hidden, weight, None).float() + bias.float()
    z = 4.0 * torch.tanh(z * 1.5 / 4.0)
    expected = soft_labels_from_logits(z[:, :61].contiguous(), k=6, temperature=0.5, impl=impl)
    torch.testing.assert_close(got.lse, expected.lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert (got.ids == expected.ids).float().mean() > 0.95
    assert got.ids.max() < 61


def test_float64_is_the_references():
    hidden, weight = torch.randn(5, 8).double(), torch.randn(33, 8).double()
    got = soft_labels(hidden, weight, k=33)
    truth = (hidden @ weight.T).log_softmax(-1)
    assert got.logprobs.dtype == torch.float64
    torch.testing.assert_close(truth.gather(1, got.ids.long()), got.logprobs, rtol=1e-14, atol=1e-14)
    with pytest.raises(NotImplementedError, match="impl='cpp' does not cover float64"):
        soft_labels(hidden, weight, k=3, impl="cpp")


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_given_logits_are_not_written_to_and_may_have_any_row_stride(impl, device, dtype):
    skip_unless_available(impl, device)
    wide = torch.randn(6, 90, device=device).to(dtype)
    before = wide.clone()
    got = soft_labels_from_logits(wide[:, 5:70], k=4, vocab_valid=60, impl=impl)
    expected = soft_labels_from_logits(wide[:, 5:65].contiguous(), k=4, impl=impl)
    assert torch.equal(wide, before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_equal_logits_go_by_id(impl, device):
    skip_unless_available(impl, device)
    logits = torch.zeros(4, 1000, device=device)
    logits[1, 700:] = 1
    logits[2, 5] = -0.0
    logits[3, ::2] = -1
    got = soft_labels_from_logits(logits, k=6, impl=impl).ids
    assert got[0].tolist() == got[2].tolist() == [0, 1, 2, 3, 4, 5]
    assert got[1].tolist() == [700, 701, 702, 703, 704, 705]
    assert got[3].tolist() == [1, 3, 5, 7, 9, 11]
    whole = soft_labels_from_logits(logits, k=1000, impl=impl).ids
    assert whole[0].tolist() == list(range(1000))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_rows_without_a_distribution_hold_nothing(impl, device, options):
    skip_unless_available(impl, device)
    logits = torch.randn(6, 300, device=device)
    plain = soft_labels_from_logits(logits, **options, impl=impl)
    logits[1, 270] = math.nan
    logits[2] = -math.inf
    logits[3, 3] = math.inf
    logits[4, 2], logits[4, 3] = math.inf, math.nan
    got = soft_labels_from_logits(logits, **options, impl=impl)
    assert (got.ids[1:5] == -1).all()
    assert (got.logprobs[1:5] == -math.inf).all()
    assert got.tail[1:5].isnan().all()
    assert got.lse[1].isnan()
    assert got.lse[2] == -math.inf
    assert got.lse[3] == math.inf
    assert got.lse[4].isnan()
    for row in (0, 5):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(got, plain))


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_masked_ids_and_certain_teachers(impl, device):
    skip_unless_available(impl, device)
    logits = torch.full((3, 300), -math.inf, device=device)
    logits[0, 123] = 5.0
    logits[1, 7], logits[1, 290] = 1e4, -1e4
    logits[2, [4, 280]] = 2.0
    head = soft_labels_from_logits(logits, k=4, impl=impl)
    assert head.ids[:, :2].tolist() == [[123, -1], [7, 290], [4, 280]]
    assert (head.ids[:, 2:] == -1).all()
    assert head.logprobs[:, 0].tolist() == pytest.approx([0, 0, -math.log(2)])
    assert head.logprobs[1, 1].item() == -2e4
    assert head.tail.tolist() == [0, 0, 0]
    drawn = soft_labels_from_logits(logits, method="sampled", draws=64, impl=impl)
    assert drawn.ids[:2, :2].tolist() == [[123, -1], [7, -1]]
    assert set(drawn.ids[2, :2].tolist()) == {4, 280}
    both = soft_labels_from_logits(logits, method="stratified", k=1, draws=8, impl=impl)
    # All of the tail is one id; where there is no tail, nothing is drawn.
    assert both.ids[:, :3].tolist() == [[123, -1, -1], [7, -1, -1], [4, 280, -1]]
    assert both.logprobs[2, :2].tolist() == pytest.approx([-math.log(2)] * 2)


@pytest.mark.parametrize(("impl", "device"), IMPLS)
def test_more_asked_for_than_there_is(impl, device):
    skip_unless_available(impl, device)
    logits = torch.randn(4, 3, device=device)
    assert soft_labels_from_logits(logits, k=10, impl=impl).ids.shape == (4, 3)
    got = soft_labels_from_logits(logits, method="sampled", draws=1000, impl=impl)
    assert got.ids.shape == (4, 3)
    p = logits.double().softmax(-1)
    target = torch.zeros_like(p).scatter_(1, got.ids.clamp_min(0).long(), got.logprobs.double().exp())
    assert (target - p).abs().max() < 4 * 0.5 / math.sqrt(1000)
    empty = soft_labels(torch.empty(0, 8, device=device), torch.randn(30, 8, device=device), k=4, impl=impl)
    assert empty.ids.shape == (0, 4)
    assert empty.lse.shape == (0,)


def test_uniforms_fill_the_interval():
    u = reference.uniforms(torch.arange(2000), 50, 5).flatten()
    assert (u >= 0).all()
    assert (u < 1).all()
    assert u.unique().numel() == u.numel()
    counts = torch.histc(u, 64, 0, 1)
    chi2 = ((counts - u.numel() / 64) ** 2 / (u.numel() / 64)).sum().item()
    # 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert abs(chi2 - 63) < 4 * 11.2


@pytest.mark.parametrize(("impl", "device"), IMPLS)
@pytest.mark.parametrize("options", METHODS, ids=lambda o: o["method"])
def test_compiles_whole(impl, device, options):
    skip_unless_available(impl, device)
    hidden, weight = torch.randn(6, 8, device=device), torch.randn(77, 8, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def mass(h, w):
        labels = effkern.soft_labels(h, w, **options, impl=impl)
        return labels.logprobs.exp().sum(1), labels.ids

    got, ids = mass(hidden, weight)
    plain = soft_labels(hidden, weight, **options, impl=impl)
    assert torch.equal(got, plain.logprobs.exp().sum(1))
    assert torch.equal(ids, plain.ids)


def test_operator_contract():
    hidden, weight, positions = torch.randn(4, 8), torch.randn(33, 8), torch.arange(4)
    for method, k, draws in (("topk", 40, 0), ("sampled", 0, 50), ("stratified", 3, 4)):
        args = (hidden, weight, None, positions, method, k, draws, 0.5, 3, 5.0, 1.0, 30, "reference", None)
        torch.library.opcheck(torch.ops.effkern.soft_labels, args)
        if registry.choose("soft_labels", "auto", hidden.device) == "cpp":
            number = ("topk", "sampled", "stratified").index(method)
            args = (torch.randn(4, 33)[:, 1:], positions, number, k, draws, 0.5, 3)
            torch.library.opcheck(torch.ops.effkern.soft_label_rows, args)


def test_gets_no_gradient():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    assert not any(part.requires_grad for part in soft_labels(hidden, weight, k=3))


def test_reference_rows_are_what_auto_gives():
    logits = torch.randn(5, 40)
    options = RowOptions("sampled", 0, 12, 2.0, 9)
    plain = reference.reference_rows(logits, torch.arange(5), options)
    got = soft_labels_from_logits(logits, method="sampled", draws=12, temperature=2.0, seed=9)
    assert torch.equal(plain[0], got.ids)
