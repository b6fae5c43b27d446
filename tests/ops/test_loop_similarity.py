"""loop_similarity: the formula term by term, the fused forms against it in float64, and its contract."""

import pytest
import torch
import torch.nn.functional as F

from effkern import loop_similarity, native
from effkern.ops import registry
from effkern.ops.loop_similarity.api import _choose
from tests.numerics import assert_as_good_as_eager, rel_err

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton in its interpreter takes tiny tensors only, with a small step.
IMPLS = [
    i.name for i in registry.registered()["loop_similarity"] if i.unavailable(torch.device(DEVICE)) is None
    or i.unavailable(CPU) is None
]  # fmt: skip
IMPL = pytest.mark.parametrize("impl", IMPLS)
COMPILED = pytest.mark.skipif(native.load("_C") is not None, reason=str(native.load("_C")))
Groups = dict[str, list[torch.Tensor]]


def home(impl: str) -> str:
    return "cpu" if impl == "cpp" else DEVICE


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    if "triton" in IMPLS:
        from effkern.ops.loop_similarity import triton as launcher

        # Several ranges per tensor, and more of them than programs.
        monkeypatch.setattr(launcher, "BLOCK", 16)
        monkeypatch.setattr(launcher, "PROGRAMS", 2)
        if DEVICE == "cpu":
            from tests.interpreter import exact_bfloat16

            exact_bfloat16(monkeypatch)


def make(
    layers: int = 6, dtype: torch.dtype = torch.float32, shapes=((5, 13), (7,), (3,)), device: str = DEVICE
) -> Groups:
    """Groups of layers that are alike to a degree; sizes of several steps and below one."""
    made = {}
    for i, shape in enumerate(shapes):
        common = torch.randn(shape)
        tensors = [(common + 0.7 * torch.randn(shape)).to(device, dtype) for _ in range(layers)]
        made[f"g{i}"] = [t.requires_grad_() for t in tensors]
    return made


def flat(groups: Groups) -> list[torch.Tensor]:
    return [t for tensors in groups.values() for t in tensors]


def to(groups: Groups, dtype: torch.dtype | None = None) -> Groups:
    return {k: [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in v] for k, v in groups.items()}


