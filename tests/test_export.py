"""torch.export and AOTInductor for what runs at inference: the program gives the bits of eager, at other sizes too."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves

import effkern
from effkern import native
from effkern.models import Decoder, DecoderConfig
from effkern.models.config import LaurelConfig
from effkern.nn import LaurelResidual, LinearDistillLoss, LoopedBlock
from effkern.ops.token_stats import label_rank

ROOT = Path(__file__).parents[1]
N = Dim("n", min=2, max=4096)


class Fn(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Any:
        return self.fn(*args)


class LaurelBlock(nn.Module):
    def __init__(self, variant: str = "rw+lr") -> None:
        super().__init__()
        self.residual = LaurelResidual(16, variant, rank=3)
        self.norm = nn.Parameter(torch.ones(16))
        nn.init.normal_(self.residual.up)

    def forward(self, branch: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.residual(branch, x, norm_weight=self.norm)
        return out.y, out.normed


class LossOf(nn.Module):
    def __init__(self, loss_fn: nn.Module) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return self.loss_fn(hidden, head, labels).loss


class Case(NamedTuple):
    module: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    """At a size n of the dynamic dimension."""
    dims: tuple[int | None, ...]
    """Which dimension of each input it is."""
    operators: tuple[str, ...]
    """Of ours, in the program."""


def looped(**options: Any) -> LoopedBlock:
    return LoopedBlock(nn.Sequential(nn.Linear(16, 16), nn.Tanh()), 3, dim=16, norm=True, **options)


def decoder(**options: Any) -> Decoder:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "mlp_size": 24, "max_seq_len": 32}
    return Decoder(DecoderConfig(vocab_size=50, **sizes, **options))


def labels(n: int, vocab: int = 37) -> Tensor:
    return torch.randint(0, vocab, (n,))


def matrices(n: int) -> Tensor:
    x = torch.randn(n, 8, 12)
    return x @ x.mT


def with_head(fn: Callable[..., Any]) -> Callable[[], nn.Module]:
    """A function of an output layer and more."""

    def make() -> nn.Module:
        weight = torch.randn(37, 16)
        return Fn(lambda hidden, *rest: fn(weight, hidden, *rest))

    return make


def distill(weight: Tensor, hidden: Tensor, labels: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    loss, stats = effkern.linear_distill_loss(
        hidden, weight, labels, teacher=effkern.TeacherHidden(teacher, head), omega=0.5, temperature=1.0,
        teacher_temperature=1.0,
    )  # fmt: skip
    return loss, stats.ce


def damped(f: Tensor, h: Tensor, e: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    out = effkern.loop_step(f, h, e, alpha=0.5, beta=0.5, norm_weight=weight, return_change=True)
    return out.state, out.core_input, out.change


def offsets(n: int) -> Tensor:
    return torch.tensor([0, 2, 2, n])


CASES: dict[str, Case] = {
    "laurel": Case(LaurelBlock, lambda n: (torch.randn(n, 16), torch.randn(n, 16)), (0, 0), ("laurel_fwd",)),
    "loop_step": Case(
        lambda: Fn(damped), lambda n: (*(torch.randn(n, 16) for _ in "fhe"), torch.ones(16)), (0, 0, 0, None),
        ("loop_step_fwd",),
    ),
    "looped_linear_attention": Case(
        lambda: Fn(lambda x, y, q, a: effkern.looped_linear_attention(x, y, q, a, 3).prediction),
        lambda n: (torch.randn(n, 6, 4), torch.randn(n, 6), torch.randn(n, 4), torch.randn(4, 4)), (0, 0, 0, None),
        ("looped_attention_fwd",),
    ),
    "loop_similarity": Case(
        lambda: Fn(lambda *layers: effkern.loop_similarity([layers], 2).groups),
        lambda n: tuple(torch.randn(n, 16) for _ in range(4)), (0, 0, 0, 0), ("loop_similarity_fwd",),
    ),
    "mean_pool": Case(
        lambda: Fn(lambda table, ids, at: effkern.mean_pool(table, ids, at, pad=0, normalize=True)),
        lambda n: (torch.randn(37, 8), labels(n), offsets(n)), (None, 0, None), ("mean_pool",),
    ),
    "norm_mean_pool": Case(
        lambda: Fn(lambda hidden, at, weight: effkern.norm_mean_pool(hidden, at, norm_weight=weight)),
        lambda n: (torch.randn(n, 8), offsets(n), torch.ones(8)), (0, None, None), ("norm_mean_pool",),
    ),
    "kmeans_assign": Case(
        lambda: Fn(lambda points, centroids: tuple(effkern.kmeans_assign(points, centroids, m=2))),
        lambda n: (torch.randn(n, 8), torch.randn(5, 8)), (0, None), ("kmeans_assign",),
    ),
    "token_stats": Case(
        with_head(lambda weight, hidden, labels: tuple(effkern.token_stats(hidden, weight, labels, softcap=4.0))),
        lambda n: (torch.randn(n, 16), labels(n)), (0, 0), ("token_stats",),
    ),
    "label_rank": Case(
        lambda: Fn(lambda logits, labels: tuple(label_rank(logits, labels))),
        lambda n: (torch.randn(n, 37), labels(n)), (0, 0), ("label_rank",),
    ),
    "soft_labels": Case(
        with_head(lambda weight, hidden: tuple(effkern.soft_labels(hidden, weight, method="topk", k=3))),
        lambda n: (torch.randn(n, 16),), (0,), ("soft_labels",),
    ),
    "linear_distill_loss": Case(
        with_head(distill), lambda n: (torch.randn(n, 16), labels(n), torch.randn(n, 4), torch.randn(37, 4)),
        (0, 0, 0, None), ("linear_distill_fwd",),
    ),
    "LinearDistillLoss": Case(
        lambda: LossOf(LinearDistillLoss(z_loss=1e-4)),
        lambda n: (torch.randn(n, 16), torch.randn(37, 16), labels(n)), (0, None, 0), ("linear_distill_fwd",),
    ),
    "matrix_inverse_root": Case(
        lambda: Fn(effkern.matrix_inverse_root), lambda n: (matrices(n),), (0,), ("shampoo_inverse_root_",),
    ),
    "batched_eigh": Case(
        lambda: Fn(lambda a: tuple(effkern.batched_eigh(a))), lambda n: (matrices(n),), (0,), ("batched_eigh",)
    ),
    "LoopedBlock": Case(
        lambda: looped(injection="add", residual="laurel", rank=2), lambda n: (torch.randn(n, 16),), (0,),
        ("loop_step_fwd",),
    ),
    "LoopedBlock with a linear injection": Case(
        lambda: looped(injection="linear", residual="euler", conditioning="table", max_loops=4),
        lambda n: (torch.randn(n, 16),), (0,), ("loop_step_fwd",),
    ),
    "Decoder": Case(decoder, lambda n: (labels(8 * n, 50).view(n, 8),), (0,), ()),
    "Decoder with LAuReL": Case(
        lambda: decoder(residual="laurel", laurel=LaurelConfig(rank=3)),
        lambda n: (labels(8 * n, 50).view(n, 8),), (0,), ("laurel_fwd",),
    ),
}  # fmt: skip


def program_of(case: Case, module: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    shapes: Any = tuple(None if dim is None else {dim: N} for dim in case.dims)
    # Of a module whose forward takes *args.
    shapes = (shapes,) if isinstance(module, Fn) else shapes
    with torch.no_grad():
        return export(module, case.inputs(9), dynamic_shapes=shapes, strict=strict)


def assert_equal(found: Any, expected: Any) -> None:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert pairs
    for a, b in pairs:
        assert torch.equal(a, b), (a - b).abs().max()


def ours(program: torch.export.ExportedProgram) -> set[str]:
    names = {str(node.target) for node in program.graph.nodes}
    return {name.split(".")[1] for name in names if name.startswith("effkern.")}


@pytest.mark.skipif(native.load("_C") is not None, reason="the operators of impl='cpp' are looked for")
@pytest.mark.parametrize("name", CASES)
def test_program_runs_as_eager_does(name):
    """Written, read and run at other sizes than it was made with."""
    case = CASES[name]
    module = case.module().eval()
    program = program_of(case, module)
    assert ours(program) == set(case.operators)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (9, 2, 23):
        given = case.inputs(n)
        with torch.no_grad():
            expected = module(*given)
            assert_equal(program.module()(*given), expected)
            assert_equal(loaded(*given), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laurel", "LoopedBlock", "mean_pool"])
def test_strict_export(name):
    case = CASES[name]
    module = case.module().eval()
    program = program_of(case, module, strict=True)
    given = case.inputs(23)
    with torch.no_grad():
        assert_equal(program.module()(*given), module(*given))


def test_length_of_a_decoder_is_dynamic():
    module = decoder().eval()
    with torch.no_grad():
        program = export(module, (labels(24, 50).view(3, 8),), dynamic_shapes=({1: Dim("t", min=2, max=32)},))
        for length in (8, 3, 32):
            tokens = labels(3 * length, 50).view(3, length)
            assert_equal(program.module()(tokens), module(tokens))
        with pytest.raises(Exception, match="32"):
            program.module()(labels(99, 50).view(3, 33))


def run_alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


LOAD = """
import sys, torch
how, path, library = sys.argv[1:]
if how == "effkern":
    import effkern
