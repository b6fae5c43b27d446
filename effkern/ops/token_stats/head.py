"""token_stats: the statistics of label_rank straight from the hidden states, without N x V.

N rows, V vocabulary, D hidden size
"""

import math
from typing import Any

import torch
from torch import Tensor

from effkern.ops import registry
from effkern.ops.autocast import autocasts
from effkern.ops.token_stats import schema as schema
from effkern.ops.token_stats.api import LabelStats

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_valid: int | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> LabelStats:
    """Loss of each row's label, and how many logits exceed the label's, from the hidden states.

    z = softcap(logit_scale (hidden weight^T + bias)),  softcap(x) = c tanh(x / c)
    lse = log sum_i exp(z_i),  loss = lse - z_y,  rank = #{i : z_i > z_y}  (0: the label is a top-1 token; ties share)

    The logits exist one chunk of rows at a time, in float32 (float64 for float64) whatever the inputs are, and are
    read once, without a sort.

    Rows whose label is `ignore_index`: loss, lse and label_logit 0, rank -1, whatever they hold. On a CPU they are
    left out of the product; elsewhere that would need a host sync, and they are computed and dropped.
    inf and NaN behave as in `label_rank` (impl="triton": a logit of +inf makes its row NaN).

    Args:
        hidden: last hidden states, [N, D], float32, bfloat16 or float16 (float64: reference only). Any strides.
        weight: output layer, [V, D], dtype of `hidden` (under autocast: any).
        labels: int64 or int32, [N], same device, each `ignore_index` or in [0, vocab_valid). Already shifted by the
            caller.
        bias: [V], any floating dtype, or None.
        softcap: c > 0, or None.
        logit_scale: factor on the raw logits.
        vocab_valid: rows of `weight` from here on are padding and are not read; default V.
        ignore_index: label of the rows that are left out.
        impl: "auto", "cuda", "cpp" or "reference" (PyTorch alone, same chunks): who reads the logits. "triton": one
            kernel whose logits never reach memory, for `hidden` and `weight` of stride 1 along D; only if named.
        chunk_bytes: budget of the one buffer of logits. None: the default of `linear_distill_loss`.

    Returns:
        LabelStats(loss, lse, label_logit, rank), each [N]; float32 (float64 for float64; loss in nats) and int64.
        Nothing gets a gradient.

    Raises:
        ValueError: a shape, device, number or size is wrong; a label is out of range (looked at on the CPU only;
            elsewhere such a row gets loss and label_logit NaN and rank -1).
        TypeError: an unsupported dtype or type.
        NotImplementedError: the chosen impl cannot run on this device, or not in this dtype.

    Memory besides the inputs: one chunk of logits (impl="reference": three of them; "triton": none), the chunk's hidden
    states where rows are left out, O(N), and under autocast the weights in its type. Deterministic on a CPU for a
    given number of threads.
    Source: the SALT_DS score needs (loss, rank): Rawat et al., arXiv 2410.18779.
    """
    vocab = _check_tensors(hidden, weight, labels, bias, vocab_valid)
    _check_numbers(softcap, logit_scale, ignore_index, chunk_bytes)
    dtype = _compute_dtype(hidden)
    stats_SN, rank_N = torch.ops.effkern.token_stats(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(), labels, float(logit_scale),
        None if softcap is None else float(softcap), ignore_index, vocab, dtype,
        _choose(impl, hidden, weight, dtype), chunk_bytes,
    )  # fmt: skip
    loss, lse, label_logit = stats_SN.unbind(0)
    return LabelStats(loss, lse, label_logit, rank_N)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Type of the matrix product: autocast's, as for any linear layer, else that of `hidden`."""
    return torch.get_autocast_dtype(hidden.device.type) if _autocasts(hidden) else hidden.dtype


def _autocasts(x: Tensor) -> bool:
    # It leaves float64 alone.
    return x.dtype != torch.float64 and autocasts(x.device.type)


def _choose(impl: str, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> str:
    chosen = registry.choose("token_stats", impl, hidden.device)
    if chosen == "triton" and hidden.shape[1] > 1 and (hidden.stride(1), weight.stride(1)) != (1, 1):
        got = (hidden.stride(1), weight.stride(1))
        raise NotImplementedError(f"token_stats: impl='triton' covers stride 1 along D of hidden and weight, got {got}")
    if dtype != torch.float64 or chosen == "reference":
        return chosen
    if impl == "auto":
        return "reference"
    raise NotImplementedError(f"token_stats: impl={impl!r} does not cover float64 tensors")


def _fail(error: type[Exception], argument: str, rule: str, got: object) -> None:
    raise error(f"token_stats: {argument} must {rule}, got {got}")


def _check_tensor(name: str, x: Any, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...] = _DTYPES) -> None:
    """`x` is a tensor of one of `dtypes` whose shape matches; None in `shape` is any size."""
    if not isinstance(x, Tensor):
        _fail(TypeError, name, "be a tensor", type(x).__name__)
    if x.dim() != len(shape) or any(want is not None and have != want for have, want in zip(x.shape, shape)):
        text = ", ".join("*" if n is None else str(n) for n in shape)
        _fail(ValueError, name, f"have shape [{text}]", list(x.shape))
    if x.dtype not in dtypes:
        _fail(TypeError, name, f"be {', '.join(str(d)[6:] for d in dtypes)}", str(x.dtype)[6:])


def _check_tensors(hidden: Any, weight: Any, labels: Any, bias: Any, vocab_valid: Any) -> int:
    """Returns the number of vocabulary entries that count."""
    _check_tensor("hidden", hidden, (None, None))
    num_rows, dim = hidden.shape
    if dim == 0:
        _fail(ValueError, "hidden", "have at least one column", list(hidden.shape))
    _check_tensor("weight", weight, (None, dim))
    vocab = weight.shape[0]
    if not 1 <= vocab < 2**31:
        _fail(ValueError, "weight", "have 1 to 2^31 - 1 rows", vocab)
    if weight.dtype != hidden.dtype and not (_autocasts(hidden) and weight.dtype != torch.float64):
        rule = f"have the dtype of hidden ({str(hidden.dtype)[6:]}) outside autocast"
        _fail(TypeError, "weight", rule, str(weight.dtype)[6:])
    _check_tensor("labels", labels, (num_rows,), (torch.int64, torch.int32))
    if bias is not None:
        _check_tensor("bias", bias, (vocab,))
    for name, x in (("weight", weight), ("labels", labels), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            _fail(ValueError, name, f"be on {hidden.device} like hidden", x.device)
    if vocab_valid is None:
        return vocab
    _check_int("vocab_valid", vocab_valid, 1, vocab)
    return vocab_valid


def _check_int(name: str, x: Any, low: int, high: int) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        _fail(TypeError, name, "be an int", type(x).__name__)
    if not low <= x <= high:
        _fail(ValueError, name, f"lie in [{low}, {high}]", x)


def _check_numbers(softcap: Any, logit_scale: Any, ignore_index: Any, chunk_bytes: Any) -> None:
    for name, x in (("softcap", softcap), ("logit_scale", logit_scale)):
        if x is None and name == "softcap":
            continue
        if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
            _fail(TypeError, name, "be a number", type(x).__name__)
        # Comparisons alone: nan fails them, and torch.compile can trace them.
        if not -math.inf < x < math.inf:
            _fail(ValueError, name, "be finite", x)
    if softcap is not None and not softcap > 0:
        _fail(ValueError, "softcap", "be > 0", softcap)
    _check_int("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    if chunk_bytes is not None:
        _check_int("chunk_bytes", chunk_bytes, 1, 2**62)