def formula(groups: Groups, block: int) -> torch.Tensor:
    """The printed sums over i and j."""
    values = []
    for theta in groups.values():
        count, value = len(theta), 0.0
        for i in range(count // block - 1):
            for j in range(block):
                u, v = theta[i * block + j], theta[(i + 1) * block + j]
                value = value + F.cosine_similarity(u.flatten(), v.flatten(), dim=0, eps=0.0)
        values.append(value / (count - block))
    return torch.stack(values)


def run(groups: Groups, values: torch.Tensor, mean: torch.Tensor, grads: torch.Tensor) -> list[torch.Tensor]:
    """Values, and the gradients of the mean and some weights of the groups."""
    found = torch.autograd.grad(mean + (grads.to(values) * values).sum(), flat(groups))
    return [values.detach(), mean.detach(), *found]


def check(groups: Groups, block: int, impl: str) -> None:
    grads = torch.randn(len(groups), device=flat(groups)[0].device)
    results = []
    for given, name in ((to(groups, torch.float64), "reference"), (to(groups), "reference"), (to(groups), impl)):
        out = loop_similarity(given, block, impl=name)
        results.append(run(given, out.groups, out.mean, grads))
    for truth, eager, ours in zip(*results):
        assert_as_good_as_eager(ours, eager, truth, ulps=4.0)


@pytest.mark.parametrize(("layers", "block"), [(2, 1), (5, 1), (6, 2), (6, 3), (8, 2)])
def test_the_reference_is_the_formula(layers, block):
    groups = to(make(layers), torch.float64)
    grads = torch.randn(3, dtype=torch.float64, device=DEVICE)
    truth_values = formula(groups, block)
    truth = run(groups, truth_values, truth_values.mean(), grads)
    out = loop_similarity(groups, block, impl="reference")
    for t, found in zip(truth, run(groups, out.groups, out.mean, grads)):
        assert rel_err(found, t) < 1e-13


@pytest.mark.parametrize(("layers", "block"), [(2, 1), (5, 1), (6, 2), (6, 3), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@IMPL
def test_every_chain(impl, dtype, layers, block):
    check(make(layers, dtype, device=home(impl)), block, impl)


def test_half():
    """float16 is Triton's alone of the fused forms."""
    check(make(4, torch.float16), 2, "triton" if "triton" in IMPLS else "auto")


@COMPILED
def test_cpp_several_tasks():
    """Over a step of 4096 elements, over a task of 16384, and exactly one."""
    for dtype in (torch.float32, torch.bfloat16):
        check(make(4, dtype, shapes=((3, 5000), (33, 1111), (16384,)), device="cpu"), 2, "cpp")


@IMPL
def test_a_looped_model_is_1(impl):
    """The same block again and again: all cosines are 1, and their slope is 0."""
    block = [torch.randn(4, 9, device=home(impl)) for _ in range(2)]
    tensors = [t.clone().requires_grad_() for _ in range(3) for t in block]
    out = loop_similarity([tensors], 2, impl=impl)
    torch.testing.assert_close(out.mean.item(), 1.0)
    out.mean.backward()
    assert max(t.grad.abs().max().item() for t in tensors) < 1e-7
    opposite = [block[0], -block[0]]
    assert loop_similarity([opposite], 1, impl=impl).mean.item() == pytest.approx(-1.0)


@IMPL
def test_subtracting_it_pulls_blocks_together(impl):
    """A few steps on -mean raise it: the sign of the regulariser."""
    tensors = [torch.randn(3, 5, device=home(impl)).requires_grad_() for _ in range(4)]
    before = loop_similarity([tensors], 2, impl=impl).mean.item()
    for _ in range(5):
        (0.0 - loop_similarity([tensors], 2, impl=impl).mean).backward()
        with torch.no_grad():
            for t in tensors:
                t -= 0.5 * t.grad
                t.grad = None
    assert loop_similarity([tensors], 2, impl=impl).mean.item() > before + 0.1


@IMPL
def test_groups_of_different_kinds(impl):
    """Lengths and dtypes differ by group; a sequence counts like a mapping."""
    groups = make(4, device=home(impl)) | {"half": make(6, torch.bfloat16, device=home(impl))["g0"]}
    check(groups, 2, impl)
    first = loop_similarity(groups, 2, impl=impl)
    assert torch.equal(loop_similarity(list(groups.values()), 2, impl=impl).groups, first.groups)
    alone = [loop_similarity([tensors], 2, impl=impl).mean for tensors in groups.values()]
    torch.testing.assert_close(torch.stack(alone), first.groups, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first.groups.mean(), first.mean)


@IMPL
def test_tensors_of_zeros(impl):
    """Their cosines are 0; neither they nor their partners move by them, and the other pairs count as ever."""
    groups = make(6, device=home(impl))
    with torch.no_grad():
        groups["g0"][2].zero_()
    out = loop_similarity(groups, 2, impl=impl)
    theta = groups["g0"]
    pairs = [F.cosine_similarity(theta[a].flatten(), theta[a + 2].flatten(), dim=0) for a in (1, 3)]
    torch.testing.assert_close(out.groups[0], (pairs[0] + pairs[1]) / 4)
    out.groups[0].backward()
    for i in (0, 2, 4):
        assert torch.equal(theta[i].grad, torch.zeros_like(theta[i])), i
    assert all(theta[i].grad.abs().sum() > 0 for i in (1, 3, 5))
    nothing = [torch.zeros(3, 4, device=home(impl)).requires_grad_() for _ in range(2)]
    out = loop_similarity([nothing], 1, impl=impl)
    out.mean.backward()
    assert out.mean.item() == 0.0
    assert torch.equal(nothing[0].grad, torch.zeros(3, 4, device=home(impl)))


@IMPL
def test_nan_and_scale(impl):
    groups = make(4, device=home(impl))
    big = {k: [(t * 1e4).detach().requires_grad_() for t in v] for k, v in groups.items()}
    a, b = (loop_similarity(g, 2, impl=impl) for g in (groups, big))
    torch.testing.assert_close(a.groups, b.groups)
    with torch.no_grad():
        groups["g1"][0][0] = float("nan")
    out = loop_similarity(groups, 2, impl=impl)
    assert out.groups.isnan().tolist() == [False, True, False]
    assert out.mean.isnan()


@IMPL
def test_frozen_tensors_and_layouts(impl):
    groups = make(4, device=home(impl))
    truth = loop_similarity(groups, 2, impl=impl)
    truth.mean.backward()
    other = {k: [torch.stack([t.detach()] * 2, -1)[..., 0] for t in v] for k, v in groups.items()}
    for i, t in enumerate(flat(other)):
        t.requires_grad_(i % 3 != 0)
    out = loop_similarity(other, 2, impl=impl)
    out.mean.backward()
    torch.testing.assert_close(out.groups, truth.groups)
    for i, (a, b) in enumerate(zip(flat(other), flat(groups))):
        assert (a.grad is None) == (i % 3 == 0)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@IMPL
def test_parameters_of_modules(impl):
    layers = [torch.nn.Linear(4, 4, device=home(impl)) for _ in range(4)]
    groups = {"weight": torch.nn.ParameterList(m.weight for m in layers), "bias": tuple(m.bias for m in layers)}
    loop_similarity(groups, 2, impl=impl).mean.backward()
    assert all(m.weight.grad.abs().sum() > 0 and m.bias.grad.abs().sum() > 0 for m in layers)


@COMPILED
def test_cpp_bits_do_not_depend_on_threads():
    groups = make(4, shapes=((70, 1111), (5,)), device="cpu")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            given = to(groups)
            out = loop_similarity(given, 2, impl="cpp")
            found.append(run(given, out.groups, out.mean, torch.ones(2)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@IMPL
def test_compile(impl):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(groups):
        return loop_similarity(groups, 2, impl=impl)

    groups = make(4, device=home(impl))
    out, truth = step(groups), loop_similarity(groups, 2, impl=impl)
    grads = torch.ones(3, device=home(impl))
    for a, b in zip(run(groups, *reversed(out), grads), run(groups, *reversed(truth), grads)):
        torch.testing.assert_close(a, b)


def test_operators():
    ops = torch.ops.effkern
    for name in [n for n in IMPLS if n != "reference"]:
        tensors = [t.detach() for t in flat(make(4, device=home(name)))]
        suffix = "" if name == "cpp" else "_triton"
        forward, backward = (getattr(ops, f"loop_similarity{suffix}_{way}") for way in ("fwd", "bwd"))
        torch.library.opcheck(forward, (tensors, [4, 4, 4], 2))
        _, factors = forward(tensors, [4, 4, 4], 2)
        wanted = [1, 0] * 6
        torch.library.opcheck(backward, (tensors, factors, torch.randn(3, device=home(name)), [4, 4, 4], 2, wanted))


@COMPILED
def test_cpp_errors_of_the_operators():
    forward, backward = torch.ops.effkern.loop_similarity_fwd, torch.ops.effkern.loop_similarity_bwd
    tensors = [torch.randn(3, 4) for _ in range(4)]
    for given, layers, block, message in (
        (tensors, [4], 3, "a multiple of `block` layers"),
        (tensors, [4, 4], 2, "a multiple of `block` layers"),
        (tensors, [2], 1, "layers must add up to all tensors"),
        ([*tensors[:3], torch.randn(3, 5)], [4], 2, "contiguous, of one size, float32 or bfloat16"),
        ([t.double() for t in tensors], [4], 2, "contiguous, of one size, float32 or bfloat16"),
        ([t.t() for t in tensors], [4], 2, "contiguous, of one size, float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(given, layers, block)
    _, factors = forward(tensors, [4], 2)
    for change in (
        (factors.float(), torch.ones(1), [1] * 4),
        (factors, torch.ones(2), [1] * 4),
        (factors, torch.ones(1), [1]),
    ):
        with pytest.raises(RuntimeError, match=r"factors must be float64 \[tensors, 3\]"):
            backward(tensors, *change[:2], [4], 2, change[2])


def test_second_derivative():
    x = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.autograd.gradgradcheck(lambda *t: loop_similarity([t], 1, impl="reference").mean, x)
    if native.load("_C") is None:
        y = [t.detach().float().requires_grad_() for t in x]
        with pytest.raises(NotImplementedError, match="create_graph=True is covered by impl='reference' alone"):
            torch.autograd.grad(loop_similarity([y], 1).mean, y, create_graph=True)


def test_choice():
    assert _choose("auto", [torch.zeros(1)]) == ("cpp" if native.load("_C") is None else "reference")
    assert _choose("auto", [torch.zeros(1, dtype=torch.float64)]) == "reference"


def _error_cases():
    t = torch.zeros(2, 3)
    yield "none", {}, 1, ValueError, "groups must hold at least one group, got none"
    yield "type", t, 1, TypeError, "groups must be a mapping or a sequence of sequences, got Tensor"
    yield "group", {"q": t}, 1, TypeError, r"groups\['q'\] must be a sequence of tensors, got Tensor"
    yield "block", [[t, t]], 0, ValueError, "block must be at least 1, got 0"
    yield "block type", [[t, t]], 1.0, TypeError, "block must be an int, got float"
    yield "layers", {"q": [t] * 5}, 2, ValueError, r"groups\['q'\] must hold a multiple of block=2 .*, got 5"
    yield "one block", [[t] * 2], 2, ValueError, r"groups\[0\] must hold a multiple of block=2 .* at least, got 2"
    yield "empty", [[]], 1, ValueError, r"groups\[0\] must hold .*, got 0"
    yield "shape", [[t, t.t()]], 1, ValueError, r"groups\[0\]\[1\] must have the shape of .*\(2, 3\), got \(3, 2\)"
    yield "dtype", [[t, t.double()]], 1, TypeError, r"groups\[0\]\[1\] must have the dtype of .* got torch.float64"
    yield "integer", [[t.int(), t.int()]], 1, TypeError, r"groups\[0\]\[0\] must be of a floating dtype"
    yield "no tensor", [[t, None]], 1, TypeError, r"groups\[0\]\[1\] must be a tensor, got NoneType"
    yield "device", [[t, t], [t.to("meta")] * 2], 1, ValueError, r"groups\[1\]\[0\] must be on cpu, got meta"


@pytest.mark.parametrize(
    ("groups", "block", "kind", "message"), [pytest.param(*c[1:], id=c[0]) for c in _error_cases()]
)
def test_errors(groups, block, kind, message):
    with pytest.raises(kind, match="loop_similarity: .*" + message):
        loop_similarity(groups, block)


def test_errors_of_the_choice():
    t = torch.zeros(2)
    with pytest.raises(ValueError, match="impl must be one of"):
        loop_similarity([[t, t]], 1, impl="fast")
    if native.load("_C") is None:
        with pytest.raises(NotImplementedError, match=r"impl='cpp' takes float32, bfloat16, got torch\.float64"):
            loop_similarity([[t.double()] * 2], 1, impl="cpp")
