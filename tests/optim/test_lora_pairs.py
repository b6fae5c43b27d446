"""Finding LoRA pairs in models, in lists and by shape; what is refused, by name."""

import pytest
import torch
from torch import nn

from effkern.nn.lora import inject_lora
from effkern.optim import LoraPair, LoRARite, find_pairs
from effkern.optim.lora.pairs import orient, pair_names, tall


class PeftLinear(nn.Module):
    """The attributes of PEFT's LoRA layers, which keep their factors by adapter name."""

    def __init__(self, base, rank, adapters=("default",)):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in adapters})
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        for name in adapters:
            self.add(name, base, rank)

    def add(self, name, base, rank):
        self.lora_A[name] = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B[name] = nn.Linear(rank, base.out_features, bias=False)


class PeftConv(PeftLinear):
    def add(self, name, base, rank):
        self.lora_A[name] = nn.Conv2d(base.in_channels, rank, base.kernel_size, bias=False)
        self.lora_B[name] = nn.Conv2d(rank, base.out_channels, 1, bias=False)


class PeftEmbedding(PeftLinear):
    def add(self, name, base, rank):
        self.lora_embedding_A[name] = nn.Parameter(torch.randn(rank, base.num_embeddings))
        self.lora_embedding_B[name] = nn.Parameter(torch.zeros(base.embedding_dim, rank))


def model():
    return nn.ModuleDict(
        {
            "embed": PeftEmbedding(nn.Embedding(11, 6), 3),
            "conv": PeftConv(nn.Conv2d(5, 7, (3, 2)), 2),
            "proj": PeftLinear(nn.Linear(6, 8), 4, ("default", "other")),
        }
    )


def test_every_kind_of_layer_is_found_in_order():
    found = find_pairs(model())
    assert [(pair.name, list(pair.A.shape), list(pair.B.shape), pair.rank) for pair in found] == [
        ("embed.lora_embedding_A.default", [3, 11], [6, 3], 3),
        ("conv.lora_A.default", [2, 5, 3, 2], [7, 2, 1, 1], 2),
        ("proj.lora_A.default", [4, 6], [8, 4], 4),
        ("proj.lora_A.other", [4, 6], [8, 4], 4),
    ]
    assert [pair.name for pair in find_pairs(model(), adapter="other")] == ["proj.lora_A.other"]


def test_adapters_that_are_not_trained_are_left_out():
    m = model()
    m["proj"].lora_A["other"].requires_grad_(False)
    m["proj"].lora_B["other"].requires_grad_(False)
    assert "proj.lora_A.other" not in [pair.name for pair in find_pairs(m)]


def test_peft_itself():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv2d(1, 4, 3))
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    assert [(list(p.A.shape), list(p.B.shape)) for p in find_pairs(adapted)] == [
        ([2, 6], [8, 2]),
        ([2, 1, 3, 3], [4, 2, 1, 1]),
    ]
    LoRARite(adapted)


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_and_embedding_steps_are_those_of_their_matrices(channels_last):
    """Factors of higher dimension move as the flat ones do, wherever their memory has the kernel positions."""
    torch.manual_seed(1)
    conv = PeftConv(nn.Conv2d(5, 7, (3, 2)), 2)
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    flat = nn.ModuleDict({"x": PeftLinear(nn.Linear(30, 7), 2)})
    A, B = conv.lora_A["default"].weight, conv.lora_B["default"].weight
    a, b = flat["x"].lora_A["default"].weight, flat["x"].lora_B["default"].weight
    a.data.copy_(A.data.flatten(1))
    b.data.copy_(B.data.flatten(1))
    one, two = LoRARite(conv, lr=0.1), LoRARite(flat, lr=0.1)
    for _ in range(4):
        A.grad, B.grad = torch.randn(2, 5, 3, 2) / 50, torch.randn(7, 2, 1, 1) / 50
        a.grad, b.grad = A.grad.flatten(1), B.grad.flatten(1)
        one.step()
        two.step()
    torch.testing.assert_close(A.flatten(1), a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B.flatten(1), b, rtol=1e-5, atol=1e-6)
    assert one.state[A]["exp_avg"].shape == A.shape


