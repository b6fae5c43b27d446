"""mean_pool and norm_mean_pool: every implementation against float64, the folded projection, and the contract."""

import pytest
import torch
import torch.nn.functional as F

from effkern import fold_projection, mean_pool, native, norm_mean_pool
from effkern.ops import registry
from effkern.ops.mean_pool.api import _choose
from tests.numerics import assert_as_good_as_eager, rel_err

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [
    i.name for i in registry.registered()["mean_pool"] if i.unavailable(torch.device(DEVICE)) is None
    or i.unavailable(CPU) is None
]  # fmt: skip
IMPL = pytest.mark.parametrize("impl", IMPLS)
COMPILED = pytest.mark.skipif(native.load("_C") is not None, reason=str(native.load("_C")))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAD, EOD = 3, 7


def home(impl: str) -> str:
    return "cpu" if impl == "cpp" else DEVICE


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    if "triton" in IMPLS:
        from effkern.ops.mean_pool import triton as launcher

        monkeypatch.setattr(launcher, "TILE", 512)


def groups(sizes=(5, 0, 1, 131, 4), vocab: int = 23, device: str = "cpu"):
    """Ids and offsets: an empty group, one of a single id, one of several strips, one of ignored ids alone."""
    ids = torch.randint(0, vocab, (sum(sizes),))
    ids[-sizes[-1] :] = torch.tensor([PAD, EOD, EOD, PAD])[: sizes[-1]]
    return ids.to(device), torch.tensor([0, *sizes]).cumsum(0).to(device)


