"""The loss over slices of the vocabulary, in groups of 2 and 4 processes, against one process."""

import pytest
import torch

from effkern import linear_distill_loss
from effkern.ops.distill.rows import DIVERGENCES
from tests.distributed import vocab_cases
from tests.distributed.vocab_cases import Call, answer, make

CASES = vocab_cases.cases()


def _truth(call: Call) -> dict[str, torch.Tensor]:
    return answer(call, linear_distill_loss, impl="reference")


def _compare(name: str, got: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    assert got.shape == truth.shape
    got, truth = got.double(), truth.double()
    finite = truth.isfinite()
    torch.testing.assert_close(got[~finite], truth[~finite], equal_nan=True, msg=lambda text: f"{name}: {text}")
    size = max(1.0, torch.where(finite, truth, 0.0).abs().max().item()) if truth.numel() else 1.0
    error = torch.where(finite, got - truth, 0.0).abs()
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= tolerance * size, f"{name}: {worst:.2e} against {tolerance:.0e} of {size:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_a_group_answers_like_one_process(group, name):
    call = CASES[name]
    answers = [found["answers"][name] for found in group]
    for given in answers:
        assert not isinstance(given, str), given
    truth = _truth(call)
    sliced = ("weight", "bias", "hidden") if call.sequence_parallel else ("weight", "bias")
    for key, value in truth.items():
        if key in sliced:
            _compare(key, torch.cat([given[key] for given in answers]), value, call.tolerance)
            continue
        for given in answers:
            _compare(key, given[key], value, call.tolerance)


def test_two_small_reductions_per_chunk(group):
    """Two chunks of 5 rows: MAX and SUM for each, a third one for divergences of three passes; per call one SUM of the
    statistics and one of the gradient of hidden."""
    statistics, gradient = 13 * vocab_cases.ROWS, vocab_cases.ROWS * vocab_cases.DIM
    sizes = {"cross entropy": (1, 1), "sparse": (1, 2 + 6), "tail_bucket": (1, 3 + 6), "reverse_kl": (2, 4),
             "symmetric_kl": (2, 4), "decoupled_kl": (4, 7), "mse": (2, 2), "centered_mse": (4, 7),
             "zscored_mse": (4, 7), "cosine": (2, 5)}  # fmt: skip
    for found in group:
        for name, counts in found["counts"].items():
            # T = 1 has one sum for both temperatures.
            most, total = sizes.get(name, (2, 3))
            want = {("MAX", 5 * most): 2, ("SUM", statistics): 1, ("SUM", gradient): 1}
            want[("SUM", 5 * total)] = want.get(("SUM", 5 * total), 0) + 2
            if name in DIVERGENCES and DIVERGENCES[name].passes == 3:
                want[("SUM", 5)] = want.get(("SUM", 5), 0) + 2
            assert dict(counts) == want, name


@pytest.mark.parametrize("kind", ["replicated", "sequence"])
def test_dtensors(group, kind):
    """Weight, bias and the teacher's weight as DTensors; gradients come back as DTensors, whose placement the rank
    checks."""
    truth = _truth(make(3, bias=True, teacher=vocab_cases._full_hidden, rows=12))
    for found in group:
        for key, value in found["dtensor"][kind].items():
            _compare(key, value, truth[key], 1e-12)


def test_weight_grad(group):
    truth = _truth(make(5))
    _compare("total", torch.cat([found["weight_grad"]["total"] for found in group]), truth["weight"] + 1, 1e-12)
    for found in group:
        _compare("hidden", found["weight_grad"]["hidden"], truth["hidden"], 1e-12)


def test_without_gradients(group):
    truth = _truth(make(6))
    for found in group:
        _compare("loss", found["no_grad"]["loss"], truth["loss"], 1e-12)
        assert found["no_grad"]["widest"] == 13 * vocab_cases.ROWS


ERRORS = {
    "option": "ValueError: {op}: temperature must be the same on every rank of the group, got by rank [1.5,",
    "number": "ValueError: {op}: omega must be the same on every rank of the group, got by rank [0.25,",
    "tokens": "ValueError: {op}: number of tokens must be the same on every rank of the group, got by rank [10,",
    "width": "ValueError: {op}: weight must have shape [*, 6], got [",
    "range": "ValueError: {op}: z_loss must be >= 0 and finite, got -1.0",
    "vocab_valid": "ValueError: {op}: vocab_valid must lie in [1, 24], the rows of all slices of weight",
    "teacher": "ValueError: {op}: the teacher's slice must cover the same ",
    "slices": "ValueError: {op}: rows of all slices of weight must be the same on every rank of the group",
    "given slices": "ValueError: {op}: weight must have ",
    "labels": "ValueError: {op}: labels must be the same on every rank of the group, got by rank [",
    "values": "ValueError: {op}: teacher.logits must hold neither NaN nor +inf, got some",
    "impl": "NotImplementedError: {op}: impl='compile' cannot run on cpu",
    "label": "ValueError: {op}: labels must lie in [0, 24) or be ignore_index (-100), got 77",
    "divergence": "ValueError: {op}: divergence must be one of",
    "parameter": "ValueError: {op}: beta must be given with divergence 'jsd'",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_reach_every_rank(group, name):
    wanted = ERRORS[name].format(op="vocab_parallel_distill_loss")
    for found in group:
        assert found["errors"][name].startswith(wanted), found["errors"][name]
