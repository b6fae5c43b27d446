"""The arithmetic of comparisons, and what the report says about numbers of either sign."""

import math

import numpy as np
import pytest
import torch

from effkern.models import Decoder, DecoderConfig
from effkern.train.compare import (
    confidence_buckets,
    first_reaching,
    gaps,
    paired_difference,
    summarise,
    token_losses,
    value_at,
)
from effkern.train.report import with_flops
from effkern.train.report_text import verdict

CURVE = [{"tokens": 0, "loss": 8.0}, {"tokens": 10, "loss": 6.0}, {"tokens": 30, "loss": 5.0}]


def test_gaps_are_taken_at_equal_tokens():
    """A curve measured once more than the other must not be shifted against it."""
    more = [*CURVE[:1], {"tokens": 7, "loss": 1.0}, {"tokens": 10, "loss": 5.5}, {"tokens": 30, "loss": 5.25}]
    assert gaps(CURVE, more) == [(0, 0.0), (10, -0.5), (30, 0.25)]


def test_interpolation():
    assert value_at(CURVE, "tokens", 5) == 7.0
    assert value_at(CURVE, "tokens", 30) == 5.0
    assert value_at(CURVE, "tokens", 31) is None
    assert first_reaching(CURVE, "tokens", 5.5) == 20.0
    assert first_reaching(CURVE, "tokens", 4.0) is None


def test_token_losses_are_the_models():
    model = Decoder(DecoderConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_size=8))
    batches = [np.random.default_rng(i).integers(0, 50, (2, 9)) for i in range(3)]
    found = token_losses(model, batches, torch.float32)
    tokens = torch.from_numpy(np.concatenate(batches))
    log_q = model.logits(model(tokens[:, :-1])).log_softmax(-1)
    ce = -log_q.gather(-1, tokens[:, 1:, None])[..., 0]
    np.testing.assert_allclose(found["ce"], ce.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["entropy"], -(log_q.exp() * log_q).sum(-1).detach().numpy(), rtol=1e-4)
    assert (found["hit"] == (log_q.argmax(-1) == tokens[:, 1:]).numpy()).all()
    numbers = summarise(found, 3.0)
    assert numbers["loss"] == pytest.approx(ce.mean().item(), rel=1e-6)
    assert numbers["bits_per_byte"] == pytest.approx(ce.mean().item() / math.log(2) / 3, rel=1e-6)
    assert numbers["tokens"] == 48


def test_paired_difference():
    first = np.zeros((4, 5))
    second = np.repeat([[0.1], [0.3], [0.1], [0.3]], 5, axis=1)
    found = paired_difference(first, second)
    assert found["difference"] == pytest.approx(0.2)
    assert found["validation_standard_error"] == pytest.approx(np.std([0.1, 0.3, 0.1, 0.3], ddof=1) / 2)


def test_buckets_sort_by_the_teachers_entropy():
    entropy = np.array([[3.0, 1.0], [2.0, 0.0]])
    losses = {"teacher": {"entropy": entropy, "ce": entropy + 1}, "salt": {"entropy": entropy, "ce": 2 * entropy}}
    assert confidence_buckets(losses, 2) == [
        {"teacher_entropy": 0.5, "teacher": 1.5, "salt": 1.0},
        {"teacher_entropy": 2.5, "teacher": 3.5, "salt": 5.0},
    ]


def test_flops_count_the_teacher_up_to_the_switch():
    evals = [
        {"step": i, "tokens": t, "loss": 1.0, "accuracy": 0.0, "bits_per_byte": 1.0} for i, t in enumerate((0, 10, 30))
    ]
    assert [e["flops"] for e in with_flops(evals, 5.0, 2.0, 20)] == [0.0, 170.0, 490.0]


def findings(early, final, error, equal, reach):
    return {
        "at_switch": {"salt": 6.0 + early, "baseline": 6.0},
        "final": {
            "salt_minus_baseline": {"difference": final, "validation_standard_error": error},
            "teacher": {"loss": 4.9},
            "baseline": {"loss": 5.0},
            "salt": {"loss": 5.0 + final},
        },
        "equal_flops": {
            "salt": None if equal is None else 5.0 + equal,
            "baseline": 5.0,
            "salt_extra_flops_share": 0.05,
            "salt_flops_share_to_reach_baseline_final": reach,
            "teacher_training_flops_share": 0.4,
        },
    }


@pytest.mark.parametrize(
    ("numbers", "expected", "forbidden"),
    [
        (
            (-0.2, -0.03, 0.01, -0.01, 0.9),
            [
                "0.2000 nats below",
                "SALT is better by 0.0300",
                "after 90%",
                "does not show that",
                "40% of BASELINE's FLOPs: more than the 10%",
                "exists already",
            ],
            "WORSE",
        ),
        (
            (0.1, 0.04, 0.01, 0.05, None),
            ["0.1000 nats above", "SALT is WORSE by 0.0400", "never reaches", "more than the 0%"],
            "exists already",
        ),
        ((-0.1, -0.01, 0.01, None, 0.99), ["do not differ", "-0.0100 +- 0.0100"], "better by"),
        (
            (-0.1, -0.2, 0.01, -0.1, 0.8),
            ["Ahead of the smaller teacher (loss 4.9000) at the end: SALT."],
            "does not show",
        ),
    ],
)
def test_verdict_follows_the_numbers(numbers, expected, forbidden):
    text = " ".join(verdict(findings(*numbers)))
    assert all(part in text for part in expected)
    assert forbidden not in text
    assert "ONE seed" in text
