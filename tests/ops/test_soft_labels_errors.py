"""soft_labels: every wrong argument is named, with the rule and what came."""

import math

import pytest
import torch

from effkern.ops.soft_labels import soft_labels, soft_labels_from_logits

H, W = torch.zeros(2, 4), torch.zeros(5, 4)
ERRORS = {
    "hidden_dims": (lambda: soft_labels(H[0], W, k=1), ValueError, "hidden must have 2 dimension(s), got shape [4]"),
    "hidden_type": (lambda: soft_labels([1], W, k=1), TypeError, "hidden must be a tensor, got list"),
    "hidden_dtype": (lambda: soft_labels(H.int(), W.int(), k=1), TypeError, "hidden must be float32, bfloat16"),
    "weight_shape": (lambda: soft_labels(H, W[:, 1:], k=1), ValueError, "weight must have shape [V, 4] with D >= 1"),
    "weight_dtype": (lambda: soft_labels(H, W.half(), k=1), TypeError, "weight must have the dtype of hidden"),
    "weight_device": (lambda: soft_labels(H, W.to("meta"), k=1), ValueError, "weight must be on cpu like hidden"),
    "no_vocabulary": (lambda: soft_labels(H, W[:0], k=1), ValueError, "the vocabulary must hold at least one entry"),
    "method": (lambda: soft_labels(H, W, method="best", k=1), ValueError, "method must be one of topk, sampled"),
    "k_missing": (lambda: soft_labels(H, W), ValueError, "k must be given for method='topk', got None"),
    "k_zero": (lambda: soft_labels(H, W, k=0), ValueError, "k must lie in [1, 2147483647], got 0"),
    "k_bool": (lambda: soft_labels(H, W, k=True), TypeError, "k must be an int, got bool"),
    "k_unused": (
        lambda: soft_labels(H, W, method="sampled", draws=3, k=1),
        ValueError,
        "k must be None for method='sampled', got 1",
    ),
    "draws": (lambda: soft_labels(H, W, method="sampled", draws=1 << 21), ValueError, "draws must lie in [1, 1048576]"),
    "temperature": (lambda: soft_labels(H, W, k=1, temperature=0.0), ValueError, "temperature must be > 0 and finite"),
    "temperature_nan": (lambda: soft_labels(H, W, k=1, temperature=math.nan), ValueError, "temperature must be > 0"),
    "seed": (lambda: soft_labels(H, W, k=1, seed=1 << 63), ValueError, "seed must lie in [-9223372036854775808"),
    "softcap": (lambda: soft_labels(H, W, k=1, softcap=-1.0), ValueError, "softcap must be > 0 and finite"),
    "scale": (lambda: soft_labels(H, W, k=1, logit_scale=math.inf), ValueError, "logit_scale must be finite, got inf"),
    "bias": (lambda: soft_labels(H, W, k=1, bias=torch.zeros(4)), ValueError, "bias must have shape [5], got [4]"),
    "vocab_valid": (lambda: soft_labels(H, W, k=1, vocab_valid=6), ValueError, "vocab_valid must lie in [1, 5], got 6"),
    "positions_dtype": (
        lambda: soft_labels(H, W, k=1, positions=torch.zeros(2)),
        TypeError,
        "positions must be int64, got torch.float32",
    ),
    "positions_shape": (
        lambda: soft_labels(H, W, k=1, positions=torch.arange(3)),
        ValueError,
        "positions must have shape [2] on cpu, got [3]",
    ),
    "positions_stride": (
        lambda: soft_labels(H, W, k=1, positions=torch.arange(4)[::2]),
        ValueError,
        "positions must be contiguous, got stride 2",
    ),
    "logits_stride": (
        lambda: soft_labels_from_logits(W.T, k=1),
        ValueError,
        "logits must have stride 1 along V, got strides [1, 4]",
    ),
    "chunk_bytes": (lambda: soft_labels(H, W, k=1, chunk_bytes=0), ValueError, "chunk_bytes must lie in [1, "),
    "impl": (lambda: soft_labels(H, W, k=1, impl="fast"), ValueError, "impl must be one of"),
    "impl_device": (
        lambda: soft_labels(H.to("meta"), W.to("meta"), k=1, impl="cpp"),
        NotImplementedError,
        "impl='cpp' cannot run on meta",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_argument_rule_and_fact(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith("soft_labels: ")
    assert message in str(caught.value)
