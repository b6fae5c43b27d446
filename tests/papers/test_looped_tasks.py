"""The synthetic tasks: every instance against the definition, written as plain loops."""

import pytest
import torch

from benchmarks.papers import looped_tasks as tasks


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**31, ())))


def find_1(v: list[int], i: int) -> int:
    return max([0, *(j for j in range(2, i + 1) if v[j - 2] == v[i - 1])])


def find_p(v: list[int], i: int, p: int) -> int:
    if i == 0:
        return 0
    return i if p == 0 else find_1(v, find_p(v, i, p - 1)) if find_p(v, i, p - 1) else 0


# Exactly as many hops as fit; two letters; the paper's sizes; many letters.
@pytest.mark.parametrize(("length", "count", "letters"), [(4, 1, 2), (18, 8, 3), (40, 5, 2), (256, 32, 4), (64, 4, 30)])
def test_p_hop_is_what_it_says(length, count, letters):
    batch = 20 if length > 100 else 300
    tokens, answers = tasks.p_hop(batch, length, count, letters, generator())
    assert tokens.shape == (batch, length)
    assert set(tokens.unique().tolist()) <= set(range(letters))
    for row, answer in zip(tokens.tolist(), answers.tolist()):
        at = length
        for _ in range(count):
            at = find_1(row, at)
            assert at > 0
        assert row[at - 1] == answer


def test_answers_of_every_position():
    tokens, answers = tasks.p_hop(50, 24, 3, 4, generator())
    found = tasks.p_hop_answers(tokens, 3)
    assert torch.equal(found[:, -1], answers)
    for row, of_row in zip(tokens.tolist(), found.tolist()):
        for i in range(1, 25):
            at = find_p(row, i, 3)
            assert of_row[i - 1] == (row[at - 1] if at else -100)


def test_p_hop_does_not_give_itself_away():
    """The answer is uniform, and no position's letter alone tells it: chance, up to what 20000 draws leave."""
    tokens, answers = tasks.p_hop(20000, 16, 4, 4, generator())
    assert (answers.bincount(minlength=4) / 20000 - 0.25).abs().max() < 0.02
    for i in range(16):
        table = torch.zeros(4, 4).index_put_((tokens[:, i], answers), torch.ones(()), accumulate=True)
        best = table.amax(1).sum() / 20000
        assert best < 0.62, (i, best)


def test_p_hop_is_reproducible():
    first, second = (tasks.p_hop(5, 20, 3, 4, torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_p_hop_errors():
    with pytest.raises(ValueError, match=r"8 hops must be at least 1 and at most .* got length 17"):
        tasks.p_hop(1, 17, 8, 4, generator())
    with pytest.raises(ValueError, match="letters must be at least 2, got 1"):
        tasks.p_hop(1, 17, 3, 1, generator())


@pytest.mark.parametrize(("operands", "digits"), [(1, 1), (2, 3), (8, 3), (32, 3), (4, 1)])
def test_addition(operands, digits):
    tokens, labels = tasks.addition(200, operands, digits, generator())
    names = "0123456789+=$"
    for row, wanted in zip(tokens.tolist(), labels.tolist()):
        text = "".join(names[t] for t in row)
        left, right = text.split("=")
        parts = left.split("+")
        assert len(parts) == operands
        assert all(len(part) == digits for part in parts)
        answer = str(sum(map(int, parts)))
        assert right.rstrip("$") == answer
        assert right.endswith("$")
        read = "".join(names[t] for t in wanted if t >= 0)
        assert read == answer + "$"
        first = wanted.index(next(t for t in wanted if t >= 0))
        assert text[first] == "="


def test_addition_fills_its_range():
    tokens, _ = tasks.addition(4000, 2, 1, generator())
    totals = tokens[:, 0] + tokens[:, 2]
    assert totals.min() == 0
    assert totals.max() == 18