def test_tall_views_share_memory():
    x = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    for factor in (x, torch.randn(4, 9), torch.randn(9, 4).T):
        view = tall(factor, 0)
        assert view.shape == (factor.numel() // 4, 4)
        view[1, 2] = 77.0
        assert (factor == 77.0).sum() == 1
    with pytest.raises(ValueError, match=r"LoRA factor must be dense in memory, got shape \[4, 3, 3\]"):
        tall(torch.randn(4, 3, 5)[:, :, ::2], 0)
    A, B = nn.Parameter(torch.randn(4, 10)[:, ::2]), nn.Parameter(torch.randn(6, 4))
    A.grad, B.grad = torch.ones(4, 5), torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"A of p: a factor must be dense in memory, got shape \[4, 5\]"):
        LoRARite([LoraPair("p", A, B, 0, 1)]).step()


@pytest.mark.parametrize(
    ("A", "B", "dims"),
    [((3, 8), (9, 3), (0, 1)), ((8, 3), (9, 3), (1, 1)), ((8, 3), (3, 9), (1, 0)), ((3, 8), (3, 9), (0, 0)),
     ((4, 16), (16, 4), (0, 1)), ((2, 5, 3, 3), (7, 2, 1, 1), (0, 1))],
)  # fmt: skip
def test_orientation_from_shapes(A, B, dims):
    pair = orient("p", torch.empty(A), torch.empty(B))
    assert (pair.rank_dim_A, pair.rank_dim_B) == dims


@pytest.mark.parametrize(
    ("A", "B", "why"),
    [((4, 4), (9, 4), "several readings"), ((3, 8), (9, 5), "no common rank"), ((4, 4), (4, 4), "several readings")],
)
def test_shapes_that_leave_a_choice_are_refused(A, B, why):
    with pytest.raises(ValueError, match=rf"params\[1\]: the shapes of a pair must say which.*{why}; give LoraPair"):
        LoRARite([(nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(6, 2))),
                  (nn.Parameter(torch.ones(A)), nn.Parameter(torch.ones(B)))])  # fmt: skip


@pytest.mark.parametrize("dims", [(0, 1), (1, 1), (1, 0), (0, 0)])
def test_both_orientations_step_alike(dims):
    torch.manual_seed(3)
    A, B, grads = torch.randn(8, 3), torch.randn(9, 3), [(torch.randn(8, 3) / 9, torch.randn(9, 3) / 9) for _ in "123"]
    results = []
    for d in (dims, (1, 1)):
        a = nn.Parameter((A.T if d[0] == 0 else A).clone(memory_format=torch.contiguous_format))
        b = nn.Parameter((B.T if d[1] == 0 else B).clone(memory_format=torch.contiguous_format))
        optimizer = LoRARite([LoraPair("p", a, b, *d)], lr=0.1)
        for ga, gb in grads:
            a.grad, b.grad = (ga.T if d[0] == 0 else ga), (gb.T if d[1] == 0 else gb)
            optimizer.step()
        results.append([(a.T if d[0] == 0 else a).detach(), (b.T if d[1] == 0 else b).detach()])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_lists():
    m = model()
    named = [(n, p) for n, p in m.named_parameters() if "lora" in n]
    assert [pair.rank for pair in pair_names(named)] == [pair.rank for pair in find_pairs(m)]
    flat = [x for pair in find_pairs(m) for x in (pair.A, pair.B)]
    assert LoRARite(flat).param_groups[0]["rank_dims"] == [0, 1] * 4
    with pytest.raises(ValueError, match=r"params must hold factors in the order A, B, A, B, got 7 tensors"):
        LoRARite(flat[:-1])
    with pytest.raises(ValueError, match=r"params\[0\] and \[1\] must be A \[r, ...\] and B \[rows, r, ...\] of one"):
        LoRARite([flat[0], flat[2], flat[1], flat[3]])
    with pytest.raises(ValueError, match=r"in pairs lora_A, lora_B, got without a partner: proj.lora_B.other.weight"):
        LoRARite([item for item in named if item[0] != "proj.lora_A.other.weight"])


