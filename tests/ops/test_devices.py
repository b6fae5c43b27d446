"""Several devices, streams and CUDA graphs, as far as they can be seen without a GPU, and on one where there is one."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from effkern.ops import addresses
from tests.ops.fake_cuda import DEVICE, ELSEWHERE, fake_cuda
from tests.ops.op_calls import CALLS, Make
from tests.ops.operator_samples import operator_samples

# What copies a table of addresses, or eigenvalues, with each call.
COPIES = {"loop_similarity"}
# "auto" on a GPU; eigh is the library's there, and waits.
CAPTURED = [
    "linear_distill_loss", "linear_distill_loss, teacher's logits", "linear_distill_loss, teacher's hidden states",
    "linear_distill_loss, sparse teacher", "laurel_residual", "laurel_residual, low rank alone", "loop_step",
    "loop_step, normed", "looped_linear_attention", "looped_linear_attention, dual", "mean_pool", "kmeans",
    "token_stats", "inverse_root, polar_express", "shampoo", "lora_rite",
]  # fmt: skip
WRITTEN_IN_PYTHON = [
    "linear_distill_fwd", "scale_grad_", "laurel_fwd", "laurel_bwd", "loop_step_triton_fwd", "loop_step_triton_bwd",
    "loop_similarity_triton_fwd", "loop_similarity_triton_bwd", "looped_attention_fwd", "looped_attention_bwd",
    "mean_pool_triton", "norm_mean_pool_triton", "kmeans_assign", "token_stats", "soft_labels",
    "shampoo_triton_gram_ema_", "shampoo_triton_inverse_root_", "shampoo_triton_apply_",
]  # fmt: skip
TENSORS = {name: len(make.kept) for name, make in ((name, Make()) for name in CALLS) if CALLS[name].run(make, "auto")}


@pytest.mark.parametrize("name", CALLS)
def test_on_a_gpu_no_value_is_read_and_launches_are_on_the_tensors_device(name, monkeypatch):
    with fake_cuda(monkeypatch) as gpu:
        make = Make(DEVICE)
        with gpu.running():
            first = CALLS[name].run(make, "auto")
            gpu.copies.clear()
            again = CALLS[name].run(make.again(), "auto")
    assert all(str(x.device) == DEVICE for x in (*first, *again))
    assert {device for _, device in gpu.launches} <= {0}
    assert gpu.current == ELSEWHERE
    print("LAUNCH", name, sorted({n for n, _ in gpu.launches}), gpu.copies)
    assert bool(gpu.copies) == (name in COPIES), gpu.copies


@pytest.mark.parametrize("name", WRITTEN_IN_PYTHON)
def test_kernels_in_python_read_no_value_on_a_gpu(name, monkeypatch):
    """Forward and backward operators, on the arguments that calls on the CPU gave to them."""
    impl = "reference" if name in ("soft_labels", "token_stats") else "triton"
    samples = operator_samples()[name]
    with fake_cuda(monkeypatch) as gpu:
        for sample in samples:
            args = tree_map(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE) if isinstance(x, Tensor) else x, sample)
            args = tuple(impl if isinstance(x, str) and x == "cpp" else x for x in args)
            with gpu.running():
                out = getattr(torch.ops.effkern, name)(*args)
            assert all(str(x.device) == DEVICE for x in tree_leaves(out) if isinstance(x, Tensor))
        assert {device for _, device in gpu.launches} <= {0}
        print("OPLAUNCH", name, sorted({n for n, _ in gpu.launches}), gpu.copies)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_two_devices_are_refused(name):
    """Each tensor in turn is on another device than the rest."""
    for odd in range(TENSORS[name]):
        make = Make(odd=odd)
        with pytest.raises(Exception) as e:
            CALLS[name].run(make, "auto")
        print("ODD", name, odd, type(e.value).__name__, str(e.value)[:150])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_call_replays(name):
    """Forward and backward, or the steps of an optimizer, in one CUDA graph; from the same start the same bits."""
    make = Make("cuda")
    run = CALLS[name].run
    run(make, "auto")
    written = [x.detach() for x in make.tensors()]
    start = [x.clone() for x in written]

    def restore() -> None:
        for x, s in zip(written, start):
            x.copy_(s)

    expected = [x.clone() for x in run(make.again(), "auto")]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            restore()
            run(make.again(), "auto")
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(make.again(), "auto")
    for _ in range(2):
        restore()
        graph.replay()
        assert all(map(torch.equal, outputs, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_side_streams_give_the_same_bits(name):
    run = CALLS[name].run
    expected = [[x.clone() for x in run(Make("cuda", seed), "auto")] for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for seed, stream in enumerate(streams):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(run(Make("cuda", seed), "auto"))
    torch.cuda.synchronize()
    for outputs, truth in zip(found, expected):
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(outputs, truth))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_second_device_gives_the_same_bits(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first, second = ([x.cpu() for x in CALLS[name].run(Make(f"cuda:{i}"), "auto")] for i in range(2))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second))
