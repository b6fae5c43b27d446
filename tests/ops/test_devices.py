"""Several devices, streams and CUDA graphs, as far as they can be seen without a GPU, and on one where there is one."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from effkern import native
from effkern.nn import GraphedLoops, LoopedBlock
from effkern.nn.looped import graph
from effkern.nn.lora import inject_lora
from effkern.ops import addresses
from effkern.optim import LoRARite, Shampoo
from effkern.optim.lora import runs
from tests.ops.fake_cuda import DEVICE, ELSEWHERE, fake_cuda
from tests.ops.op_calls import CALLS, Make
from tests.ops.operator_samples import operator_samples

# What copies a table of addresses with each call.
COPIES = {"loop_similarity"}
# "auto" on a GPU with effkern._C_cuda; eigh of the library waits.
CAPTURED = [
    "linear_distill_loss", "linear_distill_loss, teacher's logits", "linear_distill_loss, teacher's hidden states",
    "linear_distill_loss, sparse teacher", "laurel_residual", "laurel_residual, low rank alone", "loop_step",
    "loop_step, normed", "looped_linear_attention", "looped_linear_attention, dual", "mean_pool", "kmeans",
    "token_stats", "soft_labels", "soft_labels, of logits", "inverse_root, polar_express", "shampoo", "lora_rite",
    "batched_eigh",
]  # fmt: skip
WRITTEN_IN_PYTHON = [
    "linear_distill_fwd", "scale_grad_", "laurel_fwd", "laurel_bwd", "loop_step_triton_fwd", "loop_step_triton_bwd",
    "loop_similarity_triton_fwd", "loop_similarity_triton_bwd", "looped_attention_fwd", "looped_attention_bwd",
    "mean_pool_triton", "norm_mean_pool_triton", "kmeans_assign", "token_stats", "soft_labels",
    "shampoo_triton_gram_ema_", "shampoo_triton_inverse_root_", "shampoo_triton_apply_",
]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_on_a_gpu_no_value_is_read_and_launches_are_on_the_tensors_device(name, monkeypatch):
    # What the host computes once.
    CALLS[name].run(Make(), "auto")
    with fake_cuda(monkeypatch) as gpu:
        make = Make(DEVICE)
        with gpu.running():
            first = CALLS[name].run(make, "auto")
            gpu.copies.clear()
            again = CALLS[name].run(make.again(), "auto")
    assert all(str(x.device) == DEVICE for x in (*first, *again))
    assert {device for _, device in gpu.launches} <= {0}
    assert gpu.current == ELSEWHERE
    assert bool(gpu.copies) == (name in COPIES), gpu.copies


# These have a table of addresses; of new tensors it has to be copied.
BY_ADDRESS = ("loop_similarity", "shampoo_triton_apply")


def on_gpu(x: object) -> object:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("name", WRITTEN_IN_PYTHON)
def test_kernels_in_python_read_no_value_on_a_gpu(name, monkeypatch):
    """Forward and backward operators, on the arguments that calls on the CPU gave to them."""
    by_library = name in ("soft_labels", "token_stats")
    impl = "reference" if by_library else "triton"
    samples = operator_samples()[name]
    with fake_cuda(monkeypatch) as gpu:
        for sample in samples:
            args = tree_map(on_gpu, sample)
            args = tuple(impl if isinstance(x, str) and x == "cpp" else x for x in args)
            with gpu.running():
                out = getattr(torch.ops.effkern, name)(*args)
            assert all(str(x.device) == DEVICE for x in tree_leaves(out) if isinstance(x, Tensor))
        assert {device for _, device in gpu.launches} <= {0}
        assert bool(gpu.launches) != by_library
        assert bool(gpu.copies) == name.startswith(BY_ADDRESS), gpu.copies


@pytest.mark.parametrize("name", [name for name in CALLS if "batched_eigh" not in name])
def test_tensors_of_two_devices_are_refused(name):
    """Each tensor in turn is on another device than the rest."""
    whole = Make()
    CALLS[name].run(whole, "auto")
    places = [i for i, x in enumerate(whole.kept) if isinstance(x, Tensor)]
    assert len(places) > 1
    for odd in places:
        with pytest.raises(ValueError, match=r"must .*on (cpu|meta).*, got .*(cpu|meta)"):
            CALLS[name].run(Make(odd=odd), "auto")


def test_tables_of_addresses_in_a_capture(monkeypatch):
    """A table of a step before serves, and outlives what is thrown out; others are written without a copy."""
    device = torch.device(DEVICE)
    with fake_cuda(monkeypatch) as gpu, gpu.running():
        known = addresses.table([1, 2, 3], device)
        assert gpu.copies
        gpu.copies.clear()
        gpu.capturing = True
        assert addresses.table([1, 2, 3], device) is known
        new = addresses.table([1, 2, 4], device)
        assert new.device == device
        assert addresses.table([1, 2, 4], device) is not new
        assert not gpu.copies
        gpu.capturing = False
        for i in range(100):
            addresses.table([i], device)
    assert len(addresses._TABLES) <= 64
    assert known in addresses._CAPTURED.values()
    assert all(entry.table is not new for entry in addresses._TABLES.values())


def test_the_numbers_of_a_table_that_is_written_in_a_capture():
    numbers = (2**62 + 1, 0, -3)
    assert addresses._written(numbers, torch.device("cpu")).tolist() == list(numbers)


def test_a_table_made_on_one_stream_is_waited_for_on_another(monkeypatch):
    waited = []
    with fake_cuda(monkeypatch) as gpu:
        addresses.table([5, 6], torch.device(DEVICE))
        monkeypatch.setattr(FakeTensor, "record_stream", lambda x, stream: waited.append("kept"))
        addresses.table([5, 6], torch.device(DEVICE))
        assert not waited
        gpu.stream = SimpleNamespace(cuda_stream=2, wait_event=lambda event: waited.append("waits"))
        addresses.table([5, 6], torch.device(DEVICE))
    assert waited == ["waits", "kept"]


def test_a_loop_is_recorded_on_the_device_of_its_state(monkeypatch):
    """CUDA graphs and their streams are of the current device."""
    current = []

    class Recorder:
        def record(self, body):
            current.append(gpu.current)
            return body

    with fake_cuda(monkeypatch) as gpu:
        block = LoopedBlock(nn.Linear(4, 4, device=DEVICE), 2, dim=4)
        monkeypatch.setattr(graph, "RandomStates", lambda devices: SimpleNamespace(equals=lambda other: True))
        GraphedLoops(block, Recorder())(torch.empty(3, 4, device=DEVICE))
    assert current == [0]


def test_a_step_of_lora_rite_reads_no_value(monkeypatch):
    """But in the first, which looks whether a loaded state is that of the parameters."""
    monkeypatch.setattr(runs, "fresh_factors", lambda run, impl, loaded: list(range(len(run.layouts))))
    with fake_cuda(monkeypatch) as gpu, gpu.running():
        model = nn.Sequential(nn.Linear(8, 6, device=DEVICE), nn.Linear(6, 4, device=DEVICE))
        inject_lora(model, ["0", "1"], rank=2)
        optimizer = LoRARite(model, lr=0.01)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        for _ in range(2):
            gpu.copies.clear()
            gpu.launches.clear()
            optimizer.step()
    assert not gpu.copies
    assert {device for _, device in gpu.launches} == {0}


def test_shampoo_refuses_to_be_captured(monkeypatch):
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = Shampoo([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="step must not be captured in a CUDA graph"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(4, 3))


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


@pytest.mark.gpu
def test_a_captured_step_of_lora_rite():
    """With the gradients where they were in the step before; the rate is a tensor, changed between replays."""
    assert native.load("_C_cuda") is None
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8)).cuda() for _ in range(2)]
    for model in models:
        inject_lora(model, ["0", "2"], rank=8)
    models[1].load_state_dict(models[0].state_dict())
    rates = [torch.tensor(0.01, device="cuda") for _ in models]
    optimizers = [LoRARite(model, lr=rate) for model, rate in zip(models, rates)]
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    for a, b in zip(*trained):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        optimizers[1].step()
    for step in range(3):
        for a, b in zip(*trained):
            a.grad.normal_()
            b.grad.copy_(a.grad)
        for rate in rates:
            rate.fill_(0.01 / (step + 1))
        optimizers[0].step()
        recorded.replay()
        assert all(torch.equal(a, b) for a, b in zip(*trained))
