"""create, parameter_groups, describe and Together: who steps what, and what people put around an optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn

from effkern.nn import LaurelResidual, LoopedBlock
from effkern.nn.lora import inject_lora
from effkern.optim import LoRARite, OneSidedShampoo, Shampoo, Together, create, describe, parameter_groups, roles
from effkern.optim.shampoo import parameter_groups as shampoo_groups
from tests.numerics import rel_err

NAMES = ("adamw", "shampoo", "one_sided_shampoo", "muon", "lora_rite", "lora_muon", "scaled_adam")


class Net(nn.Module):
    """Every role but LoRA pairs; `tied` makes the output layer the embedding."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8, bias=False)
        self.gate = nn.Parameter(torch.ones(()))
        self.laurel = LaurelResidual(8, "rw+lr", rank=2, per_channel=True)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.conv(x.mT).mT
        return self.head(self.laurel(self.down(torch.tanh(self.norm(self.up(x)))) * self.gate, x).y)


def net(lora=False, frozen=True, **options):
    torch.manual_seed(3)
    model = Net(**options)
    if lora:
        if frozen:
            model.requires_grad_(False)
        inject_lora(model, ["up", "down"], rank=2)
        for module in (model.norm,) if frozen else ():
            module.requires_grad_(True)
    return model


def train(model, optimizer, steps=4, scheduler=None):
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (4, 6), generator=generator)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(name, model, lr, decay):
    """The optimizer as one would write it for Net."""
    matrices = [model.up.weight, model.down.weight, model.conv.weight, model.laurel.down, model.laurel.up]
    plain = [model.embed.weight, model.norm.weight, model.norm.bias, model.up.bias, model.conv.bias, model.gate,
             model.laurel.weights]  # fmt: skip
    rest = [{"params": [model.head.weight], "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    if name == "adamw":
        return [torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, *rest], lr=lr)]
    if "shampoo" in name:
        kind = Shampoo if name == "shampoo" else OneSidedShampoo
        groups = [{"params": matrices, "weight_decay": decay, "rule": "shampoo"}]
        return [kind(groups + [{**group, "rule": "adamw"} for group in rest], lr=lr)]
    flat_ones = [p for p in matrices if p.dim() == 2]
    other = {"params": [p for p in matrices if p.dim() != 2], "weight_decay": decay}
    muon = torch.optim.Muon(flat_ones, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW([other, *rest], lr=lr)]


@pytest.mark.parametrize("name", ["adamw", "shampoo", "one_sided_shampoo", "muon"])
def test_the_same_steps_as_by_hand(name):
    model, other = net(), net()
    start = flat(model)
    train(model, create(name, model, lr=0.02, weight_decay=0.3))
    parts = by_hand(name, other, 0.02, 0.3)
    train(other, Together(*parts))
    assert (flat(model) - start).norm() > 0.1
    # Fused and plain AdamW round differently.
    assert rel_err(flat(model) - start, (flat(other) - start).double()) < 1e-5


def test_lora_optimizers_step_pairs_and_adamw_the_rest():
    model, other = net(lora=True), net(lora=True)
    optimizer = create("lora_rite", model, lr=0.02, weight_decay=0.1, adamw={"lr": 0.005}, betas=(0.8, 0.99))
    assert [type(part).__name__ for part in optimizer.parts] == ["LoRARite", "AdamW"]
    start = flat(model)
    train(model, optimizer)
    pairs = LoRARite(other, lr=0.02, weight_decay=0.1, betas=(0.8, 0.99), others="ignore")
    train(other, Together(pairs, torch.optim.AdamW(other.norm.parameters(), lr=0.005, weight_decay=0.0)))
    assert rel_err(flat(model) - start, (flat(other) - start).double()) < 1e-5
    # Pairs alone: the optimizer itself.
    model.norm.requires_grad_(False)
    assert type(create("lora_rite", model)) is LoRARite


def names_of(found):
    return {role: [name for name, _ in members] for role, members in found.items() if members}


def test_roles():
    assert names_of(roles(net())) == {
        "matrices": ["conv.weight", "up.weight", "down.weight", "laurel.down", "laurel.up"],
        "output": ["head.weight"],
        "embeddings": ["embed.weight"],
        "norms": ["norm.weight", "norm.bias"],
        "vectors": ["gate", "conv.bias", "up.bias", "laurel.weights"],
    }
    tied = names_of(roles(net(tied=True)))
    assert tied["embeddings"] == ["embed.weight"]
    assert "output" not in tied
    assert names_of(roles(net(), output=["down.weight"]))["output"] == ["down.weight", "head.weight"]
    adapted = names_of(roles(net(lora=True)))
    assert set(adapted) == {"norms", "lora"}
    assert adapted["lora"][:2] == ["up.lora_A.default.weight", "up.lora_B.default.weight"]
    looped = LoopedBlock([nn.Linear(8, 8)], 3, dim=8, layer_scalars="increment", conditioning="table", max_loops=3)
    tables = [name for name in names_of(roles(looped))["vectors"] if name.endswith("table")]
    assert [dict(looped.named_parameters())[name].dim() for name in tables] == [2, 2]


