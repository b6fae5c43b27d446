"""One step: accumulation, the SALT objective, clipping, weight decay, and what is not finite."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from effkern.models import Decoder, DecoderConfig
from effkern.train.config import DataConfig, OptimizerConfig, TeacherConfig, TrainConfig
from effkern.train.optimizer import build_optimizer, split_decay
from effkern.train.step import IGNORE, train_step
from effkern.train.timing import StepTimer

MODEL = DecoderConfig(
    vocab_size=37,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    mlp_size=24,
    max_seq_len=32,
    vocab_multiple=8,
)
CONFIG = TrainConfig(
    model=MODEL,
    data=DataConfig(seq_len=8, batch_size=6),
    optimizer=OptimizerConfig(clip_norm=0.0),
    teacher=TeacherConfig(temperature=0.5, student_temperature=1.0),
)


def run(config, tokens, *, teacher=None, omega=0.0, model=None, rate=1e-2):
    """A step on a fresh model; returns the model, its gradients before zeroing, and the result."""
    model = model or Decoder(config.model, seed=1)
    optimizer = build_optimizer(model, config.optimizer)
    seen: dict[str, torch.Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    result = train_step(
        model,
        model,
        optimizer,
        tokens,
        config,
        teacher=teacher,
        omega=omega,
        rate=rate,
        dtype=torch.float32,
        timer=StepTimer(torch.device("cpu")),
    )
    return model, seen, result


@pytest.mark.parametrize("omega", [0.0, 0.6])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_is_the_big_batch(omega, micro):
    tokens = torch.randint(0, 37, (6, 9))
    # Uneven numbers of supervised tokens: dividing by micro-batch would give another loss.
    tokens[0, 3:] = tokens[4, 5:] = 0
    teacher = Decoder(replace(MODEL, hidden_size=8), seed=2).eval().requires_grad_(False)
    _, gradients, result = run(CONFIG, tokens, teacher=teacher, omega=omega)
    parts = replace(CONFIG, data=replace(CONFIG.data, micro_batch_size=micro))
    _, pieces, accumulated = run(parts, tokens, teacher=teacher, omega=omega)
    assert accumulated.loss == pytest.approx(result.loss, rel=1e-6)
    assert accumulated.grad_norm == pytest.approx(result.grad_norm, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-7)
    assert accumulated.accuracy == result.accuracy


def test_denominator_counts_supervised_tokens_of_the_step(monkeypatch):
    """Rows whose labels are ignored must not change the mean, wherever they fall among the micro-batches."""
    tokens = torch.randint(0, 37, (6, 9))
    _, gradients, _ = run(CONFIG, tokens[:4])
    masked = tokens.clone()
    masked[4:] = 0

    from effkern.train import step as module

    real = module.linear_distill_loss
    calls = []

    def masking(hidden, weight, labels, **kwargs):
        labels = labels.clone()
        first = 2 * len(calls)
        calls.append(len(labels))
        if first >= 4:
            labels[:] = IGNORE
        return real(hidden, weight, labels, **{**kwargs, "denom": 32})

    monkeypatch.setattr(module, "linear_distill_loss", masking)
    parts = replace(CONFIG, data=replace(CONFIG.data, micro_batch_size=2))
    _, pieces, _ = run(parts, masked)
    assert calls == [16, 16, 16]
    for name, gradient in gradients.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-7)


def test_objective_is_salts(monkeypatch):
    tokens = torch.randint(0, 37, (6, 9))
    teacher = Decoder(replace(MODEL, hidden_size=8), seed=2).eval().requires_grad_(False)
    model = Decoder(MODEL, seed=1)
    labels = tokens[:, 1:].flatten()
    log_q = model.logits(model(tokens[:, :-1])).flatten(0, 1).log_softmax(-1)
    p = (teacher.logits(teacher(tokens[:, :-1])).flatten(0, 1) / 0.5).softmax(-1)
    ce = F.nll_loss(log_q, labels)
    kl = F.kl_div(log_q, p, reduction="batchmean")
    _, gradients, result = run(CONFIG, tokens, teacher=teacher, omega=0.3)
    assert result.ce == pytest.approx(ce.item(), rel=1e-5)
    assert result.divergence == pytest.approx(kl.item(), rel=1e-4)
    assert result.loss == pytest.approx((0.7 * ce + 0.3 * kl).item(), rel=1e-5)
    expected = torch.autograd.grad(0.7 * ce + 0.3 * kl, list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), expected):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)
    hits = (log_q.argmax(-1) == labels).float().mean().item()
    assert result.accuracy == pytest.approx(hits)


def test_teacher_does_not_run_at_omega_zero():
    class Forbidden(Decoder):
        def forward(self, *args, **kwargs):
            raise AssertionError("the teacher ran")

    tokens = torch.randint(0, 37, (6, 9))
    teacher = Forbidden(MODEL, seed=2)
    _, gradients, result = run(CONFIG, tokens, teacher=teacher, omega=0.0)
    _, plain, expected = run(CONFIG, tokens)
    assert result == expected
    assert all(torch.equal(gradients[n], plain[n]) for n in plain)
    with pytest.raises(AssertionError, match="the teacher ran"):
        run(CONFIG, tokens, teacher=teacher, omega=0.1)


def test_clipping_bounds_the_gradient_that_is_applied():
    tokens = torch.randint(0, 37, (6, 9))
    clipped = replace(CONFIG, optimizer=replace(CONFIG.optimizer, clip_norm=0.01))
    _, gradients, result = run(clipped, tokens)
    _, free, expected = run(CONFIG, tokens)
    assert result.grad_norm == expected.grad_norm > 0.01
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(gradients["norm.weight"] / norm, free["norm.weight"] / expected.grad_norm)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["hidden", "gradient"])
def test_a_step_that_is_not_finite_touches_nothing(bad, where):
    model = Decoder(MODEL, seed=1)
    optimizer = build_optimizer(model, CONFIG.optimizer)
    tokens = torch.randint(0, 37, (6, 9))

    def step(forward):
        timer = StepTimer(torch.device("cpu"))
        return train_step(
            model,
            forward,
            optimizer,
            tokens,
            CONFIG,
            teacher=None,
            omega=0.0,
            rate=1e-2,
            dtype=torch.float32,
            timer=timer,
        )

    assert step(model).applied
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}

    def poisoned(inputs):
        hidden = model(inputs)
        if where == "hidden":
            return hidden * bad
        hidden.register_hook(lambda gradient: gradient * bad)
        return hidden

    result = step(poisoned)
    assert not result.applied
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[i][k], v) for k, v in state.items())
    assert all(p.grad is None for p in model.parameters())
    assert step(model).applied


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_spares_norms_and_the_embedding(tied):
    model = Decoder(replace(MODEL, tie_head=tied))
    decayed, plain = split_decay(model)
    names = {id(p): n for n, p in model.named_parameters()}
    expected = {"stack.blocks.0.attention.qkv.weight", "stack.blocks.0.attention.out.weight"}
    expected |= {"stack.blocks.0.mlp.gate_up.weight", "stack.blocks.0.mlp.down.weight"} | (
        set() if tied else {"head.weight"}
    )
    assert {names[id(p)] for p in decayed} == expected
    assert len(decayed) + len(plain) == len(list(model.parameters()))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.25))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]


def test_update_is_adamws_at_the_given_rate():
    tokens = torch.randint(0, 37, (6, 9))
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, weight_decay=0.0))
    start = Decoder(MODEL, seed=1)
    model, gradients, _ = run(config, tokens, rate=0.03)
    for (name, new), old in zip(model.named_parameters(), start.parameters()):
        # The first step of Adam moves by rate * g / (|g| + eps).
        torch.testing.assert_close(
            new, old - 0.03 * gradients[name] / (gradients[name].abs() + 1e-8), rtol=1e-4, atol=1e-5
        )


def test_the_loss_op_is_a_part_of_the_step():
    timer = StepTimer(torch.device("cpu"))
    model = Decoder(MODEL, seed=1)
    tokens = torch.randint(0, 37, (6, 9))
    optimizer = build_optimizer(model, CONFIG.optimizer)
    teacher = Decoder(MODEL, seed=2)
    train_step(
        model, model, optimizer, tokens, CONFIG, teacher=teacher, omega=0.5, rate=0.1, dtype=torch.float32, timer=timer
    )
    assert timer.loss > 0
    assert timer.teacher > 0
    assert timer.loss + timer.teacher < timer.total
