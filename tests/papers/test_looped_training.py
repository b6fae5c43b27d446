"""What the experiments of looped models share: models by notation, schedules, what counts as right, tables."""

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks.papers import looped_p_hop as p_hop
from benchmarks.papers import looped_tasks as tasks
from benchmarks.papers import looped_training as training


def test_models_by_notation():
    """1x3 has the parameters of 1x1 and is it thrice over; 3x1 has three layers."""
    once, looped, deep = (training.decoder(stages, 5, 8, 16, 2, seed=3) for stages in ("1x1", "1x3", "3x1"))
    assert training.parameters(once) == training.parameters(looped)
    of_layer = training.parameters(deep) - training.parameters(once)
    assert of_layer == 2 * (4 * 16 * 16 + 3 * 16 * 48 + 2 * 16)
    tokens = torch.randint(5, (2, 8))
    with torch.no_grad():
        # The same block thrice: the weights of 1x3 in each layer of 3x1.
        block = [p for n, p in looped.named_parameters() if "stack" in n]
        for i in range(3):
            for target, source in zip(deep.stack.blocks[i].parameters(), block):
                target.copy_(source)
        for name in ("embedding", "norm", "head"):
            getattr(deep, name).load_state_dict(getattr(looped, name).state_dict())
        torch.testing.assert_close(deep(tokens), looped(tokens))
        assert not torch.allclose(once(tokens), looped(tokens))


def test_rate():
    rates = [training.rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001


def test_what_counts_as_right():
    class Fixed(torch.nn.Module):
        def forward(self, tokens):
            return tokens

        def logits(self, hidden):
            return torch.nn.functional.one_hot(hidden, 4).float()

    tokens = torch.tensor([[0, 1, 2], [3, 2, 1], [1, 1, 1]])
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 0], [1, -100, 1]])
    assert training.accuracy(Fixed(), [(tokens, labels)]) == pytest.approx(2 / 3)
    assert training.accuracy(Fixed(), [(tokens, labels), (tokens[:1], labels[:1])]) == pytest.approx(5 / 6)


def test_training_learns():
    """One hop of two letters, which one layer can look up; and the penalty is part of what is minimised."""
    torch.manual_seed(0)
    model, generator = training.decoder("1x2", 4, 12, 32, 4, seed=0), torch.Generator().manual_seed(0)

    def batches(step: int) -> training.Batch:
        tokens, _ = tasks.p_hop(32, 12, 1, 4, generator)
        return tokens, tasks.p_hop_answers(tokens, 1)

    shares = []
    pulled = torch.nn.Parameter(torch.ones(()))
    model.register_parameter("pulled", pulled)
    losses = training.train(
        model, batches, 80, 5e-3, penalty=lambda: 3 * pulled.square(), watch=lambda _, share: shares.append(share)
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert sum(shares[-10:]) > 1.3 * sum(shares[:10])
    assert pulled.item() < 0.95


def test_curriculum():
    c = p_hop.Curriculum(8, 800)
    assert (c.stages, c.share, c.hops) == ([1, 2, 4, 8], 100, 1)
    for step in range(30):
        c.watch(step, 1.0)
    # The first of twenty counts as wrong.
    assert c.reached == [18]
    assert c.hops == 2
    for step in range(30, 300):
        c.watch(step, 0.3)
    assert c.reached == [18, 118, 218]
    assert c.hops == 8
    assert p_hop.Curriculum(6, 60).stages == [1, 2, 4, 6]


def test_tables_are_resumed_only_with_the_same_options(tmp_path: Path):
    a = argparse.Namespace(steps=5, seeds=1, threads=1, out=tmp_path / "x.json")
    assert training.earlier(a) == []
    training.write(a, [{"model": "1x1", "seed": 0}])
    assert training.earlier(argparse.Namespace(**{**vars(a), "seeds": 9})) == [{"model": "1x1", "seed": 0}]
    with pytest.raises(SystemExit, match=r"made with other options: \{'steps': 5\}"):
        training.earlier(argparse.Namespace(**{**vars(a), "steps": 6}))