def test_groups_and_their_table():
    model = net()
    groups = parameter_groups(model, weight_decay=0.1)
    assert [(g["role"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("matrices", 0.1, 5), ("output", 0.1, 1), ("embeddings", 0.0, 1), ("norms", 0.0, 2), ("vectors", 0.0, 4),
    ]  # fmt: skip
    assert sum(p.numel() for g in groups for _, p in g["params"]) == sum(p.numel() for p in model.parameters())
    assert describe(model).splitlines()[1].split() == [
        "matrices", "-", "5", "416", "-", "0", "conv.weight", "..", "laurel.up",
    ]  # fmt: skip
    lines = [line.split() for line in describe(create("shampoo", model, lr=0.01, weight_decay=0.1)).splitlines()]
    assert lines[0] == ["role", "stepped", "by", "parameters", "numbers", "lr", "decay", "names"]
    assert lines[1][:6] == ["matrices", "shampoo", "5", "416", "0.01", "0.1"]
    assert lines[3] == ["embeddings", "adamw", "1", "88", "0.01", "0", "embed.weight"]
    muon = describe(create("muon", model, matrix_lr_ratio=2.0))
    assert [line.split()[:3] for line in muon.splitlines()[1:3]] == [
        ["matrices", "Muon", "4"],
        ["matrices", "AdamW", "1"],
    ]
    assert "0.002" in muon.splitlines()[1]
    assert "lora   LoRARite    4" in describe(create("lora_rite", net(lora=True)))
    assert describe(torch.optim.SGD(model.parameters(), lr=0.1)).splitlines()[1].startswith("-     SGD")


def test_the_groups_are_those_of_shampoos_own_function():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 9))
    theirs = {name: g["rule"] for g in shampoo_groups(model) for name, _ in g["params"]}
    groups = create("shampoo", model).param_groups
    assert {name: g["rule"] for g in groups for name in g["param_names"]} == theirs


# What people put around an optimizer -----------------------------------------------------------------------------