def loop(rows, keep, offsets, weight=None, eps=0.0, normalize=False):
    """Group by group, in float64."""
    out = []
    for a, b in zip(offsets.tolist(), offsets.tolist()[1:]):
        kept = rows[a:b][keep[a:b]].double()
        if weight is not None:
            kept = kept / (kept.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
        mean = kept.mean(0) if len(kept) else torch.zeros_like(rows[0], dtype=torch.float64)
        out.append(F.normalize(mean, dim=0, eps=0.0) if normalize and mean.abs().sum() > 0 else mean)
    return torch.stack(out)


# One column, one block of lanes and its rest, wide blocks and both; Triton has one path, and the rest is masked.
DIMS = [(name, dim) for name in IMPLS for dim in ((37,) if name == "triton" else (1, 37, 64, 201))]


@pytest.mark.parametrize(("impl", "dim"), DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_table(impl, dtype, dim):
    table = torch.randn(23, dim).to(dtype)
    ids, offsets = groups()
    keep = (ids != PAD) & (ids != EOD)
    eager = F.embedding_bag(
        torch.where(keep, ids, 23),
        torch.cat([table.float(), torch.zeros(1, dim)]),
        offsets,
        mode="mean",
        include_last_offset=True,
        padding_idx=23,
    )
    for normalize in (False, True):
        truth = loop(table[ids], keep, offsets, normalize=normalize)
        eager_y = torch.nan_to_num(F.normalize(eager, dim=1)) if normalize else eager
        for kind in (torch.int64, torch.int32):
            found = mean_pool(
                table.to(home(impl)), ids.to(home(impl), kind), offsets.to(home(impl)), pad=PAD, eod=EOD,
                normalize=normalize, impl=impl,
            ).cpu()  # fmt: skip
            assert_as_good_as_eager(found, eager_y, truth, ulps=2.0)
        assert torch.equal(found[[1, 4]], torch.zeros(2, dim))


@pytest.mark.parametrize(("impl", "dim"), DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden(impl, dtype, dim):
    ids, offsets = groups()
    hidden, weight = torch.randn(len(ids), dim).to(dtype), torch.rand(dim) + 0.5
    keep = (ids != PAD) & (ids != EOD)
    # What does not count may be anything.
    hidden[~keep] = float("nan")
    where = home(impl)
    for given in (weight, weight.to(dtype), None):
        eager = loop(hidden.float(), keep, offsets, None if given is None else given.float(), 1e-5)
        truth = loop(hidden, keep, offsets, given, 1e-5)
        found = norm_mean_pool(
            hidden.to(where), offsets.to(where), keep=keep.to(where), eps=1e-5, impl=impl,
            norm_weight=None if given is None else given.to(where),
        ).cpu()  # fmt: skip
        assert_as_good_as_eager(found, eager.float(), truth, ulps=4.0)
    whole = norm_mean_pool(
        hidden.nan_to_num().to(where), offsets.to(where), normalize=True, norm_weight=weight.to(where), impl=impl
    )
    truth = loop(hidden.nan_to_num(), torch.ones_like(keep), offsets, weight, 1e-6, normalize=True)
    assert rel_err(whole.cpu(), truth) < 1e-6


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "reference"])
def test_long_groups_keep_their_digits(impl):
    """20000 equal rows: the mean is the row to a few roundings, where one running sum loses four digits."""
    rows = 20_000 if impl != "triton" else 2_000
    table = torch.full((1, 16), 0.1)
    ids, offsets = torch.zeros(rows, dtype=torch.int64), torch.tensor([0, rows])
    found = mean_pool(table.to(home(impl)), ids.to(home(impl)), offsets.to(home(impl)), impl=impl).cpu()
    assert rel_err(found, table.double()) < 4e-6


@IMPL
def test_lengths_of_extreme_values(impl):
    """Normalising neither overflows nor underflows; NaN and inf stay in their group."""
    table = torch.tensor([[1e30, 1e30], [1e-30, 0.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    ids, offsets = torch.arange(5), torch.arange(6)
    where = home(impl)
    found = mean_pool(table.to(where), ids.to(where), offsets.to(where), normalize=True, impl=impl).cpu()
    torch.testing.assert_close(found[:3], torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0], [0.0, 0.0]]))
    assert found[3:].isnan().any(1).all()


@IMPL
def test_strided_rows_and_no_groups(impl):
    where = home(impl)
    wide = torch.randn(23, 40, device=where)
    ids, offsets = groups(device=where)
    narrow = mean_pool(wide[:, :16], ids, offsets, impl=impl)
    assert torch.equal(narrow, mean_pool(wide[:, :16].contiguous(), ids, offsets, impl=impl))
    hidden = torch.randn(len(ids), 40, device=where)
    assert torch.equal(
        norm_mean_pool(hidden[:, :16], offsets, impl=impl),
        norm_mean_pool(hidden[:, :16].contiguous(), offsets, impl=impl),
    )
    none = torch.zeros(1, dtype=torch.int64, device=where)
    assert mean_pool(wide, ids[:0], none, impl=impl).shape == (0, 40)
    assert norm_mean_pool(hidden[:0], none, impl=impl).shape == (0, 40)


@IMPL
def test_folded_projection_is_the_projected_mean(impl):
    """Mean, standardisation and projection of means are the mean of the folded table's rows."""
    table, ids_offsets = torch.randn(23, 40), groups(sizes=(9, 30, 2, 17, 3))
    ids, offsets = ids_offsets
    mean, scale, components = torch.randn(40), torch.rand(40) + 0.5, torch.linalg.qr(torch.randn(40, 6))[0].t()
    means = mean_pool(table.double(), ids, offsets, impl="reference")
    truth = (means - mean) / scale @ components.double().t()
    where = home(impl)
    folded = fold_projection(table, mean, scale, components).to(where)
    found = mean_pool(folded, ids.to(where), offsets.to(where), impl=impl)
    assert rel_err(found.cpu(), truth) < 1e-6
    unit = mean_pool(folded, ids.to(where), offsets.to(where), normalize=True, impl=impl)
    assert rel_err(unit.cpu(), F.normalize(truth, dim=1)) < 1e-6
    # Folding moves every token; a group without tokens stays 0.
    assert torch.equal(
        mean_pool(folded, ids[:0].to(where), torch.tensor([0, 0], device=where)).cpu(), torch.zeros(1, 6)
    )


@COMPILED
def test_cpp_bits_do_not_depend_on_threads():
    table = torch.randn(100, 70)
    ids, offsets = groups(sizes=(700, 90, 1300, 4), vocab=100)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(mean_pool(table, ids, offsets, normalize=True, impl="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_reference_gradients():
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_()
    ids, offsets = torch.tensor([0, 4, 4, 2, 1, 1]), torch.tensor([0, 4, 4, 6])
    keep = torch.tensor([True, False, True, True, True, True])
    torch.autograd.gradcheck(lambda t: mean_pool(t, ids, offsets, pad=2, impl="reference"), table)
    torch.autograd.gradcheck(
        lambda h, w: norm_mean_pool(h, offsets, keep=keep, norm_weight=w, impl="reference"), (hidden, weight)
    )
    with pytest.raises(NotImplementedError, match="mean_pool: table must not require a gradient"):
        mean_pool(table, ids, offsets)
    with pytest.raises(NotImplementedError, match="norm_mean_pool: norm_weight must not require a gradient"):
        norm_mean_pool(hidden.detach(), offsets, norm_weight=weight)
    with torch.no_grad():
        assert torch.equal(mean_pool(table, ids, offsets), mean_pool(table.detach(), ids, offsets))


@IMPL
def test_compile(impl):
    if impl == "reference":
        pytest.skip("its groups have sizes that only values tell")
    table = torch.randn(23, 16, device=home(impl))
    ids, offsets = groups(device=home(impl))
    hidden, keep = table[ids], ids != PAD

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(table, ids, offsets, hidden, keep):
        first = mean_pool(table, ids, offsets, pad=PAD, impl=impl)
        return first, norm_mean_pool(hidden, offsets, keep=keep, norm_weight=table[0], impl=impl)

    first, second = both(table, ids, offsets, hidden, keep)
    torch.testing.assert_close(first, mean_pool(table, ids, offsets, pad=PAD, impl=impl))
    torch.testing.assert_close(second, norm_mean_pool(hidden, offsets, keep=keep, norm_weight=table[0], impl=impl))


def test_operators():
    for name in [n for n in IMPLS if n != "reference"]:
        suffix = "" if name == "cpp" else "_triton"
        table, (ids, offsets) = torch.randn(23, 16, device=home(name)), groups(device=home(name))
        torch.library.opcheck(getattr(torch.ops.effkern, f"mean_pool{suffix}"), (table, ids, offsets, PAD, -1, True))
        torch.library.opcheck(
            getattr(torch.ops.effkern, f"norm_mean_pool{suffix}"),
            (table[ids], offsets, ids != PAD, table[0].contiguous(), 1e-6, False),
        )


@COMPILED
def test_cpp_errors_of_the_operators():
    table, (ids, offsets) = torch.randn(23, 16), groups()
    pool, norm = torch.ops.effkern.mean_pool, torch.ops.effkern.norm_mean_pool
    for given, message in (
        ((table.double(), ids, offsets), "rows must be float32, bfloat16 or float16"),
        ((table.t(), ids, offsets), "rows must have stride 1"),
        ((table, ids.float(), offsets), "ids must be a contiguous int64 or int32 vector"),
        ((table, ids, offsets[1:]), "offsets must go from 0 to 141 and never fall"),
        ((table, ids, offsets.flip(0)), "offsets must go from 0 to 141 and never fall"),
        ((table, ids, offsets.int()), "offsets must be a contiguous int64 vector"),
        ((table, ids + 23, offsets), r"ids must lie in \[0, 23\)"),
        ((table, ids - 30, offsets), r"ids must lie in \[0, 23\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pool(*given, -1, -1, False)
    for keep, weight, message in (
        (torch.ones(3, dtype=torch.bool), None, "keep must be contiguous booleans"),
        (torch.ones(141), None, "keep must be contiguous booleans"),
        (None, torch.ones(15), "weight must be contiguous"),
        (None, torch.ones(16).double(), "weight must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            norm(table[ids], offsets, keep, weight, 1e-6, False)


def test_triton_ids_out_of_range_are_nan():
    """Where no one looks at values before, a wrong id shows in its own group."""
    if "triton" not in IMPLS:
        pytest.skip("triton is not there")
    table = torch.randn(5, 16, device=DEVICE)
    ids = torch.tensor([0, 5, 1, -2, 2], device=DEVICE)
    offsets = torch.tensor([0, 2, 3, 4, 9], device=DEVICE)
    found = torch.ops.effkern.mean_pool_triton(table, ids, offsets, -1, -1, False)
    assert found.isnan().all(1).tolist() == [True, False, True, False]
    torch.testing.assert_close(found[3], table[2])


def test_choice():
    assert _choose("mean_pool", "auto", torch.zeros(1, 1)) == ("cpp" if native.load("_C") is None else "reference")
    assert _choose("mean_pool", "auto", torch.zeros(1, 1, dtype=torch.float64)) == "reference"
    for name in [n for n in IMPLS if n != "reference"]:
        with pytest.raises(NotImplementedError, match=f"mean_pool: impl='{name}' does not cover float64"):
            _choose("mean_pool", name, torch.zeros(1, 1, dtype=torch.float64, device=home(name)))
    if "triton" in IMPLS:
        with pytest.raises(NotImplementedError, match="does not cover more than 8192 columns, got 8193"):
            _choose("mean_pool", "triton", torch.zeros(1, 8193, device=DEVICE))


def _error_cases():
    table, ids, offsets = torch.zeros(4, 3), torch.tensor([0, 1, 3]), torch.tensor([0, 2, 3])
    good = {"table_VD": table, "ids": ids, "offsets": offsets}
    for changes, kind, message in (
        ({"table_VD": None}, TypeError, "table must be a tensor, got NoneType"),
        ({"table_VD": table.int()}, TypeError, "table must be float32, .* got torch.int32"),
        ({"table_VD": table[0]}, ValueError, r"table must have two dimensions and a column, got shape \[3\]"),
        ({"table_VD": table.t()}, ValueError, "table must have stride 1 along its columns, got 3"),
        ({"ids": ids.float()}, TypeError, "ids must be int64 or int32, got torch.float32"),
        ({"ids": ids[None]}, ValueError, r"ids must be contiguous with shape \[\*\], got shape \[1, 3\]"),
        ({"ids": ids + 1}, ValueError, r"ids must lie in \[0, 4\), got 4"),
        ({"ids": ids - 1}, ValueError, r"ids must lie in \[0, 4\), got -1"),
        ({"ids": ids.to("meta")}, ValueError, "ids must be on cpu, got meta"),
        ({"offsets": offsets.int()}, TypeError, "offsets must be int64, got torch.int32"),
        ({"offsets": offsets[:0]}, ValueError, r"offsets must have N \+ 1 entries, got none"),
        ({"offsets": offsets + 1}, ValueError, "offsets must go from 0 to 3 and never fall, got 1 to 4"),
        ({"offsets": torch.tensor([0, 3, 2, 3])}, ValueError, "offsets must go from 0 to 3 and never fall"),
        ({"pad": -1}, ValueError, "pad must be at least 0, got -1"),
        ({"eod": 1.0}, TypeError, "eod must be an int or None, got float"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
    ):
        yield pytest.param(good | changes, kind, message, id=message[:24])


@pytest.mark.parametrize(("given", "kind", "message"), list(_error_cases()))
def test_errors(given, kind, message):
    with pytest.raises(kind, match="mean_pool: .*" + message):
        mean_pool(given.pop("table_VD"), given.pop("ids"), given.pop("offsets"), **given)


def test_errors_of_hidden_and_fold():
    hidden, offsets = torch.zeros(3, 2), torch.tensor([0, 3])
    for given, kind, message in (
        ({"keep": torch.ones(3)}, TypeError, "keep must be bool, got torch.float32"),
        ({"keep": torch.ones(2, dtype=torch.bool)}, ValueError, r"keep must be contiguous with shape \[3\]"),
        ({"norm_weight": torch.ones(3)}, ValueError, r"norm_weight must be contiguous with shape \[2\]"),
        ({"norm_weight": torch.ones(2).half()}, TypeError, "norm_weight must be float32, got torch.float16"),
        ({"eps": -1.0}, ValueError, r"eps must be at least 0, got -1\.0"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0, got nan"),
    ):
        with pytest.raises(kind, match="norm_mean_pool: " + message):
            norm_mean_pool(hidden, offsets, **given)
    one = torch.ones(2)
    for arguments, message in (
        ((hidden, one, one, torch.ones(1, 3)), "table and components must be"),
        ((hidden, torch.ones(3), one, torch.ones(1, 2)), r"mean must have shape \[2\], got \[3\]"),
        ((hidden, one, torch.zeros(2), torch.ones(1, 2)), r"scale must be positive, got 0\.0"),
    ):
        with pytest.raises(ValueError, match="fold_projection: " + message):
            fold_projection(*arguments)
