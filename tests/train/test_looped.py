"""Training of looped decoders: from a file, resumed bit for bit, with drawn loops, distilled, and estimated."""

from dataclasses import asdict, replace

import pytest
import torch

from effkern.models import (
    Block,
    Decoder,
    DecoderConfig,
    LoopConfig,
    count_parameters,
    forward_flops,
    generate_with_loops,
)
from effkern.nn.looped import PoissonLognormalLoops
from effkern.train.checkpoint import Checkpoint, CheckpointError
from effkern.train.config import ScheduleConfig, TeacherConfig, TrainConfig
from effkern.train.estimate import activation_bytes, estimate
from effkern.train.exit_loss import exit_loss
from effkern.train.log import read_log
from effkern.train.loop import Trainer, compiled, train
from effkern.train.mapping import overlay, read_toml
from effkern.train.restore import Inputs, check_same_run, load_model
from tests.models.loop_models import looped, noisy
from tests.train.fixtures import at
from tests.train.test_loop import curve, digest, stop_after

# Everything that is drawn: loops of two stages, and the first state.
DRAWN = LoopConfig(
    "1x1,1x2,1x1,1x3", injection="linear", init="noise", norm=True, conditioning="table", sample="poisson", max_loops=6,
    layer_scalars="increment", residual="laurel", rank=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def drawn(base) -> TrainConfig:
    """18 steps in micro-batches, with validations between."""
    return replace(
        base,
        model=replace(base.model, stack="looped", num_layers=4, loop=DRAWN),
        data=replace(base.data, micro_batch_size=2),
        schedule=ScheduleConfig(steps=18),
        run=replace(base.run, eval_every=5),
    )


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("looped")
    return out, train(at(drawn, out), quiet=True)


def loops_run(trainer):
    """Per step, the loops of every forward pass, stage by stage, from what the cores see."""
    seen: list[list[tuple[int, int]]] = []
    real = trainer.step

    def step(i):
        seen.append([])
        return real(i)

    trainer.step = step
    for number, stage in enumerate(trainer.model.stack.stages):
        if hasattr(stage, "block"):
            real_count = stage.block._count

            def count(loops, step, stage=stage, number=number, real_count=real_count):
                found = real_count(loops, step)
                if stage.training and seen:
                    seen[-1].append((number, found))
                return found

            stage.block._count = count
    return seen


def test_it_learns(base, tmp_path):
    model = replace(
        base.model, stack="looped", num_layers=3, loop=LoopConfig("1x1,1x4,1x1", injection="add", norm=True)
    )
    config = replace(base, model=model, schedule=ScheduleConfig(steps=120))
    result = train(at(config, tmp_path, run__checkpoint_every=0), quiet=True)
    losses = [record["loss"] for record in result.evals]
    assert losses[-1] < 0.75 * losses[0]
    assert result.parameters == count_parameters(model)


@pytest.mark.parametrize("steps", [3, 10])
def test_stop_and_resume_is_bit_exact(drawn, whole, tmp_path, steps):
    config = at(drawn, tmp_path)
    first = loops_run(trainer := stop_after(Trainer(config, quiet=True), steps))
    assert trainer.run().state.step == steps
    second = loops_run(trainer := Trainer(config, quiet=True))
    assert trainer.run().finished
    assert curve(tmp_path) == curve(whole[0])
    assert digest(tmp_path) == digest(whole[0])
    # The draws are those of the step, the same for both micro-batches, and not the same all the time.
    stages = {1: PoissonLognormalLoops(2, limit=6), 3: PoissonLognormalLoops(3, limit=6)}
    seeds = {number: drawn.run.seed * 4 + number for number in stages}
    want = [[(n, stages[n].draw(step, seeds[n])) for n in stages] * 2 for step in range(18)]
    assert first + second == want
    assert len({tuple(row) for row in want}) > 4


def test_validation_does_not_touch_the_run(drawn, whole, tmp_path):
    train(at(drawn, tmp_path, run__eval_every=2), quiet=True)
    assert digest(tmp_path) == digest(whole[0])


def test_another_seed_draws_other_loops(drawn, whole, tmp_path):
    train(at(drawn, tmp_path, run__seed=1), quiet=True)
    assert digest(tmp_path) != digest(whole[0])


def test_micro_batches_are_the_batch(base, tmp_path):
    """Drawn loops belong to the step: the gradient of two halves is that of the whole."""
    loop = replace(DRAWN, init="zeros")
    config = replace(base, model=replace(base.model, stack="looped", num_layers=4, loop=loop))
    config = replace(config, schedule=ScheduleConfig(steps=3))
    losses = []
    for rows in (4, 2):
        out = tmp_path / str(rows)
        train(at(config, out, data__micro_batch_size=rows), quiet=True)
        losses.append([(r["loss"], r["grad_norm"]) for r in read_log(out / "log.jsonl") if r["kind"] == "train"])
    for a, b in zip(*losses):
        assert a == pytest.approx(b, rel=1e-4)


def test_the_stored_model_is_the_trained_one(drawn, whole):
    loaded = load_model(whole[0])
    assert loaded.model.config == drawn.model
    tokens = torch.randint(0, 300, (2, 9))
    assert torch.equal(loaded.model(tokens), load_model(whole[0]).model(tokens))


def test_a_looped_model_teaches_and_learns(drawn, whole, tmp_path):
    config = replace(
        drawn,
        schedule=ScheduleConfig(steps=6, mode="salt", omega=0.5, kd_steps=4),
        teacher=TeacherConfig(checkpoint=str(whole[0])),
    )
    result = train(at(config, tmp_path), quiet=True)
    steps = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    assert result.finished
    assert [r["divergence"] > 0 for r in steps] == [True] * 4 + [False] * 2


def test_from_a_file(drawn, tmp_path):
    (tmp_path / "run.toml").write_text(
        """
        [model]
        stack = "looped"
        num_layers = 12
        [model.loop]
        stages = "4x1,4x4,4x1"
        injection = "linear"
        sample = "uniform"
        """
    )
    config = overlay(TrainConfig(), read_toml(tmp_path / "run.toml"))
    assert config.model.loop == LoopConfig("4x1,4x4,4x1", injection="linear", sample="uniform")
    assert config.model.depth == 24
    with pytest.raises(ValueError, match="c: DecoderConfig: num_layers must be 3, the layers of loop"):
        overlay(config, {"model": {"loop": {"stages": "1x1,1x4,1x1"}}}, source="c")


def test_a_run_from_before_loops_resumes():
    config, inputs = TrainConfig(), Inputs("a", "b")
    stored = asdict(config)
    del stored["model"]["loop"]
    old = Checkpoint(1, {}, {"config": stored, "inputs": asdict(inputs)})
    check_same_run(old, config, inputs)
    now = replace(config, model=replace(config.model, stack="looped", loop=LoopConfig("6x2")))
    with pytest.raises(CheckpointError, match=r"model\.loop\.stages: '' -> '6x2'"):
        check_same_run(old, now, inputs)


def test_compilation_is_by_layer():
    """So that no number of loops compiles anything; the keys of the state dict stay."""
    config = DecoderConfig(vocab_size=37, hidden_size=16, num_heads=2, num_kv_heads=1, num_layers=2, mlp_size=24)
    model = Decoder(replace(config, stack="looped", loop=LoopConfig("1x1,1x3")))
    names = list(model.state_dict())
    assert compiled(model) is model
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    assert len(blocks) == 2
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert list(model.state_dict()) == names


GATED = LoopConfig("1x1,1x4,1x1", injection="add", norm=True, exit_gate=True, exit_beta=0.3)


@pytest.mark.parametrize("vocab_multiple", [1, 16])
def test_the_loss_of_a_gate_is_the_expected_one(vocab_multiple):
    """Value and every gradient, in float64, against probabilities and cross entropies written out."""
    config = replace(looped(), vocab_multiple=vocab_multiple, loop=GATED)
    model, tokens = noisy(config, size=0.2).train(), torch.randint(0, 37, (3, 8))
    targets = torch.randint(0, 37, (24,))
    targets[::5] = -100
    parameters = list(model.parameters())
    found = exit_loss(model, tokens, targets, step=0, ignore=-100, denom=50)
    grads = torch.autograd.grad(found.loss, parameters)

    stay, total = 1.0, 0.0
    counts = targets != -100
    gate = model.stack.stages[1].gate
    for t in range(1, 5):
        hidden = model(tokens, loops=t)
        ce = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), targets, reduction="none")
        states = model.stack.stages[1](*entering(model, tokens), loops=t)
        go = torch.sigmoid(states @ gate.weight + gate.bias).flatten()
        p = stay * go if t < 4 else stay
        stay = stay * (1 - go)
        total = total + (p * ce + 0.3 * p * p.log())[counts].sum() / 50
    torch.testing.assert_close(found.loss, total, rtol=1e-10, atol=1e-12)
    for name, a, b in zip(dict(model.named_parameters()), grads, torch.autograd.grad(total, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=name)
    torch.testing.assert_close(found.ce[counts], ce[counts].detach())


def entering(model, tokens):
    """What the looped stage gets."""
    stream, rope = model.embed(tokens, 0)
    return model.stack.stages[0](stream, rope), rope


def test_a_gate_learns_to_exit(base, tmp_path):
    """It leaves its start, the model learns, a resumed run is the same bit for bit, and inference may ask the gate."""
    config = replace(base, model=replace(base.model, stack="looped", num_layers=3, loop=GATED))
    config = replace(config, schedule=ScheduleConfig(steps=60), data=replace(base.data, micro_batch_size=2))
    result = train(at(config, tmp_path / "a"), quiet=True)
    losses = [record["loss"] for record in result.evals]
    assert losses[-1] < 0.85 * losses[0]
    stop_after(Trainer(at(config, tmp_path / "b"), quiet=True), 25).run()
    train(at(config, tmp_path / "b"), quiet=True)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    model = load_model(tmp_path / "a").model
    assert model.stack.stages[1].gate.weight.norm() > 1e-3
    found = generate_with_loops(model, torch.randint(0, 300, (4, 4)), 8, exit="gate-cdf=0.6", kv_policy="last")
    assert 1 <= found.loops[:, 1:].min() < 4


@pytest.mark.parametrize(
    ("loop", "mode", "message"),
    [
        (replace(GATED, exit_beta=0.0), "baseline", r"model\.loop\.exit_beta must be positive to train an exit gate"),
        (replace(GATED, stages="1x2,1x2,1x1"), "baseline", "must have one looped stage to train an exit gate"),
        (GATED, "salt", "schedule.mode must be baseline to train an exit gate, got 'salt'"),
    ],
)
def test_a_gate_that_cannot_be_trained(base, tmp_path, loop, mode, message):
    schedule = ScheduleConfig(steps=4, mode=mode, kd_steps=1 if mode == "salt" else 0)
    config = replace(base, model=replace(base.model, stack="looped", num_layers=3, loop=loop), schedule=schedule)
    with pytest.raises(ValueError, match=message):
        Trainer(at(config, tmp_path))


def test_estimate_counts_loops(base):
    config = replace(
        base, model=replace(base.model, stack="looped", num_layers=3, loop=LoopConfig("1x1,1x8,1x1", mode="full"))
    )
    plain = replace(base, model=replace(base.model, num_layers=10))
    same, deep = estimate(config, torch.float32), estimate(plain, torch.float32)
    assert same.student_flops == pytest.approx(deep.student_flops, rel=1e-12)
    assert same.activations == deep.activations
    assert same.parameters == count_parameters(replace(base.model, num_layers=3))
    assert forward_flops(config.model, 16) == forward_flops(plain.model, 16)


@pytest.mark.parametrize(
    ("loop", "forward", "backward"),
    [
        ({"mode": "full"}, 6, 6),
        ({"mode": "truncated", "gradient_loops": 2}, 6, 2),
        # Means of the draws.
        ({"sample": "poisson"}, 7, 7),
        ({"sample": "poisson", "max_loops": 6}, 6, 6),
        ({"sample": "uniform"}, 6, 6),
        ({"sample": "poisson", "mode": "truncated", "gradient_loops": 4}, 7, 4),
    ],
)
def test_estimate_of_training_flops(base, loop, forward, backward):
    def flops(loops):
        shape = replace(base.model, stack="looped", num_layers=2, loop=LoopConfig(f"1x1,1x{loops}"))
        return forward_flops(shape, base.data.seq_len).total

    config = replace(base, model=replace(base.model, stack="looped", num_layers=2, loop=LoopConfig("1x1,1x6", **loop)))
    found = estimate(config, torch.float32)
    assert found.student_flops == pytest.approx((flops(forward) + 2 * flops(backward)) * found.tokens, rel=1e-12)


@pytest.mark.parametrize(
    ("mode", "kept", "again"),
    [("full", 2 + 2 * 16, 0), ("autograd", 2 + 2 * 16, 0), ("recompute", 2, 2), ("recompute_layer", 2, 1)],
)
def test_activation_formula_is_what_is_kept(mode, kept, again):
    """`kept` blocks between forward and backward, which a backward pass adds `again` to, beside the loops' inputs."""
    loop = LoopConfig("1x1,2x16,1x1", mode=mode)
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=160,
        stack="looped",
        loop=loop,
    )
    model, storages = Decoder(config).train(), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() >= 512 * 16 * 4:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 64, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model(tokens)
    assert hidden.shape == (4, 128, 64)
    state = 4 * 64 * tokens.numel()
    plain = replace(config, stack="plain", loop=LoopConfig(), num_layers=1)
    ends = activation_bytes(replace(plain, num_layers=2), tokens.numel(), torch.float32)
    block = ends - activation_bytes(plain, tokens.numel(), torch.float32)
    ends -= 2 * block
    inputs = {"full": 0, "autograd": 0, "recompute": 16, "recompute_layer": 16}[mode]
    assert sum(storages.values()) == pytest.approx(kept * block + inputs * state + ends, rel=0.03)
    more = 2 * state if mode == "recompute_layer" else 0
    total = activation_bytes(config, tokens.numel(), torch.float32)
    assert total == (kept + again) * block + inputs * state + more + ends