def lora_or_not(name):
    return net(lora=name.startswith(("lora", "scaled")))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_schedulers_set_its_rates(name):
    model = lora_or_not(name)
    optimizer = create(name, model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    ids = torch.arange(11)[None]
    first = nn.functional.cross_entropy(model(ids)[0], ids[0].roll(1))
    train(model, optimizer, 3, scheduler)
    assert nn.functional.cross_entropy(model(ids)[0], ids[0].roll(1)) < first
    assert [float(group["lr"]) for group in optimizer.param_groups] == [pytest.approx(0.01 / 8)] * len(
        optimizer.param_groups
    )
    before = flat(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_round(name):
    """Two steps, a file, two more: as four in one go; also copies and pickles."""
    model = lora_or_not(name)
    optimizer = create(name, model, lr=0.02)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    resumed = create(name, twin, lr=0.5)
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    # Twice, as accelerate loads once by itself.
    resumed.load_state_dict(state)
    resumed.load_state_dict(state)
    assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert len(resumed.state) == len(optimizer.state) > 0
    train(model, optimizer, 2)
    train(twin, resumed, 2)
    assert torch.equal(flat(model), flat(twin))
    third, again = copy.deepcopy((model, optimizer))
    assert type(again) is type(optimizer)
    assert train(third, again, 2) == train(model, optimizer, 2)
    assert torch.equal(flat(third), flat(model))


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler(name):
    """Scaled gradients step as plain ones do; an overflow keeps every part from stepping, and lowers the scale."""
    model, plain = lora_or_not(name), lora_or_not(name)
    optimizer, other = create(name, model, lr=0.01), create(name, plain, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ids = torch.arange(11)[None]
    for m, scale in ((model, True), (plain, False)):
        loss = nn.functional.cross_entropy(m(ids)[0], ids[0])
        (scaler.scale(loss) if scale else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    other.step()
    assert rel_err(flat(model), flat(plain).double()) < 1e-6
    before = flat(model)
    optimizer.zero_grad()
    scaler.scale(nn.functional.cross_entropy(model(ids)[0], ids[0])).backward()
    next(p for g in optimizer.param_groups for p in g["params"]).grad.view(-1)[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), before)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("name", ["muon", "one_sided_shampoo", "lora_rite"])
def test_a_closure_as_lightning_passes_it(name):
    """Automatic optimization: forward, zero_grad and backward run within step(closure), once; its loss comes back.

    The wrapper is what Lightning makes of an optimizer: an object of a subclass with its attributes but step.
    """
    model, other = lora_or_not(name), lora_or_not(name)
    optimizer = create(name, model, lr=0.01)
    wrapper = type("Wrapped", (type(optimizer),), {"__init__": lambda self: None})()
    vars(wrapper).update({k: v for k, v in vars(optimizer).items() if k != "step"})
    assert isinstance(wrapper, torch.optim.Optimizer)
    assert [id(g) for g in wrapper.param_groups] == [id(g) for g in optimizer.param_groups]
    ids, calls = torch.arange(11)[None], []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        loss = nn.functional.cross_entropy(model(ids)[0], ids[0])
        optimizer.zero_grad()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure=closure)
    second = optimizer.step(closure)
    assert len(calls) == 2
    assert second.item() < first.item()
    # Manual optimization is a plain loop.
    plain = create(name, other, lr=0.01)
    for _ in range(2):
        plain.zero_grad()
        nn.functional.cross_entropy(other(ids)[0], ids[0]).backward()
        plain.step()
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("name", ["muon", "shampoo", "lora_rite"])
def test_accelerate(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model, other = lora_or_not(name), lora_or_not(name)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = create(name, model, lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    prepared, wrapped, schedule = accelerator.prepare(model, optimizer, scheduler)
    plain = create(name, other, lr=0.02)
    ids = torch.arange(11)[None]
    for _ in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(ids)[0], ids[0]))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
    for rate in (0.02, 0.01):
        for group in plain.param_groups:
            group["lr"] = rate
        plain.zero_grad()
        nn.functional.cross_entropy(other(ids)[0], ids[0]).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        plain.step()
    assert rel_err(flat(model), flat(other).double()) < 1e-6
    accelerator.save_state(str(tmp_path))
    before = flat(model)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(flat(model), before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning(automatic, tmp_path):
    """Where it is installed: its Trainer, in both ways, makes the steps of a plain loop."""
    lightning = pytest.importorskip("lightning")
    data = torch.utils.data.DataLoader(list(torch.randint(0, 11, (5, 4, 6))), batch_size=None)

    def loss_of(model, ids):
        return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = net(), automatic

        def configure_optimizers(self):
            return create("muon", self.net, lr=0.01)

        def training_step(self, ids, index):
            if automatic:
                return loss_of(self.net, ids)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, ids))
            optimizer.step()
            return None

    module, plain = Module(), net()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(module, data)
    optimizer = create("muon", plain, lr=0.01)
    for ids in data:
        optimizer.zero_grad()
        loss_of(plain, ids).backward()
        optimizer.step()
    assert torch.equal(flat(module.net), flat(plain))


# Bad input -------------------------------------------------------------------------------------------------------


def pairs_alone():
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    inject_lora(model, ["0"], rank=2)
    return model


def matrices_alone():
    return nn.Linear(8, 8, bias=False)


@pytest.mark.parametrize(
    ("name", "model", "options", "kind", "message"),
    [
        ("sgd", net, {}, ValueError, r"create: name must be one of adamw, shampoo, .* got 'sgd'"),
        ("adamw", list, {}, TypeError, r"create\('adamw'\): model must be a torch.nn.Module, got list"),
        ("adamw", net, {"weight_decay": -1}, ValueError, r"weight_decay must be at least 0, got -1"),
        ("shampoo", net, {"matrix_lr_ratio": 0}, ValueError, r"matrix_lr_ratio must be above 0, got 0"),
        ("lora_rite", net, {"matrix_lr_ratio": 2}, ValueError, r"matrix_lr_ratio must be left at 1, .* got 2"),
        ("shampoo", net, {"adamw": {"lr": 1}}, ValueError, r"adamw must be None, .* got \{'lr': 1\}"),
        ("shampoo", net, {"beta": 1}, TypeError, r"create\('shampoo'\): options must be among .*, got beta"),
        ("one_sided_shampoo", net, {"exponents": 1}, TypeError, r"options must be among .*, got exponents"),
        ("shampoo", net, {"side": "top"}, ValueError, r"Shampoo: .*side.*got 'top'"),
        ("muon", net, {"adamw": {"nesterov": True}}, TypeError, r"'muon'\), adamw: options must be .* got nesterov"),
        ("lora_rite", pairs_alone, {"adamw": {"typo": 1}}, TypeError, r"'lora_rite'\), adamw: options .* got typo"),
        ("muon", matrices_alone, {"adamw": {"typo": 1}}, TypeError, r"'muon'\), adamw: options must be .* got typo"),
        ("lora_rite", net, {}, ValueError, r"params must hold LoRA pairs .* got none"),
        ("lora_rite", lambda: net(lora=True), {"others": "error"}, TypeError, r"options must be among .* got others"),
        ("muon", lambda: nn.Embedding(4, 4), {}, ValueError, r"'muon'\): model must have matrices besides .* got none"),
        (
            "adamw",
            lambda: net().requires_grad_(False),
            {},
            ValueError,
            r"must have parameters to train, got none in Net",
        ),
    ],
)
def test_bad_input(name, model, options, kind, message):
    with pytest.raises(kind, match=message):
        create(name, model(), **options)
