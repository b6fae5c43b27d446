"""soft_labels: what a teacher says about each token, in a few entries instead of the whole vocabulary."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.soft_labels import schema as schema
from effkern.ops.soft_labels.rows import METHODS

OP = "soft_labels"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Counts of draws stay exact in every format that stores them.
MAX_DRAWS = 1 << 20


class SoftLabels(NamedTuple):
    """Entries of each token; see soft_labels."""

    ids: Tensor
    """int32 [N, K], -1 in empty slots, which stand behind the others of their part."""
    logprobs: Tensor
    """[N, K], log of the target mass of each id, nats; -inf in empty slots."""
    tail: Tensor
    """[N], teacher mass outside of `ids`; for "stratified" outside of its k head entries."""
    lse: Tensor
    """[N], log sum exp (u / T)."""


def soft_labels(
    hidden: Tensor,
    weight: Tensor,
    *,
    method: str = "topk",
    k: int | None = None,
    draws: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_valid: int | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> SoftLabels:
    """Sparse targets from a teacher's hidden states and output layer, without an [N, V] buffer.

    u = softcap(logit_scale (hidden weight^T + bias)),  p = softmax(u / T); T comes before all that follows.

    "topk": the k most likely ids with log p, falling; of equal ones the lower id. Biased: the rest is cut off.
    "sampled": `draws` ids drawn from p with replacement, rising, with log(count / draws). Unbiased: E[count/draws] = p.
    "stratified": the same k head entries, then `draws` ids drawn from the rest, rising, with log(tail count / draws),
        tail = 1 - sum of the head. Unbiased, with less noise.

    Draw j of a token is a function of (seed, position, j) alone: chunks, batches and the order of calls do not matter.
    A row whose lse is not finite (a NaN, an inf, or -inf throughout) has no entries, and a tail of NaN.

    Args:
        hidden: teacher's last hidden states, [N, D], float32/bfloat16/float16/float64. Gets no gradient.
        weight: its output layer, [V, D], same dtype and device.
        method: "topk", "sampled" or "stratified".
        k: entries of "topk" and of the head of "stratified", >= 1; where k > V, V are made.
        draws: of "sampled" and "stratified", in [1, 2^20].
        temperature: T > 0 of the teacher.
        seed: of the draws, int64.
        positions: int64 [N], a number of its own for each token of a corpus; default 0 ... N - 1.
        bias: [V] or None.
        softcap: c > 0 for u -> c tanh(u / c), or None.
        logit_scale: factor on the logits before the softcap.
        vocab_valid: rows of `weight` from here on are padding and are not looked at; default V.
        impl: "auto", "cpp" (not for float64) or "reference".
        chunk_bytes: largest V-wide buffer, or None for the device's default.

    Returns:
        SoftLabels(ids, logprobs, tail, lse), K = min(k, V), min(draws, V) or their sum; float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or number is wrong, or k or draws does not go with the method.
        TypeError: unsupported dtype.
        NotImplementedError: the chosen impl does not cover these inputs.

    Memory: O(N K) and one chunk; the reference a few chunks in float64. Between logits and outputs all is float64.
    Deterministic; implementations agree on the draws unless one comes within 1e-15 of a boundary.
    Source: random sampling: arXiv 2503.16870 (ACL 2025); the stratified form is ours.
    """
    _tensor("hidden", hidden, 2, None)
    _tensor("weight", weight, 2, hidden)
    if weight.shape[1] != hidden.shape[1] or hidden.shape[1] == 0:
        _fail(ValueError, "weight", f"have shape [V, {hidden.shape[1]}] with D >= 1", list(weight.shape))
    if weight.dtype != hidden.dtype:
        _fail(TypeError, "weight", f"have the dtype of hidden ({hidden.dtype})", weight.dtype)
    return _call(
        hidden, weight, weight.shape[0], method, k, draws, temperature, seed, positions, bias, softcap, logit_scale,
        vocab_valid, impl, chunk_bytes,
    )  # fmt: skip


def soft_labels_from_logits(
    logits: Tensor,
    *,
    method: str = "topk",
    k: int | None = None,
    draws: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    positions: Tensor | None = None,
    vocab_valid: int | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> SoftLabels:
    """`soft_labels` of logits or log-probabilities that exist already: [N, V], stride 1 along V; the rest as there."""
    _tensor("logits", logits, 2, None)
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        _fail(ValueError, "logits", "have stride 1 along V", f"strides {list(logits.stride())}")
    return _call(
        logits, None, logits.shape[1], method, k, draws, temperature, seed, positions, None, None, 1.0, vocab_valid,
        impl, chunk_bytes,
    )  # fmt: skip


def _call(
    hidden: Tensor, weight: Tensor | None, rows: int, method: str, k: int | None, draws: int | None,
    temperature: float, seed: int, positions: Tensor | None, bias: Tensor | None, softcap: float | None,
    logit_scale: float, vocab_valid: int | None, impl: str, chunk_bytes: int | None,
) -> SoftLabels:  # fmt: skip
    if rows == 0:
        _fail(ValueError, "the vocabulary", "hold at least one entry", 0)
    k, draws = _check_method(method, k, draws)
    _positive("temperature", temperature)
    _whole("seed", seed, -(1 << 63), (1 << 63) - 1)
    vocab = rows
    if vocab_valid is not None:
        _whole("vocab_valid", vocab_valid, 1, rows)
        vocab = vocab_valid
    if bias is not None:
        _tensor("bias", bias, 1, hidden)
        if bias.shape[0] != rows:
            _fail(ValueError, "bias", f"have shape [{rows}]", list(bias.shape))
    if softcap is not None:
        _positive("softcap", softcap)
    if not isinstance(logit_scale, (int, float)) or not math.isfinite(logit_scale):
        _fail(ValueError, "logit_scale", "be finite", logit_scale)
    if chunk_bytes is not None:
        _whole("chunk_bytes", chunk_bytes, 1, (1 << 63) - 1)
    if positions is None:
        positions = torch.arange(hidden.shape[0], device=hidden.device)
    elif positions.dtype != torch.int64:
        _fail(TypeError, "positions", "be int64", positions.dtype)
    elif positions.shape != (hidden.shape[0],) or positions.device != hidden.device:
        got = f"{list(positions.shape)} on {positions.device}"
        _fail(ValueError, "positions", f"have shape [{hidden.shape[0]}] on {hidden.device}", got)
    elif not positions.is_contiguous():
        _fail(ValueError, "positions", "be contiguous", f"stride {positions.stride(0)}")
    chosen = _choose(impl, hidden)
    return SoftLabels(
        *torch.ops.effkern.soft_labels(
            hidden.detach(), None if weight is None else weight.detach(), None if bias is None else bias.detach(),
            positions, method, k, draws, float(temperature), seed, None if softcap is None else float(softcap),
            float(logit_scale), vocab, chosen, chunk_bytes,
        )
    )  # fmt: skip


def _choose(impl: str, hidden: Tensor) -> str:
    if hidden.dtype != torch.float64:
        return registry.choose(OP, impl, hidden.device)
    if impl == "cpp":
        raise NotImplementedError(f"{OP}: impl='cpp' does not cover float64; use 'reference'")
    return registry.choose(OP, "reference" if impl == "auto" else impl, hidden.device)


def _check_method(method: str, k: int | None, draws: int | None) -> tuple[int, int]:
    if method not in METHODS:
        _fail(ValueError, "method", f"be one of {', '.join(METHODS)}", repr(method))
    for name, value, used, most in (
        ("k", k, method != "sampled", (1 << 31) - 1),
        ("draws", draws, method != "topk", MAX_DRAWS),
    ):
        if used and value is None:
            _fail(ValueError, name, f"be given for method={method!r}", None)
        elif used:
            _whole(name, value, 1, most)
        elif value is not None:
            _fail(ValueError, name, f"be None for method={method!r}", value)
    return k or 0, draws or 0


def _fail(error: type[Exception], argument: str, rule: str, got: object) -> None:
    raise error(f"{OP}: {argument} must {rule}, got {got}")


def _tensor(name: str, x: Any, dims: int, like: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        _fail(TypeError, name, "be a tensor", type(x).__name__)
    if x.dim() != dims:
        _fail(ValueError, name, f"have {dims} dimension(s)", f"shape {list(x.shape)}")
    if x.dtype not in _DTYPES:
        _fail(TypeError, name, "be float32, bfloat16, float16 or float64", x.dtype)
    if like is not None and x.device != like.device:
        _fail(ValueError, name, f"be on {like.device} like hidden", x.device)


def _whole(name: str, x: Any, low: int, high: int) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        _fail(TypeError, name, "be an int", type(x).__name__)
    if not low <= x <= high:
        _fail(ValueError, name, f"lie in [{low}, {high}]", x)


def _positive(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        _fail(TypeError, name, "be a number", type(x).__name__)
    if not 1e-30 <= x <= 1e30:
        _fail(ValueError, name, "be > 0 and finite, between 1e-30 and 1e30", x)