elif how == "library":
    torch.ops.load_library(library)
program = torch.export.load(path).module()
x = torch.arange(48.0).view(3, 16).sin()
print(program(x, x.cos(), x.exp(), torch.ones(16))[0].double().sum().item())
assert ("effkern" in sys.modules) == (how == "effkern")
"""


@pytest.mark.skipif(native.load("_C") is not None, reason="is about effkern._C")
def test_a_program_needs_the_package_where_it_runs(tmp_path):
    """Python defines the operators' schemas: the compiled module alone adds kernels to nothing."""
    case = CASES["loop_step"]
    module = case.module().eval()
    path = str(tmp_path / "loop_step.pt2")
    torch.export.save(program_of(case, module), path)
    library = str(next((ROOT / "effkern").glob("_C.*so")))
    x = torch.arange(48.0).view(3, 16).sin()
    done = run_alone(LOAD, "effkern", path, library)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = module(x, x.cos(), x.exp(), torch.ones(16))[0].double().sum().item()
    assert float(done.stdout) == expected
    for how in ("nothing", "library"):
        done = run_alone(LOAD, how, path, library)
        assert done.returncode != 0
        assert "loop_step_fwd" in done.stderr


def test_an_operator_whose_module_is_missing_says_so(monkeypatch):
    monkeypatch.setattr(native, "load", lambda module: f"effkern.{module} was not built")
    with pytest.raises(NotImplementedError, match=r"effkern::mean_pool cannot run on cpu: effkern\._C was not built"):
        native._first_call("mean_pool", torch.ones(3, 2))


