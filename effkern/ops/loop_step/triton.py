"""Forward and backward of the loop step in Triton: one launch each, around torch.mm for the low-rank map.

Bytes that must move, in units of N D elements (a move): forward reads f, h and e and writes s and x, 5 moves; backward
from s reads g_s, g_x and s and writes df, dh and (with a factor) de, 5 or 6. A low-rank map adds the product's write
and read of N x D. What a second walk reads again comes from a cache. No GPU has timed any of it yet.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from effkern.ops.distill import gemm
from effkern.ops.loop_step.triton_kernels import loop_step_bwd_kernel, loop_step_fwd_kernel


class Launch(NamedTuple):
    rows: int
    block: int
    """Channels per step."""
    warps: int


# Forward: few rows, which stay in the first-level cache between both walks. Backward: 16 rows, so that a program's row
# of sums stays small beside the tile. Few rows ("decode") are a program each.
LAUNCHES = {"forward": Launch(4, 512, 4), "decode": Launch(1, 1024, 4), "backward": Launch(16, 128, 4)}
# Most rows that count as few.
DECODE_ROWS = 64
# In the order of the operators' results.
_F, _H, _E, _ALPHA, _BETA, _STATE_SCALE, _INPUT_SCALE, _DOWN, _UP, _WEIGHT, _EMBEDDING = range(11)


def _kind(factor: Tensor | None, dim: int) -> int:
    if factor is None:
        return 0
    return 1 if factor.numel() == 1 and dim > 1 else 2


def _factor_kinds(alpha, beta, state_scale, input_scale, numbers: list[float], dim: int) -> dict[str, int]:
    return {
        "ALPHA": _kind(alpha, dim),
        "BETA": -1 if beta is None and numbers[1] == 0.0 else _kind(beta, dim),
        "STATE_SCALE": _kind(state_scale, dim),
        "INPUT_SCALE": _kind(input_scale, dim),
    }


def _given(x: Tensor, *optional: Tensor | None) -> list[Tensor]:
    """Any pointer where a kernel reads none."""
    return [x if t is None else t for t in optional]


def _rows(x: Tensor, dim: int) -> Tensor:
    return x.view(-1, dim)


def forward(
    f, h, e, alpha, beta, state_scale, input_scale, numbers, down, up, norm_weight, embedding, norm, eps, return_change
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dim = h.shape[-1]
    num_rows = h.numel() // dim
    has_core_input = e is not None or embedding is not None or state_scale is not None or numbers[2] != 1.0
    is_f = alpha is beta is down is None and numbers[:2] == [1.0, 0.0] and not norm
    state = h.new_empty(0) if is_f else torch.empty_like(h)
    core_input = torch.empty_like(h) if has_core_input else h.new_empty(0)
    change = h.new_empty(num_rows if return_change else 0, dtype=torch.float32)
    rstd = h.new_empty(num_rows if norm else 0, dtype=torch.float32)
    own, low = h.new_empty(0), None
    if down is not None:
        with torch.autocast(h.device.type, enabled=False):
            own = torch.mm(_rows(h, dim), down)
            low = torch.mm(own, up)
    if num_rows == 0:
        return state, core_input, change, rstd, own
    launch = LAUNCHES["decode" if num_rows <= DECODE_ROWS else "forward"]
    with torch.cuda.device_of(h):
        loop_step_fwd_kernel[(triton.cdiv(num_rows, launch.rows),)](
            f, h, *_given(h, e, low, alpha, beta, state_scale, input_scale, norm_weight, embedding), state, core_input,
            change, rstd, num_rows, dim, *numbers, eps,
            **_factor_kinds(alpha, beta, state_scale, input_scale, numbers, dim),
            INPUT=e is not None, LOW=low is not None, NORM=norm, WEIGHT=norm_weight is not None,
            EMBEDDING=embedding is not None, CORE_INPUT=has_core_input, CHANGE=return_change,
            STATE=not is_f, ROWS=launch.rows,
            BLOCK=launch.block, num_warps=launch.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return state, core_input, change, rstd, own


def backward(
    grad_state, grad_core_input, f, h, e, state, rstd, own, alpha, beta, state_scale, input_scale, numbers, down, up,
    norm_weight, norm, from_state, wanted,
) -> tuple[Tensor, ...]:  # fmt: skip
    like = grad_core_input if grad_state is None else grad_state
    dim = like.shape[-1]
    num_rows = like.numel() // dim
    asked = [bool(wanted >> i & 1) for i in range(11)]
    kinds = _factor_kinds(alpha, beta, state_scale, input_scale, numbers, dim)
    launch = LAUNCHES["backward"]
    programs = triton.cdiv(num_rows, launch.rows)

    # Sums per program lie side by side: one number, or one per channel.
    slots = {_ALPHA: "ALPHA", _BETA: "BETA", _STATE_SCALE: "STATE_SCALE", _INPUT_SCALE: "INPUT_SCALE"}
    sum_kinds = {i: (2 if kinds[name] == 2 else 1) if asked[i] else 0 for i, name in slots.items()}
    sum_kinds |= {i: 2 if asked[i] else 0 for i in (_WEIGHT, _EMBEDDING)}
    widths = [{0: 0, 1: 1, 2: dim}[kind] for kind in sum_kinds.values()]
    offsets = [sum(widths[:i]) for i in range(len(widths))]
    sums = like.new_empty((programs, sum(widths)), dtype=torch.float32)

    products = down is not None and (asked[_H] or asked[_DOWN] or asked[_UP])
    by_beta = asked[_H] and kinds["BETA"] >= 0
    # What the products take; alpha f's gradient is g itself where alpha is the number 1.
    store_g = products and not (asked[_F] and alpha is None and numbers[0] == 1.0)
    grads = [torch.empty_like(like) if asked[i] else like.new_empty(0) for i in (_F, _H, _E)]
    g = torch.empty_like(like) if store_g else grads[_F]
    low = None
    with torch.autocast(like.device.type, enabled=False):
        if down is not None and norm and not from_state:
            low = torch.mm(own, up)
        if num_rows:
            with torch.cuda.device_of(like):
                loop_step_bwd_kernel[(programs,)](
                    *_given(like, grad_state, grad_core_input, f, h, e, state, low, rstd, alpha, beta, state_scale,
                            input_scale, norm_weight),
                    g, *grads, sums, num_rows, dim, sum(widths), *offsets, *numbers, **kinds,
                    HAS_STATE=grad_state is not None, HAS_CORE_INPUT=grad_core_input is not None, LOW=low is not None,
                    NORM=norm, WEIGHT=norm_weight is not None, FROM_STATE=from_state, STORE_G=store_g,
                    OF_F=asked[_F], OF_H=by_beta, OF_E=asked[_E], OF_ALPHA=sum_kinds[_ALPHA], OF_BETA=sum_kinds[_BETA],
                    OF_STATE_SCALE=sum_kinds[_STATE_SCALE], OF_INPUT_SCALE=sum_kinds[_INPUT_SCALE],
                    OF_WEIGHT=sum_kinds[_WEIGHT], OF_EMBEDDING=sum_kinds[_EMBEDDING], ROWS=launch.rows,
                    BLOCK=launch.block, num_warps=launch.warps, enable_fp_fusion=True,
                )  # fmt: skip
        of_down = of_up = None
        if products:
            of_down, of_up = _products(_rows(g, dim), h, own, down, up, grads[_H], by_beta, asked)
    # Results of an operator share no memory.
    total = torch.ops.aten.split_with_sizes_copy(sums.sum(0, dtype=torch.float64).float(), widths)
    small = dict(zip(sum_kinds, total))
    of_down, of_up = (sums.new_empty(0) if t is None else t for t in (of_down, of_up))
    return (
        *grads, *(small[i] for i in slots), of_down, of_up, small[_WEIGHT], small[_EMBEDDING],
    )  # fmt: skip


def _products(
    g: Tensor, h: Tensor | None, own: Tensor | None, down: Tensor, up: Tensor, grad_h: Tensor, by_beta: bool,
    asked: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of A and B, and what A adds to that of h."""
    dim, of_down, of_up = g.shape[1], None, None
    if asked[_UP]:
        assert own is not None
        of_up = _transposed_product(own, g)
    if asked[_H] or asked[_DOWN]:
        grad_u = torch.mm(g, up.t())
        if asked[_DOWN]:
            assert h is not None
            of_down = _transposed_product(_rows(h, dim), grad_u)
        if asked[_H] and by_beta:
            _rows(grad_h, dim).addmm_(grad_u, down.t())
        elif asked[_H]:
            torch.mm(grad_u, down.t(), out=_rows(grad_h, dim))
    return of_down, of_up


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float32."""
    if a.shape[0] == 0:
        return a.new_zeros((a.shape[1], b.shape[1]), dtype=torch.float32)
    total = a.new_empty((a.shape[1], b.shape[1]), dtype=torch.float32)
    gemm.add_weight_grad(total, a, b, True)
    return total


def _case(kernel: Any, launch: Launch, dtype: str, **flags: Any) -> tuple:
    """One launch for `tests.native.triton_codegen`."""
    factors = ("alpha_ptr", "beta_ptr", "state_scale_ptr", "input_scale_ptr", "weight_ptr", "embedding_ptr")
    wide = (*factors, "change_ptr", "rstd_ptr", "sums_ptr")

    def type_of(name: str) -> str:
        if name.endswith("_ptr"):
            return "*fp32" if name in wide else f"*{dtype}"
        if name in ("dim", "sums_width") or name.startswith("of_"):
            return "i32:16"
        return "i32" if name == "num_rows" else "fp32"

    constants = {name: flags.get(name, 0) for name in kernel.arg_names if name.isupper()}
    constants |= {"ROWS": launch.rows, "BLOCK": launch.block}
    return kernel, {n: type_of(n) for n in kernel.arg_names if n not in constants}, constants, launch.warps


def _both(name: str, dtype: str = "bf16", sums: int = 1, **flags: Any) -> dict[str, tuple]:
    """`sums`: kind of the sums for the factors that are tensors."""
    forward_flags = {"CORE_INPUT": True, "STATE": True, **flags}
    backward_flags = {"HAS_STATE": True, "HAS_CORE_INPUT": True, "OF_F": True, "OF_H": flags.get("BETA", 0) >= 0}
    backward_flags |= {f"OF_{k}": sums for k in ("ALPHA", "BETA", "STATE_SCALE", "INPUT_SCALE") if flags.get(k, 0) > 0}
    backward_flags |= {"OF_WEIGHT": 2 * flags.get("WEIGHT", 0), "OF_EMBEDDING": 2 * flags.get("EMBEDDING", 0)}
    backward_flags |= {"OF_E": flags.get("INPUT_SCALE", 0) > 0, **flags}
    return {
        f"fwd_{name}": _case(loop_step_fwd_kernel, LAUNCHES["forward"], dtype, **forward_flags),
        f"decode_{name}": _case(loop_step_fwd_kernel, LAUNCHES["decode"], dtype, **forward_flags),
        f"bwd_{name}": _case(loop_step_bwd_kernel, LAUNCHES["backward"], dtype, **backward_flags),
    }


_CHANNEL: dict[str, Any] = {"ALPHA": 2, "BETA": 2, "STATE_SCALE": 2, "INPUT_SCALE": 2}
_ALL: dict[str, Any] = {"INPUT": 1, "NORM": 1, "WEIGHT": 1, "EMBEDDING": 1, "CHANGE": 1, "FROM_STATE": 1}

COMPILE_CASES = {
    **_both("damped"),
    **_both("normed", **_ALL, BETA=-1),
    **_both("scalars", **_ALL, ALPHA=1, BETA=1, STATE_SCALE=1, INPUT_SCALE=1),
    **_both("channels", sums=2, **_ALL, **_CHANNEL),
    **_both("again_low_rank", sums=2, **{**_ALL, "FROM_STATE": 0}, **_CHANNEL, LOW=1, STORE_G=1),
    **_both("channels_fp32", "fp32", sums=2, **_ALL, **_CHANNEL),
}
