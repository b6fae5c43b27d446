"""The end-to-end benchmark: the plain side trains the package's models, and its figures are what they say."""

import argparse
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import end_to_end as bench
from benchmarks.end_to_end_plain import PlainDecoder, PlainShampoo, PlainTrainer
from effkern.models import Decoder
from effkern.train.optimizer import build_optimizer
from effkern.train.schedules import learning_rate
from effkern.train.step import train_step
from effkern.train.timing import StepTimer

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 48, "max_seq_len": 16}


def small(method: str, tmp_path) -> tuple:
    """Config, student and teacher of a method, at sizes that train in milliseconds."""
    config = bench.configure(method, tmp_path, 20, 1)
    model = replace(config.model, **SMALL)
    data = replace(config.data, seq_len=12, batch_size=4)
    config = replace(config, model=model, data=data, run=replace(config.run, compile=False))
    teacher = Decoder(replace(bench.PRESETS["demo-teacher"].config.model, **{**SMALL, "hidden_size": 16}), seed=5)
    return config, Decoder(model, seed=1), teacher if config.teacher.checkpoint else None


@pytest.mark.parametrize("method", bench.METHODS)
def test_both_sides_train_alike(method, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    config, student, teacher = small(method, tmp_path)
    plain = PlainTrainer(config, student, teacher)
    plain.set_exact(True)
    tokens = [torch.randint(0, 64, (4, 13)) for _ in range(4)]
    assert plain.validate(tokens) == pytest.approx(
        torch.stack([_cross_entropy(student, t) for t in tokens]).mean().item(), rel=1e-5
    )
    optimizer = build_optimizer(student, config.optimizer)
    before = [p.detach().clone() for p in student.parameters()]
    for number, batch in enumerate(tokens):
        ours = train_step(
            student, student, optimizer, batch, config, teacher=teacher, omega=0.5 if teacher else 0.0,
            rate=learning_rate(config.optimizer, 20, number), dtype=torch.float32,
            timer=StepTimer(torch.device("cpu")), step=number,
        )  # fmt: skip
        theirs = plain.step(number, batch)
        # The same mathematics in another order; Shampoo's roots are good to 1e-3 and change later steps.
        assert theirs == pytest.approx((ours.loss, ours.grad_norm), rel=1e-5 if number == 0 else bench.BOUND)
        if number + 1 == bench.AGREED:
            bench.agree_on_changes(method, changes(plain.model, before), changes(student, before))
    bench.agree(method, [theirs], [(ours.loss, ours.grad_norm)])


def changes(model: torch.nn.Module, before: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(i): p.detach() - was for i, (p, was) in enumerate(zip(model.parameters(), before))}


@pytest.mark.parametrize("method", ["base", "shampoo"])
@pytest.mark.parametrize("setting", ["weight_decay", "betas"])
def test_another_optimizer_is_not_timed(method, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    config, student, _ = small(method, tmp_path)
    before = [p.detach().clone() for p in student.parameters()]
    tokens = [torch.randint(0, 64, (4, 13), generator=torch.Generator().manual_seed(i)) for i in range(bench.AGREED)]

    def trained(wrong: bool) -> tuple[list, dict]:
        plain = PlainTrainer(config, student, None)
        for optimizer in plain.optimizers if wrong else ():
            for group in optimizer.param_groups:
                group.update({"weight_decay": 0.0} if setting == "weight_decay" else {"betas": (0.9, 0.9)})
            if isinstance(optimizer, PlainShampoo):
                optimizer.wd = 0.0 if setting == "weight_decay" else optimizer.wd
                optimizer.betas = (0.9, 0.9) if setting == "betas" else optimizer.betas
        return [plain.step(n, batch) for n, batch in enumerate(tokens)], changes(plain.model, before)

    (losses, moved), (others, other) = trained(False), trained(True)
    bench.agree_on_changes(method, moved, moved)
    # Losses and norms of so few steps do not tell.
    bench.agree(method, losses, others)
    with pytest.raises(SystemExit, match=f"{method}: the changes of parameter .* nothing is timed"):
        bench.agree_on_changes(method, moved, other)


def test_plain_roots_are_exact_while_sides_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    config, student, _ = small("shampoo", tmp_path)
    plain, dtypes, real = PlainTrainer(config, student, None), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: dtypes.append(x.dtype) or real(x))
    for exact in (False, True, False):
        plain.set_exact(exact)
        dtypes.clear()
        plain.step(0, torch.randint(0, 64, (4, 13)))
        assert set(dtypes) == {torch.float64 if exact else torch.float32}


def test_a_side_says_what_its_steps_did(tmp_path):
    side = bench.Side.__new__(bench.Side)
    model = torch.nn.Linear(2, 3)
    side.kept, side.before = [model], [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model.bias += 1.0
    called = []
    side.checked = lambda: called.append("checked")
    path = tmp_path / "changes.safetensors"
    assert side.changes(path) == {"changes": str(path)}
    found = load_file(path)
    assert torch.equal(found["0"], torch.zeros(3, 2))
    assert torch.allclose(found["1"], torch.ones(3))
    assert (side.before, called) == ([], ["checked"])
    # NaN is no agreement.
    with pytest.raises(SystemExit, match="the changes of parameter 1"):
        bench.agree_on_changes("base", found, {**found, "1": found["1"] * float("nan")})


def _cross_entropy(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(
            model.logits(model(tokens[:, :-1])).flatten(0, 1), tokens[:, 1:].flatten()
        )


def test_the_plain_decoder_refuses_another_shape(tmp_path):
    config, _, _ = small("base", tmp_path)
    untied = Decoder(replace(config.model, tie_head=False))
    with pytest.raises(ValueError, match="must have the parameters of the package's"):
        PlainDecoder(untied, 12)


def test_sides_that_differ_are_not_timed():
    bench.agree("base", [(5.0, 1.0)], [(5.0, 1.0005)])
    for wrong in (1.01, float("nan")):
        with pytest.raises(SystemExit, match="base: step 1 differs by"):
            bench.agree("base", [(5.0, 1.0), (5.0, 1.0)], [(5.0, 1.0), (5.0, wrong)])


def measured(step: float, losses: list[float]) -> dict:
    curve = [(3 + 10 * i, loss) for i, loss in enumerate(losses)]
    memory = {"state": 2 << 20, "step": 3 << 20}
    return {"wall": [step, step, 9 * step], "cpu": [step] * 3, "curve": curve, "memory": memory}


def test_figures_are_of_the_median_step_and_of_the_time_to_the_base_loss():
    found = {
        ("base", "plain"): measured(0.1, [9.0, 8.0, 7.0]),
        ("base", "effkern"): measured(0.05, [9.0, 8.0, 7.0]),
        ("loops", "plain"): measured(0.2, [9.0, 7.0, 6.0]),
        ("loops", "effkern"): measured(0.2, [9.0, 8.5, 8.0]),
    }
    rows = bench.summarise(found, 1000)
    assert rows["base", "plain"]["tokens_per_s"] == pytest.approx(10000)
    assert rows["base", "plain"]["to_base"] == 1.0
    assert rows["base", "effkern"]["to_base"] == pytest.approx(0.5)
    # At step 13 instead of 23, twice as slow a step.
    assert rows["loops", "plain"]["to_base"] == pytest.approx(2 * 13 / 23, rel=1e-3)
    assert rows["loops", "effkern"]["to_base"] is None
    assert rows["loops", "plain"]["peak_mib"] == 3.0
    text = bench.table(rows)
    assert "| base | effkern | 20000 | 50 | 50-450 | 0.50 | 0.50 | 3 | 2 | 7.000 | 0.50 |" in text
    assert text.count("\n") == 5
    lines = [json.loads(line) for line in bench.result_lines(rows, 23, 4096)]
    assert [(r["case"]["method"], r["variant"]) for r in lines] == [
        ("base", "plain"), ("base", "effkern"), ("loops", "plain"), ("loops", "plain base"), ("loops", "effkern"),
    ]  # fmt: skip
    assert lines[3]["wall"] == pytest.approx(0.1)


def test_a_worker_that_ends_or_is_silent_is_an_error(monkeypatch):
    a = argparse.Namespace(steps=5, work="nowhere", threads=1, vocab=4096)
    real = bench.subprocess.Popen

    def instead(program: str):
        monkeypatch.setattr(
            bench.subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", program], **more)
        )
        return bench.Worker("base", "plain", a)

    worker = instead("import sys; print(sys.stdin.readline().strip(), flush=True); sys.stdin.read()")
    try:
        assert worker.ask(steps=2) == {"steps": 2}
        with pytest.raises(RuntimeError, match=r"base, plain: no answer within 0.1 s"):
            worker.receive(0.1)
    finally:
        worker.close()
    worker = instead("pass")
    worker.process.wait()
    with pytest.raises(RuntimeError, match="base, plain: its process ended"):
        worker.ask(steps=1)
    worker.close()


def test_bad_options_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--steps", "3"])
    assert stop.value.code == 2
    assert "--steps must be above 3, got 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--vocab", "100"])
    assert "--vocab must be at least 4096, got 100" in capsys.readouterr().err