def test_what_is_no_pair_is_refused_by_name():
    m = model()
    del m["proj"].lora_B["other"]
    with pytest.raises(ValueError, match=r"find_pairs: proj.lora_A.other must have a partner, got no proj.lora_B.oth"):
        LoRARite(m)
    m = model()
    m["proj"].lora_B["other"] = nn.Linear(5, 8, bias=False)
    with pytest.raises(ValueError, match=r"proj.lora_A.other: both factors must have the same rank, got 4 in .* and 5"):
        LoRARite(m)
    m = model()
    m["proj"].num_experts = 4
    with pytest.raises(ValueError, match=r"find_pairs: proj must hold one product, got 4 experts in one factor"):
        LoRARite(m)
    with pytest.raises(ValueError, match=r"params must hold LoRA pairs .* got none"):
        LoRARite(nn.Linear(3, 4))
    with pytest.raises(TypeError, match=r"params must be a model or a list of pairs, got one tensor"):
        LoRARite(nn.Parameter(torch.ones(3, 4)))
    with pytest.raises(TypeError, match=r"params\[0\] must be a pair \(A, B\) of tensors or a LoraPair, got int"):
        LoRARite([1, 2])
    with pytest.raises(ValueError, match=r"params must hold at least one LoRA pair, got none"):
        LoRARite([])
    with pytest.raises(TypeError, match=r"p: A must be a real floating tensor, got torch.int64"):
        LoRARite([LoraPair("p", torch.ones(2, 5, dtype=torch.long), torch.ones(6, 2), 0, 1)])


def test_a_shared_factor_is_refused_naming_both_pairs():
    A = nn.Parameter(torch.ones(2, 5))
    B = [nn.Parameter(torch.ones(6, 2)) for _ in "12"]
    pairs = [LoraPair("first", A, B[0], 0, 1), LoraPair("second", A, B[1], 0, 1)]
    with pytest.raises(ValueError, match=r"one pair each, got A of second shared with A of first"):
        LoRARite(pairs)
    optimizer = LoRARite(pairs[:1])
    with pytest.raises(ValueError, match=r"one pair each, got A of second shared with A of first"):
        optimizer.add_param_group({"params": pairs[1:]})


def test_other_trainable_parameters_are_not_forgotten():
    m = nn.ModuleDict({"a": nn.Linear(4, 5), "norm": nn.LayerNorm(5)})
    inject_lora(m, ["a"], rank=2)
    m["norm"].requires_grad_(True)
    with pytest.raises(ValueError, match=r"params must hold LoRA pairs alone, got other trainable parameters: norm.w"):
        LoRARite(m)
    assert len(LoRARite(m, others="ignore").param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1.0"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be a number, got a tensor \[2\]"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9,)}, ValueError, r"betas must be two numbers, got \(0.9,\)"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0 and finite, got nan"),
        ({"rank_tolerance": 0.0}, ValueError, r"rank_tolerance must be in \(0, 1\), got 0.0"),
        ({"second_moment": "max"}, ValueError, "second_moment must be 'average' or 'sum', got 'max'"),
        ({"escaped_mass": 1}, TypeError, "escaped_mass must be True or False, got 1"),
        ({"fused": "yes"}, TypeError, "fused must be None, True or False, got 'yes'"),
        ({"others": "adam"}, ValueError, "others must be 'error' or 'ignore', got 'adam'"),
    ],
)
def test_options_out_of_range(options, error, text):
    with pytest.raises(error, match=f"LoRARite: {text}"):
        LoRARite(model(), **options)


def test_groups():
    pairs = find_pairs(model())
    groups = [{"params": pairs[:1], "lr": 1.0}, {"params": pairs[1:], "clip_grad": 2.0}]
    with pytest.raises(ValueError, match=r"clip_grad must be the same in all groups, .* got 2.0 and 1.0"):
        LoRARite(groups)
    with pytest.raises(ValueError, match=r"a group must have options of .*, got \['momentum'\]"):
        LoRARite([{"params": pairs, "momentum": 0.9}])