def test_an_operator_that_no_module_can_run_says_so(monkeypatch):
    """And does not call itself for ever: the dispatcher takes CUDA's kernel if any tensor is there."""
    monkeypatch.setattr(native, "load", lambda module: None if module == "_C" else "it is not there")
    with FakeTensorMode():
        on_cuda = torch.empty(3, 2, device="cuda")
    with pytest.raises(NotImplementedError, match="effkern::mean_pool cannot run on cuda:0: it is not there"):
        native._first_call("mean_pool", torch.ones(3, 2), on_cuda)
    with pytest.raises(NotImplementedError, match="cannot run on meta: it has kernels for CPU and CUDA"):
        native._first_call("mean_pool", torch.ones(3, 2), torch.ones(3, device="meta"))
    with pytest.raises(NotImplementedError, match="effkern::loop_similarity_fwd cannot run on cpu: it got no tensor"):
        torch.ops.effkern.loop_similarity_fwd([], [0], 2)


def test_a_program_of_the_reference_needs_torch_alone(tmp_path):
    """impl="reference" of the ops that have a form in plain PyTorch."""
    module = Fn(lambda f, h, e, w: tuple(effkern.loop_step(f, h, e, alpha=0.5, norm_weight=w, impl="reference")[:2]))
    program = program_of(CASES["loop_step"], module)
    assert not ours(program)
    path = str(tmp_path / "plain.pt2")
    torch.export.save(program, path)
    done = run_alone(LOAD, "nothing", path, "")
    assert done.returncode == 0, done.stderr
    x = torch.arange(48.0).view(3, 16).sin()
    assert float(done.stdout) == module(x, x.cos(), x.exp(), torch.ones(16))[0].double().sum().item()


class Scorer(nn.Module):
    """A LAuReL block, a looped block, statistics and loss of labels: one package, as compiling is what takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.laurel, self.looped = LaurelBlock(), looped(injection="add")
        self.head = nn.Parameter(torch.randn(37, 16))

    def forward(self, branch: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        y, normed = self.laurel(branch, x)
        hidden = self.looped(normed)
        stats = effkern.token_stats(hidden, self.head, labels)
        return y, hidden, stats.loss, stats.rank, effkern.linear_distill_loss(hidden, self.head, labels).loss


PACKAGE = """
import sys, torch
if sys.argv[1] == "effkern":
    import effkern
elif sys.argv[1] == "library":
    torch.ops.load_library(sys.argv[3])
package = torch._inductor.aoti_load_package(sys.argv[2])
inputs = torch.load(sys.argv[4], weights_only=True)
torch.save(list(package(*inputs)), sys.argv[5])
"""


@pytest.mark.slow
@pytest.mark.skipif(native.load("_C") is not None, reason="is about effkern._C")
def test_a_compiled_package_runs_as_eager_does(tmp_path):
    """By AOTInductor, at two sizes, in processes of their own; sums of our operators are eager's to the bit."""
    module = Scorer().eval()
    case = Case(Scorer, lambda n: (torch.randn(n, 16), torch.randn(n, 16), labels(n)), (0, 0, 0), ())
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp_cache_precompile_headers": False}
    package = torch._inductor.aoti_compile_and_package(
        program_of(case, module), package_path=str(tmp_path / "scorer.pt2"), inductor_configs=quick
    )
    library = str(next((ROOT / "effkern").glob("_C.*so")))
    given, found = str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")
    for n in (9, 23):
        inputs = case.inputs(n)
        torch.save(list(inputs), given)
        done = run_alone(PACKAGE, "effkern", package, library, given, found)
        assert done.returncode == 0, done.stderr
        outputs = torch.load(found, weights_only=True)
        with torch.no_grad():
            expected = module(*inputs)
        torch.testing.assert_close(outputs, list(expected))
        assert torch.equal(outputs[0], expected[0])
        assert torch.equal(outputs[3], expected[3])
    for how in ("nothing", "library"):
        done = run_alone(PACKAGE, how, package, library, given, found)
        assert done.returncode != 0
        assert "Could not find schema for effkern::laurel_fwd" in done.stderr
